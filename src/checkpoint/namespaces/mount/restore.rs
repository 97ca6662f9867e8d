//! The table of the images on top of what config.json has made.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::mount::MsFlags;
use oci_spec::runtime::{Capability, Spec};

use super::class::{planned, resolved};
use super::table::fstype;
use super::{RENEWABLE, detached, inner, open_mount};
use crate::checkpoint::context::Restore;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::MntEntry;
use crate::checkpoint::namespaces::enter::within;
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::mountinfo::{self, Mount};
use crate::checkpoint::namespaces::tmpfs::{self, Policy};
use crate::sys::mount::{Attributes, FsContext, attach, clone_tree, set_attributes};
use crate::sys::resolve::open_in_root;

/// Mounts are told by where they lie, and how many lie there already.
type Key = (PathBuf, usize);

/// Compares the tables, makes what is missing and fills each tmpfs.
pub fn restore(restore: &Restore<'_>) -> Result<()> {
    let (target, model) = (restore.target, restore.model);
    let Some(images) = model.mountpoints.values().next() else { return Ok(()) };
    let init = target.init;
    let there = keyed(mountinfo::of(&init.to_string())?, |mount| mount.point.clone());
    let wanted = keyed(images.iter().collect(), |entry| PathBuf::from(&entry.mountpoint));
    let mut missing = Vec::new();
    for entry in ordered(images) {
        let Some((key, _)) = wanted.iter().find(|(_, e)| e.mnt_id == entry.mnt_id) else { continue };
        match there.get(key) {
            Some(mount) => compare(entry, mount)?,
            None => missing.push(entry),
        }
    }
    if !missing.is_empty() {
        may_mount(&target.spec, missing[0])?;
        let root = target.root.as_fd();
        within(init, &[Kind::Pid, Kind::Net, Kind::Ipc, Kind::Mnt], || {
            missing
                .iter()
                .try_for_each(|entry| make(root, entry, images).map_err(|e| e.path(&entry.mountpoint)))
        })?;
    }
    fill(restore, &wanted)
}

/// A table by places.
fn keyed<T>(mounts: Vec<T>, point: impl Fn(&T) -> PathBuf) -> BTreeMap<Key, T> {
    let mut count: BTreeMap<PathBuf, usize> = BTreeMap::new();
    let mut table = BTreeMap::new();
    for mount in mounts {
        let point = point(&mount);
        let nth = count.entry(point.clone()).or_default();
        *nth += 1;
        table.insert((point, *nth), mount);
    }
    table
}

/// Mounts after those they lie on.
fn ordered(images: &[MntEntry]) -> Vec<&MntEntry> {
    let ids: BTreeSet<u32> = images.iter().map(|e| e.mnt_id).collect();
    let top = |e: &&MntEntry| !ids.contains(&e.parent_mnt_id) || e.parent_mnt_id == e.mnt_id;
    let mut order: Vec<&MntEntry> = images.iter().filter(top).collect();
    let mut at = 0;
    while let Some(parent) = order.get(at).copied() {
        order.extend(images.iter().filter(|e| e.parent_mnt_id == parent.mnt_id && e.mnt_id != parent.mnt_id));
        at += 1;
    }
    order
}

/// What config.json made at a place must be of the kind that was there.
fn compare(entry: &MntEntry, mount: &Mount) -> Result<()> {
    // Of the host's: the new config.json says what.
    if entry.ext_key.is_some() || entry.mountpoint == "/" {
        return Ok(());
    }
    match fstype(entry) {
        Some(name)
            if name != mount.fstype && name.trim_end_matches('2') != mount.fstype.trim_end_matches('2') =>
        {
            Err(Error::new(format!(
                "config.json mounts a {} where the checkpoint has a {name}",
                mount.fstype
            ))
            .path(&entry.mountpoint))
        }
        _ => Ok(()),
    }
}

/// A container that could not have mounted anything does not get a mount from an image.
fn may_mount(spec: &Spec, entry: &MntEntry) -> Result<()> {
    if entry.ext_key.is_some() {
        return Err(Error::new("config.json lacks a mount from the host that the checkpoint has")
            .path(&entry.mountpoint)
            .remedy("add it to the mounts of config.json"));
    }
    match may(spec, Capability::SysAdmin) {
        true => Ok(()),
        false => Err(Error::new("the checkpoint has a mount that config.json does not make")
            .path(&entry.mountpoint)
            .remedy("add it to the mounts of config.json, or give the capability CAP_SYS_ADMIN")),
    }
}

fn may(spec: &Spec, capability: Capability) -> bool {
    let capabilities = spec.process().as_ref().and_then(|p| p.capabilities().as_ref());
    capabilities.and_then(|c| c.bounding().as_ref()).is_some_and(|set| set.contains(&capability))
}

