//! The table of the images on top of what config.json has made.
//!
//! ```text
//!   for each mount of the images, once the one it lies on, and the one it is a bind of, are there:
//!     at its place already   compare ─▶ fill ─▶ flags
//!     missing                make ────▶ fill ─▶ flags ─▶ attach       (only where config.json allows to mount)
//! ```

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::MsFlags;
use oci_spec::runtime::{Capability, Spec};

use super::class::{Planned, planned, resolved};
use super::make::{self, best, bind, fresh, position, renewable, source};
use super::table::fstype;
use super::{FILLED, detached, flags, inner, open_mount, options};
use crate::checkpoint::context::Restore;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::MntEntry;
use crate::checkpoint::namespaces::enter::within;
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::mountinfo::{self, Mount, NOSYMFOLLOW};
use crate::checkpoint::namespaces::tmpfs::{self, Policy};
use crate::sys::mount::{Attributes, FsContext, attach, set_attributes};
use crate::sys::resolve::open_in_root;
use crate::sys::stat;

/// Compares the tables, makes what is missing and fills each tmpfs. Returns what the container misses now.
pub fn restore(restore: &Restore<'_>) -> Result<Vec<String>> {
    let target = restore.target;
    let inits = Kind::Mnt.inits(restore.model);
    let Some(images) = restore.model.mountpoints.get(&inits) else { return Ok(Vec::new()) };
    if !Kind::Mnt.private(target.init)? {
        return Err(Error::new(
            "config.json gives the container no mount namespace, which the checkpoint has",
        ));
    }
    let plans = planned(&target.spec, &|path| resolved(&target.root, path));
    let host = mountinfo::of("self")?.into_iter().map(|mount| mount.dev).collect();
    let all = mountinfo::of(&target.init.to_string())?;
    let (done, filled, missing) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    let mut table = Table { restore, images, plans, host, all, done, filled, missing };
    let late = super::late::all_waiting(restore.model)?;
    let mut left: Vec<&MntEntry> = images.iter().filter(|e| !late.contains(&e.mnt_id)).collect();
    while !left.is_empty() {
        let (now, later): (Vec<_>, Vec<_>) = left.iter().copied().partition(|entry| table.ready(entry));
        let served = now.iter().find(|entry| make::served(images, &table.done, entry));
        let Some(entry) = served.or(now.first()).copied() else {
            return Err(Error::new("a mount of the checkpoint lies on one that it does not have")
                .path(&later[0].mountpoint));
        };
        table.place(entry).map_err(|e| e.path(&entry.mountpoint))?;
        left.retain(|other| other.mnt_id != entry.mnt_id);
    }
    Ok(table.missing)
}

struct Table<'a> {
    restore: &'a Restore<'a>,
    images: &'a [MntEntry],
    plans: Vec<Planned>,
    /// What is mounted in the container now.
    all: Vec<Mount>,
    /// Ids of the mounts that are there.
    done: BTreeSet<u32>,
    /// Devices of the file systems of this host.
    host: BTreeSet<u32>,
    /// Devices whose contents have been put back.
    filled: BTreeSet<u32>,
    /// What this machine does not have.
    missing: Vec<String>,
}

