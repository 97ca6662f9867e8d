//! Control groups behind one small interface: v1, hybrid and v2.
//!
//! ```text
//!   Cgroup ── hierarchy   which directories (cgroups-rs finds the mounts)
//!        ├─── v1, v2      limits of config.json
//!        ├─── devices     who may open what: devices.allow, or eBPF
//!        ├─── doors       how a new process gets in
//!        ├─── freezer     pause and resume
//!        ├─── systemd     the directories are those of a scope unit, made and removed over D-Bus
//!        ├─── rootless    what a user without privileges does without
//!        ├─── rdt         caches and memory bandwidth, by a file system beside these
//!        ├─── pids        who is in it; kill; remove
//!        ├─── stats       `events --stats`
//!        └─── oom         `events`
//! ```
//!
//! cgroups-rs finds and describes the mounted trees. Writing limits is done here: clients rely on runc's order of
//! writes, its conversions and its words, and a limit that could not be set must be an error.

pub mod devices;
pub mod doors;
mod engine;
mod file;
mod freezer;
pub mod hierarchy;
pub mod oom;
mod pids;
pub mod rdt;
mod rootless;
pub mod stats;
pub mod systemd;
mod v1;
pub mod v2;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use oci_spec::runtime::{Linux, LinuxRdma, LinuxResources};

use crate::sys::{Context, Error, Result};

pub use hierarchy::is_unified;
pub use stats::Stats;

/// The control groups of one container: a directory in each tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    paths: BTreeMap<String, PathBuf>,
    /// Whose directories they are, if systemd manages them.
    unit: Option<systemd::Unit>,
    /// What this user may not do to control groups is left undone.
    rootless: bool,
}

impl Cgroup {
    /// The control groups that a container with this `cgroupsPath` (or id, without one) gets. Nothing is made.
    pub fn locate(cgroups_path: Option<&Path>, id: &str, systemd: bool) -> Result<Self> {
        if systemd {
            let unit = systemd::Unit::parse(cgroups_path, id)?;
            systemd::running()?;
            let paths = hierarchy::locate(Some(&unit.path()?), id)?;
            return Ok(Self { paths, unit: Some(unit), rootless: false });
        }
        Ok(Self { paths: hierarchy::locate(cgroups_path, id)?, unit: None, rootless: false })
    }

    /// Makes the directories. Nothing is in them yet, and no limit is set but what a process needs to enter. systemd
    /// makes its own only around a process: see [`Cgroup::enter`].
    ///
    /// For a `rootless` container that names no path (`unnamed`), trees where nothing may be made are left out.
    pub fn create(mut self, resources: &LinuxResources, unnamed: bool, rootless: bool) -> Result<Self> {
        self.rootless = rootless;
        if self.unit.is_some() {
            return Ok(self);
        }
        let mut made = Vec::new();
        match self.make_allowed(resources, unnamed, &mut made) {
            Ok(()) => Ok(self),
            Err(e) => {
                // Children before parents.
                for dir in made.iter().rev() {
                    let _ = std::fs::remove_dir(dir);
                }
                Err(e)
            }
        }
    }

    fn make(&self, resources: &LinuxResources, made: &mut Vec<PathBuf>) -> Result<()> {
        if self.is_unified() {
            return v2::create(self.unified_dir()?, resources, made);
        }
        for controller in hierarchy::CONTROLLERS {
            let Some(dir) = self.paths.get(*controller) else { continue };
            let result = self.make_v1(controller, dir, resources, made);
            if !is_needless(controller) {
                result?;
            }
        }
        Ok(())
    }

    fn make_v1(
        &self,
        controller: &str,
        dir: &Path,
        res: &LinuxResources,
        made: &mut Vec<PathBuf>,
    ) -> Result<()> {
        let mut missing = vec![dir];
        while let Some(&d) = missing.last() {
            match std::fs::create_dir(d) {
                Ok(()) => made.push(d.to_owned()),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => match (e.kind(), d.parent()) {
                    (std::io::ErrorKind::NotFound, Some(parent)) if missing.len() < DEEPEST => {
                        missing.push(parent);
                        continue;
                    }
                    _ => return Err(e).context(|| format!("mkdir {}", d.display())),
                },
            }
            missing.pop();
        }
        match (controller, res.cpu()) {
            ("cpuset", cpu) => {
                // A group can have no more than those above.
                if let Some(parent) = dir.parent().filter(|p| p.join("cpuset.cpus").exists()) {
                    v1::inherit_cpuset(parent)?;
                }
                if let Some(cpu) = cpu {
                    v1::set_cpuset(dir, cpu)?;
                }
                v1::inherit_cpuset(dir)
            }
            ("cpu", Some(cpu)) => v1::set_realtime(dir, cpu),
            _ => Ok(()),
        }
    }

