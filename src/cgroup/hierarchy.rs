//! Where control groups are mounted, and where a container's directories go.
//!
//! ```text
//!   v2       /sys/fs/cgroup                    one tree, key ""
//!   v1       /sys/fs/cgroup/{cpu,memory,...}   one tree a controller, or some share one ("cpu,cpuacct")
//!   hybrid   as v1, and /sys/fs/cgroup/unified is a v2 tree (key "") with what v1 leaves over
//! ```
//!
//! `cgroupsPath` means what it means to runc: absolute, it counts from the mount of each tree; relative, or missing
//! (then the container's id stands for it), from the control group that the runtime itself is in, so that a container
//! started in a container stays in it.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use cgroups_rs::fs::hierarchies::{Mountinfo, mountinfo_self};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::sys::{Context, Error, Result};

/// Mount point of cgroup v2, and the directory of the v1 mounts.
pub const UNIFIED: &str = "/sys/fs/cgroup";
/// Mount point of the v2 tree beside v1.
const HYBRID: &str = "/sys/fs/cgroup/unified";

/// The trees that a container gets a directory in, in the order they are joined. "" is the v2 tree of hybrid mode.
pub(super) const CONTROLLERS: &[&str] = &[
    "cpuset",
    "devices",
    "memory",
    "cpu",
    "cpuacct",
    "pids",
    "blkio",
    "hugetlb",
    "net_cls",
    "net_prio",
    "perf_event",
    "freezer",
    "rdma",
    "name=systemd",
    "misc",
    "",
];

fn is_cgroup2(path: &str) -> bool {
    statfs(path).is_ok_and(|s| s.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// True if this host has cgroup v2 only.
pub fn is_unified() -> bool {
    static UNIFIED_MODE: OnceLock<bool> = OnceLock::new();
    *UNIFIED_MODE.get_or_init(|| is_cgroup2(UNIFIED))
}

/// One mounted v1 tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// The directory of the tree that is mounted there.
    pub root: PathBuf,
    /// Its controllers, or `name=...`.
    pub controllers: Vec<String>,
}

impl Hierarchy {
    /// The options that mount this tree again.
    pub fn mount_options(&self) -> String {
        self.controllers.join(",")
    }

    /// The directory of the control group that /proc/PID/cgroup calls `path`.
    fn directory(&self, path: &Path) -> PathBuf {
        join_relative(&self.mount_point, &relative(&self.root, path))
    }

    /// The directory that this process is in.
    pub fn own_directory(&self, own: &BTreeMap<String, PathBuf>) -> Option<PathBuf> {
        own.get(self.controllers.first()?).map(|path| self.directory(path))
    }
}

/// `path` as seen from `base`, both absolute, with `..` where needed.
fn relative(base: &Path, path: &Path) -> PathBuf {
    if let Ok(rest) = path.strip_prefix(base) {
        return rest.to_owned();
    }
    let common = base.components().zip(path.components()).take_while(|(a, b)| a == b).count();
    let up = base.components().skip(common).map(|_| Component::ParentDir);
    up.chain(path.components().skip(common)).collect()
}

/// Joins and resolves `..` in the text.
fn join_relative(base: &Path, rest: &Path) -> PathBuf {
    let mut out = base.to_owned();
    for part in rest.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            _ => {}
        }
    }
    out
}

/// The control groups of this process: controller (or `name=...`, or "" for v2) to path.
pub fn own_paths() -> Result<BTreeMap<String, PathBuf>> {
    paths_of("self")
}

/// The control groups of process `pid`.
pub fn paths_of(pid: &str) -> Result<BTreeMap<String, PathBuf>> {
    let name = format!("/proc/{pid}/cgroup");
    let text = crate::sys::procfs::read_text(&name).context(|| format!("open {name}"))?;
    parse_own(&text)
}

fn parse_own(text: &str) -> Result<BTreeMap<String, PathBuf>> {
    let mut paths = BTreeMap::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(Error::new(format!(
                "invalid cgroup entry: must contain at least two colons: {line}"
            )));
        };
        for controller in controllers.split(',') {
            paths.insert(controller.to_owned(), PathBuf::from(path));
        }
    }
    Ok(paths)
}

/// The mounted v1 trees; of a tree that is mounted twice the first mount. They are looked for once: with many mounts
/// that is what takes longest, and a new process has what the command found.
pub fn v1_mounts(own: &BTreeMap<String, PathBuf>) -> &'static [Hierarchy] {
    static MOUNTS: OnceLock<Vec<Hierarchy>> = OnceLock::new();
    MOUNTS.get_or_init(|| hierarchies(mountinfo_self(), own))
}

fn hierarchies(mounts: Vec<Mountinfo>, own: &BTreeMap<String, PathBuf>) -> Vec<Hierarchy> {
    let mut all: Vec<Hierarchy> = Vec::new();
    for m in mounts.into_iter().filter(|m| m.fs_type.0 == "cgroup") {
        let controllers: Vec<String> = m.super_opts.into_iter().filter(|o| own.contains_key(o)).collect();
        if controllers.is_empty() || all.iter().any(|h| h.controllers.contains(&controllers[0])) {
            continue;
        }
        all.push(Hierarchy { mount_point: m.mount_point, root: m.mount_root, controllers });
    }
    all
}

