//! The mount tables of namespaces that the container has made.
//!
//! ```text
//!   all tables:   the container's, then those of the namespaces that have been made
//!   each mount    a copy of one in these tables that shows the same, or a new file system
//!
//!   helper, a copy of the container's namespace: private ─▶ the root of the images over the old one ─▶ pivot_root
//!       ─▶ one mount after the other ─▶ peer groups, by MOVE_MOUNT_SET_GROUP
//! ```
//!
//! What shows a namespace that is made later waits for it: see `late`.
//!
//! Everything is private until all is in its place: a mount that is attached where another namespace listens would
//! appear there a second time.

mod live;

pub use live::{Tree, check, look, save};

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, fchdir, pivot_root};
use oci_spec::runtime::Capability;

use self::live::top;
use super::late::Late;
use super::make::{best, bind, fresh, groups, renewable, served, source};
use super::restore::may_mount;
use super::{FILLED, detached, flags, inner, open_mount, table};
use crate::checkpoint::context::Restore;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::MntEntry;
use crate::checkpoint::namespaces::enter::{Doors, door, doors, through};
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::tmpfs::{self, Policy};
use crate::sys::mount::{Attributes, attach, set_attributes, set_group};
use crate::sys::resolve::open_in_root;
use crate::sys::stat;

/// Where mounts are copied from, and made.
struct Place {
    door: OwnedFd,
    root: OwnedFd,
}

impl Place {
    fn doors(&self) -> Result<Doors> {
        let door =
            self.door.try_clone().during("cannot hold a namespace", || "fcntl(_, F_DUPFD_CLOEXEC)".into())?;
        Ok(vec![(door, Kind::Mnt)])
    }
}

/// A mount namespace in the making.
pub struct Builder<'a> {
    restore: &'a Restore<'a>,
    id: u32,
    /// The tables of all namespaces that are there, and at last of this one.
    all: Vec<MntEntry>,
    /// Whose they are, by mount.
    owners: BTreeMap<u32, u32>,
    places: BTreeMap<u32, Place>,
    done: BTreeSet<u32>,
    /// Those that wait for a namespace.
    waiting: BTreeSet<u32>,
    late: Late,
    /// The container could not have made this namespace without a user namespace around it.
    bounded: bool,
    /// The mounts of this namespace.
    trees: BTreeMap<u32, OwnedFd>,
}

/// Gives the namespace of a helper the mounts of the images, all of them private.
pub fn build<'a>(restore: &'a Restore<'_>, id: u32, helper: i32) -> Result<Builder<'a>> {
    let Some(entries) = restore.model.mountpoints.get(&id) else {
        return Err(Error::new(format!("the images lack mountpoints-{id}.img")));
    };
    let mut builder = begin(restore, id)?;
    builder.all.extend(entries.iter().cloned());
    builder.owners.extend(entries.iter().map(|e| (e.mnt_id, id)));
    builder.waiting.extend(builder.late.waiting(entries));
    builder.build(helper, entries)?;
    Ok(builder)
}

/// Makes those mounts of a namespace that is there otherwise which have waited for others.
pub fn build_late(restore: &Restore<'_>, id: u32) -> Result<()> {
    let entries = restore.model.mountpoints.get(&id).map_or(&[][..], Vec::as_slice);
    let mut builder = begin(restore, id)?;
    let late = builder.late.waiting(entries);
    let left: Vec<&MntEntry> = entries.iter().filter(|e| late.contains(&e.mnt_id)).collect();
    if left.is_empty() {
        return Ok(());
    }
    // Those of the container's are made first, then by number.
    let inits = Kind::Mnt.inits(restore.model);
    let earlier = |other: u32| id != inits && other != id && (other == inits || other < id);
    let before = restore.model.mountpoints.iter().filter(|(other, _)| earlier(**other));
    builder.done.extend(before.flat_map(|(_, entries)| entries.iter().map(|e| e.mnt_id)));
    builder.waiting.retain(|mount| !builder.done.contains(mount));
    if id == inits {
        left.iter().try_for_each(|e| {
            may_mount(&restore.target.spec, e).map_err(|error| error.path(&e.mountpoint))
        })?;
    }
    builder.pile(left, entries, None)?;
    // What lies on a shared mount has come to be shared, too, maybe with others than it was.
    through(builder.doors()?, || {
        let private = Attributes { propagation: libc::MS_PRIVATE, ..Attributes::default() };
        builder.trees.values().try_for_each(|tree| {
            set_attributes(tree, private, false)
                .during("cannot make a mount private", || "mount_setattr(_, MS_PRIVATE)".into())
        })
    })?;
    let late: Vec<MntEntry> = entries.iter().filter(|e| late.contains(&e.mnt_id)).cloned().collect();
    builder.share(&late)
}

