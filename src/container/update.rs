//! Changing the resource limits of a container.

use oci_spec::runtime::{LinuxResources, Spec};
use serde_json::{Map, Value};

use super::{Container, Error, Result, Status, Store};

/// `update`: what `change` leaves out stays as it is.
pub fn update(store: &Store, id: &str, change: &LinuxResources) -> Result<()> {
    let (container, _lock) = Container::load_locked(store, id)?;
    if container.status()? == Status::Stopped {
        return Err(Error::NotRunning);
    }
    let mut change = change.clone();
    complete(&mut change);
    // Device rules belong to the creation; an update neither sees nor touches them.
    change.set_devices(None);
    container.cgroup().update(&change)?;
    let spec = merged(container.spec()?, &change)?;
    let text = serde_json::to_vec(&spec).map_err(|e| Error::new(format!("encoding config.json: {e}")))?;
    container.dir.write("config.json", &text)
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
