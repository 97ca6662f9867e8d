//! `migrate`.

use std::path::PathBuf;
use std::time::Duration;

use super::checkpoint::{What, options};
use super::{Context, absolute, one_id};
use crate::checkpoint::context::Options;
use crate::checkpoint::progress;
use crate::container::{Error, Result};
use crate::migrate::{self, Destination};

/// Move a running container to another host
///
/// Its memory is sent while it runs; it stands still only for what changes last. The other host runs `stasis receive`
/// with a bundle that has the same files.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where `stasis receive --listen` waits
    #[arg(long, value_name = "HOST:PORT")]
    to: Option<String>,
    /// A shell command that runs `stasis receive` there, with this one at its standard input and output:
    /// "ssh HOST stasis receive --bundle DIR ID"
    #[arg(long, value_name = "COMMAND")]
    via: Option<String>,
    /// Most rounds before the container stands still
    #[arg(long, value_name = "N", default_value_t = 8)]
    rounds: u32,
    /// How long the other side may say nothing
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u32,
    /// Directory for the images on their way, which must not exist [default: one in /var/tmp]
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    /// Directory for the log and statistics
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Leave out processes that were started by exec
    #[arg(long)]
    drop_exec: bool,
    /// Keep processes that were started by exec, without their clients
    #[arg(long, conflicts_with = "drop_exec")]
    keep_exec: bool,
    /// Take along what is in the network namespace: devices, addresses, routes, packet filters, sysctls
    #[arg(long)]
    keep_network: bool,
    #[command(flatten)]
    what: What,
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("migrate", &args.args)?;
    let to = match (&args.to, &args.via) {
        (Some(address), None) => Destination::Tcp(address.clone()),
        (None, Some(command)) => Destination::Command(command.clone()),
        _ => return Err(Error::new("give one of --to HOST:PORT and --via COMMAND")),
    };
    let default = || PathBuf::from(format!("/var/tmp/stasis-migrate-{id}-{}", std::process::id()));
    let options = Options {
        image_path: args.image_path.as_deref().map(absolute).transpose()?.unwrap_or_else(default),
        work_path: args.work_path.as_deref().map(absolute).transpose()?,
        drop_exec: args.drop_exec,
        keep_exec: args.keep_exec,
        keep_network: args.keep_network,
        ..options(&args.what)?
    };
    let patience = Duration::from_secs(args.timeout.into());
    progress::show();
    let done = migrate::send(&context.store, id, &options, &to, args.rounds, patience)?;
    println!(
        "{id} has moved: stood still for {:.1} ms of {:.2} s, {:.1} MiB in {} rounds",
        done.downtime.as_secs_f64() * 1e3,
        done.total.as_secs_f64(),
        done.sent as f64 / f64::from(1 << 20),
        done.rounds + 1
    );
    Ok(0)
}
