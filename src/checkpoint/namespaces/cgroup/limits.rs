//! The settings of the container's own group, which `update` may have changed since the start.
//!
//! ```text
//!   --manage-cgroups-mode   soft (or none)    config.json of the restore decides
//!                           full              those of the images, as far as config.json allows
//!                           strict            likewise, and the group must not have been there before
//!                           ignore            no group at all is looked at
//!
//!   config.json says nothing    the image's
//!   a limit, a quota, CPUs      the smaller one; of CPUs, those that both have
//!   a weight, a protection      config.json's
//! ```

use std::collections::BTreeSet;
use std::path::Path;

use oci_spec::runtime::{LinuxResources, Spec};

use super::properties::{set, value};
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::CgroupDirEntry;

/// How what config.json sets and what the image has make one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// A number, or `max`.
    Least,
    /// A list of numbers.
    Both,
    /// Microseconds in a period.
    Quota,
    /// No matter of more or less.
    Config,
}

/// The settings, in an order in which each can be lowered.
const SETTINGS: [(&str, Rule); 28] = [
    ("cpuset.cpus", Rule::Both),
    ("cpuset.mems", Rule::Both),
    ("cpu.cfs_quota_us", Rule::Quota),
    ("cpu.max", Rule::Quota),
    ("cpu.shares", Rule::Config),
    ("cpu.weight", Rule::Config),
    ("cpu.idle", Rule::Config),
    ("cpu.cfs_burst_us", Rule::Config),
    ("cpu.max.burst", Rule::Config),
    ("memory.limit_in_bytes", Rule::Least),
    ("memory.memsw.limit_in_bytes", Rule::Least),
    ("memory.soft_limit_in_bytes", Rule::Least),
    ("memory.swappiness", Rule::Config),
    ("memory.high", Rule::Least),
    ("memory.max", Rule::Least),
    ("memory.swap.max", Rule::Least),
    ("memory.low", Rule::Config),
    ("memory.min", Rule::Config),
    ("pids.max", Rule::Least),
    ("blkio.weight", Rule::Config),
    ("blkio.bfq.weight", Rule::Config),
    ("blkio.throttle.read_bps_device", Rule::Config),
    ("blkio.throttle.write_bps_device", Rule::Config),
    ("blkio.throttle.read_iops_device", Rule::Config),
    ("blkio.throttle.write_iops_device", Rule::Config),
    ("io.weight", Rule::Config),
    ("io.bfq.weight", Rule::Config),
    ("io.max", Rule::Config),
];

/// The period of a quota of version 1, which is a file of its own.
const PERIOD: &str = "cpu.cfs_period_us";

/// The names of the settings that a hierarchy of version 1, or that of version 2, may have.
pub(super) fn names(hierarchy: &str) -> Vec<&'static str> {
    let has = |name: &str| {
        let controller = name.split('.').next().unwrap_or_default();
        hierarchy.is_empty() || hierarchy.split(',').any(|c| c == controller)
    };
    SETTINGS.iter().map(|(name, _)| *name).chain([PERIOD]).filter(|name| has(name)).collect()
}

/// Whether the settings of the images are wanted.
pub(super) fn wanted(mode: Option<&str>) -> bool {
    matches!(mode, Some("full" | "strict"))
}

/// Gives the container's own group what it had, as far as config.json allows.
pub(super) fn restore(group: &CgroupDirEntry, dir: &Path, spec: &Spec) -> Result<()> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let saved = |name: &str| group.properties.iter().find(|p| p.name == name).map(|p| p.value.trim());
    for (name, rule) in SETTINGS {
        let (Some(was), Some(is)) = (saved(name).filter(|was| !was.is_empty()), value(dir, name)) else {
            continue;
        };
        let bound = resources.is_some_and(|resources| configured(resources, name));
        if name == "cpu.cfs_quota_us" {
            quota_v1(dir, (was, saved(PERIOD)), &is, bound)?;
            continue;
        }
        let to = match rule {
            Rule::Both if !bound => within_parent(dir, name, was)?,
            _ if !bound => was.to_owned(),
            Rule::Config => continue,
            Rule::Least => least(was, &is).to_owned(),
            Rule::Both => both(name, was, &is)?,
            Rule::Quota if share(was) < share(&is) => was.to_owned(),
            Rule::Quota => continue,
        };
        if to != is {
            // A list of devices is written line by line.
            to.lines().try_for_each(|line| set(dir, name, line))?;
        }
    }
    Ok(())
}

/// The quota of version 1: two files for what `cpu.max` is in version 2.
fn quota_v1(dir: &Path, was: (&str, Option<&str>), is: &str, bound: bool) -> Result<()> {
    let (Some(period), Some(now)) = (was.1, value(dir, PERIOD)) else { return Ok(()) };
    let text = |quota: &str, period: &str| {
        format!("{} {period}", if quota.starts_with('-') { "max" } else { quota })
    };
    let (was_both, is_both) = (text(was.0, period), text(is, &now));
    if was_both == is_both || bound && share(&was_both) >= share(&is_both) {
        return Ok(());
    }
    set(dir, PERIOD, period)?;
    set(dir, "cpu.cfs_quota_us", was.0)
}

