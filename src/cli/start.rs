//! `start`.

use super::{Context, one_id};
use crate::container::{Result, start};

/// Run the program of a created container
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("start", &args.args)?;
    start::start(&context.store, id)?;
    Ok(0)
}
