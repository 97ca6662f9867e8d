//! What a group made inside was set to.
//!
//! Only settings that limit or weigh, by name: an image cannot write to any other file of a group. A setting that a
//! new group has by itself is not written, for the kernel refuses some values that it reports.

use std::fs;
use std::path::Path;

use super::limits;
use super::tree::perms;
use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::{CgControllerEntry, CgroupDirEntry, CgroupPropEntry};
use crate::sys::procfs::read_text;

/// Settings of version 1, by controller.
const V1: [&str; 37] = [
    "cpu.shares",
    "cpu.cfs_period_us",
    "cpu.cfs_quota_us",
    "cpu.cfs_burst_us",
    "cpu.rt_period_us",
    "cpu.rt_runtime_us",
    "cpu.idle",
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.soft_limit_in_bytes",
    "memory.swappiness",
    "memory.oom_control",
    "memory.use_hierarchy",
    "memory.move_charge_at_immigrate",
    "memory.kmem.tcp.limit_in_bytes",
    "cpuset.memory_migrate",
    "cpuset.cpu_exclusive",
    "cpuset.mem_exclusive",
    "cpuset.mem_hardwall",
    "cpuset.memory_spread_page",
    "cpuset.memory_spread_slab",
    "cpuset.sched_load_balance",
    "cpuset.sched_relax_domain_level",
    "blkio.weight",
    "blkio.bfq.weight",
    "blkio.throttle.read_bps_device",
    "blkio.throttle.write_bps_device",
    "blkio.throttle.read_iops_device",
    "blkio.throttle.write_iops_device",
    "net_cls.classid",
    "net_prio.ifpriomap",
    "pids.max",
    "devices.list",
    "cgroup.clone_children",
    "notify_on_release",
    "cgroup.freeze",
    "freezer.state",
];

/// Settings of version 2.
const V2: [&str; 26] = [
    "cgroup.max.depth",
    "cgroup.max.descendants",
    "cgroup.pressure",
    "cpu.weight",
    "cpu.max",
    "cpu.max.burst",
    "cpu.idle",
    "cpu.uclamp.min",
    "cpu.uclamp.max",
    "cpuset.cpus",
    "cpuset.mems",
    "cpuset.cpus.exclusive",
    "cpuset.cpus.partition",
    "memory.min",
    "memory.low",
    "memory.high",
    "memory.max",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "memory.oom.group",
    "io.weight",
    "io.max",
    "io.latency",
    "pids.max",
    "cgroup.freeze",
];

/// A process cannot enter a group of version 1 before these are set.
const FIRST_V1: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// Those of version 2 that shape the tree.
const TYPE: &str = "cgroup.type";
const THREADED: &str = "threaded";
const DISTRIBUTED: &str = "cgroup.subtree_control";

/// Whether a hierarchy is that of version 2.
pub(super) fn unified(controller: &CgControllerEntry) -> bool {
    controller.cnames.iter().all(String::is_empty)
}

pub(super) fn value(dir: &Path, name: &str) -> Option<String> {
    // Not there in this kernel, or not readable in this kind of group.
    read_text(dir.join(name)).ok().map(|text| text.trim_end().to_owned())
}

/// The settings of a group. Of the container's own only what those inside change by being there.
pub(super) fn read(hierarchy: &str, dir: &Path, top: bool) -> Result<Vec<CgroupPropEntry>> {
    match (hierarchy.is_empty(), top) {
        (true, true) => read_all(dir, [DISTRIBUTED]),
        (true, false) => read_all(dir, [TYPE, DISTRIBUTED].into_iter().chain(V2)),
        (false, true) => Ok(Vec::new()),
        (false, false) => read_all(dir, FIRST_V1.into_iter().chain(V1)),
    }
}

/// Those of the container's own group that `update` can change.
pub(super) fn read_limits(hierarchy: &str, dir: &Path) -> Result<Vec<CgroupPropEntry>> {
    read_all(dir, limits::names(hierarchy))
}

fn read_all<'a>(dir: &Path, names: impl IntoIterator<Item = &'a str>) -> Result<Vec<CgroupPropEntry>> {
    let mut all = Vec::new();
    for name in names {
        if let Some(value) = value(dir, name) {
            let perms = Some(perms(&dir.join(name))?);
            all.push(CgroupPropEntry { name: name.to_owned(), value, perms });
        }
    }
    Ok(all)
}

/// Whether a group holds threads, or one inside does.
pub(super) fn threaded(group: &CgroupDirEntry) -> bool {
    let own = group.properties.iter().any(|p| p.name == TYPE && p.value == THREADED);
    own || group.children.iter().any(threaded)
}

