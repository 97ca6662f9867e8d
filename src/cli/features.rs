//! `features`.

use super::{Count, check_args};
use crate::bundle::features;
use crate::container::{Error, Result};

/// Show the enabled features, as JSON
#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(hide = true)]
    args: Vec<String>,
}

pub fn run(args: &Args) -> Result<u8> {
    check_args("features", &args.args, Count::Exactly(0))?;
    let text = serde_json::to_string_pretty(&features::document()).map_err(|e| Error::new(e.to_string()))?;
    super::say(format_args!("{text}\n"));
    Ok(0)
}
