//! What proc file systems show: each the processes of one pid namespace.
//!
//! One that shows a namespace which the container has made can be mounted only when that is there again.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use super::class::Class;
use super::open_mount;
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::MntEntry;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::mountinfo::Mount;
use crate::checkpoint::namespaces::nested::pids::Pids;

/// What a proc file system shows: what the kernel calls the pid namespace of the process that it calls 1.
pub(super) fn shown(root: &OwnedFd, mount: &Mount) -> Result<PathBuf> {
    let root = open_mount(root, mount)?;
    let path = format!("/proc/self/fd/{}/1/ns/pid", root.as_raw_fd());
    std::fs::read_link(&path).map_err(|_| {
        Error::new("the container has mounted a proc of a pid namespace in which nobody is")
            .remedy("unmount it")
            .path(&mount.point)
    })
}

/// Refuses a proc in the container's own mount namespace that shows a pid namespace which the container has made.
pub(super) fn check_procs(init: i32, root: &OwnedFd, mounts: &[(Mount, Class)]) -> Result<()> {
    let own = Kind::Pid.of(&init.to_string())?;
    let later = |m: &Mount, c: &Class| *c == Class::Later && m.fstype == "proc" && m.root == "/";
    for (mount, _) in mounts.iter().filter(|(mount, class)| later(mount, class)) {
        if Some(shown(root, mount)?) != own {
            return Err(Error::new(
                "a proc of a pid namespace that the container has made is mounted outside of any mount namespace of its own",
            )
            .remedy("mount it in a mount namespace, as unshare --mount-proc does")
            .path(&mount.point));
        }
    }
    Ok(())
}

/// Of the mounts of a namespace, those that wait for a pid namespace.
pub fn waiting(pids: &Pids, entries: &[MntEntry]) -> BTreeSet<u32> {
    let mut late: BTreeSet<u32> =
        entries.iter().filter(|e| pids.procs.contains_key(&e.root_dev)).map(|e| e.mnt_id).collect();
    loop {
        let lies = |e: &&MntEntry| late.contains(&e.parent_mnt_id) && !late.contains(&e.mnt_id);
        match entries.iter().find(lies) {
            Some(entry) => late.insert(entry.mnt_id),
            None => return late,
        };
    }
}

/// The same of all namespaces.
pub fn all_waiting(model: &Model) -> Result<BTreeSet<u32>> {
    let pids = Pids::of(model)?;
    Ok(model.mountpoints.values().flat_map(|entries| waiting(&pids, entries)).collect())
}