impl Table<'_> {
    /// Whether all that a mount needs is there: what it lies on, what lies below it at the same place, and its original
    /// unless it has been made already.
    fn ready(&self, entry: &MntEntry) -> bool {
        let there = |id: u32| self.done.contains(&id);
        let known = |id: u32| self.images.iter().any(|e| e.mnt_id == id);
        let parent = entry.parent_mnt_id;
        let lies = parent == entry.mnt_id || !known(parent) || there(parent);
        let below = self.images.iter().take(position(self.images, entry));
        let covered = |e: &MntEntry| e.mountpoint != entry.mountpoint || there(e.mnt_id);
        let made = || source(self.images, entry).is_none_or(|e| there(e.mnt_id));
        lies && below.clone().all(covered) && (self.at_place(entry).is_some() || made())
    }

    /// What lies where a mount is to be: made by config.json, or propagated from one made here.
    fn at_place(&self, entry: &MntEntry) -> Option<&Mount> {
        let below = self.images.iter().take(position(self.images, entry));
        let nth = below.filter(|e| e.mountpoint == entry.mountpoint).count();
        self.all.iter().filter(|mount| mount.point == Path::new(&entry.mountpoint)).nth(nth)
    }

    /// One mount, on top of those that are done.
    fn place(&mut self, entry: &MntEntry) -> Result<()> {
        let target = self.restore.target;
        let point = Path::new(&entry.mountpoint);
        match self.at_place(entry).cloned() {
            _ if self.shows_other_groups(point) => {}
            Some(mount) => {
                compare(entry, &mount)?;
                self.reconfigure(entry, &mount)?;
                self.fill_there(entry, &mount)?;
                self.change(entry, &mount)?;
            }
            // Under another kernel: config.json protects a file of /proc or /sys that this one does not have.
            None if protects(&target.spec, point) && is_missing(&target.root, point) => {}
            None if fstype(entry) == Some("cgroup") && self.view_of_groups(point).is_some() => {
                let what = "this machine has no such hierarchy of control groups, which the container had";
                self.missing.push(format!("{what}: {}", point.display()));
            }
            None => {
                may_mount(&target.spec, entry)?;
                self.make(entry)?;
                self.all = mountinfo::of(&target.init.to_string())?;
            }
        }
        self.done.insert(entry.mnt_id);
        Ok(())
    }

    /// The place of config.json's view of the control groups that a path lies in.
    fn view_of_groups(&self, point: &Path) -> Option<&Path> {
        let views = self.plans.iter().filter(|plan| plan.groups).map(|plan| plan.point.as_path());
        views.into_iter().find(|view| point.starts_with(view))
    }

    /// Whether a path lies in a view of control groups that are of version 2 here and were of version 1, or the other way
    /// round: config.json asks for a view of whatever there is.
    fn shows_other_groups(&self, point: &Path) -> bool {
        let Some(view) = self.view_of_groups(point) else { return false };
        let was = self.images.iter().find(|entry| Path::new(&entry.mountpoint) == view).and_then(fstype);
        let is = self.all.iter().find(|mount| mount.point == view).map(|mount| mount.fstype.as_str());
        let unified = |name: Option<&str>| name.map(|name| name == "cgroup2");
        unified(was) != unified(is)
    }

    /// Whether the path of a mount of the images leads to it now.
    fn open(&self, entry: &MntEntry, live: &[Mount]) -> bool {
        let point = Path::new(&entry.mountpoint);
        let below = self.images.iter().take(position(self.images, entry));
        let nth = below.filter(|e| e.mountpoint == entry.mountpoint).count();
        let place = open_in_root(&self.restore.target.root, inner(point), OFlag::O_PATH);
        let leads = place.ok().and_then(|place| stat::place(&place).ok()).map_or(0, |place| place.mount);
        let there = live.iter().filter(|mount| mount.point == point).nth(nth);
        there.is_some_and(|mount| leads == 0 || leads == u64::from(mount.id))
    }

    /// Makes a mount that the container had made itself.
    fn make(&mut self, entry: &MntEntry) -> Result<()> {
        let target = self.restore.target;
        let (root, images) = (target.root.as_fd(), self.images);
        let live = mountinfo::of(&target.init.to_string())?;
        let mapped = Kind::User.private(target.init)?;
        let original = best(images, &self.done, entry, &|e| self.open(e, &live));
        let tree = within(target.init, &[Kind::Pid, Kind::Net, Kind::Ipc, Kind::Mnt], || {
            match (original, renewable(entry)) {
                (Some(original), _) => bind(root, entry, original),
                (None, Some(name)) if mapped => make::of_users(name, true).and_then(|()| fresh(name, entry)),
                (None, Some(name)) => fresh(name, entry),
                (None, None) => {
                    Err(Error::new("the mount cannot be made again: what it shows is not in the checkpoint"))
                }
            }
        })?;
        self.fill(entry, tree.as_fd(), BTreeSet::new())?;
        let wanted = flags::of(entry);
        let attributes =
            Attributes { set: flags::attributes(wanted), clear: flags::ALL, ..Attributes::default() };
        let steps = make::propagation(entry, original);
        let steps = steps.into_iter().map(|propagation| Attributes { propagation, ..Attributes::default() });
        within(target.init, &[Kind::Mnt], || {
            for attributes in steps.chain([attributes]) {
                set_attributes(&tree, attributes, false)
                    .during("cannot set the flags of the mount", || {
                        format!("mount_setattr(_, {attributes:?})")
                    })?;
            }
            let path = Path::new(&entry.mountpoint);
            let place = open_in_root(root, inner(path), OFlag::O_PATH)
                .during("cannot find the place of the mount", || {
                    format!("openat2(_, {path:?}, O_PATH, RESOLVE_IN_ROOT)")
                })?;
            attach(&tree, &place).during("cannot make the mount", || format!("move_mount(_, {path:?})"))
        })
    }

    /// Gives a file system that config.json has mounted the options that the container has changed since: before its
    /// contents, which may need the room.
    fn reconfigure(&self, entry: &MntEntry, mount: &Mount) -> Result<()> {
        let target = self.restore.target;
        let own = entry.ext_key.is_none() && mount.root == "/" && !self.host.contains(&mount.dev);
        if !own || !may(&target.spec, Capability::SysAdmin) || !options::differ(mount, &entry.options) {
            return Ok(());
        }
        options::set(mount, open_mount(&target.root, mount)?, &entry.options)
    }

    /// Fills a tmpfs that lies at its place.
    fn fill_there(&mut self, entry: &MntEntry, mount: &Mount) -> Result<()> {
        if !self.saved(entry) {
            return Ok(());
        }
        // A file system that is read-only as a whole was empty, or filled by whoever made it.
        if mount.super_flags.contains(MsFlags::MS_RDONLY) {
            return tmpfs::verify(self.restore.images.raw_open(&tmpfs::name(entry.root_dev))?);
        }
        if self.plans.iter().any(|plan| plan.host && plan.point == mount.point) {
            return Err(Error::new(
                "config.json mounts something of the host where the checkpoint has a tmpfs",
            ));
        }
        let target = self.restore.target;
        let place = open_mount(&target.root, mount)?;
        let inside = self.all.iter().filter(|m| m.point != mount.point && m.within(&mount.point));
        let keep: BTreeSet<PathBuf> =
            inside.filter_map(|m| m.point.strip_prefix(&mount.point).ok().map(Path::to_owned)).collect();
        let on_top = self.all.iter().filter(|m| m.point == mount.point).count() > 1;
        if keep.is_empty() && !on_top && !mount.flags.contains(MsFlags::MS_RDONLY) {
            // Nothing hides any of it, and it can be written: a copy, and the kernel's wait for its end, would be wasted.
            return self.fill(entry, place.as_fd(), keep);
        }
        let copy = within(target.init, &[Kind::Mnt], || detached(&place))?;
        let clear = Attributes { clear: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
        set_attributes(&copy, clear, false)
            .during("cannot open the mount for writing", || "mount_setattr(_)".into())?;
        self.fill(entry, copy.as_fd(), keep)
    }

    fn saved(&self, entry: &MntEntry) -> bool {
        fstype(entry).is_some_and(|kind| FILLED.contains(&kind))
            && entry.root == "/"
            && entry.ext_key.is_none()
            && !self.filled.contains(&entry.root_dev)
            && self.restore.images.exists(&tmpfs::name(entry.root_dev))
    }

    /// Puts saved contents into a tmpfs, and makes it read-only as a whole where it was.
    fn fill(&mut self, entry: &MntEntry, tree: impl AsFd, keep: BTreeSet<PathBuf>) -> Result<()> {
        if !self.saved(entry) {
            return Ok(());
        }
        let devices = may_make_devices(self.restore)?;
        let archive = self.restore.images.raw_open(&tmpfs::name(entry.root_dev))?;
        let owners = self.restore.owners.of_archives(self.restore.model, self.restore.target.init)?;
        tmpfs::unpack(&tree, archive, &Policy { devices, keep, owners })?;
        self.filled.insert(entry.root_dev);
        seal(entry, tree)
    }

    /// Gives what config.json has mounted the flags that the container has changed since. Towards less, always;
    /// towards more, where it may mount.
    fn change(&self, entry: &MntEntry, mount: &Mount) -> Result<()> {
        let target = self.restore.target;
        let mut wanted = flags::of(entry);
        if self.restore.model.extension.is_none() {
            // CRIU does not save this one: config.json knows.
            wanted |= mount.flags & NOSYMFOLLOW;
        }
        let loosen = may(&target.spec, Capability::SysAdmin) && entry.ext_key.is_none();
        let Some(attributes) = flags::change(mount.flags, wanted, loosen) else { return Ok(()) };
        let place = open_mount(&target.root, mount)?;
        within(target.init, &[Kind::Mnt], || {
            set_attributes(&place, attributes, false)
                .during("cannot set the flags of the mount", || format!("mount_setattr(_, {attributes:?})"))
        })
    }
}

