//! What a container has used: the `data` of `events --stats`, in runc's shape.
//!
//! Files of controllers that are not there leave zeroes, for clients expect every section.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::Cgroup;
use super::file::{is_missing, pairs, parse_number, read, read_number};
use crate::sys::{Error, Result};

mod blkio;
mod memory;

fn zero(n: &u64) -> bool {
    *n == 0
}

fn default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// All statistics.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Processor time.
    pub cpu: Cpu,
    /// Processors and memory nodes (v1 only).
    pub cpuset: CpuSet,
    /// Memory.
    pub memory: memory::Memory,
    /// Processes.
    pub pids: Pids,
    /// Block devices.
    pub blkio: blkio::Blkio,
    /// Huge pages, by size.
    pub hugetlb: BTreeMap<String, HugeTlb>,
    /// The last-level cache and memory bandwidth; filled in by who knows the container's class.
    pub intel_rdt: super::rdt::Stats,
    /// Always null, as from a runtime that makes no interfaces.
    pub network_interfaces: Option<Vec<String>>,
}

/// Processor time.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Cpu {
    /// In nanoseconds.
    #[serde(skip_serializing_if = "default")]
    pub usage: CpuUsage,
    /// By the quota.
    #[serde(skip_serializing_if = "default")]
    pub throttling: Throttling,
    /// Time lost waiting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Pressure>,
}

/// Processor time in nanoseconds.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct CpuUsage {
    /// All.
    #[serde(skip_serializing_if = "zero")]
    pub total: u64,
    /// By processor.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub percpu: Vec<u64>,
    /// In the kernel, by processor.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub percpu_kernel: Vec<u64>,
    /// In user mode, by processor.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub percpu_user: Vec<u64>,
    /// In the kernel.
    pub kernel: u64,
    /// In user mode.
    pub user: u64,
}

/// What the quota took away.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Throttling {
    /// Periods with something to run.
    #[serde(skip_serializing_if = "zero")]
    pub periods: u64,
    /// Those in which the quota ran out.
    #[serde(skip_serializing_if = "zero")]
    pub throttled_periods: u64,
    /// Time lost, in nanoseconds.
    #[serde(skip_serializing_if = "zero")]
    pub throttled_time: u64,
}

/// The cpuset of v1.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the fields are the kernel's files of the same names")]
pub struct CpuSet {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<u64>,
    pub cpu_exclusive: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mems: Vec<u64>,
    pub mem_hardwall: u64,
    pub mem_exclusive: u64,
    pub memory_migrate: u64,
    pub memory_spread_page: u64,
    pub memory_spread_slab: u64,
    pub memory_pressure: u64,
    pub sched_load_balance: u64,
    pub sched_relax_domain_level: i64,
}

/// Processes and their limit, 0 for none.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Pids {
    /// Now.
    #[serde(skip_serializing_if = "zero")]
    pub current: u64,
    /// At most.
    #[serde(skip_serializing_if = "zero")]
    pub limit: u64,
}

/// Huge pages of one size, in bytes.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct HugeTlb {
    /// Now.
    #[serde(skip_serializing_if = "zero")]
    pub usage: u64,
    /// At most, so far.
    #[serde(skip_serializing_if = "zero")]
    pub max: u64,
    /// Refused allocations.
    pub failcnt: u64,
}

/// Pressure stall information.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Pressure {
    /// Time that some task waited.
    pub some: Stall,
    /// Time that all tasks waited.
    pub full: Stall,
}

/// One line of a pressure file.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Stall {
    /// Percent over 10 seconds.
    pub avg10: f64,
    /// Percent over a minute.
    pub avg60: f64,
    /// Percent over five minutes.
    pub avg300: f64,
    /// Microseconds.
    pub total: u64,
}

/// Takes a failure to find a file for the absence of a feature.
fn optional<T: Default>(result: Result<T>) -> Result<T> {
    match result {
        Err(e) if is_missing(&e) => Ok(T::default()),
        other => other,
    }
}

