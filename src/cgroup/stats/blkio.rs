//! Block device statistics, v2 in the terms of v1.

use std::path::Path;

use serde::Serialize;

use super::{Pressure, pressure, zero};
use crate::cgroup::file::{is_missing, parse_number, read};
use crate::sys::{Error, Result};

/// Use of block devices.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the fields are the kernel's files of the same names")]
pub struct Blkio {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_service_bytes_recursive: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_serviced_recursive: Vec<Entry>,
    #[serde(rename = "ioQueueRecursive", skip_serializing_if = "Vec::is_empty")]
    pub io_queued_recursive: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_service_time_recursive: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_wait_time_recursive: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_merged_recursive: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_time_recursive: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sectors_recursive: Vec<Entry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Pressure>,
}

/// One counter of one device.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Entry {
    /// Major number.
    #[serde(skip_serializing_if = "zero")]
    pub major: u64,
    /// Minor number.
    #[serde(skip_serializing_if = "zero")]
    pub minor: u64,
    /// Read, Write and so on.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub op: String,
    /// The count.
    #[serde(skip_serializing_if = "zero")]
    pub value: u64,
}

/// The first of the schedulers' sets of files that is there and not empty: bfq, cfq, then the throttling layer.
pub(super) fn v1(dir: &Path) -> Result<Blkio> {
    let mut stats = Blkio::default();
    let file = |name: &str| -> Result<Vec<Entry>> {
        match read(dir, name) {
            Err(e) if is_missing(&e) => Ok(vec![]),
            other => parse_v1(&other?, name),
        }
    };
    for prefix in ["blkio.bfq.", "blkio."] {
        let serviced = file(&format!("{prefix}io_serviced_recursive"))?;
        if serviced.is_empty() {
            continue;
        }
        stats.io_serviced_recursive = serviced;
        stats.io_service_bytes_recursive = file(&format!("{prefix}io_service_bytes_recursive"))?;
        stats.sectors_recursive = file(&format!("{prefix}sectors_recursive"))?;
        stats.io_service_time_recursive = file(&format!("{prefix}io_service_time_recursive"))?;
        stats.io_wait_time_recursive = file(&format!("{prefix}io_wait_time_recursive"))?;
        stats.io_merged_recursive = file(&format!("{prefix}io_merged_recursive"))?;
        stats.io_queued_recursive = file(&format!("{prefix}io_queued_recursive"))?;
        stats.io_time_recursive = file(&format!("{prefix}time_recursive"))?;
        return Ok(stats);
    }
    for suffix in ["_recursive", ""] {
        let serviced = file(&format!("blkio.throttle.io_serviced{suffix}"))?;
        if !serviced.is_empty() {
            stats.io_serviced_recursive = serviced;
            stats.io_service_bytes_recursive = file(&format!("blkio.throttle.io_service_bytes{suffix}"))?;
            break;
        }
    }
    Ok(stats)
}

/// Lines of `major:minor [op] count`, and a total.
fn parse_v1(text: &str, name: &str) -> Result<Vec<Entry>> {
    let mut all = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split([' ', ':']).collect();
        let malformed = || Error::new(format!("malformed line {line:?} in {name}"));
        let (major, minor, op, value) = match fields[..] {
            ["Total", _] => continue,
            [major, minor, value] => (major, minor, "", value),
            [major, minor, op, value] => (major, minor, op, value),
            _ => return Err(malformed()),
        };
        let number = |text: &str| parse_number(text).ok_or_else(malformed);
        all.push(Entry {
            major: number(major)?,
            minor: number(minor)?,
            op: op.to_owned(),
            value: number(value)?,
        });
    }
    Ok(all)
}

/// Lines of `major:minor key=count ...`.
pub(super) fn v2(dir: &Path) -> Result<Blkio> {
    let mut stats = Blkio { psi: pressure(dir, "io.pressure")?, ..Blkio::default() };
    for line in read(dir, "io.stat")?.lines() {
        let mut fields = line.split_whitespace();
        let device = fields.next().and_then(|d| d.split_once(':'));
        let Some((Some(major), Some(minor))) = device.map(|(a, b)| (parse_number(a), parse_number(b))) else {
            continue;
        };
        for field in fields {
            let Some((key, value)) = field.split_once('=') else { continue };
            let (table, op) = match key {
                "rbytes" => (&mut stats.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut stats.io_service_bytes_recursive, "Write"),
                "rios" => (&mut stats.io_serviced_recursive, "Read"),
                "wios" => (&mut stats.io_serviced_recursive, "Write"),
                _ => continue,
            };
            let value = parse_number(value).unwrap_or(0);
            table.push(Entry { major, minor, op: op.to_owned(), value });
        }
    }
    Ok(stats)
}