/// What part of a processor `cpu.max` gives, in millionths.
fn share(text: &str) -> u64 {
    let mut words = text.split_whitespace();
    let (quota, period) = (words.next().unwrap_or("max"), words.next().unwrap_or("100000"));
    let number = |word: &str| word.parse::<u64>().ok();
    match (number(quota), number(period)) {
        (Some(quota), Some(period)) if period != 0 => quota.saturating_mul(1_000_000) / period,
        _ => u64::MAX,
    }
}

fn least<'a>(a: &'a str, b: &'a str) -> &'a str {
    let number = |text: &str| text.parse::<u64>().unwrap_or(u64::MAX);
    if number(a) < number(b) { a } else { b }
}

/// Processors or nodes of the images, as far as the group around has them. Any other setting as it is.
pub(super) fn within_parent(dir: &Path, name: &str, was: &str) -> Result<String> {
    let around = match name {
        "cpuset.cpus" => ["cpuset.cpus.effective", "cpuset.effective_cpus", name],
        "cpuset.mems" => ["cpuset.mems.effective", "cpuset.effective_mems", name],
        _ => return Ok(was.to_owned()),
    };
    let parent = dir.parent();
    let has = around.iter().find_map(|file| value(parent?, file)).filter(|has| !has.is_empty());
    let Some(has) = has else { return Ok(was.to_owned()) };
    let (wanted, there) = (numbers(was), numbers(&has));
    if wanted.is_subset(&there) {
        return Ok(was.to_owned());
    }
    let common: Vec<String> = wanted.intersection(&there).map(u32::to_string).collect();
    if common.is_empty() {
        return Err(Error::new(format!(
            "a control group of the checkpoint has {name} {was}, and here there are {has}: they have nothing in common"
        ))
        .remedy("restore with --manage-cgroups-mode ignore, or on a machine that has them"));
    }
    Ok(common.join(","))
}

/// The numbers that are in two lists.
fn both(name: &str, was: &str, is: &str) -> Result<String> {
    let common: Vec<String> = numbers(was).intersection(&numbers(is)).map(u32::to_string).collect();
    if common.is_empty() {
        return Err(Error::new(format!(
            "the checkpoint's {name} is {was}, config.json allows {is}: they have nothing in common"
        ))
        .remedy("change config.json, or restore with --manage-cgroups-mode soft"));
    }
    Ok(common.join(","))
}

/// Most that a kernel knows of processors or nodes.
const NUMBERS_MAX: u32 = 1 << 16;

fn numbers(list: &str) -> BTreeSet<u32> {
    let mut all = BTreeSet::new();
    for part in list.split(',') {
        let (first, last) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            all.extend(first..=last.min(NUMBERS_MAX));
        }
    }
    all
}