/// With what is there already.
fn begin<'a>(restore: &'a Restore<'_>, id: u32) -> Result<Builder<'a>> {
    let (model, target) = (restore.model, restore.target);
    let inits = Kind::Mnt.inits(model);
    let clone = |fd: &OwnedFd| {
        fd.try_clone().during("cannot hold a directory", || "fcntl(_, F_DUPFD_CLOEXEC)".into())
    };
    let mut builder = Builder {
        restore,
        id,
        all: Vec::new(),
        owners: BTreeMap::new(),
        places: BTreeMap::new(),
        done: BTreeSet::new(),
        waiting: BTreeSet::new(),
        late: Late::of(model)?,
        bounded: !super::restore::may(&target.spec, Capability::SysAdmin),
        trees: BTreeMap::new(),
    };
    builder.add(inits, Place { door: door(target.init, Kind::Mnt)?, root: clone(&target.root)? });
    for (other, root) in restore.made.roots()? {
        if let Some(door) = restore.made.door(other)? {
            builder.add(other, Place { door, root });
        }
    }
    Ok(builder)
}

impl Builder<'_> {
    fn doors(&self) -> Result<Doors> {
        self.places.get(&self.id).map_or(Ok(Vec::new()), Place::doors)
    }

    fn add(&mut self, id: u32, place: Place) {
        let entries = self.restore.model.mountpoints.get(&id).map_or(&[][..], Vec::as_slice);
        self.all.extend(entries.iter().cloned());
        self.owners.extend(entries.iter().map(|e| (e.mnt_id, id)));
        let late = self.late.waiting(entries);
        self.done.extend(entries.iter().map(|e| e.mnt_id).filter(|id| !late.contains(id)));
        self.waiting.extend(late);
        self.places.insert(id, place);
    }

    fn build(&mut self, helper: i32, entries: &[MntEntry]) -> Result<()> {
        let known: BTreeSet<u32> = entries.iter().map(|e| e.mnt_id).collect();
        let is_top = |e: &MntEntry| !known.contains(&e.parent_mnt_id) || e.parent_mnt_id == e.mnt_id;
        let top = entries.iter().find(|e| is_top(e));
        let top = top.ok_or_else(|| Error::new("a mount namespace of the images has no root"))?;
        let tree = self.tree(top, Some(helper)).map_err(|e| e.path(&top.mountpoint))?;
        let root = through(doors(helper, &[Kind::Mnt])?, || become_root(&tree))?;
        self.places.insert(self.id, Place { door: door(helper, Kind::Mnt)?, root });
        self.keep(top, tree);
        let later = |e: &MntEntry| e.mnt_id == top.mnt_id || self.waiting.contains(&e.mnt_id);
        let left = entries.iter().filter(|e| !later(e)).collect();
        self.pile(left, entries, Some(helper))
    }

    /// One mount after the other.
    fn pile(&mut self, mut left: Vec<&MntEntry>, entries: &[MntEntry], helper: Option<i32>) -> Result<()> {
        while !left.is_empty() {
            let Some(entry) = left.iter().copied().find(|entry| self.ready(entry, entries)) else {
                return Err(Error::new("a mount of the checkpoint lies on one that it does not have")
                    .path(&left[0].mountpoint));
            };
            self.make(entry, helper).map_err(|e| e.path(&entry.mountpoint))?;
            left.retain(|other| other.mnt_id != entry.mnt_id);
        }
        Ok(())
    }

    /// Brings the mounts into their peer groups. The root directory.
    pub fn finish(&self) -> Result<OwnedFd> {
        let entries = self.restore.model.mountpoints.get(&self.id).map_or(&[][..], Vec::as_slice);
        let now = |e: &&MntEntry| !self.waiting.contains(&e.mnt_id);
        self.share(&entries.iter().filter(now).cloned().collect::<Vec<_>>())?;
        let place = self.places.get(&self.id).ok_or_else(|| Error::new("a mount namespace has no root"))?;
        place.root.try_clone().during("cannot hold a directory", || "fcntl(_, F_DUPFD_CLOEXEC)".into())
    }

    /// Goes on in a copy of the namespace, that of another helper.
    pub fn copied(&self, helper: i32) -> Result<OwnedFd> {
        let Some(place) = self.places.get(&self.id) else {
            return Err(Error::new("a mount namespace has no root"));
        };
        let [(old, _)] = &place.doors()?[..] else { return Err(Error::new("a mount namespace has no door")) };
        let old = old.try_clone().during("cannot hold a namespace", || "fcntl(_, F_DUPFD_CLOEXEC)".into())?;
        let (old, new) = (look(old)?, look(door(helper, Kind::Mnt)?)?);
        let mut trees = BTreeMap::new();
        for (id, tree) in &self.trees {
            // A copy has its mounts in the same order.
            let at = stat::place(tree).during("cannot find a mount", || "statx(_)".into())?.mount;
            let nth = old.mounts.iter().position(|m| u64::from(m.id) == at);
            let copy = nth.and_then(|nth| open_mount(&new.root, new.mounts.get(nth)?).ok());
            trees.extend(copy.map(|copy| (*id, copy)));
        }
        let mut places = BTreeMap::new();
        for (id, place) in &self.places {
            let root = if *id == self.id { &new.root } else { &place.root };
            let root =
                root.try_clone().during("cannot hold a directory", || "fcntl(_, F_DUPFD_CLOEXEC)".into())?;
            let door = if *id == self.id { door(helper, Kind::Mnt)? } else { place.doors()?.remove(0).0 };
            places.insert(*id, Place { door, root });
        }
        let (all, owners, done) = (self.all.clone(), self.owners.clone(), self.done.clone());
        Builder {
            restore: self.restore,
            id: self.id,
            bounded: self.bounded,
            waiting: self.waiting.clone(),
            late: self.late.clone(),
            all,
            owners,
            places,
            done,
            trees,
        }
        .finish()
    }

    fn keep(&mut self, entry: &MntEntry, tree: OwnedFd) {
        self.done.insert(entry.mnt_id);
        self.trees.insert(entry.mnt_id, tree);
    }

    /// Whether what a mount lies on, what lies below it at the same place, and its original are there.
    fn ready(&self, entry: &MntEntry, entries: &[MntEntry]) -> bool {
        let there = |id: u32| self.done.contains(&id);
        let below = entries.iter().take_while(|e| e.mnt_id != entry.mnt_id);
        there(entry.parent_mnt_id)
            && below.clone().all(|e| e.mountpoint != entry.mountpoint || there(e.mnt_id))
            && source(&self.all, entry).is_none_or(|e| there(e.mnt_id))
    }

    /// A mount, not attached yet, private, with its flags.
    fn tree(&self, entry: &MntEntry, helper: Option<i32>) -> Result<OwnedFd> {
        let original = best(&self.all, &self.done, entry, &|_| true);
        let place = original.and_then(|e| self.places.get(self.owners.get(&e.mnt_id)?));
        if self.bounded {
            self.permit(entry, original)?;
        }
        let kept = self.late.kept(self.restore, entry)?;
        let tree = match (original, place, renewable(entry)) {
            _ if kept.is_some() => through(self.doors()?, || {
                kept.as_ref().map_or_else(|| Err(Error::new("nothing is kept")), detached)
            })?,
            (Some(original), Some(place), _) => {
                through(place.doors()?, || bind(&place.root, entry, original))?
            }
            (None, _, Some(name)) => {
                if Kind::User.private(self.restore.target.init)? {
                    super::make::of_users(name, false)?;
                }
                let tree = through(self.around(entry)?, || fresh(name, entry))?;
                if FILLED.contains(&name) {
                    self.fill(entry, tree.as_fd())?;
                }
                tree
            }
            (None, ..) if helper.is_some() && table::fstype(entry) == Some("tmpfs") => {
                self.part(entry, helper.unwrap_or(0))?
            }
            _ => {
                return Err(Error::new(
                    "the mount cannot be made again: what it shows is not in the checkpoint",
                ));
            }
        };
        let wanted = flags::of(entry);
        let attributes = Attributes {
            set: flags::attributes(wanted),
            clear: flags::ALL,
            propagation: libc::MS_PRIVATE,
            ..Attributes::default()
        };
        set_attributes(&tree, attributes, false)
            .during("cannot set the flags of the mount", || format!("mount_setattr(_, {attributes:?})"))?;
        Ok(tree)
    }

    /// A directory of a new tmpfs, whose root nothing leads to.
    fn part(&self, entry: &MntEntry, helper: i32) -> Result<OwnedFd> {
        let what = "cannot make a part of a tmpfs";
        let whole = through(self.around(entry)?, || fresh("tmpfs", entry))?;
        let (mut dir, flags) = (
            whole.try_clone().during(what, || "fcntl(_, F_DUPFD)".into())?,
            OFlag::O_PATH | OFlag::O_DIRECTORY,
        );
        for name in Path::new(inner(Path::new(&entry.root))).components() {
            let std::path::Component::Normal(name) = name else { continue };
            nix::sys::stat::mkdirat(&dir, name, Mode::from_bits_truncate(0o755))
                .during(what, || format!("mkdirat(_, {name:?}, 0755)"))?;
            dir = nix::fcntl::openat(&dir, name, flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())
                .during(what, || format!("openat(_, {name:?}, O_PATH)"))?;
        }
        self.fill(entry, dir.as_fd())?;
        // Only what is attached can be copied, so for a moment it lies on the root.
        through(doors(helper, &[Kind::Mnt])?, || {
            let root = top(what)?;
            private(&root)?;
            attach(&whole, &root).during(what, || "move_mount(_, \"/\")".into())?;
            let part = detached(&dir);
            fchdir(&whole).during(what, || "fchdir(_)".into())?;
            umount2(".", MntFlags::MNT_DETACH).during(what, || "umount2(\".\", MNT_DETACH)".into())?;
            part
        })
    }

    /// A container that may not mount gets from an image what a user namespace could have mounted: copies with all that
    /// covers them and with no flag lifted, and empty file systems; a new proc or sysfs only where the container sees all
    /// of its own.
    fn permit(&self, entry: &MntEntry, original: Option<&MntEntry>) -> Result<()> {
        let Some(original) = original else {
            return match table::fstype(entry) {
                Some(fstype) if super::make::of_users(fstype, false).is_err() => super::make::of_users(fstype, false),
                Some(fstype @ ("proc" | "sysfs")) if !flags::in_full_view(&self.restore.target.spec, fstype) => Err(Error::new(
                    "a mount namespace of the checkpoint has a new proc or sysfs, which config.json does not allow",
                )
                .remedy("give the capability CAP_SYS_ADMIN")),
                _ => Ok(()),
            };
        };
        let lifted = flags::restrictions(original) & !flags::restrictions(entry);
        if lifted != 0 {
            return Err(Error::new(format!(
                "a mount namespace of the checkpoint lifts restrictions ({lifted:#x}) of {}, which config.json does not allow",
                original.mountpoint
            ))
            .remedy("give the capability CAP_SYS_ADMIN"));
        }
        // What lies on the part of it that is shown.
        let rest = Path::new(&entry.root).strip_prefix(&original.root).unwrap_or(Path::new(""));
        let shown = Path::new(&original.mountpoint).join(rest);
        let owner = self.owners.get(&original.mnt_id);
        let of = |e: &&MntEntry, owner: Option<&u32>| self.owners.get(&e.mnt_id) == owner;
        for cover in self.all.iter().filter(|e| of(e, owner) && e.mnt_id != original.mnt_id) {
            let Ok(below) = Path::new(&cover.mountpoint).strip_prefix(&shown) else { continue };
            if below == Path::new("") && cover.mountpoint != original.mountpoint {
                continue;
            }
            let there = Path::new(&entry.mountpoint).join(below);
            let same = |e: &MntEntry| {
                Path::new(&e.mountpoint) == there && (e.root_dev, &e.root) == (cover.root_dev, &cover.root)
            };
            let kept = self.all.iter().filter(|e| of(e, Some(&self.id))).any(same);
            if below != Path::new("") && !kept {
                return Err(Error::new(format!(
                    "a mount namespace of the checkpoint shows what {} covers, which config.json does not allow",
                    cover.mountpoint
                ))
                .remedy("give the capability CAP_SYS_ADMIN"));
            }
        }
        Ok(())
    }

    /// The namespaces that a new file system belongs to: those of the first process that is in this one.
    fn around(&self, entry: &MntEntry) -> Result<Doors> {
        let model = self.restore.model;
        let ids = model.ids.values().find(|ids| ids.mnt_ns_id == Some(self.id));
        let init = self.restore.target.init;
        let mut all = vec![(self.late.pid_door(self.restore, entry)?, Kind::Pid)];
        for kind in [Kind::Net, Kind::Ipc] {
            let made = ids.and_then(|ids| kind.get(ids)).map(|id| self.restore.made.door(id)).transpose()?;
            let door = match made.flatten() {
                Some(made) => made,
                None => door(init, kind)?,
            };
            all.push((door, kind));
        }
        Ok(all)
    }

    fn fill(&self, entry: &MntEntry, tree: impl AsFd) -> Result<()> {
        let name = tmpfs::name(entry.root_dev);
        if !self.restore.images.exists(&name) {
            return Ok(());
        }
        let devices = super::restore::may_make_devices(self.restore)?;
        let archive = self.restore.images.raw_open(&name)?;
        let owners = self.restore.owners.of_archives(self.restore.model, self.restore.target.init)?;
        tmpfs::unpack(&tree, archive, &Policy { devices, keep: BTreeSet::new(), owners })?;
        super::restore::seal(entry, tree)
    }

    fn make(&mut self, entry: &MntEntry, helper: Option<i32>) -> Result<()> {
        let Some(place) = self.places.get(&self.id) else { return Ok(()) };
        if helper.is_none()
            && let Some(there) = self.arrived(place, entry)?
        {
            self.keep(entry, there);
            return Ok(());
        }
        let tree = self.tree(entry, helper)?;
        through(place.doors()?, || {
            let path = Path::new(&entry.mountpoint);
            let point = open_in_root(&place.root, inner(path), OFlag::O_PATH)
                .during("cannot find the place of the mount", || {
                    format!("openat2(_, {path:?}, O_PATH, RESOLVE_IN_ROOT)")
                })?;
            attach(&tree, &point).during("cannot make the mount", || format!("move_mount(_, {path:?})"))
        })?;
        self.keep(entry, tree);
        Ok(())
    }

    /// A mount that has come from a peer of what it lies on, whose was made before.
    fn arrived(&self, place: &Place, entry: &MntEntry) -> Result<Option<OwnedFd>> {
        let Some((door, _)) = place.doors()?.pop() else { return Ok(None) };
        let same =
            |e: &&MntEntry| e.mountpoint == entry.mountpoint && self.owners.get(&e.mnt_id) == Some(&self.id);
        let below = self.all.iter().filter(same).take_while(|e| e.mnt_id != entry.mnt_id).count();
        let live = look(door)?.mounts;
        let there = live.iter().filter(|m| m.point == Path::new(&entry.mountpoint)).nth(below);
        there.map(|mount| open_mount(&place.root, mount)).transpose()
    }

    /// Brings every mount into its peer group.
    fn share(&self, entries: &[MntEntry]) -> Result<()> {
        let mut left: Vec<&MntEntry> =
            entries.iter().filter(|e| groups(e) != (0, 0) || unbindable(e)).collect();
        // A group can be joined only by what shows no more than the member that is there.
        left.sort_by_key(|e| e.root.len());
        let now: BTreeSet<u32> = entries.iter().map(|e| e.mnt_id).collect();
        let there = |e: &&MntEntry| !now.contains(&e.mnt_id) && !self.waiting.contains(&e.mnt_id);
        let mut done: BTreeSet<u32> = self.all.iter().filter(there).map(|e| e.mnt_id).collect();
        while !left.is_empty() {
            let at = left.iter().position(|e| served(&self.all, &done, e)).unwrap_or(0);
            let entry = left.remove(at);
            self.share_one(entry, &done).map_err(|e| e.path(&entry.mountpoint))?;
            done.insert(entry.mnt_id);
        }
        Ok(())
    }

    fn share_one(&self, entry: &MntEntry, done: &BTreeSet<u32>) -> Result<()> {
        let Some(tree) = self.trees.get(&entry.mnt_id) else { return Ok(()) };
        let Some(place) = self.places.get(&self.id) else { return Ok(()) };
        let (shared, master) = groups(entry);
        let member = |of: &dyn Fn((u32, u32)) -> bool| {
            let wide =
                |e: &&MntEntry| e.root_dev == entry.root_dev && Path::new(&entry.root).starts_with(&e.root);
            self.all.iter().filter(|e| done.contains(&e.mnt_id)).filter(wide).find(|e| of(groups(e)))
        };
        let mut steps: Vec<u64> = Vec::new();
        let mut from = member(&|(s, _)| shared != 0 && s == shared);
        if from.is_none() {
            from = member(&|(s, _)| master != 0 && s == master);
            if from.is_some() {
                steps.push(libc::MS_SLAVE);
            } else {
                from = member(&|of| master != 0 && of == (0, master));
            }
            if shared != 0 {
                steps.push(libc::MS_SHARED);
            }
        }
        if unbindable(entry) {
            steps.push(libc::MS_UNBINDABLE);
        }
        let what = "cannot set the peer group of the mount";
        let peer = from.map(|from| self.live(from)).transpose()?;
        through(place.doors()?, || {
            if let Some(peer) = peer.flatten() {
                set_group(&peer, tree).during(what, || "move_mount(_, _, MOVE_MOUNT_SET_GROUP)".into())?;
            }
            for propagation in steps {
                set_attributes(tree, Attributes { propagation, ..Attributes::default() }, false)
                    .during(what, || format!("mount_setattr(_, {propagation:#x})"))?;
            }
            Ok(())
        })
    }

    /// A mount that is there already; none where another lies over it.
    fn live(&self, entry: &MntEntry) -> Result<Option<OwnedFd>> {
        if let Some(tree) = self.trees.get(&entry.mnt_id) {
            return tree
                .try_clone()
                .map(Some)
                .during("cannot hold a mount", || "fcntl(_, F_DUPFD_CLOEXEC)".into());
        }
        let Some(place) = self.owners.get(&entry.mnt_id).and_then(|id| self.places.get(id)) else {
            return Ok(None);
        };
        let [(door, _)] = &place.doors()?[..] else { return Ok(None) };
        let door =
            door.try_clone().during("cannot hold a namespace", || "fcntl(_, F_DUPFD_CLOEXEC)".into())?;
        let mounts = look(door)?.mounts;
        let point = Path::new(&entry.mountpoint);
        Ok(mounts.iter().rev().find(|m| m.point == point).and_then(|m| open_mount(&place.root, m).ok()))
    }
}

