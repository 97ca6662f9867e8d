//! Mounts that show what is made after the mounts: namespaces.
//!
//! ```text
//!   proc    the processes of one pid namespace      extension `pids`: by the device of the file system
//!   nsfs    a namespace that a mount keeps          extension `kept`: by the root of the mount, net:[4026532332]
//! ```
//!
//! Where such a namespace is of the container's making, the mount and all that lies on it wait until it is there again.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::class::Class;
use super::make::shows;
use super::open_mount;
use crate::checkpoint::context::{Dump, Options, Restore, Source};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::MntEntry;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::enter::door;
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::mountinfo::Mount;
use crate::checkpoint::namespaces::nested;
use crate::checkpoint::namespaces::nested::pids::{self, Pids};

/// The extension that says which namespaces mounts keep. CRIU would not know what to mount.
pub const EXTENSION: &str = "kept";

/// What mounts of the images wait for.
#[derive(Debug, Clone, Default)]
pub struct Late {
    pids: Pids,
    kept: BTreeMap<String, u32>,
}

impl Late {
    /// Of these images.
    pub fn of(model: &Model) -> Result<Self> {
        Ok(Self { pids: Pids::of(model)?, kept: model.extension(EXTENSION)? })
    }

    /// Of the mounts of a namespace, those that wait.
    pub fn waiting(&self, entries: &[MntEntry]) -> BTreeSet<u32> {
        let shows = |e: &&MntEntry| {
            self.pids.procs.contains_key(&e.root_dev)
                || self.kept.contains_key(&e.root) && kind(&e.root).is_some()
        };
        let mut late: BTreeSet<u32> = entries.iter().filter(shows).map(|e| e.mnt_id).collect();
        loop {
            let waits = |e: &MntEntry| late.contains(&e.parent_mnt_id) || is_part_of_late(entries, &late, e);
            match entries.iter().find(|e| !late.contains(&e.mnt_id) && waits(e)) {
                Some(entry) => late.insert(entry.mnt_id),
                None => return late,
            };
        }
    }

    /// A way into the pid namespace that a file system belongs to.
    pub fn pid_door(&self, restore: &Restore<'_>, entry: &MntEntry) -> Result<OwnedFd> {
        pids::door_to(restore, self.pids.procs.get(&entry.root_dev).copied().unwrap_or(0))
    }

    /// A way into the namespace that a mount keeps, if it keeps one.
    pub fn kept(&self, restore: &Restore<'_>, entry: &MntEntry) -> Result<Option<OwnedFd>> {
        let (Some(id), Some(kind)) = (self.kept.get(&entry.root), kind(&entry.root)) else { return Ok(None) };
        match restore.made.door(*id)? {
            Some(door) => Ok(Some(door)),
            None if *id == kind.inits(restore.model) => door(restore.target.init, kind).map(Some),
            None => Err(Error::new(format!("the {} namespace {id} was not made again", kind.title()))),
        }
    }
}

/// Whether a mount shows a part of a file system that can be reached through mounts only which wait.
fn is_part_of_late(entries: &[MntEntry], late: &BTreeSet<u32>, entry: &MntEntry) -> bool {
    let mut sources = entries.iter().filter(|e| e.mnt_id != entry.mnt_id && shows(e, entry)).peekable();
    entry.root != "/" && sources.peek().is_some() && sources.all(|e| late.contains(&e.mnt_id))
}

