//! `delete`.

use super::{Context, one_id};
use crate::container::{Result, signal};

/// Delete what a container holds
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kill the container if it still runs (SIGKILL)
    #[arg(long, short)]
    force: bool,
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("delete", &args.args)?;
    signal::delete(&context.store, id, args.force)?;
    Ok(0)
}
