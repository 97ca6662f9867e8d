//! `image`.

use std::fmt::Display;
use std::io::Write;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::Serialize;

use super::absolute;
use crate::checkpoint::image::ImageDir;
use crate::checkpoint::model::reseal;
use crate::checkpoint::show;
use crate::container::{Error, Result};

/// Look at the images of a checkpoint
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Output format: text or json
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    format: String,
    /// What to look at
    #[arg(value_enum, value_name = "VIEW")]
    view: View,
    /// Directory of images
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum View {
    /// What the set is, how big, and what it needs
    Show,
    /// Processes and threads
    Tree,
    /// Mappings of every process, and how much of each is saved
    Mem,
    /// Descriptors of every process
    Files,
    /// Read everything to its end; ends with 1 where a restore could not
    Verify,
    /// Accept the images as they are now, after some were edited
    Seal,
}

pub fn run(args: &Args) -> Result<u8> {
    let path = absolute(&args.dir)?;
    if matches!(args.view, View::Verify) {
        let verdict = show::verify(&ImageDir::open(path)?);
        print(args, &verdict, ToString::to_string)?;
        return Ok(u8::from(!verdict.whole));
    }
    if matches!(args.view, View::Seal) {
        reseal(&ImageDir::open(path)?)?;
        return Ok(0);
    }
    let (images, model) = show::open(&path)?;
    match args.view {
        View::Show => print(args, &show::summary(&images, &model)?, ToString::to_string)?,
        View::Tree => print(args, &show::tree(&images, &model), |v| lines(v))?,
        View::Mem => print(args, &show::memory(&images, &model), |v| lines(v))?,
        View::Files | View::Verify | View::Seal => print(args, &show::files(&model), |v| lines(v))?,
    }
    Ok(0)
}

fn lines(all: &[impl Display]) -> String {
    all.iter().map(ToString::to_string).collect()
}

fn print<T: Serialize>(args: &Args, view: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
    let text = match args.format.as_str() {
        "text" => text(view),
        "json" => {
            serde_json::to_string_pretty(view).map_err(|e| Error::new(format!("encoding: {e}")))? + "\n"
        }
        _ => return Err(Error::new("invalid format option")),
    };
    // A closed pipe is no reason to say more.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}