/// The images with those mounts last that wait: the first of several mounts of a file system makes it.
pub fn in_order(mut model: Cow<'_, Model>) -> Result<Cow<'_, Model>> {
    let waiting = all_waiting(&model)?;
    if !waiting.is_empty() {
        let tables = model.to_mut().mountpoints.values_mut();
        tables.for_each(|entries| entries.sort_by_key(|e| waiting.contains(&e.mnt_id)));
    }
    Ok(model)
}

/// The mounts of all namespaces that wait.
pub fn all_waiting(model: &Model) -> Result<BTreeSet<u32>> {
    let late = Late::of(model)?;
    Ok(model.mountpoints.values().flat_map(|entries| late.waiting(entries)).collect())
}

/// The kind of the namespace that the root of a mount names.
fn kind(root: &str) -> Option<Kind> {
    let (name, _) = root.trim_start_matches('/').split_once(":[")?;
    Kind::ALL.into_iter().find(|kind| kind.name() == name)
}

/// What a proc file system shows: what the kernel calls the pid namespace of the process that it calls 1.
fn shown(root: &OwnedFd, mount: &Mount) -> Result<PathBuf> {
    let root = open_mount(root, mount)?;
    let path = format!("/proc/self/fd/{}/1/ns/pid", root.as_raw_fd());
    std::fs::read_link(&path).map_err(|_| {
        Error::new("the container has mounted a proc of a pid namespace in which nobody is")
            .remedy("unmount it")
            .path(&mount.point)
    })
}

/// The namespace that a mount keeps.
fn held(root: &OwnedFd, mount: &Mount) -> Result<OwnedFd> {
    let place = open_mount(root, mount)?;
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .during("cannot open a namespace", || format!("open({path:?}, O_RDONLY)"))
        .map_err(|e| e.path(&mount.point))
}

fn is_proc(mount: &Mount, class: &Class) -> bool {
    *class == Class::Later && mount.fstype == "proc" && mount.root == "/"
}

fn keeps(mount: &Mount, class: &Class) -> bool {
    *class == Class::Later && mount.fstype == "nsfs"
}

/// Everything about these mounts of a namespace, seen from its root, that cannot be made again.
pub(super) fn check(
    options: &Options,
    source: &Source,
    root: &OwnedFd,
    mounts: &[(Mount, Class)],
) -> Vec<Error> {
    let one = |(mount, class): &(Mount, Class)| match (keeps(mount, class), is_proc(mount, class)) {
        (true, _) => held(root, mount)
            .and_then(|door| nested::check_door(options, source, &door).map_err(|e| e.path(&mount.point)))
            .err(),
        // One that another lies over shows nobody anything.
        (_, true) if open_mount(root, mount).is_ok() => shown(root, mount).err(),
        _ => None,
    };
    mounts.iter().filter_map(one).collect()
}

/// Notes which namespaces they show.
pub(super) fn note(dump: &mut Dump<'_>, root: &OwnedFd, mounts: &[(Mount, Class)]) -> Result<()> {
    let mut kept: BTreeMap<String, u32> = dump.model.extension(EXTENSION)?;
    let before = kept.len();
    for (mount, class) in mounts {
        if keeps(mount, class) && !kept.contains_key(&mount.root) {
            kept.insert(mount.root.clone(), dump.spaces.of_door(dump.source.init, held(root, mount)?)?);
        }
        if is_proc(mount, class)
            && let Ok(name) = shown(root, mount)
        {
            dump.spaces.show(mount.dev, &name);
        }
    }
    match kept.len() == before {
        true => Ok(()),
        false => dump.model.set_critical_extension(EXTENSION, &kept),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_on_a_mount_waits_with_it() {
        let entry = |mnt_id, parent_mnt_id, root_dev, root: &str| MntEntry {
            mnt_id,
            parent_mnt_id,
            root_dev,
            root: root.into(),
            ..MntEntry::default()
        };
        let all = [
            entry(1, 0, 7, "/"),
            entry(2, 1, 8, "/"),
            entry(3, 2, 9, "/"),
            entry(4, 1, 4, "net:[4026532332]"),
            entry(5, 1, 4, "net:[4026532333]"),
        ];
        let pids = Pids { procs: [(8, 21)].into(), ..Pids::default() };
        let late = Late { pids, kept: [("net:[4026532332]".into(), 22), ("odd:[5]".into(), 23)].into() };
        assert_eq!(late.waiting(&all), [2, 3, 4].into());
        // A tmpfs that lies on proc and elsewhere is made where nothing has to wait, its part on proc alone is not.
        let all = [
            entry(1, 0, 7, "/"),
            entry(2, 1, 8, "/"),
            entry(3, 2, 9, "/"),
            entry(6, 1, 9, "/"),
            entry(4, 2, 10, "/"),
            entry(5, 1, 10, "/part"),
        ];
        assert_eq!(late.waiting(&all), [2, 3, 4, 5].into());
        let extension = serde_json::to_vec(&late.kept).unwrap();
        let mut model = Model { mountpoints: [(11, all.to_vec())].into(), ..Model::default() };
        model.mountpoints.insert(12, vec![entry(8, 9, 4, "net:[4026532332]"), entry(9, 0, 7, "/")]);
        model.set_critical_extension_data(EXTENSION, extension);
        let order: Vec<u32> =
            in_order(Cow::Owned(model)).unwrap().mountpoints[&12].iter().map(|e| e.mnt_id).collect();
        assert_eq!(order, [9, 8]);
        assert_eq!((kind("cgroup:[5]"), kind("odd:[5]"), kind("/")), (Some(Kind::Cgroup), None, None));
    }
}
