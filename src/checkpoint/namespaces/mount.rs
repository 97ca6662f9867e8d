//! Mounts.
//!
//! ```text
//!   mountinfo ──classify──▶  the root            the bundle's; nothing to save
//!                            external            from the host, by config.json: only its key is saved
//!                            configured          config.json makes it again; a tmpfs has its contents saved
//!                            later               made inside the container since; made again here, or refused by name
//! ```
//!
//! At a restore init/ has made what config.json says. The table of the images is compared with what is there: contents
//! go into each tmpfs, what was made later is made again, and what has no counterpart is an error that names it.

mod class;
mod flags;
pub mod late;
mod make;
pub mod nested;
mod options;
mod restore;
mod table;

pub use class::{Class, classify};
pub use restore::restore;
pub use table::{has_owner, in_kernels_order};

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::MsFlags;
use nix::sys::stat::Mode;

use crate::checkpoint::context::{Dump, Options, Source};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::enter::within;
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::mountinfo::Mount;
use crate::checkpoint::namespaces::{tmpfs, user};
use crate::sys::mount::clone_tree;
use crate::sys::resolve::open_in_root;
use crate::sys::stat;

/// File systems that can be made anew: empty, by the kernel's own doing, or (overlay) of directories that are there.
const RENEWABLE: [&str; 14] = [
    "tmpfs",
    "proc",
    "sysfs",
    "mqueue",
    "devpts",
    "overlay",
    "hugetlbfs",
    "fusectl",
    "debugfs",
    "tracefs",
    "securityfs",
    "configfs",
    "binfmt_misc",
    "pstore",
];

/// File systems that have nothing but what is put into them, which is saved with them.
const FILLED: [&str; 2] = ["tmpfs", "hugetlbfs"];

/// Every mount that cannot be saved.
pub fn check(options: &Options, source: &Source) -> Result<Vec<Error>> {
    let mounts = classify(source)?;
    let mapped = user::private(source)?;
    let mut found = Vec::new();
    for (mount, class) in &mounts {
        if let Err(e) = check_one(mount, class, &mounts, false).and_then(|()| owned(mount, class, mapped)) {
            found.push(e.path(&mount.point));
        }
    }
    if found.is_empty() && Kind::Mnt.private(source.init)? {
        let root = root_of(source.init)?;
        found.extend(places(&root, &mounts, false).err());
        found.extend(lost(&root, &mounts).err());
        found.extend(late::check(options, source, &root, &mounts));
    }
    Ok(found)
}

/// An overlay works with the rights of whoever has mounted it: the restore has more than the root of a container with id
/// mappings.
fn owned(mount: &Mount, class: &Class, mapped: bool) -> Result<()> {
    match mapped && *class == Class::Later && mount.fstype == "overlay" {
        true => Err(Error::new("the container has id mappings and has mounted an overlay itself")
            .remedy("unmount it, or mount it through config.json")),
        false => Ok(()),
    }
}

/// `parts`: a tmpfs of which only a directory is mounted can be made again.
fn check_one(mount: &Mount, class: &Class, all: &[(Mount, Class)], parts: bool) -> Result<()> {
    // What keeps a namespace is looked at by itself.
    if *class != Class::Later || mount.fstype == "nsfs" {
        return Ok(());
    }
    if mount.root.ends_with("//deleted") {
        return Err(Error::new("what the container mounted here has been removed since").remedy("unmount it"));
    }
    // A bind mount of something that comes back anyway; binds of binds lead to the first.
    let known = |m: &Mount, c: &Class| *c != Class::Later || RENEWABLE.contains(&m.fstype.as_str());
    let same = |m: &Mount| m.id != mount.id && m.dev == mount.dev;
    let shown = |m: &Mount| Path::new(&mount.root).starts_with(&m.root);
    let bind = all.iter().any(|(m, c)| same(m) && shown(m) && known(m, c));
    let fresh = RENEWABLE.contains(&mount.fstype.as_str()) && mount.root == "/";
    let whole = |m: &Mount| m.dev != mount.dev || Path::new(&m.root).starts_with(&mount.root);
    let part = parts && mount.fstype == "tmpfs" && all.iter().all(|(m, _)| whole(m));
    if fresh || bind || part {
        return Ok(());
    }
    if all.iter().any(|(m, c)| same(m) && known(m, c)) {
        return Err(Error::new(format!(
            "the mount shows {}, which no mount of config.json leads to (any more)",
            mount.root
        ))
        .remedy("unmount it, or mount it through config.json"));
    }
    Err(Error::new(format!("the container mounted a {} itself, which cannot be restored", mount.fstype))
        .remedy("unmount it, or mount it through config.json"))
}

