//! Writes man pages and shell completions: `cargo run --example manual -- DIRECTORY`, or `make manual`.
//!
//! They are made of the definition that the command line is parsed with, so they cannot tell of flags that are not there.

use std::fs;
use std::path::{Path, PathBuf};

use clap_complete::Shell;

#[allow(dead_code)] // tests/manual.rs has this file, too
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("manual"), PathBuf::from);
    Ok(write_all(&directory)?)
}

/// All of it, in a directory.
pub fn write_all(directory: &Path) -> std::io::Result<()> {
    let mut command = stasis::cli::definition();
    for (shell, path) in
        [(Shell::Bash, "bash/stasis"), (Shell::Zsh, "zsh/_stasis"), (Shell::Fish, "fish/stasis.fish")]
    {
        let mut text = vec![];
        clap_complete::generate(shell, &mut command, "stasis", &mut text);
        write(&directory.join(path), &text)?;
    }
    for (name, command) in pages("stasis", &stasis::cli::definition()) {
        let mut text = vec![];
        let page = clap_mangen::Man::new(command).title(name.to_uppercase()).section("8");
        page.render(&mut text)?;
        write(&directory.join(format!("man/man8/{name}.8")), &text)?;
    }
    Ok(())
}

/// A page for the program and one for each subcommand, and each of these, that is not hidden.
pub fn pages(name: &str, command: &clap::Command) -> Vec<(&'static str, clap::Command)> {
    // clap wants names that outlive everything, and this program is about to end.
    let name: &'static str = name.to_owned().leak();
    // There is no page of `help`, and `--help` says the same.
    let own = command.clone().name(name).bin_name(name.replacen('-', " ", 1)).disable_help_subcommand(true);
    let mut pages = vec![(name, own)];
    for inner in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        pages.extend(self::pages(&format!("{name}-{}", inner.get_name()), inner));
    }
    pages
}

fn write(path: &Path, text: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, text)
}
