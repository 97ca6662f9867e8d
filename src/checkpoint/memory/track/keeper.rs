//! The keeper: a process that does nothing but hold userfaultfds open from one command to the next.
//!
//! ```text
//!   checkpoint --pre-dump ──clone3──> keeper ── poll(pidfd of init) ──> ends with the container
//!        ends                            ^
//!   checkpoint  ── pidfd_getfd ──────────┘  ── SIGKILL when the marks are no longer needed
//! ```
//!
//! A userfaultfd that is closed takes its protection with it, and the target must not see one among its descriptors.
//! Were the keeper to die, all pages would count as written: nothing is lost but time.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::checkpoint::error::{Context, Result};
use crate::sys::pidfd;
use crate::sys::process::{Fork, Side, clone3, detach, exit_now};

/// A keeper, by its pid and start time: another process with the same number is not taken for it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Keeper {
    pid: i32,
    start: i64,
}

impl Keeper {
    /// Its pidfd, while it lives.
    pub fn handle(&self) -> Option<OwnedFd> {
        let handle = pidfd::open(self.pid, 0).ok()?;
        (super::start_time(self.pid) == Some(self.start)).then_some(handle)
    }

    /// Ends it.
    pub fn end(&self) {
        if let Some(handle) = self.handle() {
            let _ = pidfd::send_signal(handle.as_fd(), libc::SIGKILL);
        }
    }
}

/// Starts a keeper of these descriptors, which have the same numbers in it.
pub fn start(uffds: &[&OwnedFd], init: i32) -> Result<Keeper> {
    let what = "cannot keep the noting of writes";
    let handle = pidfd::open(init, 0).during(what, || format!("pidfd_open({init}, 0)"))?;
    let mut keep: Vec<i32> = uffds.iter().map(|uffd| uffd.as_raw_fd()).collect();
    keep.push(handle.as_raw_fd());
    // SAFETY: the threads that copy pages have ended, and the child only waits and exits.
    match unsafe { clone3(Fork::default()) }.during(what, || "clone3({exit_signal=SIGCHLD})".into())? {
        Side::Child => {
            // SAFETY: none of the closed descriptors is used any more: the child ends by _exit.
            if unsafe { detach(&keep) }.is_ok() {
                let mut ended = [PollFd::new(handle.as_fd(), PollFlags::POLLIN)];
                while poll(&mut ended, PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
            }
            exit_now(0)
        }
        Side::Parent(pid, _) => {
            let pid = pid.as_raw();
            Ok(Keeper { pid, start: super::start_time(pid).unwrap_or(-1) })
        }
    }
}
