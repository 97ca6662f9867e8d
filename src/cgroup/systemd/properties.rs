//! Limits and annotations of config.json as properties of a unit.
//!
//! The files of the control group are written all the same: systemd has no property for some limits, and rounds others.
//! But it writes what its properties say again whenever it is reloaded, so they must not contradict.

use std::collections::HashMap;

use oci_spec::runtime::LinuxResources;

use super::wire::Value;
use crate::cgroup::v2::{swap_alone, weight_of_shares};
use crate::sys::{Error, Result};

/// Name and value.
pub type Property = (String, Value);

pub(super) fn property(name: &str, value: Value) -> Property {
    (name.to_owned(), value)
}

/// What -1 is to config.json.
pub(super) const INFINITY: u64 = u64::MAX;

fn limit(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(INFINITY)
}

/// The limits that systemd has properties for.
pub fn of_resources(resources: &LinuxResources, unified: bool) -> Result<Vec<Property>> {
    let mut all = Vec::new();
    let mut add = |name: &str, n: u64| all.push(property(name, Value::U64(n)));
    if let Some(memory) = resources.memory() {
        let max = memory.limit().unwrap_or(0);
        if max != 0 {
            add(if unified { "MemoryMax" } else { "MemoryLimit" }, limit(max));
        }
        if unified {
            if let Some(low) = memory.reservation().filter(|n| *n != 0) {
                add("MemoryLow", limit(low));
            }
            let sum = memory.swap().unwrap_or(0);
            let swap = swap_alone(sum, max)?;
            if swap != 0 || sum > 0 {
                add("MemorySwapMax", limit(swap));
            }
        }
    }
    if let Some(cpu) = resources.cpu() {
        let shares = cpu.shares().unwrap_or(0);
        if unified {
            match weight_of_shares(shares) {
                _ if cpu.idle() == Some(1) => add("CPUWeight", 0),
                0 => {}
                weight => add("CPUWeight", weight),
            }
        } else if shares != 0 {
            add("CPUShares", shares);
        }
        let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
        if period != 0 {
            add("CPUQuotaPeriodUSec", period);
        }
        if quota != 0 || period != 0 {
            add("CPUQuotaPerSecUSec", per_second(quota, period));
        }
        if unified {
            for (name, list) in [("AllowedCPUs", cpu.cpus()), ("AllowedMemoryNodes", cpu.mems())] {
                if let Some(list) = list.as_deref().filter(|l| !l.is_empty()) {
                    all.push(property(name, Value::Bytes(mask(list)?)));
                }
            }
        }
    }
    if let Some(pids) = resources.pids() {
        // systemd has no 0.
        all.push(property("TasksMax", Value::U64(limit(pids.limit()).max(1))));
    }
    if !unified && let Some(weight) = resources.block_io().as_ref().and_then(|io| io.weight()) {
        if weight != 0 {
            all.push(property("BlockIOWeight", Value::U64(weight.into())));
        }
    }
    if unified && let Some(files) = resources.unified() {
        all.extend(super::unified::of_unified(files)?);
    }
    Ok(all)
}

/// Microseconds of CPU in a second, in the whole percents that systemd keeps.
pub(super) fn per_second(quota: i64, period: u64) -> u64 {
    let Some(quota) = u64::try_from(quota).ok().filter(|q| *q > 0) else { return INFINITY };
    let period = if period == 0 { 100_000 } else { period };
    quota.saturating_mul(1_000_000).div_ceil(period).next_multiple_of(10_000)
}

/// A list like `0-3,7` as a mask of bits, the first byte first.
pub(super) fn mask(list: &str) -> Result<Vec<u8>> {
    let wrong = || Error::new(format!("invalid list of CPUs or memory nodes: {list:?}"));
    let mut mask = Vec::new();
    for part in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
        let (from, to) = (number(from)?, number(to)?);
        if from > to {
            return Err(wrong());
        }
        for n in usize::from(from)..=usize::from(to) {
            if mask.len() <= n / 8 {
                mask.resize(n / 8 + 1, 0);
            }
            mask[n / 8] |= 1 << (n % 8);
        }
    }
    Ok(mask)
}

