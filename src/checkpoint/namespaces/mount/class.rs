//! Where each mount of a container comes from.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use super::{inner, root_of};
use crate::checkpoint::context::Source;
use crate::checkpoint::error::Result;
use crate::checkpoint::namespaces::mountinfo::{self, Mount};
use crate::init::credentials;
use crate::init::devices::DEFAULT;
use crate::sys::resolve::open_in_root;

/// Where a mount comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Class {
    /// The root file system, which the bundle has.
    Root,
    /// From the host; the key that images know it by.
    External(String),
    /// By config.json, from the kernel.
    Configured,
    /// Made inside the container since it started.
    Later,
}

impl Class {
    /// Whether what is in it belongs to the host.
    pub fn outside(&self) -> bool {
        // What masks a file is the container's own /dev/null.
        matches!(self, Self::Root) || matches!(self, Self::External(key) if key != MASK)
    }
}

/// The key by which runc, and so CRIU, knows what hides a file.
const MASK: &str = "/dev/null";

/// The mounts of the container, each with where it comes from.
pub fn classify(source: &Source) -> Result<Vec<(Mount, Class)>> {
    let mounts = mountinfo::of(&source.init.to_string())?;
    let host = mountinfo::of("self")?.into_iter().map(|mount| mount.dev).collect();
    let root = root_of(source.init)?;
    let resolve = |path: &Path| resolved(&root, path);
    let mut planned = planned(&source.spec, &resolve);
    for path in source.external_mounts.keys() {
        let point = resolve(path);
        if planned.iter().all(|plan| plan.point != point) {
            planned.push(Planned { host: true, ..Planned::at(path, point) });
        }
    }
    Ok(classified(mounts, planned, &host))
}

/// A mount that config.json asks for.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    /// Where, with links resolved.
    pub point: PathBuf,
    /// Where, as config.json says it: the key of what is the host's.
    pub key: String,
    /// It shows something of the host.
    pub host: bool,
    /// It is of the type `cgroup` or `cgroup2`.
    pub groups: bool,
}

impl Planned {
    fn at(path: &Path, point: PathBuf) -> Self {
        Self { point, key: path.to_string_lossy().into_owned(), host: false, groups: false }
    }
}

/// All mounts that config.json asks for, in order.
pub(super) fn planned(spec: &Spec, resolve: &dyn Fn(&Path) -> PathBuf) -> Vec<Planned> {
    let mut all: Vec<Planned> = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        let options = mount.options().iter().flatten();
        let bind = mount.typ().as_deref() == Some("bind")
            || options.into_iter().any(|o| o == "bind" || o == "rbind");
        let host =
            bind || !matches!(mount.typ().as_deref(), Some(kind) if kind != "none" && virtual_type(kind));
        let groups = mount.typ().as_deref().is_some_and(|kind| kind.starts_with("cgroup"));
        let path = mount.destination();
        all.push(Planned { host, groups, ..Planned::at(path, resolve(path)) });
    }
    if let Some(linux) = spec.linux() {
        // Where devices cannot be made, the host's are mounted.
        let user = |n: &LinuxNamespace| n.typ() == LinuxNamespaceType::User;
        if linux.namespaces().iter().flatten().any(user) || credentials::in_user_namespace() {
            let own = linux.devices().iter().flatten().map(|d| d.path().as_path());
            let paths: BTreeSet<&Path> =
                DEFAULT.iter().map(|(path, ..)| Path::new(path)).chain(own).collect();
            all.extend(paths.iter().map(|path| Planned { host: true, ..Planned::at(path, resolve(path)) }));
        }
        let masked = linux.masked_paths().iter().flatten();
        let paths = masked.chain(linux.readonly_paths().iter().flatten());
        all.extend(paths.map(Path::new).map(|path| Planned::at(path, resolve(path))));
    }
    all.push(Planned::at(Path::new("/dev/console"), "/dev/console".into()));
    all
}

/// Types that hold nothing of a device of the host.
fn virtual_type(kind: &str) -> bool {
    let known = ["proc", "sysfs", "tmpfs", "hugetlbfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs"];
    known.contains(&kind)
}

