//! Shares of the last-level cache and of memory bandwidth: Intel RDT, by the kernel's `resctrl` file system.
//!
//! ```text
//!   /sys/fs/resctrl/
//!     info/{L3,MB,L3_MON}/      what this processor can do
//!     schemata                  what everybody has
//!     CLOS/                     a class of service: a container's own, called after it, or one that is shared
//!       schemata tasks
//!       mon_groups/ID/          what one container of the class uses, if it asks for that
//! ```
//!
//! Whoever runs the machine mounts it. A class that config.json names belongs to somebody else and outlives the container;
//! one that was made for the container goes with it.

mod stats;
#[cfg(test)]
mod tests;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use cgroups_rs::fs::hierarchies::mountinfo_self;
use nix::sys::statfs::statfs;
use oci_spec::runtime::LinuxIntelRdt;
use serde::{Deserialize, Serialize};

pub use stats::Stats;

use crate::sys::{Context, Error, Result};

/// Where the kernel makes a directory for it, if the processor has such a thing.
const USUAL: &str = "/sys/fs/resctrl";
/// RDTGROUP_SUPER_MAGIC, which libc does not have.
const MAGIC: i64 = 0x0765_5821;

/// The mounted file system.
#[derive(Debug, Clone)]
pub struct Resctrl {
    root: PathBuf,
}

/// A container's place in it, as state.json keeps it, in runc's words and one of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The directory of the class of service.
    #[serde(default, rename = "intel_rdt_path", skip_serializing_if = "Option::is_none")]
    pub class: Option<PathBuf>,
    /// The directory of the monitoring group.
    #[serde(default, rename = "intel_rdt_mon_path", skip_serializing_if = "Option::is_none")]
    pub monitor: Option<PathBuf>,
    /// The class was made for this container.
    #[serde(default, rename = "intel_rdt_made", skip_serializing_if = "std::ops::Not::not")]
    pub made: bool,
}

impl Resctrl {
    /// The file system, where it is mounted.
    pub fn find() -> Option<Self> {
        let usual = statfs(USUAL).ok()?;
        if usual.filesystem_type().0 == MAGIC {
            return Some(Self { root: USUAL.into() });
        }
        let mount = mountinfo_self().into_iter().find(|m| m.fs_type.0 == "resctrl")?;
        Some(Self { root: mount.mount_point })
    }

    /// True if the cache can be shared out.
    pub fn has_cache(&self) -> bool {
        self.root.join("info/L3").exists()
    }

    /// True if memory bandwidth can be shared out.
    pub fn has_bandwidth(&self) -> bool {
        self.root.join("info/MB").exists()
    }

    /// Puts the new process `pid` where config.json wants it. `place` is filled in as far as things are made, so that
    /// a failure can be undone.
    pub fn enter(&self, wanted: &LinuxIntelRdt, id: &str, pid: i32, place: &mut Place) -> Result<()> {
        let class = wanted.clos_id().as_deref().filter(|c| !c.is_empty());
        // A name without slashes, or `/` alone: everybody's class.
        let dir = self.root.join(class.unwrap_or(id).trim_start_matches('/'));
        if class.is_some() && schemata(wanted).is_empty() {
            dir.metadata().context(|| {
                "clos dir not accessible (must be pre-created when schemata, l3CacheSchema and memBwSchema are empty)"
                    .to_owned()
            })?;
        }
        let made = self.make(&dir)?;
        *place = Place { class: Some(dir.clone()), monitor: None, made: made && class.is_none() };
        if wanted.enable_monitoring().unwrap_or(false) {
            place.monitor = Some(dir.join("mon_groups").join(id));
        }
        // First the class: a monitoring group takes tasks of its own class only.
        self.add(&dir, pid)?;
        if let Some(monitor) = &place.monitor {
            self.make(monitor)?;
            self.add(monitor, pid)?;
        }
        Ok(())
    }

    /// Sets the shares of a container's class.
    pub fn set(&self, wanted: &LinuxIntelRdt, place: &Place) -> Result<()> {
        let (text, Some(class)) = (schemata(wanted), &place.class) else { return Ok(()) };
        if text.is_empty() {
            return Ok(());
        }
        fs::write(class.join("schemata"), &text)
            .context(|| format!("intelrdt: unable to write {text:?}"))
            .map_err(|e| self.explained(e))
    }