/// `org.systemd.property.NAME`: the unit's property NAME, with a value in GVariant's notation.
pub fn of_annotations(annotations: &HashMap<String, String>) -> Result<Vec<Property>> {
    let mut all = Vec::new();
    for (key, text) in annotations {
        let Some(name) = key.strip_prefix("org.systemd.property.") else { continue };
        if name.len() < 3 || !name.bytes().all(|b| b.is_ascii_alphabetic()) {
            return Err(Error::new(format!("annotation {key} name incorrect: {name:?}")));
        }
        let wrong = || Error::new(format!("annotation {key}={text} value parse error"));
        let value = parse(text).ok_or_else(wrong)?;
        let seconds = name.strip_suffix("Sec").filter(|n| n.ends_with(|c: char| c.is_ascii_lowercase()));
        all.push(match seconds {
            Some(stem) => (format!("{stem}USec"), micros(&value).ok_or_else(wrong)?),
            None => (name.to_owned(), value),
        });
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}

/// Seconds as systemd wants them.
fn micros(value: &Value) -> Option<Value> {
    let whole = |n: u64| n.checked_mul(1_000_000).map(Value::U64);
    match value {
        Value::I32(n) => whole(u64::try_from(*n).ok()?),
        Value::I64(n) => whole(u64::try_from(*n).ok()?),
        Value::U32(n) => whole(u64::from(*n)),
        Value::U64(n) => whole(*n),
        Value::F64(n) if *n >= 0.0 && *n < 1e12 => Some(Value::U64((n * 1e6) as u64)),
        _ => None,
    }
}

/// `true`, `'text'`, `12`, `1.5`, `uint64 12`, `['a', 'b']`.
fn parse(text: &str) -> Option<Value> {
    let text = text.trim();
    if let Some(inside) = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
        let strings = |rest: &str| -> Option<Vec<String>> {
            let (mut rest, mut all) = (rest.trim(), Vec::new());
            while !rest.is_empty() {
                let (one, behind) = quoted(rest)?;
                all.push(one);
                rest = behind.trim_start();
                rest = if rest.is_empty() { rest } else { rest.strip_prefix(',')?.trim_start() };
            }
            Some(all)
        };
        return strings(inside).filter(|all| !all.is_empty()).map(Value::Strs);
    }
    if let Some((one, rest)) = quoted(text) {
        return rest.trim().is_empty().then_some(Value::Str(one));
    }
    match text.split_once(' ').map_or(("", text), |(kind, rest)| (kind, rest.trim())) {
        ("", "true") => Some(Value::Bool(true)),
        ("", "false") => Some(Value::Bool(false)),
        ("", n) if n.contains(['.', 'e']) => n.parse().ok().map(Value::F64),
        ("" | "int32", n) => n.parse().ok().map(Value::I32),
        ("int64", n) => n.parse().ok().map(Value::I64),
        ("uint32", n) => n.parse().ok().map(Value::U32),
        ("uint64", n) => n.parse().ok().map(Value::U64),
        ("double", n) => n.parse().ok().map(Value::F64),
        _ => None,
    }
}

/// A text in quotes of either kind, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let mut out = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => out.push(chars.next()?.1),
            c if c == quote => return Some((out, &text[at + 1..])),
            c => out.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn limits_become_properties() {
        let resources: LinuxResources = serde_json::from_value(json!({
            "memory": { "limit": 1000, "swap": 1500, "reservation": 500 },
            "cpu": { "shares": 1024, "quota": 33333, "period": 100_000, "cpus": "0-2,9" },
            "pids": { "limit": 0 },
        }))
        .unwrap();
        let all = of_resources(&resources, true).unwrap();
        let get = |name: &str| all.iter().find(|p| p.0 == name).map(|p| p.1.clone());
        assert_eq!(get("MemoryMax"), Some(Value::U64(1000)));
        assert_eq!(get("MemorySwapMax"), Some(Value::U64(500)));
        assert_eq!(get("MemoryLow"), Some(Value::U64(500)));
        assert_eq!(get("CPUWeight"), Some(Value::U64(100)));
        assert_eq!(get("CPUQuotaPerSecUSec"), Some(Value::U64(340_000)));
        assert_eq!(get("AllowedCPUs"), Some(Value::Bytes(vec![0b111, 0b10])));
        assert_eq!(get("TasksMax"), Some(Value::U64(1)));
        let all = of_resources(&resources, false).unwrap();
        let get = |name: &str| all.iter().find(|p| p.0 == name).map(|p| p.1.clone());
        assert_eq!(get("MemoryLimit"), Some(Value::U64(1000)));
        assert_eq!(get("CPUShares"), Some(Value::U64(1024)));
        assert_eq!(get("AllowedCPUs"), None);
        assert!(mask("3-1").is_err() && mask("x").is_err() && mask("70000").is_err());
        assert_eq!(per_second(-1, 0), INFINITY);
    }

    #[test]
    fn annotations_are_read_as_gvariant_prints_them() {
        let one = |name: &str, text: &str| {
            let key = format!("org.systemd.property.{name}");
            of_annotations(&HashMap::from([(key, text.to_owned()), ("other".into(), String::new())]))
        };
        for (name, text, to, value) in [
            ("TimeoutStopUSec", "uint64 123456789", "TimeoutStopUSec", Value::U64(123_456_789)),
            ("TimeoutStopSec", "30", "TimeoutStopUSec", Value::U64(30_000_000)),
            ("TimeoutStopSec", "1.5", "TimeoutStopUSec", Value::U64(1_500_000)),
            ("CollectMode", "'inactive-or-failed'", "CollectMode", Value::Str("inactive-or-failed".into())),
            ("SendSIGHUP", "true", "SendSIGHUP", Value::Bool(true)),
            ("After", "['a.service', \"b\"]", "After", Value::Strs(vec!["a.service".into(), "b".into()])),
        ] {
            assert_eq!(one(name, text).unwrap(), [(to.to_owned(), value)], "{name}={text}");
        }
        for (name, text) in
            [("A", "1"), ("Bad.name", "1"), ("Name", "what"), ("TimeoutSec", "-1"), ("Na", "'x")]
        {
            assert!(one(name, text).is_err(), "{name}={text}");
        }
    }
}