/// Makes a file system read-only as a whole where it was.
pub(super) fn seal(entry: &MntEntry, tree: impl AsFd) -> Result<()> {
    if entry.sb_flags.is_some_and(|bits| u64::from(bits) & libc::MS_RDONLY != 0) {
        FsContext::pick(&tree)
            .and_then(|context| context.flag(c"ro").and_then(|()| context.reconfigure()))
            .during("cannot make the file system read-only", || "fsconfig(_, \"ro\")".into())?;
    }
    Ok(())
}

/// What config.json made at a place must be of the kind that was there.
fn compare(entry: &MntEntry, mount: &Mount) -> Result<()> {
    // Of the host's: the new config.json says what.
    if entry.ext_key.is_some() || entry.mountpoint == "/" {
        return Ok(());
    }
    let plain = |name: &str| name.trim_end_matches('2').to_owned();
    match fstype(entry) {
        Some(name) if plain(name) != plain(&mount.fstype) => Err(Error::new(format!(
            "config.json mounts a {} where the checkpoint has a {name}",
            mount.fstype
        ))),
        _ => Ok(()),
    }
}

/// Whether config.json masks a path, or makes it read-only.
fn protects(spec: &Spec, point: &Path) -> bool {
    let Some(linux) = spec.linux() else { return false };
    let paths = linux.masked_paths().iter().chain(linux.readonly_paths());
    paths.flatten().any(|path| Path::new(path) == point)
}