    fn make(&self, dir: &Path) -> Result<bool> {
        match fs::create_dir(dir) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e).context(|| format!("mkdir {}", dir.display())).map_err(|e| self.explained(e)),
        }
    }

    fn add(&self, dir: &Path, pid: i32) -> Result<()> {
        fs::write(dir.join("tasks"), pid.to_string())
            .context(|| format!("intelrdt: unable to add pid {pid}"))
            .map_err(|e| self.explained(e))
    }

    /// An error with what the kernel has to say about it.
    fn explained(&self, e: Error) -> Error {
        match fs::read_to_string(self.root.join("info/last_cmd_status")) {
            Ok(status) => Error::new(format!("{e}, last_cmd_status: {}", status.trim())),
            Err(_) => e,
        }
    }
}

impl Place {
    /// Adds another process of the container. A class that is gone limits nothing.
    pub fn join(&self, pid: i32) -> Result<()> {
        let Some(class) = self.class.as_ref().filter(|c| c.exists()) else { return Ok(()) };
        let root = class.parent().unwrap_or(Path::new(USUAL)).to_owned();
        let tree = Resctrl { root };
        tree.add(class, pid)?;
        match self.monitor.as_ref().filter(|m| m.exists()) {
            Some(monitor) => tree.add(monitor, pid),
            None => Ok(()),
        }
    }

    /// Removes what was made for the container.
    pub fn leave(&self) -> Result<()> {
        // The monitoring groups of a class go with it.
        let dir = if self.made { &self.class } else { &self.monitor };
        let Some(dir) = dir else { return Ok(()) };
        match fs::remove_dir(dir) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(e).context(|| format!("rmdir {}", dir.display()))
            }
            _ => Ok(()),
        }
    }
}

/// The lines to be written. A line of `schemata` comes after, and so over, the two others.
fn schemata(wanted: &LinuxIntelRdt) -> String {
    let fields = [wanted.l3_cache_schema(), wanted.mem_bw_schema()];
    let lines = fields.into_iter().flatten().chain(wanted.schemata().iter().flatten());
    lines.filter(|l| !l.is_empty()).map(|l| format!("{l}\n")).collect()
}

/// Puts a new container's process where config.json wants it, if it says anything of that.
pub fn enter(wanted: Option<&LinuxIntelRdt>, id: &str, pid: i32, place: &mut Place) -> Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    Resctrl::find().map_or(Ok(()), |tree| tree.enter(wanted, id, pid, place))
}

/// Sets what config.json says of its class.
pub fn set(wanted: Option<&LinuxIntelRdt>, place: &Place) -> Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    Resctrl::find().map_or(Ok(()), |tree| tree.set(wanted, place))
}

/// Statistics of a container; empty ones of one without a class.
pub fn stats(place: &Place) -> Result<Stats> {
    if place.class.is_none() {
        return Ok(Stats::default());
    }
    Resctrl::find().map_or_else(|| Ok(Stats::default()), |tree| tree.stats(place))
}

/// Refuses what this machine or any cannot do.
pub fn validate(wanted: &LinuxIntelRdt, tree: Option<&Resctrl>) -> Result<()> {
    let Some(tree) = tree else {
        return Err(Error::new("intelRdt is specified in config, but Intel RDT is not enabled"));
    };
    let given = |field: &Option<String>| field.as_ref().is_some_and(|s| !s.is_empty());
    let class = wanted.clos_id().as_deref().unwrap_or_default();
    if class == "." || class == ".." || (class.len() > 1 && class.contains('/')) {
        return Err(Error::new(format!("invalid intelRdt.ClosID {class:?}")));
    }
    if !tree.has_cache() && given(wanted.l3_cache_schema()) {
        return Err(Error::new(
            "intelRdt.l3CacheSchema is specified in config, but Intel RDT/CAT is not enabled",
        ));
    }
    if !tree.has_bandwidth() && given(wanted.mem_bw_schema()) {
        return Err(Error::new(
            "intelRdt.memBwSchema is specified in config, but Intel RDT/MBA is not enabled",
        ));
    }
    Ok(())
}
