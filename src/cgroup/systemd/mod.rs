//! The systemd driver: a container's control group is a scope unit, which systemd makes and removes.
//!
//! ```text
//!   cgroupsPath   machine-a.slice : docker : ID
//!   unit          docker-ID.scope in machine-a.slice
//!   directory     /machine.slice/machine-a.slice/docker-ID.scope
//! ```
//!
//! A scope takes processes that exist already, so it is made when init is there. It is delegated: limits that systemd
//! does not know are ours to write into its files. Nothing of this is touched without `--systemd-cgroup`.

mod bus;
mod properties;
#[cfg(test)]
mod tests;
mod unified;
mod wire;

use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxResources;

use self::bus::Bus;
use self::properties::Property;
use self::wire::{Value, Writer};
use super::devices::Policy;
use crate::sys::{Error, Result};

pub use properties::{of_annotations, of_resources};

/// A unit that a container's processes are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Its name, with `.scope` or `.slice`.
    pub name: String,
    /// The slice it is in.
    slice: String,
}

/// Refuses to go on where there is no systemd: that of the host is told by a directory.
pub fn running() -> Result<()> {
    if bus::user().is_none() && !Path::new("/run/systemd/system").is_dir() {
        return Err(Error::new("systemd not running on this host, cannot use systemd cgroups manager"));
    }
    Ok(())
}

impl Unit {
    /// The unit that `cgroupsPath` names, or one called after the container.
    pub fn parse(cgroups_path: Option<&Path>, id: &str) -> Result<Self> {
        let text = cgroups_path.map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        let default = if bus::user().is_none() { "system.slice" } else { "user.slice" };
        let (slice, prefix, name) = match text.split(':').collect::<Vec<_>>()[..] {
            [""] => ("", "runc", id),
            [slice, prefix, name] => (slice, prefix, name),
            _ => {
                return Err(Error::new(format!(
                    "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {text:?} instead"
                )));
            }
        };
        let name = match (name.ends_with(".slice"), prefix) {
            (true, _) => name.to_owned(),
            (false, "") => format!("{name}.scope"),
            (false, prefix) => format!("{prefix}-{name}.scope"),
        };
        if name.contains('/') {
            return Err(Error::new(format!("invalid unit name: {name}")));
        }
        Ok(Self { name, slice: if slice.is_empty() { default } else { slice }.to_owned() })
    }

    /// The unit whose directory this is.
    pub fn of(dir: &Path) -> Option<Self> {
        let name = |p: &Path| Some(p.file_name()?.to_string_lossy().into_owned());
        let slice = dir.parent().and_then(name).filter(|n| n.ends_with(".slice"));
        Some(Self { name: name(dir)?, slice: slice.unwrap_or_else(|| "-.slice".to_owned()) })
    }

    /// Its directory, from the root of every hierarchy.
    pub fn path(&self) -> Result<PathBuf> {
        let mut path = PathBuf::from("/");
        if bus::user().is_some() {
            // What a user's own systemd manages lies below that.
            path.push(Bus::open()?.property("ControlGroup")?);
        }
        path.push(expand(&self.slice)?);
        path.push(&self.name);
        Ok(path)
    }

    /// Makes the unit around a process.
    pub fn start(&self, pid: i32, more: &[Property]) -> Result<()> {
        let pid = u32::try_from(pid).map_err(|_| Error::new(format!("no pid: {pid}")))?;
        let mut all = vec![("Description".to_owned(), Value::Str(format!("container {}", self.name)))];
        if self.name.ends_with(".slice") {
            all.push(("Wants".to_owned(), Value::Strs(vec![self.slice.clone()])));
        } else {
            all.push(("Slice".to_owned(), Value::Str(self.slice.clone())));
            all.push(("Delegate".to_owned(), Value::Bool(true)));
            all.push(("PIDs".to_owned(), Value::U32s(vec![pid])));
        }
        let accounting = if super::is_unified() { "IOAccounting" } else { "BlockIOAccounting" };
        for name in ["MemoryAccounting", "CPUAccounting", accounting, "TasksAccounting"] {
            all.push((name.to_owned(), Value::Bool(true)));
        }
        all.push(("DefaultDependencies".to_owned(), Value::Bool(false)));
        // An annotation goes over what we say ourselves.
        all.retain(|(name, _)| !more.iter().any(|(other, _)| other == name));
        all.extend_from_slice(more);
        let mut bus = Bus::open()?;
        bus.subscribe()?;
        self.start_with(&mut bus, &all)
    }

    fn start_with(&self, bus: &mut Bus, all: &[Property]) -> Result<()> {
        let mut body = Writer::default();
        body.string(&self.name);
        body.string("replace");
        bus::properties(&mut body, all);
        body.array(8, |_| {});
        let body = body.bytes();
        let mut begin = || bus.manager("StartTransientUnit", "ssa(sv)a(sa(sv))", &body);
        let mut answer = begin()?;
        // A failed unit of that name may be left over.
        if answer.as_ref().is_err_and(|e| e.name.ends_with(".UnitExists")) {
            self.named(bus, "ResetFailedUnit")?;
            answer = bus.manager("StartTransientUnit", "ssa(sv)a(sa(sv))", &body)?;
        }
        let failed = |e: Error| e.context(format_args!("unable to start unit {:?}", self.name));
        match bus.wait(&answer.map_err(|e| failed(e.into()))?)?.as_str() {
            "done" => Ok(()),
            how => {
                self.named(bus, "ResetFailedUnit")?;
                Err(failed(Error::new(format!("the job ended as {how:?}"))))
            }
        }
    }

