//! `run`.

use std::os::fd::AsFd;

use super::{Context, log, new, one_id};
use crate::container::foreground::{Signals, stay};
use crate::container::{Error, Result, create, start};
use crate::init::process::Purpose;
use crate::sys;

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
        // Only for processes that outlive an init without a pid namespace of its own.
        if let Err(e) = nix::sys::prctl::set_child_subreaper(true) {
            log::warn(&format!("prctl(PR_SET_CHILD_SUBREAPER): {}", sys::error::words(e)));
        }
    }
    let created = create::create(&context.store, prepared.request)?;
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
    let Some(signals) = signals else { return Ok(0) };
    drop(created.lock);
    let code = stay(created.init.pid, created.init.pidfd.as_fd(), prepared.ours, &signals);
    if !args.keep {
        let lock = created.container.dir.lock();
        // Another command may have deleted it.
        if lock.is_ok() {
            if let Err(e) = created.container.destroy() {
                log::warn(&e.to_string());
            }
        }
    }
    u8::try_from(code?).map_err(|_| Error::new("exit status out of range"))
}