/// Whether there is nothing at a path of the container.
fn is_missing(root: impl AsFd, point: &Path) -> bool {
    matches!(open_in_root(root, inner(point), OFlag::O_PATH), Err(Errno::ENOENT))
}

/// A container that could not have mounted anything does not get a mount from an image.
pub(super) fn may_mount(spec: &Spec, entry: &MntEntry) -> Result<()> {
    if entry.ext_key.is_some() {
        return Err(Error::new("config.json lacks a mount from the host that the checkpoint has")
            .remedy("add it to the mounts of config.json"));
    }
    match may(spec, Capability::SysAdmin) {
        true => Ok(()),
        false => Err(Error::new("the checkpoint has a mount that config.json does not make")
            .remedy("add it to the mounts of config.json, or give the capability CAP_SYS_ADMIN")),
    }
}

/// Whether the container could have made devices: in a user namespace nobody can.
pub(super) fn may_make_devices(restore: &Restore<'_>) -> Result<bool> {
    Ok(may(&restore.target.spec, Capability::Mknod) && !Kind::User.private(restore.target.init)?)
}

pub(super) fn may(spec: &Spec, capability: Capability) -> bool {
    let capabilities = spec.process().as_ref().and_then(|p| p.capabilities().as_ref());
    capabilities.and_then(|c| c.bounding().as_ref()).is_some_and(|set| set.contains(&capability))
}
