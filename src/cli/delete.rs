//! `delete`.

use super::kill::matching;
use super::{Context, log, one_id};
use crate::container::{Error, Result, signal};

/// Delete what a container holds
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kill the container if it still runs (SIGKILL)
    #[arg(long, short)]
    force: bool,
    /// The name is a regular expression: delete every container whose name it matches
    #[arg(long, short)]
    regex: bool,
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("delete", &args.args)?;
    if args.regex {
        let mut failed = false;
        for id in matching(&context.store, id)? {
            match signal::delete(&context.store, &id, args.force) {
                // Somebody else was quicker.
                Err(Error::NotExist) | Ok(()) => {}
                Err(e) => {
                    log::error(&format!("{id}: {e}"), None);
                    failed = true;
                }
            }
        }
        return Ok(u8::from(failed));
    }
    signal::delete(&context.store, id, args.force)?;
    Ok(0)
}
