//! `events`.

use super::{Context, one_id};
use crate::container::{Container, Error, Result, Status};

/// Display the resource usage of a container, and out-of-memory events
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Time between two displays, as 5s or 500ms
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    interval: String,
    /// Display once, and exit
    #[arg(long)]
    stats: bool,
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("events", &args.args)?;
    let container = Container::load(&context.store, id)?;
    if container.status()? == Status::Stopped {
        return Err(Error::new(format!("container with id {id} is not running")));
    }
    Err(Error::new("events are not supported yet"))
}
