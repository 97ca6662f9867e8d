//! A further process in a running container: `exec`.
//!
//! ```text
//!   command ── clone3 ──> helper: joins the namespaces of init
//!      |                    └── clone3(CLONE_PARENT) ──> process: a child of the command, inside
//!      | <── Pid ───────────┘ (helper exits)               |
//!      | ── Go, once it is in the control groups ────────> | terminal, labels, user, capabilities, program
//! ```
//!
//! The helper is needed because setns(2) moves only children into a pid namespace, and because the command itself
//! must stay outside.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::sys::stat::{Mode, umask};
use nix::unistd::setsid;
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::channel::{Channel, Message};
use super::namespaces::{self, Joined};
use super::process::{become_root, console_size, first_steps, session_keyring};
use super::program::Program;
use super::{console, lsm, privileges, seccomp};
use crate::sys::process::{Fork, Side, clone3, exit_now};
use crate::sys::procfs::Later;
use crate::sys::{Context, Result, pidfd};

/// All that a further process needs to know.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Container id.
    pub id: &'a str,
    /// config.json of the container.
    pub spec: &'a Spec,
    /// What to run, and as whom.
    pub process: &'a Process,
    /// The namespaces of init that differ from ours.
    pub namespaces: &'a [Joined],
    /// It is to be in a user namespace, the container's or ours.
    pub user_namespace: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// Standard input, output and error, where they are not the command's.
    pub stdio: Option<&'a [OwnedFd; 3]>,
    /// Where the terminal's master is to go.
    pub console: Option<&'a console::Console>,
    /// Socket that is to get a pidfd of the process.
    pub pidfd_socket: Option<&'a OwnedFd>,
    /// How many descriptors from 3 on the program inherits.
    pub passed: i32,
    /// The seccomp program, compiled.
    pub seccomp: Option<&'a seccomp::Program>,
}

/// Forks, into the control group (v2) that is asked for if the kernel lets us, and says whether it did: a group may have
/// groups inside, no room for one more process, or belong to somebody else. Then the command moves the process there.
///
/// # Safety
/// As for [`clone3`].
pub unsafe fn fork(what: Fork) -> nix::Result<(Side, bool)> {
    if what.into_cgroup.is_some() {
        // SAFETY: the caller's promise.
        if let Ok(side) = unsafe { clone3(what) } {
            return Ok((side, true));
        }
    }
    // SAFETY: the caller's promise.
    Ok((unsafe { clone3(Fork { into_cgroup: None, ..what }) }?, false))
}

/// The helper's life: joins, and makes the process that `then` becomes. Never returns.
///
/// Used by `exec`, by `create` for a container that joins namespaces by path, and for a process that is to be nobody's
/// child.
pub fn helper(namespaces: &[Joined], what: Fork, channel: Channel, then: &dyn Fn(Channel)) -> ! {
    let born = || -> Result<()> {
        namespaces::join(namespaces)?;
        if namespaces::joins(namespaces, LinuxNamespaceType::User) {
            become_root()?;
        }
        // SAFETY: this process has one thread.
        match unsafe { fork(what) }.context(|| "clone3")? {
            (Side::Child, _) => Ok(()),
            (Side::Parent(pid, _), born_inside) => {
                channel.tell(&Message::Pid(pid.as_raw(), born_inside))?;
                exit_now(0)
            }
        }
    };
    match born() {
        Ok(()) => then(channel),
        Err(e) => {
            let _ = channel.tell(&Message::Failed(e.to_string()));
        }
    }
    exit_now(1)
}

/// The life of a process that the checkpoint engine fills. Never returns.
pub fn shell(id: &str, namespaces: &[Joined], no_new_keyring: bool, channel: Channel) -> ! {
    let prepare = || -> Result<()> {
        first_steps(None, vec![channel.as_raw_fd()], false)?;
        channel.wait()?;
        if no_new_keyring {
            return Ok(());
        }
        session_keyring(id, namespaces::joins(namespaces, LinuxNamespaceType::User))
    };
    let failure = match prepare() {
        Err(e) => e,
        Ok(()) => super::process::shell(&channel),
    };
    // Nobody is left to hear of a failure of this.
    let _ = channel.tell(&Message::Failed(failure.to_string()));
    exit_now(1)
}

/// The life of the process up to its program. Never returns.
pub fn main(plan: &Plan<'_>, channel: Channel) -> ! {
    match prepare(plan, &channel) {
        Err(e) => {
            let _ = channel.tell(&Message::Failed(e.to_string()));
            exit_now(1)
        }
        Ok(program) => {
            drop(channel);
            eprintln!("{}", program.exec());
            exit_now(255)
        }
    }
}

fn prepare(plan: &Plan<'_>, channel: &Channel) -> Result<Program> {
    first_steps(plan.stdio, plan.keep(channel), false)?;
    channel.wait()?;
    setsid().context(|| "setsid")?;
    if !plan.no_new_keyring {
        let user_namespace = namespaces::joins(plan.namespaces, LinuxNamespaceType::User);
        lsm::with_key_label(plan.process, || session_keyring(plan.id, user_namespace))?;
    }
    if let Some(console) = plan.console {
        let slave = console::create(console, console_size(plan.process))?;
        console::adopt(&slave)?;
    }
    if let Some(socket) = plan.pidfd_socket {
        let own = pidfd::open(std::process::id() as i32, 0).context(|| "pidfd_open")?;
        console::send(socket.as_fd(), b"setns", own.as_fd())?;
    }
    umask(Mode::from_bits_truncate(plan.process.user().umask().unwrap_or(0o022)));
    let procfs = Later::default();
    if plan.user_namespace {
        // As in a new container.
        procfs.get()?;
    }
    privileges::before_ready(plan.process, plan.spec)?;
    channel.tell(&Message::Ready)?;
    channel.wait()?;
    lsm::apply_apparmor(plan.process, &procfs)?;
    let late = privileges::Late {
        filter: plan.seccomp,
        listener: &|fd| {
            channel.tell(&Message::Listener(fd))?;
            channel.wait()
        },
        parent: None,
    };
    privileges::after_ready(plan.process, plan.passed, &procfs, &late)
}

impl Plan<'_> {
    fn keep(&self, channel: &Channel) -> Vec<RawFd> {
        let sockets = [self.console.map(|c| &c.socket), self.pidfd_socket];
        let mut keep: Vec<RawFd> = sockets.into_iter().flatten().map(AsRawFd::as_raw_fd).collect();
        keep.push(channel.as_raw_fd());
        keep.extend(3..3 + self.passed);
        keep
    }
}
