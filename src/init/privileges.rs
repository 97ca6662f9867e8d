//! What a process gives up before its program starts, in the order in which it can still give up the next.

use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::unistd::{Pid, chdir, getcwd, getppid};
use oci_spec::runtime::{Process, Spec};

use super::process::find;
use super::program::Program;
use super::{capabilities, credentials, lsm, scheduling, seccomp};
use crate::sys::procfs::Later;
use crate::sys::{Context, Error, Result, fd, prctl};

/// Settings of the process that a supervisor should still be able to fail.
pub fn before_ready(process: &Process, spec: &Spec) -> Result<()> {
    if process.no_new_privileges() == Some(true) {
        nix::sys::prctl::set_no_new_privs().context(|| "prctl(SET_NO_NEW_PRIVS)")?;
    }
    let linux = spec.linux().as_ref();
    if let Some(scheduler) = process.scheduler() {
        let cpu = linux.and_then(|l| l.resources().as_ref()).and_then(|r| r.cpu().as_ref());
        let cpuset = cpu.and_then(|c| c.cpus().as_ref()).is_some_and(|c| !c.is_empty());
        scheduling::set_policy(scheduler, cpuset)?;
    }
    if let Some(priority) = process.io_priority() {
        scheduling::set_io(priority)?;
    }
    if let Some(personality) = linux.and_then(|l| l.personality().as_ref()) {
        scheduling::set_personality(personality)?;
    }
    if let Some(policy) = linux.and_then(|l| l.memory_policy().as_ref()) {
        scheduling::set_memory_policy(policy)?;
    }
    Ok(())
}

/// What a process does last, and cannot do once its seccomp filter is in force.
pub struct Late<'a> {
    /// The filter, compiled.
    pub filter: Option<&'a seccomp::Program>,
    /// Hands over the filter's listener.
    pub listener: &'a dyn Fn(RawFd) -> Result<()>,
    /// The command that must not have died, where that is to be looked at.
    pub parent: Option<Pid>,
}

/// The rest, up to finding the program.
pub fn after_ready(process: &Process, passed: i32, procfs: &Later, late: &Late<'_>) -> Result<Program> {
    // Without no_new_privs a filter needs CAP_SYS_ADMIN, which goes away below; with it, the fewer system calls
    // come after it the better.
    let early = process.no_new_privileges() != Some(true);
    let load = || -> Result<()> {
        let Some(filter) = late.filter else { return Ok(()) };
        match seccomp::load(filter)? {
            Some(fd) => (late.listener)(fd.as_raw_fd()),
            None => Ok(()),
        }
    };
    lsm::apply_selinux(process, procfs)?;
    // A filter need not know close_range(2).
    fd::cloexec_from(u32::try_from(3 + passed).unwrap_or(3)).context(|| "close_range")?;
    if early {
        load()?;
    }
    // A user namespace forgets it at setuid(2).
    let death_signal = prctl::parent_death_signal().context(|| "can't get pdeath signal")?;
    let cwd = process.cwd();
    let enter =
        || chdir(cwd.as_path()).context(|| format!("chdir to cwd ({cwd:?}) set in config.json failed"));
    let entered = match enter() {
        Ok(()) => true,
        // The user of the program may get where root, without its capabilities over files, may not.
        Err(e) if e.errno() == Some(Errno::EACCES) => false,
        Err(e) => return Err(e),
    };
    if let Some(sets) = process.capabilities() {
        capabilities::drop_bounding(sets)?;
    }
    credentials::become_user(process.user(), procfs)?;
    if !entered {
        enter()?;
    }
    inside()?;
    credentials::clear_keep_capabilities()?;
    if let Some(sets) = process.capabilities() {
        capabilities::apply(sets)?;
    }
    if death_signal != 0 {
        prctl::set_parent_death_signal(death_signal).context(|| "can't restore pdeath signal")?;
    }
    if late.parent.is_some_and(|parent| getppid() != parent) {
        return Err(Error::new("the command that makes the container has died"));
    }
    let program = find(process)?;
    if !early {
        load()?;
    }
    Ok(program)
}

/// Refuses a working directory that is not below the root (CVE-2024-21626).
fn inside() -> Result<()> {
    match getcwd() {
        Ok(cwd) if cwd.is_absolute() => Ok(()),
        Ok(cwd) => Err(Error::new(format!(
            "current working directory is not absolute -- possible container breakout detected: cwd is {cwd:?}"
        ))),
        Err(Errno::ENOENT) => Err(Error::new(
            "current working directory is outside of container mount namespace root -- possible container \
             breakout detected",
        )),
        Err(errno) => {
            Err(Error::call("failed to verify if current working directory is safe: getcwd", errno))
        }
    }
}