/// A tmpfs of more than this is not kept in memory twice.
const LARGE: u64 = 16 << 20;

/// Saves the table, and the contents of every tmpfs that is the container's.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let init = dump.source.init;
    let mounts = classify(dump.source)?;
    for (mount, class) in &mounts {
        check_one(mount, class, &mounts, false).map_err(|e| e.path(&mount.point))?;
    }
    if Kind::Mnt.private(init)? {
        late::note(dump, &root_of(init)?, &mounts)?;
        for (mount, copy) in open_tmpfs(init, &mounts)? {
            let name = tmpfs::name(mount.dev);
            let large = mount.fstype != "tmpfs" || tmpfs::used(&copy.root) > LARGE;
            let to = if large { dump.images.raw_create_large(&name) } else { dump.images.raw_create(&name) };
            copy.pack(to?).map_err(|e| e.path(&mount.point))?;
            dump.to_close.push(copy.root);
        }
        let table = mounts.iter().map(|(mount, class)| table::entry(mount, class)).collect();
        dump.model.mountpoints.insert(Kind::Mnt.id(true), table);
    }
    Ok(())
}

/// A detached copy of each tmpfs whose contents are the container's: no other mount lies over its files.
fn open_tmpfs(init: i32, mounts: &[(Mount, Class)]) -> Result<Vec<(&Mount, Alone)>> {
    let places = places(&root_of(init)?, mounts, false)?;
    let copies = within(init, &[Kind::Mnt], || {
        places
            .iter()
            .map(|(mount, place)| alone(mount, place).map_err(|e| e.path(&mount.point)))
            .collect::<Result<Vec<_>>>()
    })?;
    Ok(places.into_iter().map(|(mount, _)| mount).zip(copies).collect())
}

/// The root of each tmpfs whose contents are the container's; `parts`: or the widest directory of it that is mounted.
fn places<'a>(
    root: &OwnedFd,
    mounts: &'a [(Mount, Class)],
    parts: bool,
) -> Result<Vec<(&'a Mount, OwnedFd)>> {
    // What is mounted from outside as well belongs outside.
    let outside: BTreeSet<u32> =
        mounts.iter().filter(|(_, class)| class.outside()).map(|(mount, _)| mount.dev).collect();
    let filled = |m: &&Mount| FILLED.contains(&m.fstype.as_str()) && !outside.contains(&m.dev);
    let own = || mounts.iter().map(|(m, _)| m).filter(filled);
    let mut places: Vec<(&Mount, OwnedFd)> = Vec::new();
    let mut failed = BTreeMap::new();
    let widest = |mount: &Mount| {
        own().filter(|m| m.dev == mount.dev).all(|m| Path::new(&m.root).starts_with(&mount.root))
    };
    for mount in own().filter(|mount| if parts { widest(mount) } else { mount.root == "/" }) {
        if places.iter().all(|(other, _)| other.dev != mount.dev) {
            // Another mount of the same may lie open.
            match open_mount(root, mount) {
                Ok(place) => places.push((mount, place)),
                Err(e) => _ = failed.entry(mount.dev).or_insert(e),
            }
        }
    }
    for (mount, _) in &places {
        let covered = mounts.iter().any(|(m, _)| m.parent == mount.id && m.id != mount.id);
        if mount.flags.contains(MsFlags::MS_UNBINDABLE) && covered {
            return Err(Error::new(
                "the mount is unbindable, so its contents cannot be told from what is mounted on it",
            )
            .remedy("make it private, or unmount that")
            .path(&mount.point));
        }
    }
    for mount in own() {
        if places.iter().all(|(other, _)| other.dev != mount.dev) {
            let part = format!("only a part of a {} is mounted, the rest cannot be reached", mount.fstype);
            let part = Error::new(part);
            return Err(failed.remove(&mount.dev).unwrap_or(part).path(&mount.point));
        }
    }
    Ok(places)
}

