//! `create`.

use super::{Context, new, one_id};
use crate::container::{Result, create};
use crate::init::process::Purpose;

/// Create a container
///
/// Everything is set up but the program of config.json, which `start` runs.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    new: new::Flags,
    /// The container's name, unique on this host
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: Args) -> Result<u8> {
    let id = one_id("create", &args.args)?;
    let mut prepared = new::prepare(context, id, &args.new, true, Purpose::Start)?;
    prepared.request.hold = true;
    let created = create::create(&context.store, prepared.request)?;
    if let Some(path) = &prepared.pid_file {
        create::write_pid_file(path, created.init.pid).inspect_err(|_| {
            created.init.kill();
            let _ = created.container.destroy();
        })?;
    }
    Ok(0)
}
