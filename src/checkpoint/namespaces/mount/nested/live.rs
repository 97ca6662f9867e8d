//! Mount namespaces of a live container: what is looked at before it is stopped, and what is saved.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::checkpoint::context::{Dump, Options, Source};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::enter::through;
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::mount::class::{Class, classify};
use crate::checkpoint::namespaces::mount::{self, check_one, late, table};
use crate::checkpoint::namespaces::mountinfo::{self, Mount};
use crate::checkpoint::namespaces::tmpfs;

/// A live mount namespace, as its root shows it.
#[derive(Debug)]
pub struct Tree {
    /// Its root directory.
    pub root: OwnedFd,
    /// Its mounts.
    pub mounts: Vec<Mount>,
}

impl Tree {
    /// Whether a mount is in it.
    pub fn has(&self, mount: i32) -> bool {
        self.mounts.iter().any(|m| i32::try_from(m.id) == Ok(mount))
    }
}

/// Looks at the namespace behind a door.
pub fn look(door: OwnedFd) -> Result<Tree> {
    let what = "cannot look at a mount namespace that the container has made";
    let table = std::fs::File::open("/proc").during(what, || "open(\"/proc\")".into())?;
    through(vec![(door, Kind::Mnt)], || {
        let root = top(what)?;
        // Whatever lies at /proc in there, this one is ours.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = nix::fcntl::openat(&table, "thread-self/mountinfo", flags, Mode::empty());
        let mut text = Vec::new();
        let file = file.during(what, || "openat(proc, \"thread-self/mountinfo\")".into())?;
        std::io::Read::read_to_end(&mut std::fs::File::from(file), &mut text)
            .during(what, || "read(mountinfo)".into())?;
        Ok(Tree { root, mounts: mountinfo::parse(&text)? })
    })
}

/// The root directory of this thread.
pub(super) fn top(what: &str) -> Result<OwnedFd> {
    open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .during(what, || "open(\"/\", O_PATH)".into())
}

type Classes = Vec<(Mount, Class)>;

/// The mounts of a namespace that the container has made, and all that they may be copies of.
fn classes(source: &Source, tree: &Tree) -> Result<(Classes, Classes)> {
    let inside: Vec<_> = tree.mounts.iter().map(|mount| (mount.clone(), Class::Later)).collect();
    let all = classify(source)?.into_iter().chain(inside.iter().cloned()).collect();
    Ok((inside, all))
}

/// Every mount of such a namespace that cannot be saved.
pub fn check(options: &Options, source: &Source, tree: &Tree) -> Result<Vec<Error>> {
    let (inside, all) = classes(source, tree)?;
    let mut found: Vec<Error> = Vec::new();
    for (mount, class) in &inside {
        found.extend(check_one(mount, class, &all, true).err().map(|e| e.path(&mount.point)));
    }
    if found.is_empty() {
        let own = own(&inside, &all);
        found.extend(late::check(options, source, &tree.root, &showing(&inside, &all)));
        found.extend(mount::places(&tree.root, &own, true).err());
        found.extend(mount::lost(&tree.root, &own).err());
    }
    Ok(found)
}

/// The mounts of file systems that the container's own table does not have.
fn own(inside: &[(Mount, Class)], all: &[(Mount, Class)]) -> Vec<(Mount, Class)> {
    let outer: BTreeSet<u32> = all[..all.len() - inside.len()].iter().map(|(mount, _)| mount.dev).collect();
    inside.iter().filter(|(mount, _)| !outer.contains(&mount.dev)).cloned().collect()
}

/// The mounts that may show a namespace which the container has made: not those that config.json has made.
fn showing(inside: &[(Mount, Class)], all: &[(Mount, Class)]) -> Vec<(Mount, Class)> {
    let outer = &all[..all.len() - inside.len()];
    let same = |a: &Mount, b: &Mount| (a.dev, &a.root) == (b.dev, &b.root);
    let configured = |m: &Mount| outer.iter().any(|(o, class)| *class != Class::Later && same(o, m));
    inside.iter().filter(|(mount, _)| !configured(mount)).cloned().collect()
}

/// Saves the table of such a namespace, and the contents of every tmpfs that is only there.
pub fn save(dump: &mut Dump<'_>, id: u32, door: OwnedFd, tree: &Tree) -> Result<()> {
    let (inside, all) = classes(dump.source, tree)?;
    for (mount, class) in &inside {
        check_one(mount, class, &all, true).map_err(|e| e.path(&mount.point))?;
    }
    let own = own(&inside, &all);
    late::note(dump, &tree.root, &showing(&inside, &all))?;
    let places = mount::places(&tree.root, &own, true)?;
    let copies = through(vec![(door, Kind::Mnt)], || {
        places
            .iter()
            .map(|(mount, place)| mount::alone(mount, place).map_err(|e| e.path(&mount.point)))
            .collect::<Result<Vec<_>>>()
    })?;
    for ((mount, _), copy) in places.iter().zip(copies) {
        let name = tmpfs::name(mount.dev);
        // Another namespace that the container has made may have it, too.
        if !dump.images.exists(&name) {
            copy.pack(dump.images.raw_create(&name)?).map_err(|e| e.path(&mount.point))?;
        }
    }
    let table = inside.iter().map(|(mount, class)| table::entry(mount, class)).collect();
    dump.model.mountpoints.insert(id, table);
    Ok(())
}
