//! Starting the program of a created container.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use oci_spec::runtime::Spec;

use super::hooks::{self, Point};
use super::{Container, Error, Result, Status, Store};
use crate::sys::{Context, pidfd};

/// How long init may say nothing before we look whether it has gone on without us.
const LOOK_AGAIN: u8 = 50;

/// Lets the program of a created container run.
pub fn start(store: &Store, id: &str) -> Result<Container> {
    let (container, _lock) = Container::load_locked(store, id)?;
    match container.status()? {
        Status::Created => {}
        Status::Stopped => return Err(Error::new("cannot start a container that has stopped")),
        Status::Running => return Err(Error::new("cannot start an already running container")),
        Status::Paused => return Err(Error::new("cannot start a container in the paused state")),
    }
    container.release()?;
    poststart(&container, &container.spec()?)?;
    Ok(container)
}

impl Container {
    /// Opens the exec fifo, which init waits for, and makes sure that init went on.
    fn release(&self) -> Result<()> {
        // Before init can go on: a short program would be gone again.
        let init = pidfd::open(self.state.init_process_pid, 0).context(|| "pidfd_open")?;
        let path = self.dir.exec_fifo();
        let fifo = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let mut fifo = fifo.context(|| format!("exec fifo: open {}", path.display()))?;
        loop {
            let mut fds =
                [PollFd::new(fifo.as_fd(), PollFlags::POLLIN), PollFd::new(init.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, LOOK_AGAIN) {
                Err(Errno::EINTR) => {}
                // Another `start` let it go and was killed before it could read the byte: no other will come.
                Ok(0) if self.init().is_some_and(|init| init.execed) => return self.forget_fifo(),
                Ok(0) => {}
                done => {
                    done.context(|| "poll exec fifo")?;
                    break;
                }
            }
        }
        let mut byte = [0];
        let read = match fifo.read(&mut byte) {
            // Nothing was written, and init is gone.
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => 0,
            read => read.context(|| "read exec fifo")?,
        };
        if read == 0 {
            return Err(Error::new(
                "exec fifo is empty: container init died before it could run the program",
            ));
        }
        self.forget_fifo()
    }

    fn forget_fifo(&self) -> Result<()> {
        match fs::remove_file(self.dir.exec_fifo()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(|| "unlink exec fifo")?,
            _ => {}
        }
        Ok(())
    }
}

/// Runs the poststart hooks; a failure kills the container, as runc does.
pub fn poststart(container: &Container, spec: &Spec) -> Result<()> {
    if !hooks::any(spec, &[Point::Poststart]) {
        return Ok(());
    }
    container.run_hooks(spec, Point::Poststart, "running").inspect_err(|_| {
        let _ = container.signal(libc::SIGKILL);
    })
}
