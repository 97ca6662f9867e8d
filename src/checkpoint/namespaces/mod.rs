//! Namespaces, mounts and control groups.
//!
//! ```text
//!   dump      look from outside, or enter with a helper thread ──▶ utsns, ipcns-*, mountpoints, tmpfs-dev-*, netns,
//!                                                                  timens, cgroup
//!   restore   init/ has made the namespaces and the mounts of *this* config.json; contents are put into them
//! ```
//!
//! What config.json joins by path belongs to others too: it is neither saved nor touched.

pub mod cgroup;
pub mod enter;
pub mod ipc;
pub mod kind;
pub mod mount;
pub mod mountinfo;
pub mod net;
pub mod pid;
pub mod time;
pub mod tmpfs;
pub mod user;
pub mod uts;

use std::collections::BTreeMap;

use crate::checkpoint::context::{Dump, NewTask, Options, Restore, Source};
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::TaskKobjIdsEntry;
use crate::checkpoint::remote::Thread;

pub use enter::within;
pub use kind::Kind;

/// Everything about the namespaces of these processes (pids of this host) that keeps them from being dumped.
pub fn check(_options: &Options, source: &Source, pids: &[i32]) -> Vec<Error> {
    let mut found = Vec::new();
    for pid in pids {
        if let Err(e) = check_process(source.init, *pid) {
            // What has ended meanwhile is no finding.
            if std::fs::metadata(format!("/proc/{pid}/ns/mnt")).is_ok() {
                found.push(e.pid(vpid(*pid)));
            }
        }
    }
    match mount::check(source) {
        Ok(mounts) => found.extend(mounts),
        Err(e) => found.push(e),
    }
    found.extend(ipc::check(source, pids));
    found
}

/// A process must be in the namespaces of init, and its children must become so.
fn check_process(init: i32, pid: i32) -> Result<()> {
    let names = Kind::ALL.map(|kind| (kind, kind.name()));
    let children = [(Kind::Pid, "pid_for_children"), (Kind::Time, "time_for_children")];
    for (kind, name) in names.into_iter().chain(children) {
        let theirs = kind::link(&pid.to_string(), name)?;
        // Of a zombie nothing is left to look at. A process whose children will be in a new pid namespace has no link.
        let unborn = name == "pid_for_children" && theirs.is_none() && kind.of(&pid.to_string())?.is_some();
        if unborn || theirs.is_some() && theirs != kind.of(&init.to_string())? {
            let whose = if name == kind.name() { "a" } else { "its children in a" };
            return Err(Error::new(format!(
                "the process has {whose} {} namespace of its own, which cannot be checkpointed yet",
                kind.title()
            )));
        }
    }
    Ok(())
}

/// The pid that a process has in its innermost namespace, for messages; the host's if it cannot be told.
fn vpid(pid: i32) -> i32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    line.and_then(|line| line.split_whitespace().next_back()?.parse().ok()).unwrap_or(pid)
}

/// Fills in the namespaces of a process, by its pid on this host, in its record of ids.
pub fn ids(dump: &mut Dump<'_>, pid: i32) -> Result<()> {
    let vpid = dump.tasks.iter().find(|task| task.pid == pid).map_or(pid, |task| task.vpid);
    let name = u32::try_from(vpid).map_err(|_| Error::new("a process has a negative id").pid(vpid))?;
    let entry = dump.model.ids.entry(name).or_default();
    fill(pid, entry).map_err(|e| e.pid(vpid))
}

fn fill(pid: i32, entry: &mut TaskKobjIdsEntry) -> Result<()> {
    for kind in Kind::ALL {
        let theirs = kind.of(&pid.to_string())?;
        *kind.field(entry) = theirs.is_some().then_some(kind.id(theirs != kind.of("self")?));
    }
    Ok(())
}

/// Captures the contents of all namespaces while the container is stopped.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let mut own = TaskKobjIdsEntry::default();
    fill(std::process::id().try_into().unwrap_or(0), &mut own)?;
    dump.model.inventory.root_ids = Some(own);
    dump.model.inventory.ns_per_id = Some(true);
    cgroup::dump(dump)?;
    user::dump(dump)?;
    mount::dump(dump)?;
    uts::dump(dump)?;
    ipc::dump(dump)?;
    net::dump(dump)?;
    pid::dump(dump)?;
    time::dump(dump)
}

/// Fills the namespaces of a container that has been built and runs nothing yet.
pub fn restore(restore: &Restore<'_>) -> Result<()> {
    user::restore(restore)?;
    uts::restore(restore)?;
    ipc::restore(restore)?;
    user::as_root_of(restore.target, || mount::restore(restore))
}

/// Puts the processes, by their pids inside, where they were among the container's control groups.
pub fn place(restore: &Restore<'_>, tree: &BTreeMap<i32, NewTask>) -> Result<()> {
    cgroup::place(restore, tree)
}

/// What can be done only when every process has its memory and its threads.
pub fn finish(restore: &Restore<'_>, threads: &[Thread]) -> Result<()> {
    ipc::finish(restore)?;
    cgroup::finish(restore, threads)?;
    pid::finish(restore)
}