/// Makes a mount that the container had made itself. Runs inside its namespaces.
fn make(root: impl AsFd, entry: &MntEntry, images: &[MntEntry]) -> Result<()> {
    if entry.ext_key.is_some() {
        return Err(Error::new("config.json lacks a mount from the host that the checkpoint has"));
    }
    let path = Path::new(&entry.mountpoint);
    let place = open_in_root(&root, inner(path), OFlag::O_PATH)
        .during("cannot find the place of the mount", || {
            format!("openat2(_, {path:?}, O_PATH, RESOLVE_IN_ROOT)")
        })?;
    let original =
        images.iter().find(|e| e.mnt_id != entry.mnt_id && e.root_dev == entry.root_dev && below(entry, e));
    let name = fstype(entry).filter(|name| RENEWABLE.contains(name) && entry.root == "/");
    let tree = match (original, name) {
        // Of several mounts of one file system the first in the table is the original, the others are its binds.
        (Some(first), None) => bind(&root, entry, first)?,
        (Some(first), Some(_)) if position(images, first) < position(images, entry) => {
            bind(&root, entry, first)?
        }
        (_, Some(name)) => fresh(name, &entry.options)?,
        (None, None) => {
            return Err(Error::new("the mount cannot be made again: its original is not in the checkpoint"));
        }
    };
    let flags = MsFlags::from_bits_truncate(entry.flags.into());
    let propagation = if flags.contains(MsFlags::MS_SHARED) { libc::MS_SHARED } else { libc::MS_PRIVATE };
    let attributes = Attributes { set: attributes(flags), clear: ALL, propagation, ..Attributes::default() };
    set_attributes(&tree, attributes, false)
        .during("cannot set the flags of the mount", || "mount_setattr(_)".into())?;
    attach(&tree, &place).during("cannot make the mount", || format!("move_mount(_, {path:?})"))
}

/// Whether the root of `entry` can be reached through `other`.
fn below(entry: &MntEntry, other: &MntEntry) -> bool {
    Path::new(&entry.root).starts_with(&other.root)
}

fn position(images: &[MntEntry], entry: &MntEntry) -> Option<usize> {
    images.iter().position(|e| e.mnt_id == entry.mnt_id)
}

fn bind(root: impl AsFd, entry: &MntEntry, original: &MntEntry) -> Result<OwnedFd> {
    let rest = Path::new(&entry.root).strip_prefix(&original.root).unwrap_or(Path::new(""));
    let from = Path::new(&original.mountpoint).join(rest);
    let place = open_in_root(root, inner(&from), OFlag::O_PATH)
        .during("cannot find what the mount shows", || {
            format!("openat2(_, {from:?}, O_PATH, RESOLVE_IN_ROOT)")
        })?;
    clone_tree(place.as_fd(), c"", false)
        .during("cannot copy the mount", || format!("open_tree(_, {from:?}, OPEN_TREE_CLONE)"))
}

fn fresh(name: &str, options: &str) -> Result<OwnedFd> {
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

/// Attributes that a record decides.
const ALL: u64 = libc::MOUNT_ATTR_RDONLY
    | libc::MOUNT_ATTR_NOSUID
    | libc::MOUNT_ATTR_NODEV
    | libc::MOUNT_ATTR_NOEXEC
    | libc::MOUNT_ATTR_NODIRATIME
    | libc::MOUNT_ATTR__ATIME;

fn attributes(flags: MsFlags) -> u64 {
    let pairs = [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        (MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME),
        (MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
    ];
    pairs.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, attribute)| attribute).sum()
}

/// Puts saved contents into each tmpfs.
fn fill(restore: &Restore<'_>, wanted: &BTreeMap<Key, &MntEntry>) -> Result<()> {
    let target = restore.target;
    let mounts = mountinfo::of(&target.init.to_string())?;
    let there = keyed(mounts.iter().collect(), |mount| mount.point.clone());
    let plans = planned(&target.spec, &|path| resolved(&target.root, path));
    let mut done = BTreeSet::new();
    for (key, entry) in wanted {
        let name = tmpfs::name(entry.root_dev);
        let saved = fstype(entry) == Some("tmpfs") && entry.root == "/" && entry.ext_key.is_none();
        if !saved || !restore.images.exists(&name) || !done.insert(entry.root_dev) {
            continue;
        }
        let Some(mount) = there.get(key) else { continue };
        let host = plans.iter().any(|plan| plan.host && plan.point == mount.point);
        let failed = |e: Error| e.path(&mount.point);
        if host {
            return Err(failed(Error::new(
                "config.json mounts something of the host where the checkpoint has a tmpfs",
            )));
        }
        // A file system that is read-only as a whole was empty, or filled by whoever made it.
        if mount.super_flags.contains(MsFlags::MS_RDONLY) {
            tmpfs::verify(restore.images.raw_open(&name)?).map_err(failed)?;
            continue;
        }
        let place = open_mount(&target.root, mount)?;
        let copy = within(target.init, &[Kind::Mnt], || detached(&place)).map_err(failed)?;
        let clear = Attributes { clear: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
        set_attributes(&copy, clear, false)
            .during("cannot open the mount for writing", || "mount_setattr(_)".into())?;
        let inside = mounts.iter().filter(|m| m.point != mount.point && m.within(&mount.point));
        let keep =
            inside.filter_map(|m| m.point.strip_prefix(&mount.point).ok().map(Path::to_owned)).collect();
        let policy = Policy { devices: may(&target.spec, Capability::Mknod), keep };
        tmpfs::unpack(&copy, restore.images.raw_open(&name)?, &policy).map_err(failed)?;
    }
    Ok(())
}