/// The directories of a container: controller to absolute path. Only v1 trees that are mounted appear.
pub fn locate(cgroups_path: Option<&Path>, id: &str) -> Result<BTreeMap<String, PathBuf>> {
    let (inner, own) = (inner(cgroups_path, id), own_paths()?);
    if is_unified() {
        return Ok(BTreeMap::from([(String::new(), unified_directory(&inner, &own)?)]));
    }
    let paths = v1_directories(&inner, v1_mounts(&own), &own, is_cgroup2(HYBRID));
    if !paths.contains_key("devices") {
        // Without it a container could use any device: never tolerated.
        return Err(Error::new("mountpoint for devices not found"));
    }
    Ok(paths)
}

/// `cgroupsPath` without tricks: `..` cannot lead above the tree.
fn inner(cgroups_path: Option<&Path>, id: &str) -> PathBuf {
    let wanted = match cgroups_path {
        Some(path) if !path.as_os_str().is_empty() => path,
        _ => Path::new(id),
    };
    let clean = join_relative(Path::new("/"), wanted);
    if wanted.is_absolute() { clean } else { clean.strip_prefix("/").map(Path::to_owned).unwrap_or_default() }
}

fn unified_directory(inner: &Path, own: &BTreeMap<String, PathBuf>) -> Result<PathBuf> {
    if inner.is_absolute() {
        return Ok(join_relative(Path::new(UNIFIED), inner));
    }
    let own = own.get("").ok_or_else(|| Error::new("cgroup path not found"))?;
    // Our own group has processes, so it can have no controllers for children: its parent is the place.
    let parent = own.parent().unwrap_or(Path::new("/"));
    Ok(join_relative(&join_relative(Path::new(UNIFIED), parent), inner))
}

fn v1_directories(
    inner: &Path,
    mounts: &[Hierarchy],
    own: &BTreeMap<String, PathBuf>,
    hybrid: bool,
) -> BTreeMap<String, PathBuf> {
    let mut paths = BTreeMap::new();
    for controller in CONTROLLERS {
        let dir = if controller.is_empty() {
            hybrid.then(|| join_relative(Path::new(HYBRID), inner))
        } else {
            let tree = mounts.iter().find(|h| h.controllers.iter().any(|c| c == controller));
            tree.and_then(|h| {
                let base = if inner.is_absolute() { h.mount_point.clone() } else { h.own_directory(own)? };
                Some(join_relative(&base, inner))
            })
        };
        if let Some(dir) = dir {
            paths.insert((*controller).to_owned(), dir);
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> BTreeMap<String, PathBuf> {
        parse_own("4:memory:/outer\n3:cpu,cpuacct:/\n2:devices:/a\n1:name=systemd:/\n0::/user/x\n").unwrap()
    }

    fn mounts() -> Vec<Hierarchy> {
        let mount = |name: &str, root: &str, controllers: &[&str]| Hierarchy {
            mount_point: Path::new(UNIFIED).join(name),
            root: root.into(),
            controllers: controllers.iter().map(|c| (*c).to_owned()).collect(),
        };
        vec![
            mount("memory", "/", &["memory"]),
            mount("cpu,cpuacct", "/", &["cpu", "cpuacct"]),
            mount("devices", "/a", &["devices"]),
            mount("systemd", "/", &["name=systemd"]),
        ]
    }

    #[test]
    fn absolute_paths_count_from_the_mount_and_relative_ones_from_our_group() {
        let paths = v1_directories(Path::new("/docker/c"), &mounts(), &own(), true);
        assert_eq!(paths["memory"], Path::new("/sys/fs/cgroup/memory/docker/c"));
        assert_eq!(paths["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct/docker/c"));
        assert_eq!(paths[""], Path::new("/sys/fs/cgroup/unified/docker/c"));
        assert!(!paths.contains_key("freezer"));
        let paths = v1_directories(Path::new("c"), &mounts(), &own(), false);
        assert_eq!(paths["memory"], Path::new("/sys/fs/cgroup/memory/outer/c"));
        // The mount shows only /a, which is where we are.
        assert_eq!(paths["devices"], Path::new("/sys/fs/cgroup/devices/c"));
        assert!(!paths.contains_key(""));
    }

    #[test]
    fn v2_goes_beside_our_own_group() {
        let dir = |inner: &str| unified_directory(Path::new(inner), &own()).unwrap();
        assert_eq!(dir("/pod/c"), Path::new("/sys/fs/cgroup/pod/c"));
        assert_eq!(dir("c"), Path::new("/sys/fs/cgroup/user/c"));
    }

    #[test]
    fn dots_cannot_lead_out() {
        assert_eq!(inner(Some(Path::new("/../../etc")), "id"), Path::new("/etc"));
        assert_eq!(inner(Some(Path::new("../../x/./y")), "id"), Path::new("x/y"));
        assert_eq!(inner(None, "id"), Path::new("id"));
        assert_eq!(inner(Some(Path::new("")), "id"), Path::new("id"));
    }

    #[test]
    fn relative_goes_up_where_it_must() {
        assert_eq!(relative(Path::new("/a/b"), Path::new("/a/c")), Path::new("../c"));
        assert_eq!(relative(Path::new("/"), Path::new("/x")), Path::new("x"));
    }

    #[test]
    fn a_line_that_is_no_cgroup_entry_is_refused() {
        assert!(parse_own("nonsense").is_err());
    }
}
