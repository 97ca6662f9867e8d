//! `update`.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{Context, flags, log, one_id};
use crate::bundle;
use crate::cgroup::rdt::Resctrl;
use crate::container::update::{self, Shares};
use crate::container::{Error, Result};
use crate::sys::Context as _;

/// Update the resource limits of a container
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File with the resources to update, as in config.json, or '-' for standard input; other flags are ignored then
    #[arg(long, short, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight for block devices, from 10 to 1000
    #[arg(long, value_name = "N")]
    blkio_weight: Option<u16>,
    /// Period of the CPU limit, in microseconds; 0 for the system's default
    #[arg(long, value_name = "N")]
    cpu_period: Option<String>,
    /// CPU time in a period, in microseconds
    #[arg(long, value_name = "N")]
    cpu_quota: Option<String>,
    /// CPU time that may be saved up for a burst, in microseconds
    #[arg(long, value_name = "N")]
    cpu_burst: Option<String>,
    /// CPU shares, relative to other containers
    #[arg(long, value_name = "N")]
    cpu_share: Option<String>,
    /// Period of the realtime CPU limit, in microseconds
    #[arg(long, value_name = "N")]
    cpu_rt_period: Option<String>,
    /// Realtime CPU time in a period, in microseconds
    #[arg(long, value_name = "N")]
    cpu_rt_runtime: Option<String>,
    /// CPUs to use
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// 1: run only when no other group wants to
    #[arg(long, value_name = "0|1")]
    cpu_idle: Option<String>,
    /// Obsolete
    #[arg(long, hide = true)]
    kernel_memory: Option<String>,
    /// Obsolete
    #[arg(long, hide = true)]
    kernel_memory_tcp: Option<String>,
    /// Memory limit, in bytes; -1 for none
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory: Option<String>,
    /// Memory reservation (soft limit), in bytes
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory_reservation: Option<String>,
    /// Memory and swap together, in bytes; -1 for unlimited swap
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// Greatest number of processes and threads
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// Schema of the L3 cache (Intel RDT)
    #[arg(long, value_name = "SCHEMA")]
    l3_cache_schema: Option<String>,
    /// Schema of the memory bandwidth (Intel RDT)
    #[arg(long, value_name = "SCHEMA")]
    mem_bw_schema: Option<String>,
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("update", &args.args)?;
    let given = |schema: &Option<String>| schema.clone().filter(|s| !s.is_empty());
    let shares = Shares { cache: given(&args.l3_cache_schema), bandwidth: given(&args.mem_bw_schema) };
    if shares.cache.is_some() && !Resctrl::find().is_some_and(|r| r.has_cache()) {
        return Err(Error::new("Intel RDT/CAT: l3 cache schema is not enabled"));
    }
    if shares.bandwidth.is_some() && !Resctrl::find().is_some_and(|r| r.has_bandwidth()) {
        return Err(Error::new("Intel RDT/MBA: memory bandwidth schema is not enabled"));
    }
    let mut resources = match args.resources.as_deref() {
        Some(path) if !path.as_os_str().is_empty() => read(path)?,
        _ => from_flags(args)?,
    };
    if let Some(memory) = resources.get_mut("memory").and_then(Value::as_object_mut) {
        let obsolete = ["kernel", "kernelTCP"].map(|name| memory.remove(name).is_some_and(|v| !v.is_null()));
        if obsolete.contains(&true) {
            log::warn("Kernel memory settings are ignored and will be removed");
        }
    }
    let resources = serde_json::from_value(resources).map_err(|e| Error::new(format!("resources: {e}")))?;
    update::update(&context.store, id, &resources, &shares)?;
    Ok(0)
}

fn read(path: &Path) -> Result<Value> {
    let mut text = vec![];
    if path == Path::new("-") {
        std::io::stdin().read_to_end(&mut text).context(|| "read standard input")?;
    } else {
        text = std::fs::read(path).context(|| format!("open {}", path.display()))?;
    }
    if text.trim_ascii().is_empty() {
        return Err(Error::new("EOF"));
    }
    match bundle::first(&text).map_err(|e| Error::new(e.to_string()))? {
        Value::Null => Ok(json!({})),
        Value::Object(mut all) => {
            // One that names no limit changes none.
            if all.get("pids").is_some_and(|pids| pids.get("limit").is_none_or(Value::is_null)) {
                all.remove("pids");
            }
            Ok(Value::Object(all))
        }
        _ => Err(Error::new("the resources are no object")),
    }
}

