//! `state`.

use std::io::Write;

use super::{Context, one_id};
use crate::container::{Error, Result, list};

/// Output the state of a container
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("state", &args.args)?;
    let state = list::state(&context.store, id)?;
    let text =
        serde_json::to_string_pretty(&state).map_err(|e| Error::new(format!("encoding the state: {e}")))?;
    // A closed pipe is no reason to say more.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(0)
}
