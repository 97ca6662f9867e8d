//! Limits on cgroup v1: one file a limit, each in its controller's tree.

use std::path::Path;

use nix::errno::Errno;
use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxNetwork, LinuxResources, LinuxThrottleDevice,
};

use super::Cgroup;
use super::file::{is_missing, read, read_number, write};
use crate::sys::{Error, Result};

/// Sets every limit that `resources` names.
pub(super) fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    if resources.unified().as_ref().is_some_and(|u| !u.is_empty()) {
        return Err(Error::new("invalid configuration: cannot use unified on cgroup v1"));
    }
    if let Some(cpu) = resources.cpu() {
        if cpu.cpus().is_some() || cpu.mems().is_some() {
            set_cpuset(cgroup.required("cpuset")?, cpu)?;
        }
        if has_cpu_limit(cpu) {
            set_cpu(cgroup.required("cpu")?, cpu)?;
        }
    }
    if let Some(memory) = resources.memory()
        && has_memory_limit(memory)
    {
        set_memory(cgroup.required("memory")?, memory)?;
    }
    if let Some(pids) = resources.pids() {
        write(cgroup.required("pids")?, "pids.max", &pids_max(pids.limit()))?;
    }
    if let Some(io) = resources.block_io()
        && has_io_limit(io)
    {
        set_io(cgroup.required("blkio")?, io)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let dir = cgroup.required("hugetlb")?;
        let (size, value) = (limit.page_size(), limit.limit().to_string());
        write(dir, &format!("hugetlb.{size}.limit_in_bytes"), &value)?;
        match write(dir, &format!("hugetlb.{size}.rsvd.limit_in_bytes"), &value) {
            Err(e) if is_missing(&e) => {}
            other => other?,
        }
    }
    if let Some(network) = resources.network() {
        set_network(cgroup, network)?;
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        write(cgroup.required("rdma")?, "rdma.max", &super::rdma_line(device, limit))?;
    }
    Ok(())
}

/// `pids.max` for a limit of config.json: -1 is none, and 0 means 1, as with systemd.
pub(super) fn pids_max(limit: i64) -> String {
    match limit {
        1.. => limit.to_string(),
        0 => "1".to_owned(),
        _ => "max".to_owned(),
    }
}

pub(super) fn set_cpuset(dir: &Path, cpu: &LinuxCpu) -> Result<()> {
    if let Some(cpus) = cpu.cpus().as_deref().filter(|s| !s.is_empty()) {
        write(dir, "cpuset.cpus", cpus)?;
    }
    if let Some(mems) = cpu.mems().as_deref().filter(|s| !s.is_empty()) {
        write(dir, "cpuset.mems", mems)?;
    }
    Ok(())
}

/// Gives a group its parent's processors and memory nodes, where it has none of its own: without any, no process can
/// enter it. So may it be with groups above that others made: they get theirs first.
pub(super) fn inherit_cpuset(dir: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        inherit(dir, file)?;
    }
    Ok(())
}

/// The value of `file` in `dir`, taken from the nearest group above that has one.
fn inherit(dir: &Path, file: &str) -> Result<String> {
    let own = read(dir, file)?.trim().to_owned();
    let Some(parent) = dir.parent().filter(|p| own.is_empty() && p.join(file).exists()) else {
        return Ok(own);
    };
    let value = inherit(parent, file)?;
    write(dir, file, &value)?;
    Ok(value)
}

fn has_cpu_limit(cpu: &LinuxCpu) -> bool {
    cpu.shares().is_some()
        || cpu.quota().is_some()
        || cpu.period().is_some()
        || cpu.burst().is_some()
        || cpu.idle().is_some()
        || cpu.realtime_period().is_some()
        || cpu.realtime_runtime().is_some()
}

/// Writes `first`, and if the kernel finds it out of proportion to a value that is about to change, again after
/// `then`.
fn write_around(dir: &Path, file: &str, value: &str, then: impl FnOnce() -> Result<bool>) -> Result<()> {
    match write(dir, file, value) {
        Err(e) if e.errno() == Some(Errno::EINVAL) => {
            if then()? {
                write(dir, file, value)
            } else {
                Err(e)
            }
        }
        Ok(()) => then().map(drop),
        Err(e) => Err(e),
    }
}

fn set_cpu(dir: &Path, cpu: &LinuxCpu) -> Result<()> {
    if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
        write(dir, "cpu.shares", &shares.to_string())?;
        let got = read_number(dir, "cpu.shares")?;
        if shares > got {
            return Err(Error::new(format!("the maximum allowed cpu-shares is {got}")));
        } else if shares < got {
            return Err(Error::new(format!("the minimum allowed cpu-shares is {got}")));
        }
    }
    let quota = || match cpu.quota().filter(|q| *q != 0) {
        Some(quota) => write(dir, "cpu.cfs_quota_us", &quota.to_string()).map(|()| true),
        None => Ok(false),
    };
    let burst = || match cpu.burst() {
        Some(burst) => match write_around(dir, "cpu.cfs_burst_us", &burst.to_string(), quota) {
            Err(e) if is_missing(&e) => quota(),
            other => other.map(|()| true),
        },
        None => quota(),
    };
    match cpu.period().filter(|p| *p != 0) {
        Some(period) => write_around(dir, "cpu.cfs_period_us", &period.to_string(), burst)?,
        None => burst().map(drop)?,
    }
    if let Some(idle) = cpu.idle() {
        write(dir, "cpu.idle", &idle.to_string())?;
    }
    set_realtime(dir, cpu)
}

