//! `unified`, the names and values of a v2 directory's files, as properties of a unit.
//!
//! What systemd has no property for is only written into its file. A value that systemd could not be told of is refused
//! before anything is set.

use std::collections::HashMap;

use super::properties::{INFINITY, Property, mask, per_second, property};
use super::wire::Value;
use crate::sys::{Error, Result};

/// The properties that belong to these files, in the order of their names.
pub fn of_unified(unified: &HashMap<String, String>) -> Result<Vec<Property>> {
    let mut files: Vec<(&str, &str)> = unified.iter().map(|(k, v)| (k.as_str(), v.trim())).collect();
    files.sort_unstable();
    let idle = unified.get("cpu.idle").is_some_and(|v| v.trim() == "1");
    let mut all = Vec::new();
    for (name, value) in files {
        check_name(name)?;
        let wrong = || Error::new(format!("unified resource {name:?} value conversion error: {value:?}"));
        let number = |text: &str| text.parse::<u64>().map_err(|_| wrong());
        let limit = |text: &str| if text == "max" { Ok(INFINITY) } else { number(text) };
        match name {
            "cpu.idle" if idle => all.push(property("CPUWeight", Value::U64(0))),
            // Weight 0 stands for idle: both can't be had.
            "cpu.weight" if !idle => all.push(property("CPUWeight", Value::U64(number(value)?))),
            "cpu.max" => {
                let invalid = || Error::new(format!("unified resource {name:?} value invalid: {value:?}"));
                let mut words = value.split_whitespace();
                let quota = match words.next().ok_or_else(invalid)? {
                    "max" => 0,
                    quota => quota.parse().map_err(|_| wrong())?,
                };
                let period = words.next().map_or(Ok(100_000), number)?;
                if words.next().is_some() {
                    return Err(invalid());
                }
                all.push(property("CPUQuotaPeriodUSec", Value::U64(period)));
                all.push(property("CPUQuotaPerSecUSec", Value::U64(per_second(quota, period))));
            }
            "cpuset.cpus" => all.push(property("AllowedCPUs", Value::Bytes(mask(value)?))),
            "cpuset.mems" => all.push(property("AllowedMemoryNodes", Value::Bytes(mask(value)?))),
            "memory.high" => all.push(property("MemoryHigh", Value::U64(limit(value)?))),
            "memory.low" => all.push(property("MemoryLow", Value::U64(limit(value)?))),
            "memory.min" => all.push(property("MemoryMin", Value::U64(limit(value)?))),
            "memory.max" => all.push(property("MemoryMax", Value::U64(limit(value)?))),
            "memory.swap.max" => all.push(property("MemorySwapMax", Value::U64(limit(value)?))),
            // systemd has no 0.
            "pids.max" => all.push(property("TasksMax", Value::U64(limit(value)?.max(1)))),
            _ => {}
        }
    }
    Ok(all)
}

fn check_name(name: &str) -> Result<()> {
    if name.contains('/') {
        return Err(Error::new(format!("unified resource {name:?} must be a file name (no slashes)")));
    }
    if name.find('.').is_none_or(|at| at == 0) {
        return Err(Error::new(format!(
            "unified resource {name:?} must be in the form CONTROLLER.PARAMETER"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> Result<Vec<Property>> {
        of_unified(&files.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn files_become_properties() {
        let all = of(&[
            ("cpu.max", "50000 200000"),
            ("cpu.weight", " 7 "),
            ("cpuset.cpus", "0,2"),
            ("memory.high", "4096"),
            ("memory.max", "max"),
            ("memory.oom.group", "1"),
            ("pids.max", "0"),
        ]);
        let names = [
            ("CPUQuotaPeriodUSec", Value::U64(200_000)),
            ("CPUQuotaPerSecUSec", Value::U64(250_000)),
            ("CPUWeight", Value::U64(7)),
            ("AllowedCPUs", Value::Bytes(vec![0b101])),
            ("MemoryHigh", Value::U64(4096)),
            ("MemoryMax", Value::U64(INFINITY)),
            ("TasksMax", Value::U64(1)),
        ];
        assert_eq!(all.unwrap(), names.map(|(name, value)| property(name, value)));
    }

    #[test]
    fn idle_goes_before_a_weight() {
        let all = of(&[("cpu.idle", "1"), ("cpu.weight", "7")]).unwrap();
        assert_eq!(all, [property("CPUWeight", Value::U64(0))]);
        assert_eq!(of(&[("cpu.idle", "0")]).unwrap(), []);
    }

    #[test]
    fn what_systemd_could_not_be_told_is_refused() {
        for (name, value, says) in [
            ("a/b", "1", "must be a file name (no slashes)"),
            ("memory", "1", "must be in the form CONTROLLER.PARAMETER"),
            (".max", "1", "must be in the form CONTROLLER.PARAMETER"),
            ("cpu.max", "1 2 3", "value invalid"),
            ("cpu.max", "", "value invalid"),
            ("pids.max", "many", "value conversion error"),
        ] {
            let said = of(&[(name, value)]).unwrap_err().to_string();
            assert!(said.contains(says), "{name}={value}: {said}");
        }
    }
}
