//! Memory statistics, v2 in the terms of v1.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::{Pressure, default, optional, pressure, zero};
use crate::cgroup::file::{is_missing, pairs, read, read_number};
use crate::sys::Result;

/// Memory, in bytes.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Memory {
    /// Pages of files.
    #[serde(skip_serializing_if = "zero")]
    pub cache: u64,
    /// All memory.
    #[serde(skip_serializing_if = "default")]
    pub usage: Entry,
    /// Memory and swap together.
    #[serde(skip_serializing_if = "default")]
    pub swap: Entry,
    /// The kernel's (v1 only).
    #[serde(skip_serializing_if = "default")]
    pub kernel: Entry,
    /// TCP buffers (v1 only).
    #[serde(rename = "kernelTCP", skip_serializing_if = "default")]
    pub kernel_tcp: Entry,
    /// memory.stat.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub raw: BTreeMap<String, u64>,
    /// Time lost waiting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Pressure>,
}

/// One kind of memory.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Entry {
    /// At most.
    pub limit: u64,
    /// Now.
    #[serde(skip_serializing_if = "zero")]
    pub usage: u64,
    /// At most, so far.
    #[serde(skip_serializing_if = "zero")]
    pub max: u64,
    /// Refused allocations.
    pub failcnt: u64,
}

fn raw(dir: &Path) -> Result<BTreeMap<String, u64>> {
    Ok(pairs(&read(dir, "memory.stat")?).map(|(key, value)| (key.to_owned(), value)).collect())
}

pub(super) fn v1(dir: &Path) -> Result<Memory> {
    let entry = |kind: &str| -> Result<Entry> {
        let number = |field: &str| read_number(dir, &format!("{kind}.{field}"));
        Ok(Entry {
            usage: number("usage_in_bytes")?,
            max: number("max_usage_in_bytes")?,
            failcnt: number("failcnt")?,
            // Gone for kernel memory in newer kernels.
            limit: optional(number("limit_in_bytes"))?,
        })
    };
    let raw = raw(dir)?;
    Ok(Memory {
        cache: raw.get("cache").copied().unwrap_or(0),
        usage: entry("memory")?,
        swap: optional(entry("memory.memsw"))?,
        kernel: optional(entry("memory.kmem"))?,
        kernel_tcp: optional(entry("memory.kmem.tcp"))?,
        raw,
        psi: None,
    })
}

pub(super) fn v2(dir: &Path) -> Result<Memory> {
    let entry = |kind: &str| -> Result<Entry> {
        let number = |field: &str| read_number(dir, &format!("{kind}.{field}"));
        Ok(Entry {
            usage: number("current")?,
            limit: number("max")?,
            max: optional(number("peak"))?,
            failcnt: 0,
        })
    };
    let raw = raw(dir)?;
    let usage = entry("memory")?;
    let mut swap = match entry("memory.swap") {
        Err(e) if is_missing(&e) => Entry::default(),
        other => other?,
    };
    // Clients know the sum of both, as v1 has it; of the sum there is no maximum.
    swap.usage = swap.usage.saturating_add(usage.usage);
    swap.limit = swap.limit.saturating_add(usage.limit);
    swap.max = 0;
    let psi = pressure(dir, "memory.pressure")?;
    let cache = raw.get("file").copied().unwrap_or(0);
    Ok(Memory { cache, usage, swap, raw, psi, ..Memory::default() })
}