    /// A call that takes the unit's name alone, on a unit that may be gone.
    fn named(&self, bus: &mut Bus, member: &str) -> Result<()> {
        let mut body = Writer::default();
        body.string(&self.name);
        match bus.manager(member, "s", &body.bytes())? {
            Err(e) if !e.name.ends_with(".NoSuchUnit") => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Moves a process into a group of the unit.
    pub fn attach(&self, inside: &Path, pid: i32) -> Result<()> {
        self.attach_with(&mut Bus::open()?, inside, pid)
    }

    fn attach_with(&self, bus: &mut Bus, inside: &Path, pid: i32) -> Result<()> {
        let pid = u32::try_from(pid).map_err(|_| Error::new(format!("no pid: {pid}")))?;
        let mut body = Writer::default();
        body.string(&self.name);
        body.string(&Path::new("/").join(inside).to_string_lossy());
        body.array(4, |w| w.u32(pid));
        bus.manager("AttachProcessesToUnit", "ssau", &body.bytes())?.map(drop).map_err(Error::from)
    }

    /// Stops the unit, which is no error if it is gone.
    pub fn stop(&self) -> Result<()> {
        let mut bus = Bus::open()?;
        bus.subscribe()?;
        self.stop_with(&mut bus)
    }

    fn stop_with(&self, bus: &mut Bus) -> Result<()> {
        let mut body = Writer::default();
        body.string(&self.name);
        body.string("replace");
        match bus.manager("StopUnit", "ss", &body.bytes())? {
            Ok(answer) => drop(bus.wait(&answer)?),
            Err(e) if e.name.ends_with(".NoSuchUnit") => {}
            Err(e) => return Err(e.into()),
        }
        self.named(bus, "ResetFailedUnit")
    }

    /// Tells systemd of limits, until the next boot.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        self.set(properties::of_resources(resources, super::is_unified())?)
    }

    /// Tells systemd of a device policy. Version 1 has no other safe keeper: what systemd does not know of, it opens
    /// again when it is reloaded.
    pub fn set_devices(&self, policy: &Policy) -> Result<()> {
        if super::is_unified() || policy.allow {
            return Ok(());
        }
        let groups = std::fs::read_to_string("/proc/devices").unwrap_or_default();
        let allowed = policy.exceptions.iter().filter_map(|(which, access)| {
            let kind = if which.block { "block" } else { "char" };
            let name = match (which.major, which.minor) {
                (Some(major), Some(minor)) => format!("/dev/{kind}/{major}:{minor}"),
                (Some(major), None) => format!("{kind}-{}", group(&groups, which.block, major)?),
                (None, _) => format!("{kind}-*"),
            };
            Some((name, access.to_string()))
        });
        let allowed = allowed.collect();
        self.set(vec![
            ("DevicePolicy".to_owned(), Value::Str("strict".to_owned())),
            ("DeviceAllow".to_owned(), Value::Pairs(allowed)),
        ])
    }

    fn set(&self, all: Vec<Property>) -> Result<()> {
        if all.is_empty() {
            return Ok(());
        }
        let mut body = Writer::default();
        body.string(&self.name);
        // Not for the next boot: the unit won't be there.
        body.u32(1);
        bus::properties(&mut body, &all);
        let failed = |e: Error| e.context(format_args!("unable to set properties of unit {:?}", self.name));
        Bus::open()?
            .manager("SetUnitProperties", "sba(sv)", &body.bytes())?
            .map(drop)
            .map_err(|e| failed(e.into()))
    }
}

/// The directories of a slice: `a-b.slice` is `a.slice/a-b.slice`.
fn expand(slice: &str) -> Result<PathBuf> {
    let invalid = || Error::new(format!("invalid slice name: {slice}"));
    let name =
        slice.strip_suffix(".slice").filter(|n| !n.is_empty() && !n.contains('/')).ok_or_else(invalid)?;
    let mut path = PathBuf::new();
    if name == "-" {
        return Ok(path);
    }
    let mut so_far = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return Err(invalid());
        }
        so_far += part;
        path.push(format!("{so_far}.slice"));
        so_far.push('-');
    }
    Ok(path)
}

/// The name that /proc/devices has for a major number.
fn group(devices: &str, block: bool, major: u32) -> Option<&str> {
    let (chars, blocks) = devices.split_once("Block devices:")?;
    let mut lines = if block { blocks } else { chars }.lines();
    lines.find_map(|line| {
        let (number, name) = line.trim().split_once(' ')?;
        (number.parse() == Ok(major)).then_some(name)
    })
}