fn unbindable(entry: &MntEntry) -> bool {
    flags::of(entry).contains(MsFlags::MS_UNBINDABLE)
}

/// Nothing that is done below it shows anywhere else.
fn private(root: &OwnedFd) -> Result<()> {
    let private = Attributes { propagation: libc::MS_PRIVATE, ..Attributes::default() };
    set_attributes(root, private, true)
        .during("cannot make mounts private", || "mount_setattr(\"/\", MS_PRIVATE, AT_RECURSIVE)".into())
}

/// Makes a detached mount the root of this thread's mount namespace, which is a copy of another one. The new root.
fn become_root(tree: &OwnedFd) -> Result<OwnedFd> {
    let what = "cannot make the root of a mount namespace";
    let old = top(what)?;
    private(&old)?;
    attach(tree, &old).during(what, || "move_mount(_, \"/\")".into())?;
    fchdir(tree).during(what, || "fchdir(_)".into())?;
    pivot_root(".", ".").during(what, || "pivot_root(\".\", \".\")".into())?;
    fchdir(&old).during(what, || "fchdir(_)".into())?;
    umount2(".", MntFlags::MNT_DETACH).during(what, || "umount2(\".\", MNT_DETACH)".into())?;
    chdir("/").during(what, || "chdir(\"/\")".into())?;
    top(what)
}
