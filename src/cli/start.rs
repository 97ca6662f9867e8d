//! `start`.

use std::os::fd::AsFd;
use std::path::Path;

use super::{Context, new, one_id};
use crate::container::{Container, Result, notify, start};
use crate::sys::pidfd;

/// Run the program of a created container
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("start", &args.args)?;
    let Some(manager) = notify::manager() else {
        start::start(&context.store, id)?;
        return Ok(0);
    };
    let socket = notify::Socket::listen(&context.store.dir(id)?)?;
    // Before the program can run, and be gone again.
    let state = Container::load(&context.store, id)?.state;
    let init = pidfd::open(state.init_process_pid, 0);
    start::start(&context.store, id)?;
    if let (Some(socket), Ok(init)) = (socket, init) {
        let told = socket.relay(Path::new(&manager), init.as_fd(), state.init_process_pid);
        told.or_else(new::unheard)?;
    }
    Ok(0)
}