/// Whether config.json says something of a setting.
fn configured(resources: &LinuxResources, name: &str) -> bool {
    let (cpu, memory) = (resources.cpu().as_ref(), resources.memory().as_ref());
    let unified = resources.unified().as_ref().is_some_and(|all| all.contains_key(name));
    unified
        || match name {
            "cpuset.cpus" => cpu.is_some_and(|c| c.cpus().is_some()),
            "cpuset.mems" => cpu.is_some_and(|c| c.mems().is_some()),
            "cpu.cfs_quota_us" | "cpu.max" => cpu.is_some_and(|c| c.quota().is_some()),
            "cpu.shares" | "cpu.weight" => cpu.is_some_and(|c| c.shares().is_some()),
            "cpu.idle" => cpu.is_some_and(|c| c.idle().is_some()),
            "cpu.cfs_burst_us" | "cpu.max.burst" => cpu.is_some_and(|c| c.burst().is_some()),
            "memory.limit_in_bytes" | "memory.max" => memory.is_some_and(|m| m.limit().is_some()),
            "memory.memsw.limit_in_bytes" | "memory.swap.max" => memory.is_some_and(|m| m.swap().is_some()),
            "memory.soft_limit_in_bytes" | "memory.low" => memory.is_some_and(|m| m.reservation().is_some()),
            "memory.swappiness" => memory.is_some_and(|m| m.swappiness().is_some()),
            "pids.max" => resources.pids().is_some(),
            _ => {
                let device = name.starts_with("io.") || name.starts_with("blkio.");
                device && resources.block_io().is_some()
            }
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::CgroupPropEntry;

    fn group(properties: &[(&str, &str)]) -> CgroupDirEntry {
        let one = |(name, value): &(&str, &str)| CgroupPropEntry {
            name: (*name).to_owned(),
            value: (*value).to_owned(),
            perms: None,
        };
        CgroupDirEntry { properties: properties.iter().map(one).collect(), ..CgroupDirEntry::default() }
    }

    fn restored(resources: &str, now: &[(&str, &str)], saved: &[(&str, &str)]) -> Result<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in now {
            std::fs::write(dir.path().join(name), value).unwrap();
        }
        let spec = format!(r#"{{"ociVersion": "1.0.2", "linux": {{"resources": {resources}}}}}"#);
        restore(&group(saved), dir.path(), &serde_json::from_str(&spec).unwrap())?;
        Ok(now.iter().map(|(name, _)| std::fs::read_to_string(dir.path().join(name)).unwrap()).collect())
    }

    #[test]
    fn config_json_bounds_what_the_image_had() {
        let now =
            [("memory.max", "1000"), ("pids.max", "max"), ("cpu.weight", "50"), ("io.weight", "default 100")];
        let saved = |memory, pids| [("memory.max", memory), ("pids.max", pids), ("cpu.weight", "900")];
        let config = r#"{"memory": {"limit": 1000}, "cpu": {"shares": 512}}"#;
        assert_eq!(
            restored(config, &now, &saved("max", "7")).unwrap(),
            ["1000", "7", "50", "default 100"],
            "wider than config.json, or not named there"
        );
        assert_eq!(restored(config, &now, &saved("500", "max")).unwrap()[0], "500", "narrower");
        assert_eq!(restored("{}", &now, &saved("2000", "3")).unwrap()[..3], ["2000", "3", "900"]);
    }

    #[test]
    fn quotas_and_processors_are_compared_as_what_they_are() {
        let cpu = r#"{"cpu": {"quota": 50000, "period": 100000, "cpus": "0-3"}}"#;
        let one = |now: &[(&str, &str)], saved: &[(&str, &str)]| restored(cpu, now, saved);
        assert_eq!(
            one(&[("cpu.max", "50000 100000")], &[("cpu.max", "30000 50000")]).unwrap(),
            ["50000 100000"]
        );
        assert_eq!(
            one(&[("cpu.max", "50000 100000")], &[("cpu.max", "9000 50000")]).unwrap(),
            ["9000 50000"]
        );
        let v1 = |quota, period| [("cpu.cfs_quota_us", quota), ("cpu.cfs_period_us", period)];
        assert_eq!(one(&v1("50000", "100000"), &v1("-1", "100000")).unwrap(), ["50000", "100000"]);
        assert_eq!(one(&v1("50000", "100000"), &v1("1000", "10000")).unwrap(), ["1000", "10000"]);
        assert_eq!(one(&[("cpuset.cpus", "0-3")], &[("cpuset.cpus", "2,3,9")]).unwrap(), ["2,3"]);
        let error = one(&[("cpuset.cpus", "0-3")], &[("cpuset.cpus", "8")]).unwrap_err().to_string();
        assert!(error.contains("cpuset.cpus is 8") && error.contains("0-3"), "{error}");
    }

    #[test]
    fn processors_that_are_not_there_are_left_out() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("group");
        std::fs::create_dir(&dir).unwrap();
        let all = |name, was| within_parent(&dir, name, was);
        assert_eq!(all("cpuset.cpus", "0-9").unwrap(), "0-9", "nothing is known of what is there");
        std::fs::write(top.path().join("cpuset.cpus"), "0-3\n").unwrap();
        assert_eq!(all("cpuset.cpus", "0-1,3").unwrap(), "0-1,3");
        assert_eq!(all("cpuset.cpus", "2-9").unwrap(), "2,3");
        assert_eq!(all("cpuset.mems", "7").unwrap(), "7");
        assert_eq!(all("pids.max", "9").unwrap(), "9");
        // What is there beats what is asked for.
        std::fs::write(top.path().join("cpuset.cpus.effective"), "3\n").unwrap();
        assert_eq!(all("cpuset.cpus", "2-9").unwrap(), "3");
        let error = all("cpuset.cpus", "0-2").unwrap_err().to_string();
        assert!(error.contains("cpuset.cpus 0-2") && error.contains("there are 3"), "{error}");
        std::fs::write(dir.join("cpuset.cpus"), "3\n").unwrap();
        restore(&group(&[("cpuset.cpus", "1-8")]), &dir, &Spec::default()).unwrap();
        assert_eq!(std::fs::read_to_string(dir.join("cpuset.cpus")).unwrap(), "3\n");
    }

    #[test]
    fn a_hierarchy_has_the_settings_of_its_controllers() {
        assert_eq!(names("pids"), ["pids.max"]);
        assert!(names("cpu,cpuacct").contains(&PERIOD) && !names("cpu,cpuacct").contains(&"cpuset.cpus"));
        assert!(names("").contains(&"memory.max"));
    }
}