/// Tells the mounts of a table apart. Mounts over each other at one place are claimed from the bottom.
fn classified(mounts: Vec<Mount>, planned: Vec<Planned>, host: &BTreeSet<u32>) -> Vec<(Mount, Class)> {
    // One such mount of config.json becomes one a hierarchy.
    let groups: Vec<PathBuf> = planned.iter().filter(|p| p.groups).map(|p| p.point.clone()).collect();
    let mut planned: Vec<Option<Planned>> = planned.into_iter().map(Some).collect();
    let mut claim = |mount: &Mount| {
        planned.iter_mut().find(|p| p.as_ref().is_some_and(|p| p.point == mount.point)).and_then(Option::take)
    };
    let mut outside: Vec<PathBuf> = Vec::new();
    let mut done: Vec<(Mount, Class)> = Vec::new();
    for mount in mounts {
        let key = || mount.point.to_string_lossy().into_owned();
        let class = if mount.point == Path::new("/") && done.is_empty() {
            Class::Root
        } else if let Some(plan) = claim(&mount) {
            match plan.host {
                true => Class::External(plan.key),
                false if mount.root == "/null" => Class::External(MASK.into()),
                false => Class::Configured,
            }
        } else if mount.fstype == "cgroup" && groups.iter().any(|path| mount.within(path)) {
            // A hierarchy of v1; runc hands CRIU each of them from outside, too.
            Class::External(key())
        } else if host.contains(&mount.dev) && outside.iter().any(|path| mount.within(path)) {
            // It came along with a recursive bind mount, or was propagated into one.
            Class::External(key())
        } else {
            Class::Later
        };
        if class.outside() && class != Class::Root {
            outside.push(mount.point.clone());
        }
        done.push((mount, class));
    }
    done
}

/// The path that the kernel has for what a path leads to below `root`; the path itself if there is nothing.
pub(super) fn resolved(root: impl AsFd, path: &Path) -> PathBuf {
    let found = open_in_root(root, inner(path), OFlag::O_PATH)
        .ok()
        .and_then(|fd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok());
    found.unwrap_or_else(|| Path::new("/").join(path.components().as_path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
1 9 8:1 /c /  rw - ext4 /dev/sda rw
2 1 0:5 / /proc rw - proc proc rw
3 1 0:6 / /dev rw - tmpfs tmpfs rw
4 3 0:7 / /dev/shm rw - tmpfs shm rw
5 1 8:1 /var/data /data rw - ext4 /dev/sda rw
6 5 0:30 / /data/sub rw - tmpfs host rw
7 5 0:31 / /data/own rw - tmpfs tmpfs rw
8 2 0:2 /null /proc/kcore rw - devtmpfs dev rw
9 4 0:40 / /dev/shm rw - tmpfs over rw
10 1 8:9 / /mnt rw - ext4 /dev/loop0 rw
11 1 8:1 /var/other /srv rw - ext4 /dev/sda rw
12 1 8:1 /c/dir /opt rw - ext4 /dev/sda rw
";

    fn table() -> Vec<(Mount, Class)> {
        let mounts = mountinfo::parse(TABLE.replace("  ", " ").as_bytes()).unwrap();
        let plan = |path: &str, host| Planned { host, ..Planned::at(Path::new(path), path.into()) };
        let planned = vec![
            plan("/proc", false),
            plan("/dev", false),
            plan("/dev/shm", false),
            plan("/data", true),
            plan("/proc/kcore", false),
        ];
        classified(mounts, planned, &[(8 << 20) | 1, 30].into())
    }

    #[test]
    fn each_mount_is_told_by_where_it_comes_from() {
        let external = |key: &str| Class::External(key.into());
        let found: Vec<Class> = table().into_iter().map(|(_, class)| class).collect();
        let expected = [
            Class::Root,
            Class::Configured,
            Class::Configured,
            Class::Configured,
            external("/data"),
            external("/data/sub"),
            Class::Later,
            external("/dev/null"),
            Class::Later,
            Class::Later,
            Class::Later,
            Class::Later,
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn only_what_cannot_be_made_again_is_refused() {
        let all = table();
        let refused: Vec<_> = all
            .iter()
            .filter(|(m, c)| super::super::check_one(m, c, &all, false).is_err())
            .map(|(m, _)| m.id)
            .collect();
        assert_eq!(refused, [10, 11]);
    }
}