pub(super) fn read_all(cgroup: &Cgroup) -> Result<Stats> {
    let mut stats = Stats::default();
    if cgroup.is_unified() {
        let dir = cgroup.unified_dir()?;
        stats.cpu = optional(cpu_v2(dir))?;
        stats.memory = optional(memory::v2(dir))?;
        stats.blkio = optional(blkio::v2(dir))?;
        stats.pids = match pids(dir) {
            Err(e) if is_missing(&e) => Pids { current: super::pids::of(dir)?.len() as u64, limit: 0 },
            other => other?,
        };
        stats.hugetlb = hugetlb(dir, ["current", "max", "events"])?;
        return Ok(stats);
    }
    let dir = |controller: &str| cgroup.paths().get(controller);
    if let Some(dir) = dir("cpu") {
        stats.cpu.throttling = optional(throttling(dir, "throttled_time", 1))?;
    }
    if let Some(dir) = dir("cpuacct") {
        stats.cpu.usage = optional(cpu_usage_v1(dir))?;
    }
    if let Some(dir) = dir("cpuset") {
        stats.cpuset = optional(cpuset(dir))?;
    }
    if let Some(dir) = dir("memory") {
        stats.memory = optional(memory::v1(dir))?;
    }
    if let Some(dir) = dir("pids") {
        stats.pids = optional(pids(dir))?;
    }
    if let Some(dir) = dir("blkio") {
        stats.blkio = blkio::v1(dir)?;
    }
    if let Some(dir) = dir("hugetlb") {
        stats.hugetlb = hugetlb(dir, ["usage_in_bytes", "max_usage_in_bytes", "failcnt"])?;
    }
    Ok(stats)
}

fn throttling(dir: &Path, time: &str, scale: u64) -> Result<Throttling> {
    let mut t = Throttling::default();
    for (key, value) in pairs(&read(dir, "cpu.stat")?) {
        match key {
            "nr_periods" => t.periods = value,
            "nr_throttled" => t.throttled_periods = value,
            _ if key == time => t.throttled_time = value * scale,
            _ => {}
        }
    }
    Ok(t)
}

fn cpu_v2(dir: &Path) -> Result<Cpu> {
    let mut usage = CpuUsage::default();
    for (key, value) in pairs(&read(dir, "cpu.stat")?) {
        match key {
            "usage_usec" => usage.total = value * 1000,
            "user_usec" => usage.user = value * 1000,
            "system_usec" => usage.kernel = value * 1000,
            _ => {}
        }
    }
    let throttling = throttling(dir, "throttled_usec", 1000)?;
    Ok(Cpu { usage, throttling, psi: pressure(dir, "cpu.pressure")? })
}

fn cpu_usage_v1(dir: &Path) -> Result<CpuUsage> {
    let numbers = |file: &str| -> Result<Vec<u64>> {
        Ok(read(dir, file)?.split_whitespace().filter_map(parse_number).collect())
    };
    let mut usage = CpuUsage {
        total: read_number(dir, "cpuacct.usage")?,
        percpu: numbers("cpuacct.usage_percpu")?,
        ..CpuUsage::default()
    };
    // Lines of "cpu user system" after a heading; nanoseconds.
    let all = optional(read(dir, "cpuacct.usage_all"))?;
    for line in all.lines().skip(1) {
        let fields: Vec<u64> = line.split_whitespace().filter_map(parse_number).collect();
        if let [_, user, kernel] = fields[..] {
            usage.percpu_user.push(user);
            usage.percpu_kernel.push(kernel);
        }
    }
    // In ticks of a hundredth of a second, whatever the kernel's own.
    const TICK: u64 = 10_000_000;
    for (key, value) in pairs(&read(dir, "cpuacct.stat")?) {
        match key {
            "user" => usage.user = value * TICK,
            "system" => usage.kernel = value * TICK,
            _ => {}
        }
    }
    Ok(usage)
}

