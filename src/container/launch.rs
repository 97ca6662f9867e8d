//! Giving birth to a process in other namespaces, seen from the command's side.

use std::os::fd::OwnedFd;

use crate::cgroup::doors::Doors;
use crate::init::channel::{Channel, Message};
use crate::init::namespaces::{self, Joined};
use crate::init::setns;
use crate::sys::process::{Fork, Side, exit_now, wait_child};
use crate::sys::{Context, Error, Result, pidfd};

/// A new process, waiting for leave to go on.
#[derive(Debug)]
pub struct Newborn {
    /// Its pid on this host.
    pub pid: i32,
    /// Its pidfd.
    pub pidfd: OwnedFd,
    /// Our end of the conversation with it.
    pub channel: Channel,
    /// It was born in the v2 tree's group.
    pub born_inside: bool,
}

/// Whose child a new process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// Ours.
    Us,
    /// That of whoever takes in our orphans. Our end is then no parent's death to it: see prctl(2), `PR_SET_PDEATHSIG`.
    Reaper,
}

/// Where and as what a process is born.
#[derive(Debug, Clone, Copy)]
pub struct Birth<'a> {
    /// Namespaces to make, as flags of clone3(2).
    pub flags: u64,
    /// Namespaces to join.
    pub joined: &'a [Joined],
    /// The control groups to enter.
    pub doors: Option<&'a Doors>,
    /// Whose child it becomes.
    pub parent: Parent,
    /// Its pid inside, where it is not any.
    pub pid: Option<i32>,
}

impl Default for Birth<'_> {
    fn default() -> Self {
        Self { flags: 0, joined: &[], doors: None, parent: Parent::Us, pid: None }
    }
}

/// Makes a process; it runs `then`, which must not return.
pub fn launch(birth: &Birth<'_>, then: &dyn Fn(Channel)) -> Result<Newborn> {
    let Birth { flags, joined, doors, parent, pid } = *birth;
    let (ours, theirs) = Channel::pair()?;
    let unified = doors.and_then(Doors::unified);
    let enter = || doors.map_or(Ok(()), Doors::enter).and_then(|()| namespaces::join_cgroup(joined));
    let inside = |channel: Channel| match enter() {
        Ok(()) => then(channel),
        Err(e) => {
            let _ = channel.tell(&Message::Failed(e.to_string()));
        }
    };
    // The new process is in the container at once; what it inherits keeps others there from reaching it. A rootless
    // user must own its files under /proc for a while: see `first_steps`.
    if nix::unistd::geteuid().is_root() {
        nix::sys::prctl::set_dumpable(false).context(|| "prctl(PR_SET_DUMPABLE)")?;
    }
    let direct = joined.is_empty() && parent == Parent::Us;
    let whole = Fork { flags, into_cgroup: unified, set_tid: pid };
    let first = if direct { whole } else { Fork::default() };
    // SAFETY: commands have one thread.
    let (side, born_inside) = unsafe { setns::fork(first) }.context(|| "clone3")?;
    let (pid, pidfd) = match side {
        Side::Child => {
            drop(ours);
            if direct {
                inside(theirs);
            } else {
                let sibling = if parent == Parent::Us { libc::CLONE_PARENT as u64 } else { 0 };
                setns::helper(joined, Fork { flags: flags | sibling, ..whole }, theirs, &inside);
            }
            exit_now(1)
        }
        Side::Parent(pid, pidfd) => (pid.as_raw(), pidfd),
    };
    drop(theirs);
    if direct {
        return Ok(Newborn { pid, pidfd, channel: ours, born_inside });
    }
    let said = ours.listen();
    wait_child(pid, true).context(|| "wait for the process that joins namespaces")?;
    match said? {
        Some(Message::Pid(pid, born_inside)) => {
            let pidfd = pidfd::open(pid, 0).context(|| "pidfd_open")?;
            Ok(Newborn { pid, pidfd, channel: ours, born_inside })
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