/// Refuses a devpts that the container has mounted itself, with terminals in it: those would have to be made there.
fn lost(root: &OwnedFd, mounts: &[(Mount, Class)]) -> Result<()> {
    let configured = |dev: u32| mounts.iter().any(|(m, class)| m.dev == dev && *class != Class::Later);
    for (mount, _) in mounts.iter().filter(|(m, _)| m.fstype == "devpts" && !configured(m.dev)) {
        let place = open_mount(root, mount)?;
        let what = "cannot look at what is in the mount";
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::openat(&place, ".", flags, Mode::empty())
            .during(what, || "openat(_, \".\")".into())?;
        let mut dir = nix::dir::Dir::from_fd(dir).during(what, || "openat(_, \".\")".into())?;
        for entry in dir.iter() {
            let entry = entry.during(what, || "getdents64(_)".into())?;
            if entry.file_name().to_bytes().first().is_some_and(u8::is_ascii_digit) {
                return Err(Error::new("the container has mounted a devpts, and there are terminals in it")
                    .remedy("close them, or let the program use those of /dev/pts")
                    .path(&mount.point));
            }
        }
    }
    Ok(())
}

/// The root directory of a process.
fn root_of(pid: i32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/root");
    open(path.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .during("cannot open the root of the container", || format!("open({path:?}, O_PATH)"))
}

/// The root directory of a mount; an error if another mount lies over it.
fn open_mount(root: impl AsFd, mount: &Mount) -> Result<OwnedFd> {
    let path = mount.point.as_path();
    let failed = |e: Error| e.path(path);
    let place = open_in_root(root, inner(path), OFlag::O_PATH)
        .during("cannot open the mount", || format!("openat2(_, {path:?}, O_PATH, RESOLVE_IN_ROOT)"))
        .map_err(failed)?;
    let at = stat::place(&place).during("cannot open the mount", || "statx(_)".into()).map_err(failed)?;
    if at.mount != 0 && at.mount != u64::from(mount.id) {
        return Err(failed(
            Error::new("the mount lies below another one, so its contents cannot be reached")
                .remedy("unmount that"),
        ));
    }
    Ok(place)
}

/// A copy of one mount without those on it. Only from within its mount namespace.
fn detached(place: impl AsFd) -> Result<OwnedFd> {
    clone_tree(place.as_fd(), c"", false)
        .during("cannot copy the mount", || "open_tree(_, \"\", OPEN_TREE_CLONE|AT_EMPTY_PATH)".into())
}

/// A tmpfs to be read.
struct Alone {
    root: OwnedFd,
    /// Other mounts lie on it for good.
    covered: bool,
}

impl Alone {
    fn pack(&self, to: File) -> Result<()> {
        match self.covered {
            true => tmpfs::pack_visible(&self.root, to),
            false => tmpfs::pack(&self.root, to),
        }
    }
}

/// A mount without those on it, to be read: one that cannot be copied has none, or [`places`] has refused it, or they are
/// locked to it, as in a mount namespace that was copied for another user namespace.
fn alone(mount: &Mount, place: &OwnedFd) -> Result<Alone> {
    let itself = || place.try_clone().during("cannot hold the mount", || "fcntl(_, F_DUPFD_CLOEXEC)".into());
    if mount.flags.contains(MsFlags::MS_UNBINDABLE) {
        return Ok(Alone { root: itself()?, covered: false });
    }
    match detached(place) {
        Err(e) if e.errno() == Some(Errno::EINVAL) => Ok(Alone { root: itself()?, covered: true }),
        copy => Ok(Alone { root: copy?, covered: false }),
    }
}

/// A path without its leading slash, for lookups below a root.
fn inner(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}
