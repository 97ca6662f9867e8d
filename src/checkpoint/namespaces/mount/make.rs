//! Mounts that are made again: a new file system, or a bind of one that is there.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::mount::MsFlags;

use super::table::fstype;
use super::{FILLED, RENEWABLE, inner};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::MntEntry;
use crate::sys::mount::{FsContext, clone_tree};
use crate::sys::resolve::open_in_root;

/// File systems that the root of a user namespace may mount anew.
const OF_USERS: [&str; 6] = ["tmpfs", "proc", "sysfs", "mqueue", "devpts", "overlay"];

/// Refuses a new file system that nobody could have mounted with the capabilities of a user namespace only. `mapped`: of
/// the container's own; an overlay works with the rights of whoever has mounted it.
pub(super) fn of_users(name: &str, mapped: bool) -> Result<()> {
    match OF_USERS.contains(&name) && !(mapped && name == "overlay") {
        true => Ok(()),
        false => Err(Error::new(format!(
            "the checkpoint has a new {name}, which config.json lets nobody in the container mount"
        ))
        .remedy("add it to the mounts of config.json")),
    }
}

/// The file system to make anew for a record, if it is one that can be.
pub(super) fn renewable(entry: &MntEntry) -> Option<&str> {
    fstype(entry).filter(|name| RENEWABLE.contains(name) && entry.root == "/")
}

/// Where a record stands in the table.
pub(super) fn position(images: &[MntEntry], entry: &MntEntry) -> usize {
    images.iter().position(|e| e.mnt_id == entry.mnt_id).unwrap_or(images.len())
}

/// Whether the root of a mount can be reached through another one, of the same file system.
pub(super) fn shows(other: &MntEntry, entry: &MntEntry) -> bool {
    other.root_dev == entry.root_dev && Path::new(&entry.root).starts_with(&other.root)
}

/// The mount of the same file system that a mount is a bind of: the first through which its root can be reached.
pub(super) fn source<'a>(images: &'a [MntEntry], entry: &MntEntry) -> Option<&'a MntEntry> {
    let first = images.iter().find(|e| e.mnt_id != entry.mnt_id && shows(e, entry))?;
    // Of several mounts of a whole file system, the first is the original.
    let equal = first.root == entry.root;
    (!equal || position(images, first) < position(images, entry)).then_some(first)
}

/// Of the mounts that a mount may be copied from, the one that brings it into its peer group, or makes it a slave of
/// whom it received from; else the first. One that another mount lies over is not `open`, and taken only where there is
/// no other.
pub(super) fn best<'a>(
    images: &'a [MntEntry],
    done: &BTreeSet<u32>,
    entry: &MntEntry,
    open: &dyn Fn(&MntEntry) -> bool,
) -> Option<&'a MntEntry> {
    let first = source(images, entry)?;
    let shows = |e: &&MntEntry| shows(e, entry) && done.contains(&e.mnt_id) && open(e);
    let first = if open(first) { first } else { images.iter().find(shows).unwrap_or(first) };
    let (shared, master) = groups(entry);
    let ranks: [&dyn Fn(&MntEntry) -> bool; 3] =
        [&|e| shared != 0 && groups(e).0 == shared, &|e| master != 0 && groups(e).0 == master, &|e| {
            master != 0 && groups(e) == (0, master)
        }];
    let of_rank = |rank: &&dyn Fn(&MntEntry) -> bool| images.iter().filter(shows).find(|e| rank(e));
    ranks.iter().find_map(of_rank).or(Some(first))
}

/// Its peer group, and the one it receives from; 0 for none.
pub(super) fn groups(entry: &MntEntry) -> (u32, u32) {
    (entry.shared_id.unwrap_or(0), entry.master_id.unwrap_or(0))
}

/// Whether nobody it should receive from is still to be made.
pub(super) fn served(images: &[MntEntry], done: &BTreeSet<u32>, entry: &MntEntry) -> bool {
    let (_, master) = groups(entry);
    let mut givers = images.iter().filter(|e| groups(e).0 == master);
    master == 0 || givers.clone().next().is_none() || givers.any(|e| done.contains(&e.mnt_id))
}

/// What makes a copy of `from`, or a new file system, receive and pass on mounts as `entry` says, in this order.
pub(super) fn propagation(entry: &MntEntry, from: Option<&MntEntry>) -> Vec<u64> {
    let ((shared, master), (peers, giver)) = (groups(entry), from.map_or((0, 0), groups));
    if MsFlags::from_bits_truncate(entry.flags.into()).contains(MsFlags::MS_UNBINDABLE) {
        return vec![libc::MS_UNBINDABLE];
    }
    let mut steps = match master {
        _ if shared != 0 && peers == shared => return Vec::new(),
        0 => vec![libc::MS_PRIVATE],
        _ if peers == master => vec![libc::MS_SLAVE],
        _ if (peers, giver) == (0, master) => Vec::new(),
        // Whom it received from is outside.
        _ => vec![libc::MS_PRIVATE],
    };
    if shared != 0 {
        steps.push(libc::MS_SHARED);
    }
    steps
}