/// Also called before the first process enters: a real-time process may not enter a group without bandwidth.
pub(super) fn set_realtime(dir: &Path, cpu: &LinuxCpu) -> Result<()> {
    let runtime = || match cpu.realtime_runtime().filter(|r| *r != 0) {
        Some(runtime) => write(dir, "cpu.rt_runtime_us", &runtime.to_string()).map(|()| true),
        None => Ok(false),
    };
    match cpu.realtime_period().filter(|p| *p != 0) {
        Some(period) => write_around(dir, "cpu.rt_period_us", &period.to_string(), runtime),
        None => runtime().map(drop),
    }
}

fn has_memory_limit(m: &LinuxMemory) -> bool {
    m.limit().is_some()
        || m.swap().is_some()
        || m.reservation().is_some()
        || m.swappiness().is_some()
        || m.disable_oom_killer() == Some(true)
}

fn set_memory(dir: &Path, m: &LinuxMemory) -> Result<()> {
    const SWAP: &str = "memory.memsw.limit_in_bytes";
    let limit = m.limit().filter(|l| *l != 0);
    let mut swap = m.swap().filter(|s| *s != 0);
    if limit == Some(-1) && swap.is_none() && dir.join(SWAP).exists() {
        // No limit on memory means none on memory and swap together.
        swap = Some(-1);
    }
    let set_limit = || limit.map_or(Ok(()), |l| set_memory_limit(dir, l));
    let set_swap = || swap.map_or(Ok(()), |s| write(dir, SWAP, &s.to_string()));
    // The sum of both may never be below the first: raise the sum first, lower it last.
    let raise = match (limit, swap) {
        (Some(_), Some(-1)) => true,
        (Some(_), Some(s)) => read_number(dir, "memory.limit_in_bytes")? < u64::try_from(s).unwrap_or(0),
        _ => false,
    };
    if raise {
        set_swap()?;
        set_limit()?;
    } else {
        set_limit()?;
        set_swap()?;
    }
    if let Some(reservation) = m.reservation().filter(|r| *r != 0) {
        write(dir, "memory.soft_limit_in_bytes", &reservation.to_string())?;
    }
    if m.disable_oom_killer() == Some(true) {
        write(dir, "memory.oom_control", "1")?;
    }
    match m.swappiness() {
        Some(s) if s <= 100 => write(dir, "memory.swappiness", &s.to_string()),
        Some(s) if s as i64 != -1 => {
            Err(Error::new(format!("invalid memory swappiness value: {s} (valid range is 0-100)")))
        }
        _ => Ok(()),
    }
}

fn set_memory_limit(dir: &Path, limit: i64) -> Result<()> {
    match write(dir, "memory.limit_in_bytes", &limit.to_string()) {
        Err(e) if e.errno() == Some(Errno::EBUSY) => {
            let usage = read_number(dir, "memory.usage_in_bytes")?;
            let peak = read_number(dir, "memory.max_usage_in_bytes")?;
            Err(Error::new(format!(
                "unable to set memory limit to {limit} (current usage: {usage}, peak usage: {peak})"
            )))
        }
        other => other,
    }
}

fn has_io_limit(io: &LinuxBlockIo) -> bool {
    let some = |list: &Option<Vec<LinuxThrottleDevice>>| list.as_ref().is_some_and(|l| !l.is_empty());
    io.weight().is_some_and(|w| w != 0)
        || io.leaf_weight().is_some_and(|w| w != 0)
        || io.weight_device().as_ref().is_some_and(|l| !l.is_empty())
        || some(io.throttle_read_bps_device())
        || some(io.throttle_write_bps_device())
        || some(io.throttle_read_iops_device())
        || some(io.throttle_write_iops_device())
}

fn set_io(dir: &Path, io: &LinuxBlockIo) -> Result<()> {
    let prefix = if dir.join("blkio.weight").exists() { "blkio" } else { "blkio.bfq" };
    if let Some(weight) = io.weight().filter(|w| *w != 0) {
        write(dir, &format!("{prefix}.weight"), &weight.to_string())?;
    }
    if let Some(weight) = io.leaf_weight().filter(|w| *w != 0) {
        write(dir, "blkio.leaf_weight", &weight.to_string())?;
    }
    for d in io.weight_device().iter().flatten() {
        let (major, minor) = (d.major(), d.minor());
        if let Some(weight) = d.weight().filter(|w| *w != 0) {
            write(dir, &format!("{prefix}.weight_device"), &format!("{major}:{minor} {weight}"))?;
        }
        if let Some(weight) = d.leaf_weight().filter(|w| *w != 0) {
            write(dir, "blkio.leaf_weight_device", &format!("{major}:{minor} {weight}"))?;
        }
    }
    for (file, list) in [
        ("blkio.throttle.read_bps_device", io.throttle_read_bps_device()),
        ("blkio.throttle.write_bps_device", io.throttle_write_bps_device()),
        ("blkio.throttle.read_iops_device", io.throttle_read_iops_device()),
        ("blkio.throttle.write_iops_device", io.throttle_write_iops_device()),
    ] {
        for d in list.iter().flatten() {
            write(dir, file, &format!("{}:{} {}", d.major(), d.minor(), d.rate()))?;
        }
    }
    Ok(())
}

fn set_network(cgroup: &Cgroup, network: &LinuxNetwork) -> Result<()> {
    if let Some(class) = network.class_id().filter(|c| *c != 0) {
        write(cgroup.required("net_cls")?, "net_cls.classid", &class.to_string())?;
    }
    for p in network.priorities().iter().flatten() {
        write(cgroup.required("net_prio")?, "net_prio.ifpriomap", &format!("{} {}", p.name(), p.priority()))?;
    }
    Ok(())
}