    /// The control groups with these directories, as a container's state recorded them.
    pub fn load(paths: BTreeMap<String, PathBuf>) -> Self {
        Self { paths, unit: None, rootless: false }
    }

    /// The same, managed by systemd.
    #[must_use]
    pub fn by_systemd(mut self) -> Self {
        self.unit = self.main_dir().ok().and_then(systemd::Unit::of);
        self
    }

    /// Controller (`""` for v2, `name=...` for a named tree) to absolute directory.
    pub fn paths(&self) -> &BTreeMap<String, PathBuf> {
        &self.paths
    }

    /// Groups inside these, by controller; `""` alone goes for all. Whether they exist is found out by entering them.
    pub fn inside(&self, groups: &BTreeMap<String, String>) -> Result<Self> {
        let mut paths = self.paths.clone();
        let below = |dir: &Path, group: &str| {
            let steps = || Path::new(group).components();
            if steps().any(|c| c == std::path::Component::ParentDir) {
                return Err(Error::new(format!("bad sub cgroup path: {group}")));
            }
            // A leading slash means the container's own group, too.
            let steps = steps().filter(|c| matches!(c, std::path::Component::Normal(_)));
            Ok(dir.join(steps.collect::<PathBuf>()))
        };
        match groups.get("") {
            Some(group) => {
                for dir in paths.values_mut() {
                    *dir = below(dir, group)?;
                }
            }
            None => {
                for (controller, group) in groups {
                    let dir = paths.get_mut(controller).ok_or_else(|| {
                        Error::new(format!("unknown controller {controller} in SubCgroupPaths"))
                    })?;
                    *dir = below(dir, group)?;
                }
            }
        }
        Ok(Self::load(paths))
    }

    /// The v2 group that a process is in.
    pub fn of_process(pid: i32) -> Result<Self> {
        let name = format!("/proc/{pid}/cgroup");
        let text = std::fs::read_to_string(&name).context(|| format!("open {name}"))?;
        let path = text.lines().find_map(|l| l.strip_prefix("0::/"));
        let path = path.ok_or_else(|| Error::new(format!("{name} names no unified cgroup")))?;
        let dir = Path::new(hierarchy::UNIFIED).join(path);
        Ok(Self::load(BTreeMap::from([(String::new(), dir)])))
    }

    /// True if there is one v2 directory and nothing else.
    pub fn is_unified(&self) -> bool {
        self.paths.len() == 1 && self.paths.contains_key("")
    }

    fn unified_dir(&self) -> Result<&Path> {
        self.required("")
    }

    /// The directory in a tree that a limit needs.
    fn required(&self, controller: &str) -> Result<&Path> {
        let missing = || {
            Error::new(format!("cannot set {controller} limit: container could not join or create cgroup"))
        };
        self.paths.get(controller).map(PathBuf::as_path).ok_or_else(missing)
    }

    /// The directory that says which processes are in the container.
    fn main_dir(&self) -> Result<&Path> {
        let main = self.paths.get("devices").or_else(|| self.paths.get(""));
        main.map(PathBuf::as_path).ok_or_else(|| Error::new("container has no cgroup"))
    }

    /// True if it has been made and not removed.
    pub fn exists(&self) -> bool {
        self.main_dir().is_ok_and(Path::exists)
    }

    /// Puts a process into every group.
    pub fn add(&self, pid: i32) -> Result<()> {
        for (controller, dir) in &self.paths {
            let result = pids::enter(dir, pid);
            if self.is_unified() || !is_needless(controller) {
                result?;
            }
        }
        Ok(())
    }

    /// Puts the container's first process in. `annotations` may have properties of the unit.
    pub fn enter(
        &self,
        pid: i32,
        resources: Option<&LinuxResources>,
        annotations: Option<&HashMap<String, String>>,
    ) -> Result<()> {
        if let Some(unit) = &self.unit {
            let properties = annotations.map(systemd::of_annotations).transpose()?.unwrap_or_default();
            unit.start(pid, &properties)?;
            // In version 1 systemd makes directories only in the hierarchies that it uses itself.
            self.make(resources.unwrap_or(&LinuxResources::default()), &mut Vec::new())?;
        }
        self.add(pid)
    }

    /// Has systemd put a process into these groups, which are the container's or inside.
    pub fn attach(&self, groups: &Self, pid: i32) -> Result<()> {
        let unit =
            self.unit.as_ref().ok_or_else(|| Error::new("systemd does not manage the control groups"))?;
        let inside = groups.unified_dir()?.strip_prefix(self.unified_dir()?);
        unit.attach(inside.unwrap_or(Path::new("")), pid)
    }