/// A copy of what `original` shows where `entry` has its root.
pub(super) fn bind(root: impl AsFd, entry: &MntEntry, original: &MntEntry) -> Result<OwnedFd> {
    let rest = Path::new(&entry.root).strip_prefix(&original.root).unwrap_or(Path::new(""));
    let from = Path::new(&original.mountpoint).join(rest);
    let place = open_in_root(root, inner(&from), OFlag::O_PATH)
        .during("cannot find what the mount shows", || {
            format!("openat2(_, {from:?}, O_PATH, RESOLVE_IN_ROOT)")
        })?;
    clone_tree(place.as_fd(), c"", false)
        .during("cannot copy the mount", || format!("open_tree(_, {from:?}, OPEN_TREE_CLONE)"))
}

/// A new file system with the source, flags and options that the kernel showed of the old one. What is still to be
/// filled cannot be read-only yet. A proc shows the pid namespace in which children of this thread are born.
pub(super) fn fresh(name: &str, entry: &MntEntry) -> Result<OwnedFd> {
    let text = |s: &str| CString::new(s).map_err(|_| Error::new("a mount option has a zero byte"));
    let begin = if name == "proc" { FsContext::open_by_child } else { FsContext::open };
    let context =
        begin(&text(name)?).during("cannot make the file system", || format!("fsopen({name:?})"))?;
    if !matches!(entry.source.as_str(), "" | "none") {
        let source = &entry.source;
        context
            .string(c"source", &text(source)?)
            .during("cannot make the file system", || format!("fsconfig(_, \"source\", {source:?})"))?;
    }
    let set = MsFlags::from_bits_retain(entry.sb_flags.unwrap_or(0).into());
    let flags =
        [(MsFlags::MS_RDONLY, c"ro"), (MsFlags::MS_SYNCHRONOUS, c"sync"), (MsFlags::MS_DIRSYNC, c"dirsync")];
    let later = |flag| flag == MsFlags::MS_RDONLY && FILLED.contains(&name);
    for (_, key) in flags.iter().filter(|(flag, _)| set.contains(*flag) && !later(*flag)) {
        context.flag(key).during("cannot make the file system", || format!("fsconfig(_, {key:?})"))?;
    }
    for option in entry.options.split(',').filter(|option| !option.is_empty()) {
        let set = match option.split_once('=') {
            Some((key, value)) => context.string(&text(key)?, &text(value)?),
            None => context.flag(&text(option)?),
        };
        set.during("cannot make the file system", || format!("fsconfig(_, {option:?})"))?;
    }
    context.mount(0).during("cannot make the file system", || format!("fsmount({name:?})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(mnt_id: u32, root_dev: u32, root: &str) -> MntEntry {
        MntEntry { mnt_id, root_dev, root: root.into(), ..MntEntry::default() }
    }

    #[test]
    fn a_bind_is_made_of_what_shows_its_root() {
        let all = [
            entry(1, 7, "/bundle/rootfs"),
            entry(2, 8, "/"),
            entry(3, 8, "/"),
            entry(4, 8, "/dir/file"),
            entry(5, 7, "/bundle/rootfs/x"),
            entry(6, 7, "/elsewhere"),
            entry(7, 9, "/part/inner"),
            entry(8, 9, "/part"),
        ];
        let of = |n: usize| source(&all, &all[n]).map(|e| e.mnt_id);
        let found: Vec<_> = (0..all.len()).map(of).collect();
        assert_eq!(found, [None, None, Some(2), Some(2), Some(1), None, Some(8), None]);
    }

    #[test]
    fn a_covered_mount_is_copied_only_where_there_is_no_other() {
        let all = [entry(1, 7, "/"), entry(2, 7, "/"), entry(3, 7, "/file")];
        let done = (1..3).collect();
        let of = |open: &dyn Fn(&MntEntry) -> bool| best(&all, &done, &all[2], open).map(|e| e.mnt_id);
        assert_eq!(of(&|_| true), Some(1));
        assert_eq!(of(&|e| e.mnt_id != 1), Some(2));
        assert_eq!(of(&|_| false), Some(1));
    }

    #[test]
    fn groups_come_from_what_is_copied() {
        let of = |mnt_id, shared, master| MntEntry {
            mnt_id,
            shared_id: Some(shared),
            master_id: Some(master),
            ..entry(mnt_id, 7, "/")
        };
        let all = [
            of(1, 10, 0),
            of(2, 0, 10),
            of(3, 11, 10),
            of(4, 11, 10),
            of(5, 0, 0),
            of(6, 12, 0),
            of(7, 0, 99),
        ];
        let done = (1..8).collect();
        let plan = |n: usize| {
            let from = best(&all, &BTreeSet::from_iter(1..=n as u32), &all[n], &|_| true);
            (from.map(|e| e.mnt_id), propagation(&all[n], from))
        };
        let (private, slave, shared) = (libc::MS_PRIVATE, libc::MS_SLAVE, libc::MS_SHARED);
        assert_eq!(plan(1), (Some(1), vec![slave]));
        assert_eq!(plan(2), (Some(1), vec![slave, shared]));
        assert_eq!(plan(3), (Some(3), vec![]));
        assert_eq!(plan(4), (Some(1), vec![private]));
        assert_eq!(plan(5), (Some(1), vec![private, shared]));
        assert_eq!(plan(6), (Some(1), vec![private]));
        assert_eq!(propagation(&all[0], None), [private, shared]);
        assert!(served(&all, &done, &all[2]) && !served(&all, &BTreeSet::new(), &all[2]));
        assert!(served(&all, &BTreeSet::new(), &all[6]), "from outside");
    }
}
