//! Giving birth to a process in other namespaces, seen from the command's side.

use std::os::fd::OwnedFd;

use crate::init::channel::{Channel, Message};
use crate::init::namespaces::Joined;
use crate::init::setns;
use crate::sys::process::{Fork, Side, clone3, exit_now, wait_child};
use crate::sys::{Context, Error, Result, pidfd};

/// A new process, waiting for leave to go on.
#[derive(Debug)]
pub struct Newborn {
    /// Its pid on this host; it is a child of ours.
    pub pid: i32,
    /// Its pidfd.
    pub pidfd: OwnedFd,
    /// Our end of the conversation with it.
    pub channel: Channel,
}

/// Makes a process with new namespaces (`flags`), in those of `joined`; it runs `then`, which must not return.
pub fn launch(flags: u64, joined: &[Joined], then: &dyn Fn(Channel)) -> Result<Newborn> {
    let (ours, theirs) = Channel::pair()?;
    let first = if joined.is_empty() { flags } else { 0 };
    // SAFETY: commands have one thread.
    let (pid, pidfd) =
        match unsafe { clone3(Fork { flags: first, into_cgroup: None }) }.context(|| "clone3")? {
            Side::Child => {
                drop(ours);
                if joined.is_empty() {
                    then(theirs);
                } else {
                    setns::helper(joined, flags, theirs, then);
                }
                exit_now(1)
            }
            Side::Parent(pid, pidfd) => (pid.as_raw(), pidfd),
        };
    drop(theirs);
    if joined.is_empty() {
        return Ok(Newborn { pid, pidfd, channel: ours });
    }
    let said = ours.listen();
    wait_child(pid, true).context(|| "wait for the process that joins namespaces")?;
    match said? {
        Some(Message::Pid(pid)) => {
            let pidfd = pidfd::open(pid, 0).context(|| "pidfd_open")?;
            Ok(Newborn { pid, pidfd, channel: ours })
        }
        Some(Message::Failed(text)) => Err(Error::new(text)),
        _ => Err(Error::new("the process that joins namespaces has died")),
    }
}

impl Newborn {
    /// Ends the process and waits for it.
    pub fn kill(&self) {
        use std::os::fd::AsFd;
        // It may have gone already: then there is only the waiting left.
        let _ = pidfd::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        let _ = wait_child(self.pid, true);
    }
}