/// Makes the settings those of a frozen group.
pub(super) fn freeze(properties: &mut [CgroupPropEntry]) {
    for property in properties {
        match property.name.as_str() {
            "freezer.state" => property.value = "FROZEN".into(),
            "cgroup.freeze" => property.value = "1".into(),
            _ => {}
        }
    }
}

pub(super) fn set(dir: &Path, name: &str, value: &str) -> Result<()> {
    let path = dir.join(name);
    fs::write(&path, value)
        .during("cannot set a control group", || format!("write({}, {value:?})", path.display()))
}

/// What must be set before a process may enter.
pub(super) fn before(controller: &CgControllerEntry, group: &CgroupDirEntry, dir: &Path) -> Result<()> {
    for property in &group.properties {
        let (name, wanted) = (property.name.as_str(), property.value.as_str());
        let threaded = name == TYPE && wanted == THREADED && unified(controller);
        let first = FIRST_V1.contains(&name) && !unified(controller);
        if (threaded || first && !wanted.is_empty()) && value(dir, name).is_some_and(|is| is != wanted) {
            set(dir, name, &limits::within_parent(dir, name, wanted)?)?;
        }
    }
    Ok(())
}

/// Which controllers a group of version 2 gives to those inside.
pub(super) fn distribute(group: &CgroupDirEntry, dir: &Path) -> Result<()> {
    let Some(property) = group.properties.iter().find(|p| p.name == DISTRIBUTED) else { return Ok(()) };
    let has = value(dir, DISTRIBUTED).unwrap_or_default();
    let has: Vec<&str> = has.split_whitespace().collect();
    let named = |name: &&str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let missing = property.value.split_whitespace().filter(named).filter(|name| !has.contains(name));
    let wanted = missing.map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ");
    if wanted.is_empty() { Ok(()) } else { set(dir, DISTRIBUTED, &wanted) }
}

/// All other settings.
pub(super) fn after(group: &CgroupDirEntry, dir: &Path) -> Result<()> {
    for property in &group.properties {
        let (name, wanted) = (property.name.as_str(), property.value.as_str());
        let known = V1.contains(&name) || V2.contains(&name);
        if !known || wanted.is_empty() || value(dir, name).is_none_or(|is| is == wanted) {
            continue;
        }
        match name {
            "devices.list" => {
                set(dir, "devices.deny", "a")?;
                wanted.lines().try_for_each(|line| set(dir, "devices.allow", line))?;
            }
            // The other lines tell what is, not what is wanted.
            "memory.oom_control" => {
                if let Some(number) = wanted.lines().find_map(|l| l.strip_prefix("oom_kill_disable ")) {
                    set(dir, name, number)?;
                }
            }
            "freezer.state" if wanted != "FROZEN" => {}
            "cpuset.cpus" | "cpuset.mems" => {
                let there = limits::within_parent(dir, name, wanted)?;
                if value(dir, name).as_deref() != Some(&there) {
                    set(dir, name, &there)?;
                }
            }
            _ => wanted.lines().try_for_each(|line| set(dir, name, line))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(properties: &[(&str, &str)]) -> CgroupDirEntry {
        let one = |(name, value): &(&str, &str)| CgroupPropEntry {
            name: (*name).to_owned(),
            value: (*value).to_owned(),
            perms: None,
        };
        CgroupDirEntry { properties: properties.iter().map(one).collect(), ..CgroupDirEntry::default() }
    }

    #[test]
    fn only_known_settings_that_differ_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap_or_default();
        for (name, value) in [
            ("pids.max", "max"),
            ("cpu.weight", "100"),
            ("release_agent", ""),
            ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0"),
            ("io.max", ""),
        ] {
            fs::write(dir.path().join(name), value).unwrap();
        }
        let all = group(&[
            ("pids.max", "20"),
            ("cpu.weight", "100"),
            ("release_agent", "/evil"),
            ("memory.max", "1"),
            ("memory.oom_control", "oom_kill_disable 1\nunder_oom 1"),
            ("io.max", "8:0 rbps=1 wbps=max"),
        ]);
        after(&all, dir.path()).unwrap();
        assert_eq!(file("pids.max"), "20");
        assert_eq!(file("release_agent"), "");
        assert!(!dir.path().join("memory.max").exists());
        assert_eq!(file("memory.oom_control"), "1");
        assert_eq!(file("io.max"), "8:0 rbps=1 wbps=max");
    }

    #[test]
    fn controllers_are_added_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(DISTRIBUTED);
        fs::write(&path, "cpu").unwrap();
        distribute(&group(&[(DISTRIBUTED, "cpu memory -pids pids")]), dir.path()).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "+memory +pids");
    }
}
