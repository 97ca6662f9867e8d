//! What `make interop` has found, as a page of the documentation.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use crate::Outcome;
use crate::container::Place;
use crate::fixture::{Fixture, Mode};

/// A row a fixture, a cell a direction.
#[derive(Debug, Default)]
pub struct Table(BTreeMap<String, Row>);

#[derive(Debug, Default)]
struct Row {
    about: String,
    cells: BTreeMap<&'static str, String>,
}

/// The columns: title and mode.
const COLUMNS: [(&str, Mode); 3] =
    [("CRIU → Stasis", Mode::FromRunc), ("Stasis → CRIU", Mode::ToRunc), ("CRIU → CRIU", Mode::Runc)];
/// Characters of a reason that are shown.
const SHOWN: usize = 140;

impl Table {
    /// Puts down an outcome, not yet judged. `known` says more than the test can.
    pub fn add(&mut self, fixture: &Fixture, mode: Mode, outcome: &Outcome, known: Option<&str>) {
        let cell = match (outcome, known) {
            (Outcome::Passed, _) => "passed".to_owned(),
            (Outcome::Failed(_), Some(known)) => format!("**no**: {known}"),
            (Outcome::Failed(why), None) => format!("**no**: {}", reason(why)),
            (Outcome::Skipped(why), _) => format!("–: {why}"),
        };
        let row = self.0.entry(fixture.name.clone()).or_default();
        row.about.clone_from(&fixture.about);
        row.cells.insert(mode.name(), cell.replace('|', "\\|"));
    }

    /// Writes the page.
    pub fn write(&self, to: &Path, place: &Place) -> std::io::Result<()> {
        let mut page = format!(
            "# Images exchanged with CRIU {}\n\nWritten by `make interop` or `make test-vm`, under Linux {}, with {}. \
             [What the words mean](../interop.md).\n\n",
            criu_version(),
            first_line("uname", &["-r"]),
            first_line(&place.rival.to_string_lossy(), &["--version"]),
        );
        for (title, mode) in COLUMNS {
            let cells = || self.0.values().filter_map(|row| row.cells.get(mode.name()));
            let passed = cells().filter(|cell| *cell == "passed").count();
            let not_made = cells().filter(|cell| cell.starts_with('–')).count();
            page += &format!(
                "- {title}: {passed} passed, {} did not, {not_made} had nothing to restore\n",
                cells().count() - passed - not_made
            );
        }
        page += "\n| fixture |";
        page += &COLUMNS.map(|(title, _)| format!(" {title} |")).concat();
        page += "\n|---|---|---|---|\n";
        for (name, row) in &self.0 {
            let cell = |mode: Mode| row.cells.get(mode.name()).map_or("", String::as_str);
            let cells = COLUMNS.map(|(_, mode)| format!(" {} |", cell(mode))).concat();
            page += &format!("| `{name}`: {} |{cells}\n", row.about.replace('|', "\\|"));
        }
        if let Some(dir) = to.parent() {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write(to, page)
    }
}

/// The version of the criu on PATH; nothing without one.
pub fn criu_version() -> String {
    let said = first_line("criu", &["--version"]);
    said.trim_start_matches("Version:").trim().to_owned()
}

fn first_line(program: &str, words: &[&str]) -> String {
    let said = Command::new(program).args(words).output().map(|done| done.stdout).unwrap_or_default();
    String::from_utf8_lossy(&said).lines().next().unwrap_or_default().to_owned()
}

/// What a failure comes down to, the same in every run: CRIU's first error, or the first line.
pub fn reason(why: &str) -> String {
    // It always says so of the limit where it lacks CAP_SYS_RESOURCE, and goes on.
    let errors = why.lines().map(str::trim).filter(|l| l.starts_with('(') && !l.contains("RLIMIT_NOFILE"));
    let criu = errors.filter_map(|l| l.split_once("Error (")?.1.split_once("): ")).next();
    let text = match criu {
        Some((at, text)) => format!("{}: {text}", at.split(':').next().unwrap_or_default()),
        None => why.lines().next().unwrap_or_default().to_owned(),
    };
    // Places of this machine.
    let words = text.split(' ').map(|word| match word.strip_prefix('/') {
        Some(path) if path.contains("tests/fixtures/") => path.rsplit('/').next().unwrap_or_default(),
        _ => word,
    });
    let text = words.collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
