//! `list`.

use super::{Context, Count, check_args, log, say};
use crate::container::list::{Summary, list};
use crate::container::{Error, Result};
use crate::sys::Context as _;

/// List the containers under the root
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Select one of: table or json
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    format: String,
    /// Display only container ids
    #[arg(long, short)]
    quiet: bool,
    #[arg(hide = true)]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    check_args("list", &args.args, Count::Exactly(0))?;
    let (found, failed) = match list(&context.store) {
        // The default root comes into being with the first container.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !context.root_given => (vec![], vec![]),
        listed => listed.context(|| format!("open {}", context.store.root().display()))?,
    };
    for failure in failed {
        log::warn(&failure.to_string());
    }
    if args.quiet {
        found.iter().all(|c| say(format_args!("{}\n", c.id)));
        return Ok(0);
    }
    match args.format.as_str() {
        "table" => say(table(&found)),
        "json" if found.is_empty() => say("null\n"),
        "json" => {
            let text = serde_json::to_string(&found).map_err(|e| Error::new(e.to_string()))?;
            say(format_args!("{text}\n"))
        }
        _ => return Err(Error::new("invalid format option")),
    };
    Ok(0)
}

fn table(containers: &[Summary]) -> String {
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
    rows.extend(containers.iter().map(|c| {
        [
            c.id.clone(),
            c.pid.to_string(),
            c.status.to_owned(),
            c.bundle.display().to_string(),
            c.created.clone(),
            c.owner.clone(),
        ]
    }));
    // As Go's tabwriter lays it out: cells at least 12 wide, three spaces between.
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count() + 3).max().unwrap_or(0).max(12);
    let widths: Vec<usize> = (0..5).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(&widths) {
            text += &format!("{cell:width$}");
        }
        text += &row[5];
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let text = table(&[]);
        assert_eq!(text, "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n");
    }
}
