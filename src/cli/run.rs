//! `run`.

use super::{Context, new, one_id};
use crate::container::foreground::Signals;
use crate::container::{Result, create, start};
use crate::init::process::Purpose;

/// Create and run a container
///
/// In the foreground: until its program has ended, whose exit status is ours. The container is then deleted.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    new: new::Flags,
    /// Leave the container running, and return
    #[arg(long, short)]
    detach: bool,
    /// Do not delete the container when its program has ended
    #[arg(long)]
    keep: bool,
    /// Do not become the subreaper of the container's processes
    #[arg(long)]
    no_subreaper: bool,
    /// The container's name, unique on this host
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: Args) -> Result<u8> {
    let id = one_id("run", &args.args)?;
    let prepared = new::prepare(context, id, &args.new, args.detach, Purpose::Start)?;
    let signals = if args.detach { None } else { Some(Signals::take()?) };
    if !args.no_subreaper {
        new::become_subreaper();
    }
    let mut created = create::create(&context.store, prepared.request)?;
    let finish = || -> Result<()> {
        start::poststart(&created.container, &created.spec)?;
        match &prepared.pid_file {
            Some(path) => create::write_pid_file(path, created.init.pid),
            None => Ok(()),
        }
    };
    if let Err(e) = finish() {
        created.init.kill();
        let _ = created.container.destroy();
        return Err(e);
    }
    new::tell_manager(&mut created, args.detach)?;
    let Some(signals) = signals else { return Ok(0) };
    new::stay_and_delete(created, prepared.ours, &signals, args.keep)
}
