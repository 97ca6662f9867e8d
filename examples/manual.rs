//! Writes man pages and shell completions: `cargo run --example manual -- DIRECTORY`, or `make manual`.
//!
//! They are made of the definition that the command line is parsed with, so they cannot tell of flags that are not there.

use std::fs;
use std::path::{Path, PathBuf};

use clap_complete::Shell;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("manual"), PathBuf::from);
    let mut command = stasis::cli::definition();
    for (shell, path) in
        [(Shell::Bash, "bash/stasis"), (Shell::Zsh, "zsh/_stasis"), (Shell::Fish, "fish/stasis.fish")]
    {
        let mut text = vec![];
        clap_complete::generate(shell, &mut command, "stasis", &mut text);
        write(&directory.join(path), &text)?;
    }
    for (name, command) in pages(&stasis::cli::definition()) {
        let mut text = vec![];
        let page = clap_mangen::Man::new(command).title(name.to_uppercase()).section("8");
        page.render(&mut text)?;
        write(&directory.join(format!("man/man8/{name}.8")), &text)?;
    }
    Ok(())
}

/// A page for the program and one for each subcommand that is not hidden.
fn pages(root: &clap::Command) -> Vec<(&'static str, clap::Command)> {
    let mut pages = vec![("stasis", root.clone())];
    for command in root.get_subcommands().filter(|c| !c.is_hide_set()) {
        // clap wants names that outlive everything, and this program is about to end.
        let name: &str = format!("stasis-{}", command.get_name()).leak();
        pages.push((name, command.clone().name(name)));
    }
    pages
}

fn write(path: &Path, text: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, text)
}
