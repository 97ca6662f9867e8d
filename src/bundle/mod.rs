//! config.json: loading, validation, and the templates that `spec` and `features` print.

pub mod features;
pub mod template;
pub mod validate;

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capability, Process, Spec};
use serde_json::Value;

use crate::sys::{Context, Error, Result};

/// Name of the specification file in a bundle.
pub const CONFIG: &str = "config.json";

/// A config.json that is larger than this was not written for a container.
const LIMIT: u64 = 64 << 20;

/// A bundle whose config.json has been read and makes sense.
#[derive(Debug)]
pub struct Bundle {
    /// Its directory, absolute.
    pub path: PathBuf,
    /// config.json.
    pub spec: Spec,
    /// The root file system, absolute and free of symbolic links.
    pub rootfs: PathBuf,
}

impl Bundle {
    /// Reads and checks the bundle in that directory.
    pub fn load(path: &Path) -> Result<Self> {
        let path = fs::canonicalize(path).context(|| format!("chdir {}", path.display()))?;
        let spec = load(&path.join(CONFIG))?;
        validate::spec(&spec, &path)?;
        let rootfs = rootfs(&path, &spec)?;
        Ok(Self { path, spec, rootfs })
    }
}

/// Reads and checks a config.json.
pub fn load(path: &Path) -> Result<Spec> {
    let text = match fs::metadata(path) {
        Ok(meta) if meta.len() > LIMIT => return Err(Error::new(format!("{} is too large", path.display()))),
        _ => fs::read(path),
    };
    let text = match text {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::new(format!("JSON specification file {CONFIG} not found")));
        }
        text => text.context(|| format!("open {}", path.display()))?,
    };
    read(&text)
}

/// Understands the text of a config.json, and checks what needs no bundle to be checked.
pub fn read(text: &[u8]) -> Result<Spec> {
    let spec: Spec = parse(text).map_err(|e| Error::new(format!("{CONFIG}: {e}")))?;
    match spec.process() {
        Some(process) => validate_process(process)?,
        None => return Err(Error::new("process property must not be empty")),
    }
    crate::init::namespaces::validate(&spec)?;
    Ok(spec)
}

/// Reads a config.json or a process's settings. Capabilities that nobody has heard of are left out: clients list those
/// of the newest kernel.
pub fn parse<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    let failure = match serde_json::from_slice(text) {
        Ok(value) => return Ok(value),
        Err(e) => e,
    };
    let Ok(mut value) = serde_json::from_slice::<Value>(text) else { return Err(failure) };
    let process = if value.get("process").is_some() { &mut value["process"] } else { &mut value };
    let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
    let mut changed = false;
    for set in sets.into_iter().flat_map(serde_json::Map::values_mut).filter_map(Value::as_array_mut) {
        let before = set.len();
        set.retain(|name| serde_json::from_value::<Capability>(name.clone()).is_ok());
        changed |= set.len() != before;
    }
    if changed { serde_json::from_value(value) } else { Err(failure) }
}

/// What runc demands of a process.
pub fn validate_process(process: &Process) -> Result<()> {
    if process.cwd().as_os_str().is_empty() {
        return Err(Error::new("Cwd property must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::new("Cwd must be an absolute path"));
    }
    if process.args().as_deref().unwrap_or_default().is_empty() {
        return Err(Error::new("args must not be empty"));
    }
    Ok(())
}

fn rootfs(bundle: &Path, spec: &Spec) -> Result<PathBuf> {
    let root = spec.root().as_ref().ok_or_else(|| Error::new("root must be specified"))?;
    let path = bundle.join(root.path());
    let path = fs::canonicalize(&path).context(|| format!("invalid rootfs: stat {}", path.display()))?;
    if !path.is_dir() {
        return Err(Error::new(format!("invalid rootfs: {} is not a directory", path.display())));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG), text).unwrap();
        Bundle::load(dir.path()).unwrap_err().to_string()
    }

    #[test]
    fn unknown_capabilities_are_left_out() {
        let process = r#"{"user":{},"cwd":"/","args":["a"],
            "capabilities":{"bounding":["CAP_KILL","CAP_OF_TOMORROW"],"effective":["CAP_KILL"]}}"#;
        let alone: Process = parse(process.as_bytes()).unwrap();
        let spec: Spec =
            parse(format!(r#"{{"ociVersion":"1.0.2","process":{process}}}"#).as_bytes()).unwrap();
        for process in [&alone, spec.process().as_ref().unwrap()] {
            let sets = process.capabilities().as_ref().unwrap();
            assert_eq!(sets.bounding().as_ref().unwrap().len(), 1);
        }
        assert!(parse::<Process>(br#"{"user":7}"#).is_err());
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(failure("{").starts_with("config.json: "));
        assert_eq!(failure(r#"{"ociVersion":"1.0.2"}"#), "process property must not be empty");
        let process = |rest: &str| format!(r#"{{"ociVersion":"1.0.2","process":{{"user":{{}},{rest}}}}}"#);
        assert_eq!(failure(&process(r#""cwd":"x","args":["a"]"#)), "Cwd must be an absolute path");
        assert_eq!(failure(&process(r#""cwd":"/","args":[]"#)), "args must not be empty");
        assert_eq!(failure(&process(r#""cwd":"/","args":["a"]"#)), "root must be specified");
        let empty = tempfile::tempdir().unwrap();
        let e = Bundle::load(empty.path()).unwrap_err().to_string();
        assert_eq!(e, "JSON specification file config.json not found");
    }
}
