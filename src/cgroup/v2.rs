//! Limits on cgroup v2, converted where the spec still speaks v1.

use std::path::Path;

use nix::errno::Errno;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::file::{is_missing, read, read_number, write};
use super::v1::{pids_max, set_cpuset};
use crate::sys::{Context, Error, Result};

/// Sets every limit that `resources` names.
pub(super) fn apply(dir: &Path, resources: &LinuxResources) -> Result<()> {
    if let Some(pids) = resources.pids() {
        write(dir, "pids.max", &pids_max(pids.limit()))?;
    }
    if let Some(memory) = resources.memory() {
        set_memory(dir, memory)?;
    }
    if let Some(io) = resources.block_io() {
        set_io(dir, io)?;
    }
    if let Some(cpu) = resources.cpu() {
        set_cpu(dir, cpu)?;
        set_cpuset(dir, cpu)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let (size, value) = (limit.page_size(), limit.limit().to_string());
        write(dir, &format!("hugetlb.{size}.max"), &value)?;
        match write(dir, &format!("hugetlb.{size}.rsvd.max"), &value) {
            Err(e) if is_missing(&e) => {}
            other => other?,
        }
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        write(dir, "rdma.max", &super::rdma_line(device, limit))?;
    }
    for (name, value) in resources.unified().iter().flatten() {
        set_unified(dir, name, value)?;
    }
    Ok(())
}

/// -1 is written `max`, and 0 means not set.
fn limit_text(value: i64) -> Option<String> {
    match value {
        0 => None,
        -1 => Some("max".to_owned()),
        n => Some(n.to_string()),
    }
}

/// The v2 limit of swap alone for config.json's limit of memory and swap together.
pub fn swap_alone(swap: i64, memory: i64) -> Result<i64> {
    match (swap, memory) {
        (0, -1) => Ok(-1),
        (-1 | 0, _) | (_, -1) => Ok(swap),
        (_, 0) => Err(Error::new("unable to set swap limit without memory limit")),
        (_, m) if m < 0 => Err(Error::new(format!("invalid memory value: {m}"))),
        (s, m) if s < m => Err(Error::new("memory+swap limit should be >= memory limit")),
        (s, m) => Ok(s - m),
    }
}

fn set_memory(dir: &Path, m: &LinuxMemory) -> Result<()> {
    let (limit, sum) = (m.limit().unwrap_or(0), m.swap().unwrap_or(0));
    let reservation = m.reservation().unwrap_or(0);
    if limit == 0 && sum == 0 && reservation == 0 {
        return Ok(());
    }
    check_usage(dir, m)?;
    let alone = swap_alone(sum, limit)?;
    // Equal limits leave no swap at all.
    let swap = if alone == 0 && sum > 0 { Some("0".to_owned()) } else { limit_text(alone) };
    if let Some(swap) = swap {
        match write(dir, "memory.swap.max", &swap) {
            // A kernel without swap accounting limits nothing and has nothing to disable.
            Err(e) if is_missing(&e) && (swap == "max" || swap == "0") => {}
            other => other?,
        }
    }
    if let Some(limit) = limit_text(limit) {
        write(dir, "memory.max", &limit)?;
    }
    if let Some(low) = limit_text(reservation) {
        write(dir, "memory.low", &low)?;
    }
    Ok(())
}

/// Refuses limits below what is used already, where config.json asks for that.
pub(super) fn check_before_update(dir: &Path, resources: &LinuxResources) -> Result<()> {
    resources.memory().as_ref().map_or(Ok(()), |m| check_usage(dir, m))
}

fn check_usage(dir: &Path, m: &LinuxMemory) -> Result<()> {
    if m.check_before_update() != Some(true) {
        return Ok(());
    }
    let (limit, sum) = (m.limit().unwrap_or(0), m.swap().unwrap_or(0));
    let Ok(usage) = read_number(dir, "memory.current") else { return Ok(()) };
    let below = |value: i64| u64::try_from(value).is_ok_and(|v| v > 0 && v <= usage);
    if below(sum) {
        return Err(Error::new(format!("rejecting memory+swap limit {sum} <= usage {usage}")));
    }
    if below(limit) {
        return Err(Error::new(format!("rejecting memory limit {limit} <= usage {usage}")));
    }
    Ok(())
}

