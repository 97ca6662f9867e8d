//! Mounts that are made again: a new file system, or a bind of one that is there.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::OFlag;

use super::table::fstype;
use super::{RENEWABLE, inner};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::MntEntry;
use crate::sys::mount::{FsContext, clone_tree};
use crate::sys::resolve::open_in_root;

/// The file system to make anew for a record, if it is one that can be.
pub(super) fn renewable(entry: &MntEntry) -> Option<&str> {
    fstype(entry).filter(|name| RENEWABLE.contains(name) && entry.root == "/")
}

/// Where a record stands in the table.
pub(super) fn position(images: &[MntEntry], entry: &MntEntry) -> usize {
    images.iter().position(|e| e.mnt_id == entry.mnt_id).unwrap_or(images.len())
}

/// The mount of the same file system that a mount is a bind of: the first through which its root can be reached.
pub(super) fn source<'a>(images: &'a [MntEntry], entry: &MntEntry) -> Option<&'a MntEntry> {
    let shows = |e: &&MntEntry| {
        e.mnt_id != entry.mnt_id
            && e.root_dev == entry.root_dev
            && Path::new(&entry.root).starts_with(&e.root)
    };
    let first = images.iter().find(shows)?;
    // Of several mounts of a whole file system, the first is the original.
    let equal = first.root == entry.root;
    (!equal || position(images, first) < position(images, entry)).then_some(first)
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

/// A new file system with the options that the kernel showed of the old one.
pub(super) fn fresh(name: &str, options: &str) -> Result<OwnedFd> {
    let text = |s: &str| CString::new(s).map_err(|_| Error::new("a mount option has a zero byte"));
    let context = FsContext::open(&text(name)?)
        .during("cannot make the file system", || format!("fsopen({name:?})"))?;
    for option in options.split(',').filter(|option| !option.is_empty()) {
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
}