    /// Sets the limits and the device policy of a new container.
    pub fn apply(&self, linux: &Linux) -> Result<()> {
        if let Some(resources) = linux.resources() {
            self.update(resources)?;
        }
        let devices = linux.devices().as_deref().unwrap_or_default();
        self.set_devices(&devices::Policy::of(linux.resources().as_ref(), devices)?)
    }

    /// Sets the limits that `resources` names and leaves the others, and the device policy.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        if let Some(unit) = &self.unit {
            if self.is_unified() {
                // Told of too low a limit, systemd would have it enforced before we look.
                v2::check_before_update(self.unified_dir()?, resources)?;
            }
            unit.update(resources)?;
        }
        if self.is_unified() { v2::apply(self.unified_dir()?, resources) } else { v1::apply(self, resources) }
    }

    /// Replaces the device policy.
    pub fn set_devices(&self, policy: &devices::Policy) -> Result<()> {
        if let Some(unit) = &self.unit {
            unit.set_devices(policy)?;
        }
        if self.rootless && !self.paths.contains_key("devices") {
            return self.set_devices_if_allowed(policy);
        }
        if self.is_unified() {
            devices::ebpf::apply(self.unified_dir()?, policy)
        } else {
            devices::apply_v1(self.required("devices")?, policy)
        }
    }

    /// Gives the v2 directory to `uid`, so that the container can make groups inside.
    pub fn own(&self, uid: u32) -> Result<()> {
        if !self.is_unified() {
            return Ok(());
        }
        let dir = self.unified_dir()?;
        let listed = std::fs::read_to_string("/sys/kernel/cgroup/delegate").unwrap_or_default();
        let listed: Vec<&str> = if listed.is_empty() {
            vec!["cgroup.procs", "cgroup.subtree_control", "cgroup.threads"]
        } else {
            listed.lines().collect()
        };
        for name in std::iter::once("").chain(listed) {
            let path = dir.join(name);
            match nix::unistd::chown(&path, Some(uid.into()), None) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(e) => return Err(e).context(|| format!("chown {}", path.display())),
            }
        }
        Ok(())
    }

    /// True if [`Cgroup::freeze`] can work.
    pub fn has_freezer(&self) -> bool {
        self.is_unified() || self.paths.contains_key("freezer")
    }

    /// Stops all processes, also of groups inside.
    pub fn freeze(&self) -> Result<()> {
        freezer::freeze(self)
    }

    /// Continues them.
    pub fn thaw(&self) -> Result<()> {
        freezer::thaw(self)
    }

    /// Continues them, and those of groups inside that are frozen themselves.
    pub fn thaw_all(&self) -> Result<()> {
        freezer::thaw_all(self)
    }

    /// True if this group itself is frozen.
    pub fn is_frozen(&self) -> Result<bool> {
        freezer::is_frozen(self)
    }

    /// The processes in the container's own directory.
    pub fn pids(&self) -> Result<Vec<i32>> {
        pids::of(self.main_dir()?)
    }

    /// The processes of the whole subtree.
    pub fn all_pids(&self) -> Result<Vec<i32>> {
        pids::below(self.main_dir()?)
    }

    /// Sends a signal to every process of the subtree; SIGKILL leaves none.
    pub fn kill(&self, signal: i32) -> Result<()> {
        pids::kill(self, signal)
    }

    /// Removes the directories, and those the container made inside. What is gone already is no error.
    pub fn delete(&self) -> Result<()> {
        if let Some(unit) = &self.unit {
            unit.stop()?;
        }
        pids::delete(self)
    }

    /// Tells when there is not enough memory; nothing without a memory controller.
    pub fn watch_oom(&self) -> Result<Option<oom::Watch>> {
        oom::Watch::open(self)
    }

    /// What has been used so far.
    pub fn stats(&self) -> Result<Stats> {
        stats::read_all(self)
    }
}

/// More than any path has parts: a parent that goes away each time is made no more often.
const DEEPEST: usize = 4096;

/// True for a tree that limits nothing: a container can do without.
fn is_needless(controller: &str) -> bool {
    controller.is_empty() || controller.starts_with("name=") || controller == "misc"
}

/// A line of `rdma.max`.
fn rdma_line(device: &str, limit: &LinuxRdma) -> String {
    let number = |n: Option<u32>| n.map_or_else(|| "max".to_owned(), |n| n.to_string());
    format!("{device} hca_handle={} hca_object={}", number(limit.hca_handles()), number(limit.hca_objects()))
}

#[cfg(test)]
mod tests;
