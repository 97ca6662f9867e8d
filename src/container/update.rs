//! Changing the resource limits of a container.

use oci_spec::runtime::{LinuxIntelRdt, LinuxResources, Spec};
use serde_json::{Map, Value};

use super::{Container, Error, Result, Status, Store};
use crate::cgroup::rdt;

/// `update`: what `change` leaves out stays as it is.
/// The cache and the bandwidth are changed only where config.json had a class for the container.
pub fn update(store: &Store, id: &str, change: &LinuxResources, shares: &Shares) -> Result<()> {
    let (container, _lock) = Container::load_locked(store, id)?;
    if container.status()? == Status::Stopped {
        return Err(Error::NotRunning);
    }
    let mut change = change.clone();
    complete(&mut change);
    // Device rules belong to the creation; an update neither sees nor touches them.
    change.set_devices(None);
    let mut spec = container.spec()?;
    let rdt = spec.linux_mut().as_mut().and_then(|l| l.intel_rdt_mut().as_mut());
    let rdt = shares.put(rdt)?.cloned();
    container.cgroup().update(&change)?;
    rdt::set(rdt.as_ref(), &container.state.rdt)?;
    let spec = merged(spec, &change)?;
    let text = serde_json::to_vec(&spec).map_err(|e| Error::new(format!("encoding config.json: {e}")))?;
    container.dir.write("config.json", &text)
}

/// New shares of the last-level cache and of memory bandwidth.
#[derive(Debug, Default)]
pub struct Shares {
    /// `L3:...`
    pub cache: Option<String>,
    /// `MB:...`
    pub bandwidth: Option<String>,
}

impl Shares {
    /// Puts them into config.json's; nothing is returned if there is nothing to change.
    fn put<'a>(&self, rdt: Option<&'a mut LinuxIntelRdt>) -> Result<Option<&'a LinuxIntelRdt>> {
        if self.cache.is_none() && self.bandwidth.is_none() {
            return Ok(None);
        }
        let Some(rdt) = rdt else {
            return Err(Error::new("updating a non-existent Intel RDT configuration is not supported"));
        };
        if self.cache.is_some() {
            rdt.set_l3_cache_schema(self.cache.clone());
        }
        if self.bandwidth.is_some() {
            rdt.set_mem_bw_schema(self.bandwidth.clone());
        }
        Ok(Some(rdt))
    }
}

/// A memory limit that is lifted takes the limit of swap with it.
fn complete(change: &mut LinuxResources) {
    if let Some(memory) = change.memory_mut() {
        if memory.limit() == Some(-1) && memory.swap().is_none() {
            memory.set_swap(Some(-1));
        }
    }
}

/// config.json with the change, so that later commands and checkpoints know the limits in force.
fn merged(mut spec: Spec, change: &LinuxResources) -> Result<Spec> {
    let failed = |e: serde_json::Error| Error::new(format!("encoding config.json: {e}"));
    let change = serde_json::to_value(change).map_err(failed)?;
    if let Some(linux) = spec.linux_mut() {
        let mut now = match linux.resources() {
            Some(resources) => serde_json::to_value(resources).map_err(failed)?,
            None => Value::Object(Map::new()),
        };
        merge(&mut now, change);
        linux.set_resources(Some(serde_json::from_value(now).map_err(failed)?));
    }
    Ok(spec)
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (into, from) => *into = from,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn shares_change_only_what_was_there() {
        let shares = Shares { cache: Some("L3:0=f".into()), bandwidth: None };
        assert!(Shares::default().put(None).unwrap().is_none());
        let said = shares.put(None).unwrap_err().to_string();
        assert_eq!(said, "updating a non-existent Intel RDT configuration is not supported");
        let mut rdt = LinuxIntelRdt::default();
        rdt.set_mem_bw_schema(Some("MB:0=20".into()));
        let now = shares.put(Some(&mut rdt)).unwrap().unwrap();
        assert_eq!(now.l3_cache_schema().as_deref(), Some("L3:0=f"));
        assert_eq!(now.mem_bw_schema().as_deref(), Some("MB:0=20"));
    }

    #[test]
    fn what_is_left_out_stays() {
        let config = json!({
            "ociVersion": "1.3.0",
            "linux": { "resources": { "memory": { "limit": 100, "swap": 200 }, "pids": { "limit": 5 } } },
        });
        let spec: Spec = serde_json::from_value(config).unwrap();
        let change: LinuxResources = serde_json::from_value(json!({ "memory": { "limit": 150 } })).unwrap();
        let spec = merged(spec, &change).unwrap();
        let resources = serde_json::to_value(spec.linux().as_ref().unwrap().resources()).unwrap();
        assert_eq!(resources["memory"]["limit"], 150);
        assert_eq!(resources["memory"]["swap"], 200);
        assert_eq!(resources["pids"]["limit"], 5);
    }
}