/// `cpu.weight` [1, 10000] for shares [2, 262144]: a curve through both ends that takes 1024 to 100.
pub fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let l = (shares as f64).log2();
            let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
            10f64.powf(exponent).ceil() as u64
        }
    }
}

fn set_cpu(dir: &Path, cpu: &LinuxCpu) -> Result<()> {
    if let Some(idle) = cpu.idle() {
        write(dir, "cpu.idle", &idle.to_string())?;
    }
    let weight = weight_of_shares(cpu.shares().unwrap_or(0));
    if weight != 0 {
        write(dir, "cpu.weight", &weight.to_string())?;
    }
    let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
    let mut late_burst = None;
    if let Some(burst) = cpu.burst() {
        match write(dir, "cpu.max.burst", &burst.to_string()) {
            // More than the quota that is about to be raised.
            Err(e) if e.errno() == Some(Errno::EINVAL) && quota != 0 => late_burst = Some(burst),
            other => other?,
        }
    }
    if quota != 0 || period != 0 {
        // What is not named stays.
        let now = read(dir, "cpu.max")?;
        let mut now = now.split_whitespace();
        let (old_quota, old_period) = (now.next().unwrap_or("max"), now.next().unwrap_or("100000"));
        let quota = match quota {
            0 => old_quota.to_owned(),
            1.. => quota.to_string(),
            _ => "max".to_owned(),
        };
        let period = if period == 0 { old_period.to_owned() } else { period.to_string() };
        write(dir, "cpu.max", &format!("{quota} {period}"))?;
    }
    late_burst.map_or(Ok(()), |burst| write(dir, "cpu.max.burst", &burst.to_string()))
}

/// `io.weight` [1, 10000] for a blkio weight [10, 1000].
pub fn io_weight(weight: u16) -> u64 {
    1 + u64::from(weight.max(10) - 10) * 9999 / 990
}

fn set_io(dir: &Path, io: &LinuxBlockIo) -> Result<()> {
    let bfq = match read(dir, "io.bfq.weight") {
        Ok(text) => Some(text),
        Err(e) if is_missing(&e) => None,
        Err(e) => return Err(e),
    };
    if let Some(weight) = io.weight().filter(|w| *w != 0) {
        match bfq {
            Some(_) => write(dir, "io.bfq.weight", &weight.to_string())?,
            None => write(dir, "io.weight", &io_weight(weight).to_string())?,
        }
    }
    // Kernels with weights for each device print `default N` here, older ones only a number.
    if bfq.is_some_and(|text| text.trim().parse::<i64>().is_err()) {
        for d in io.weight_device().iter().flatten() {
            if let Some(weight) = d.weight().filter(|w| *w != 0) {
                write(dir, "io.bfq.weight", &format!("{}:{} {weight}\n", d.major(), d.minor()))?;
            }
        }
    }
    let throttle = |list: &Option<Vec<LinuxThrottleDevice>>, key: &str| -> Result<()> {
        for d in list.iter().flatten() {
            write(dir, "io.max", &format!("{}:{} {key}={}", d.major(), d.minor(), d.rate()))?;
        }
        Ok(())
    };
    throttle(io.throttle_read_bps_device(), "rbps")?;
    throttle(io.throttle_write_bps_device(), "wbps")?;
    throttle(io.throttle_read_iops_device(), "riops")?;
    throttle(io.throttle_write_iops_device(), "wiops")
}

fn set_unified(dir: &Path, name: &str, value: &str) -> Result<()> {
    if name.contains('/') {
        return Err(Error::new(format!("unified resource {name:?} must be a file name (no slashes)")));
    }
    for line in value.lines() {
        let Err(e) = write(dir, name, line) else { continue };
        if matches!(e.errno(), Some(Errno::ENOENT | Errno::EPERM | Errno::EACCES)) {
            let Some((controller, _)) = name.split_once('.') else {
                let form = "must be in the form CONTROLLER.PARAMETER";
                return Err(Error::new(format!("unified resource {name:?} {form}")));
            };
            let there = read(dir, "cgroup.controllers")?;
            if controller != "cgroup" && !there.split_whitespace().any(|c| c == controller) {
                return Err(Error::new(format!(
                    "unified resource {name:?} can't be set: controller {controller:?} not available"
                )));
            }
        }
        return Err(e.context(format_args!("unable to set unified resource {name:?}")));
    }
    Ok(())
}