fn from_flags(args: &Args) -> Result<Value> {
    let (mut cpu, mut memory, mut all) = (Map::new(), Map::new(), Map::new());
    for (flag, key, value) in [
        ("cpu-period", "period", &args.cpu_period),
        ("cpu-quota", "quota", &args.cpu_quota),
        ("cpu-burst", "burst", &args.cpu_burst),
        ("cpu-share", "shares", &args.cpu_share),
        ("cpu-rt-period", "realtimePeriod", &args.cpu_rt_period),
        ("cpu-rt-runtime", "realtimeRuntime", &args.cpu_rt_runtime),
        ("cpu-idle", "idle", &args.cpu_idle),
    ] {
        if let Some(text) = value.as_deref().filter(|t| !t.is_empty()) {
            let bad = |e| Error::new(format!("invalid value for {flag}: {e}"));
            let number = match flag {
                "cpu-quota" | "cpu-rt-runtime" | "cpu-idle" => {
                    json!(flags::integer::<i64>("ParseInt", text).map_err(bad)?)
                }
                _ => json!(flags::integer::<u64>("ParseUint", text).map_err(bad)?),
            };
            cpu.insert(key.to_owned(), number);
        }
    }
    for (key, value) in [("cpus", &args.cpuset_cpus), ("mems", &args.cpuset_mems)] {
        if let Some(text) = value.as_deref().filter(|t| !t.is_empty()) {
            cpu.insert(key.to_owned(), json!(text));
        }
    }
    for (flag, key, value) in [
        ("memory", "limit", &args.memory),
        ("memory-swap", "swap", &args.memory_swap),
        ("memory-reservation", "reservation", &args.memory_reservation),
        ("kernel-memory", "kernel", &args.kernel_memory),
        ("kernel-memory-tcp", "kernelTCP", &args.kernel_memory_tcp),
    ] {
        if let Some(text) = value.as_deref().filter(|t| !t.is_empty()) {
            let number = bytes(text)
                .ok_or_else(|| Error::new(format!("invalid value for {flag}: invalid size: '{text}'")))?;
            memory.insert(key.to_owned(), json!(number));
        }
    }
    if let Some(limit) = args.pids_limit {
        all.insert("pids".to_owned(), json!({ "limit": limit }));
    }
    if let Some(weight) = args.blkio_weight {
        all.insert("blockIO".to_owned(), json!({ "weight": weight }));
    }
    if !cpu.is_empty() {
        all.insert("cpu".to_owned(), Value::Object(cpu));
    }
    if !memory.is_empty() {
        all.insert("memory".to_owned(), Value::Object(memory));
    }
    Ok(Value::Object(all))
}

/// A size: `512m`, `1.5GiB`, `4096`, `-1`.
fn bytes(text: &str) -> Option<i64> {
    if text == "-1" {
        return Some(-1);
    }
    let lower = text.trim().to_ascii_lowercase();
    let end = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(end);
    let factor: u64 = match unit.trim().trim_end_matches('b').trim_end_matches('i') {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        "p" => 1 << 50,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return i64::try_from(whole.checked_mul(factor)?).ok();
    }
    let value = number.parse::<f64>().ok()? * factor as f64;
    (value.is_finite() && value < i64::MAX as f64).then_some(value as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_a_value_is_updated() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let updated = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            read(file.path()).map_err(|e| e.to_string())
        };
        for nothing in ["null", "{}", r#"{"pids":{}}"#, r#"{"pids":null} x"#, r#"{"pids":{"limit":null}}"#] {
            assert_eq!(updated(nothing), Ok(json!({})), "{nothing}");
        }
        assert_eq!(updated(r#"{"pids":{"limit":0}}"#), Ok(json!({"pids": {"limit": 0}})));
        assert_eq!(updated(" ").unwrap_err(), "EOF");
        for wrong in ["[]", "5", "{"] {
            assert!(updated(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, value) in [
            ("4096", Some(4096)),
            ("512m", Some(512 << 20)),
            ("1.5GiB", Some(3 << 29)),
            ("-1", Some(-1)),
            ("x", None),
        ] {
            assert_eq!(bytes(text), value, "{text}");
        }
    }
}
