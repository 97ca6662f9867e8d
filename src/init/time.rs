//! The time namespace: its clocks can be set only before a process is in it.

use std::fs::{self, File};
use std::os::fd::AsFd;

use nix::errno::Errno;
use oci_spec::runtime::Spec;

use super::namespaces::CLONE_NEWTIME;
use crate::sys::{Context, Error, Result, process};

/// Makes a time namespace with the offsets of config.json and enters it. The process must have one thread.
///
/// `set` has [`write()`] done by the command: the files under /proc of a process that is not dumpable belong to the
/// host's root, even when the process is root in a user namespace of its own.
pub fn enter_new(spec: &Spec, set: &dyn Fn() -> Result<()>) -> Result<()> {
    // SAFETY: numbers only; time namespaces affect no memory of ours.
    Errno::result(unsafe { libc::unshare(CLONE_NEWTIME) }).context(|| "unshare(CLONE_NEWTIME)")?;
    if !offsets(spec)?.is_empty() {
        set()?;
    }
    let name = "/proc/self/ns/time_for_children";
    let namespace = File::open(name).context(|| format!("open {name}"))?;
    process::setns(namespace.as_fd(), CLONE_NEWTIME).context(|| format!("setns to {name}"))
}

/// Sets the clocks of the namespace that process `pid` has made and not entered.
pub fn write(spec: &Spec, pid: i32) -> Result<()> {
    let name = format!("/proc/{pid}/timens_offsets");
    fs::write(&name, offsets(spec)?).context(|| format!("write {name}"))
}

fn offsets(spec: &Spec) -> Result<String> {
    let mut text = String::new();
    let all = spec.linux().as_ref().and_then(|l| l.time_offsets().as_ref());
    for (clock, offset) in all.into_iter().flatten() {
        if clock != "monotonic" && clock != "boottime" {
            return Err(Error::new(format!("time offset for unknown clock {clock:?}")));
        }
        text += &format!("{clock} {} {}\n", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
    }
    Ok(text)
}