/// Makes the directory and those above it, switching every available controller on for their children.
pub(super) fn create(
    dir: &Path,
    resources: &LinuxResources,
    made: &mut Vec<std::path::PathBuf>,
) -> Result<()> {
    let root = Path::new(super::hierarchy::UNIFIED);
    let inside =
        dir.strip_prefix(root).map_err(|_| Error::new(format!("invalid cgroup path {}", dir.display())))?;
    let controllers = read(root, "cgroup.controllers")?;
    let all: Vec<String> = controllers.split_whitespace().map(|c| format!("+{c}")).collect();
    let mut current = root.to_owned();
    for part in inside.components() {
        // Not for the container's own directory: its processes are in it.
        if write(&current, "cgroup.subtree_control", &all.join(" ")).is_err() {
            for one in &all {
                // What cannot be switched on shows when a limit of it is set.
                let _ = write(&current, "cgroup.subtree_control", one);
            }
        }
        current.push(part);
        match std::fs::create_dir(&current) {
            Ok(()) => made.push(current.clone()),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).context(|| format!("mkdir {}", current.display())),
        }
        check_type(&current, resources)?;
    }
    Ok(())
}

/// Groups that hold threads, or lie below a group with processes, cannot have domain controllers.
fn check_type(dir: &Path, resources: &LinuxResources) -> Result<()> {
    let kind = read(dir, "cgroup.type").unwrap_or_default();
    let domain = resources.memory().is_some()
        || resources.block_io().is_some()
        || resources.hugepage_limits().as_ref().is_some_and(|l| !l.is_empty());
    match kind.trim() {
        "domain invalid" if domain => Err(Error::new(format!(
            "cannot enter cgroupv2 {:?} with domain controllers -- it is in an invalid state",
            dir
        ))),
        "domain invalid" => {
            let _ = write(dir, "cgroup.type", "threaded");
            Ok(())
        }
        kind @ ("domain threaded" | "threaded") if domain => Err(Error::new(format!(
            "cannot enter cgroupv2 {:?} with domain controllers -- it is in {kind} mode",
            dir
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights() {
        for (shares, weight) in [(0, 0), (2, 1), (1024, 100), (262_144, 10_000), (300_000, 10_000)] {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
        assert_eq!((io_weight(10), io_weight(1000)), (1, 10_000));
    }

    /// Devices for RDMA are rare: the files are plain ones here.
    #[test]
    fn rdma_limits_are_lines_of_rdma_max() {
        let dir = tempfile::tempdir().unwrap();
        for (limits, line) in [
            (r#"{"hcaHandles": 3, "hcaObjects": 10}"#, "mlx5_1 hca_handle=3 hca_object=10"),
            (r#"{"hcaObjects": 0}"#, "mlx5_1 hca_handle=max hca_object=0"),
            ("{}", "mlx5_1 hca_handle=max hca_object=max"),
        ] {
            std::fs::write(dir.path().join("rdma.max"), "").unwrap();
            let resources = format!(r#"{{"rdma": {{"mlx5_1": {limits}}}}}"#);
            apply(dir.path(), &serde_json::from_str(&resources).unwrap()).unwrap();
            assert_eq!(std::fs::read_to_string(dir.path().join("rdma.max")).unwrap(), line);
        }
    }

    #[test]
    fn swap_is_what_remains_beside_memory() {
        assert_eq!(swap_alone(0, -1).unwrap(), -1);
        assert_eq!(swap_alone(-1, 100).unwrap(), -1);
        assert_eq!(swap_alone(300, 100).unwrap(), 200);
        assert_eq!(swap_alone(0, 100).unwrap(), 0);
        assert!(swap_alone(100, 0).is_err());
        assert!(swap_alone(50, 100).is_err());
    }
}
