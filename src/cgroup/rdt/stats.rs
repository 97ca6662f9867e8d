//! What a class of service may use, and what has been used, in the names and units that runc gives it.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::{Place, Resctrl};
use crate::sys::{Context, Error, Result};

/// Statistics of one container.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Stats {
    #[serde(skip_serializing_if = "Option::is_none")]
    l3_cache_info: Option<CacheInfo>,
    #[serde(skip_serializing_if = "String::is_empty")]
    l3_cache_schema_root: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    l3_cache_schema: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mem_bw_info: Option<BandwidthInfo>,
    #[serde(skip_serializing_if = "String::is_empty")]
    mem_bw_schema_root: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    mem_bw_schema: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    schemata: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mbm_stats: Option<Vec<Bandwidth>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cmt_stats: Option<Vec<Occupancy>>,
}

fn zero(n: &u64) -> bool {
    *n == 0
}

/// `info/L3`.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
struct CacheInfo {
    #[serde(skip_serializing_if = "String::is_empty")]
    cbm_mask: String,
    #[serde(skip_serializing_if = "zero")]
    min_cbm_bits: u64,
    #[serde(skip_serializing_if = "zero")]
    num_closids: u64,
}

/// `info/MB`.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
struct BandwidthInfo {
    #[serde(skip_serializing_if = "zero")]
    bandwidth_gran: u64,
    #[serde(skip_serializing_if = "zero")]
    delay_linear: u64,
    #[serde(skip_serializing_if = "zero")]
    min_bandwidth: u64,
    #[serde(skip_serializing_if = "zero")]
    num_closids: u64,
}

/// Memory bandwidth used, of one cache.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
struct Bandwidth {
    mbm_total_bytes: u64,
    mbm_local_bytes: u64,
}

/// How much of one cache is used.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
struct Occupancy {
    llc_occupancy: u64,
}

fn text(dir: &Path, file: &str) -> Result<String> {
    let path = dir.join(file);
    let text = fs::read_to_string(&path).context(|| format!("open {}", path.display()))?;
    Ok(text.trim().to_owned())
}

fn number(dir: &Path, file: &str) -> Result<u64> {
    let text = text(dir, file)?;
    let path = dir.join(file);
    let wrong = || Error::new(format!("unable to parse {text:?} as a uint from file {:?}", path));
    text.parse().map_err(|_| wrong())
}

/// The last line of a resource.
fn line(schemata: &[String], resource: &str) -> String {
    let found = schemata.iter().rfind(|l| l.contains(resource));
    found.map(|l| l.trim().to_owned()).unwrap_or_default()
}

impl Resctrl {
    /// Statistics of a container that has a class.
    pub fn stats(&self, place: &Place) -> Result<Stats> {
        let Some(class) = &place.class else { return Ok(Stats::default()) };
        let lines = |dir: &Path| -> Result<Vec<String>> {
            Ok(text(dir, "schemata")?.lines().map(str::to_owned).collect())
        };
        let (everybody, own) = (lines(&self.root)?, lines(class)?);
        let mut stats = Stats::default();
        if self.has_cache() {
            let info = self.root.join("info/L3");
            stats.l3_cache_info = Some(CacheInfo {
                cbm_mask: text(&info, "cbm_mask")?,
                min_cbm_bits: number(&info, "min_cbm_bits")?,
                num_closids: number(&info, "num_closids")?,
            });
            stats.l3_cache_schema_root = line(&everybody, "L3");
            stats.l3_cache_schema = line(&own, "L3");
        }
        if self.has_bandwidth() {
            let info = self.root.join("info/MB");
            stats.mem_bw_info = Some(BandwidthInfo {
                bandwidth_gran: number(&info, "bandwidth_gran")?,
                delay_linear: number(&info, "delay_linear")?,
                min_bandwidth: number(&info, "min_bandwidth")?,
                num_closids: number(&info, "num_closids")?,
            });
            stats.mem_bw_schema_root = line(&everybody, "MB");
            stats.mem_bw_schema = line(&own, "MB");
        }
        stats.schemata = own;
        // Without a group of its own the container is counted with all of its class.
        self.monitoring(place.monitor.as_deref().unwrap_or(class), &mut stats)?;
        Ok(stats)
    }

    fn monitoring(&self, group: &Path, stats: &mut Stats) -> Result<()> {
        let features = text(&self.root, "info/L3_MON/mon_features").unwrap_or_default();
        let has = |name: &str| features.lines().any(|l| l == name);
        let (total, local, occupancy) =
            (has("mbm_total_bytes"), has("mbm_local_bytes"), has("llc_occupancy"));
        if !(total || local || occupancy) {
            return Ok(());
        }
        let data = group.join("mon_data");
        let listed = fs::read_dir(&data).context(|| format!("open {}", data.display()))?;
        let mut caches: Vec<_> = listed.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
        caches.sort_unstable();
        let counter = |dir: &Path, wanted: bool, file| if wanted { number(dir, file) } else { Ok(0) };
        let (mut bandwidth, mut occupancies) = (vec![], vec![]);
        for cache in &caches {
            bandwidth.push(Bandwidth {
                mbm_total_bytes: counter(cache, total, "mbm_total_bytes")?,
                mbm_local_bytes: counter(cache, local, "mbm_local_bytes")?,
            });
            occupancies.push(Occupancy { llc_occupancy: counter(cache, occupancy, "llc_occupancy")? });
        }
        stats.mbm_stats = (total || local).then_some(bandwidth);
        stats.cmt_stats = occupancy.then_some(occupancies);
        Ok(())
    }
}
