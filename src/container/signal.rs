//! Signals to a container, and the end of one.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::hooks::Point;
use super::{Container, Error, Result, Status, Store, create};
use crate::sys::{self, Context, pidfd};

/// How long `delete --force` waits for processes to be gone, as long as runc does.
const PATIENCE: Duration = Duration::from_secs(10);

impl Container {
    /// Sends a signal to init; SIGKILL in a shared pid namespace goes to every process of the container, unless it has
    /// no control group (a rootless one) to tell which those are.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let cgroup = self.cgroup();
        if signal == libc::SIGKILL && !self.state.owns_pid_namespace() && cgroup.exists() {
            if !self.has_init() && cgroup.all_pids().unwrap_or_default().is_empty() {
                return Err(Error::NotRunning);
            }
            cgroup.kill(libc::SIGKILL).map_err(|e| e.context("unable to kill all processes"))?;
            return Ok(());
        }
        self.signal_init(signal)
    }

    fn signal_init(&self, signal: i32) -> Result<()> {
        // First the handle, then the look at its start time: the handle cannot come to mean another process.
        let init = match pidfd::open(self.state.init_process_pid, 0) {
            Err(Errno::ESRCH | Errno::EINVAL) => return Err(Error::NotRunning),
            opened => opened.context(|| "pidfd_open")?,
        };
        if !self.has_init() {
            return Err(Error::NotRunning);
        }
        match pidfd::send_signal(init.as_fd(), signal) {
            Err(Errno::ESRCH) => {
                return Err(sys::Error::new("unable to signal init: os: process already finished").into());
            }
            sent => sent.context(|| "unable to signal init")?,
        }
        if signal == libc::SIGKILL {
            // In a frozen v1 group even SIGKILL waits, and init for those who are in one inside.
            let _ = self.cgroup().thaw_all();
        }
        Ok(())
    }

    /// Kills everything and waits until init is gone.
    fn kill_and_wait(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let init = pidfd::open(self.state.init_process_pid, 0).ok().filter(|_| self.has_init());
        let _ = self.signal(libc::SIGKILL);
        let Some(init) = init else { return Ok(()) };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new("container init still running"));
            }
            let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(init.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(1..) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(sys::Error::call("poll", errno).into()),
            }
        }
    }

    /// Removes what a container that has stopped still holds: leftover processes, control groups, its directory.
    /// Then the poststop hooks run.
    pub fn destroy(&self) -> Result<()> {
        let cgroup = self.cgroup();
        if !self.state.owns_pid_namespace() {
            let _ = cgroup.kill(libc::SIGKILL);
        }
        cgroup.delete().map_err(|e| e.context("unable to remove container's cgroup"))?;
        let left = self.state.rdt.leave();
        left.map_err(|e| e.context("unable to remove container's IntelRDT group"))?;
        // Read before it is removed; a damaged one must not keep the container from being deleted.
        let spec = self.spec();
        self.dir.remove()?;
        match spec {
            Ok(spec) => self.run_hooks(&spec, Point::Poststop, "stopped"),
            Err(_) => Ok(()),
        }
    }
}

/// `kill`: never waits for another command.
pub fn kill(store: &Store, id: &str, signal: i32) -> Result<()> {
    Container::load(store, id)?.signal(signal)
}

/// `delete`.
pub fn delete(store: &Store, id: &str, force: bool) -> Result<()> {
    let (container, _lock) = match Container::load_locked(store, id) {
        Ok(found) => found,
        Err(Error::NotExist) => {
            forget_remains(store, id)?;
            return if force { Ok(()) } else { Err(Error::NotExist) };
        }
        Err(e) => return Err(e),
    };
    if force {
        container.kill_and_wait()?;
        return container.destroy();
    }
    match container.status()? {
        Status::Stopped => container.destroy(),
        Status::Created => {
            container.kill_and_wait()?;
            container.destroy()
        }
        status => {
            Err(Error::new(format!("cannot delete container {id} that is not stopped: {}", status.as_str())))
        }
    }
}

/// Removes the directory of a creation that was killed before there was a container.
fn forget_remains(store: &Store, id: &str) -> Result<()> {
    let dir = store.dir(id)?;
    match dir.try_lock() {
        Ok(Some(_lock)) if matches!(dir.load(), Err(Error::NotExist)) => {
            create::sweep(&dir);
            dir.remove()
        }
        _ => Ok(()),
    }
}