fn cpuset(dir: &Path) -> Result<CpuSet> {
    let list = |file: &str| -> Result<Vec<u64>> {
        let text = read(dir, file)?;
        let numbers = crate::init::scheduling::parse_list(text.trim())?;
        Ok(numbers.into_iter().map(|n| n as u64).collect())
    };
    let number = |file: &str| optional(read_number(dir, &format!("cpuset.{file}")));
    Ok(CpuSet {
        cpus: list("cpuset.cpus")?,
        cpu_exclusive: number("cpu_exclusive")?,
        mems: list("cpuset.mems")?,
        mem_hardwall: number("mem_hardwall")?,
        mem_exclusive: number("mem_exclusive")?,
        memory_migrate: number("memory_migrate")?,
        memory_spread_page: number("memory_spread_page")?,
        memory_spread_slab: number("memory_spread_slab")?,
        memory_pressure: number("memory_pressure")?,
        sched_load_balance: number("sched_load_balance")?,
        sched_relax_domain_level: optional(read(dir, "cpuset.sched_relax_domain_level"))?
            .trim()
            .parse()
            .unwrap_or(0),
    })
}

fn pids(dir: &Path) -> Result<Pids> {
    let limit = read_number(dir, "pids.max")?;
    Ok(Pids { current: read_number(dir, "pids.current")?, limit: if limit == u64::MAX { 0 } else { limit } })
}

/// Huge pages of every size the host has. The names are the ends of the files for usage, maximum and failures.
fn hugetlb(dir: &Path, files: [&str; 3]) -> Result<BTreeMap<String, HugeTlb>> {
    let mut all = BTreeMap::new();
    for size in huge_page_sizes() {
        let prefix = ["rsvd.", ""].map(|rsvd| format!("hugetlb.{size}.{rsvd}"));
        let Some(prefix) = prefix.into_iter().find(|p| dir.join(format!("{p}{}", files[0])).exists()) else {
            continue;
        };
        let failcnt = if files[2] == "events" {
            super::file::read_key(dir, &format!("hugetlb.{size}.events"), "max")?.unwrap_or(0)
        } else {
            read_number(dir, &format!("{prefix}{}", files[2]))?
        };
        // v2 has no maximum so far: its `max` is the limit.
        let max = if files[2] == "events" { 0 } else { read_number(dir, &format!("{prefix}{}", files[1]))? };
        let usage = read_number(dir, &format!("{prefix}{}", files[0]))?;
        all.insert(size, HugeTlb { usage, max, failcnt });
    }
    Ok(all)
}

fn huge_page_sizes() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else { return vec![] };
    let mut sizes: Vec<_> =
        entries.flatten().filter_map(|e| page_size_name(&e.file_name().to_string_lossy())).collect();
    sizes.sort_unstable();
    sizes
}

/// `hugepages-2048kB` is 2MB in the names of control files.
fn page_size_name(entry: &str) -> Option<String> {
    let kilobytes: u64 = entry.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    Some(match kilobytes {
        1_048_576.. => format!("{}GB", kilobytes >> 20),
        1024.. => format!("{}MB", kilobytes >> 10),
        _ => format!("{kilobytes}KB"),
    })
}

/// A pressure file; none on kernels without PSI.
fn pressure(dir: &Path, file: &str) -> Result<Option<Pressure>> {
    let text = match read(dir, file) {
        Err(e) if is_missing(&e) || e.errno() == Some(nix::errno::Errno::ENOTSUP) => return Ok(None),
        other => other?,
    };
    parse_pressure(&text).map(Some)
}

fn parse_pressure(text: &str) -> Result<Pressure> {
    let mut pressure = Pressure::default();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let stall = match fields.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            _ => continue,
        };
        for field in fields {
            let bad = || Error::new(format!("invalid psi data: {field:?}"));
            let (key, value) = field.split_once('=').ok_or_else(bad)?;
            let float = || value.parse::<f64>().map_err(|_| bad());
            match key {
                "avg10" => stall.avg10 = float()?,
                "avg60" => stall.avg60 = float()?,
                "avg300" => stall.avg300 = float()?,
                "total" => stall.total = value.parse().map_err(|_| bad())?,
                _ => {}
            }
        }
    }
    Ok(pressure)
}

#[cfg(test)]
mod tests;
