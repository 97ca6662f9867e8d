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
pub mod nested;
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
use crate::checkpoint::remote::{Conduit, Thread};
use crate::checkpoint::task::status::{self, Status};

pub use enter::within;
pub use kind::Kind;

/// Everything about the namespaces of these processes (pids of this host) that keeps them from being dumped.
pub fn check(options: &Options, source: &Source, pids: &[i32]) -> Vec<Error> {
    let mut found = nested::check(options, source, pids);
    found.extend(user::check(source).err());
    let init = source.init.to_string();
    if let (Ok(theirs), Ok(ours)) = (Kind::Mnt.of(&init), Kind::Mnt.of("self"))
        && theirs == ours
    {
        found.push(
            Error::new("the container is in the host's mount namespace, which cannot be checkpointed")
                .remedy("give it one of its own: {\"type\": \"mount\"} in linux.namespaces"),
        );
    }
    match mount::check(options, source) {
        Ok(mounts) => found.extend(mounts),
        Err(e) => found.push(e),
    }
    found.extend(ipc::check(source, pids));
    found.extend(net::check(options, source));
    found
}

/// The id that a thread has in the container, whose first process is `init`; the host's if it cannot be told.
fn vpid(init: i32, tid: i32) -> i32 {
    let inside = || Status::of(tid).ok()?.tid_at(status::depth(init).ok()?);
    inside().unwrap_or(tid)
}

/// Fills in the namespaces of a process, by its pid on this host, in its record of ids.
pub fn ids(dump: &mut Dump<'_>, pid: i32) -> Result<()> {
    let vpid = dump.tasks.iter().find(|task| task.pid == pid).map_or(pid, |task| task.vpid);
    let name = u32::try_from(vpid).map_err(|_| Error::new("a process has a negative id").pid(vpid))?;
    let entry = dump.model.ids.entry(name).or_default();
    for kind in Kind::ALL {
        *kind.field(entry) = dump.spaces.of_task(dump.source.init, pid, kind).map_err(|e| e.pid(vpid))?;
    }
    Ok(())
}

/// Captures the contents of all namespaces while the container is stopped.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let mut own = TaskKobjIdsEntry::default();
    for kind in Kind::ALL {
        *kind.field(&mut own) = kind.of("self")?.map(|_| kind.id(false));
    }
    dump.model.inventory.root_ids = Some(own);
    dump.model.inventory.ns_per_id = Some(true);
    cgroup::dump(dump)?;
    user::dump(dump)?;
    mount::dump(dump)?;
    ipc::dump(dump)?;
    uts::dump(dump)?;
    net::dump(dump)?;
    pid::dump(dump)?;
    time::dump(dump)?;
    nested::contents(dump)
}

/// Fills the namespaces of a container that has been built and runs nothing yet. Returns what it misses.
pub fn restore(restore: &Restore<'_>) -> Result<Vec<String>> {
    cgroup::restore(restore)?;
    uts::restore(restore)?;
    ipc::restore(restore)?;
    user::as_root_of(restore.target, || mount::restore(restore))
}

/// Puts the processes, by their pids inside, where they were among the container's control groups.
pub fn place(restore: &Restore<'_>, tree: &mut BTreeMap<i32, NewTask>, conduit: &Conduit) -> Result<()> {
    cgroup::place(restore, tree, conduit)
}

/// What can be done only when every process has its memory and its threads.
pub fn finish(restore: &Restore<'_>, threads: &[Thread]) -> Result<()> {
    ipc::finish(restore)?;
    cgroup::finish(restore, threads)?;
    nested::pids::finish(restore)?;
    pid::finish(restore)
}
