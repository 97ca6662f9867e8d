//! `state.json`: what must survive the command that made it, in the shape runc gives it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cgroup::rdt;

/// One container as it is on disk. Field names are runc's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Container id.
    pub id: String,
    /// Init of the container, as a pid of this host.
    pub init_process_pid: i32,
    /// When init started, in clock ticks since boot: tells a reused pid.
    pub init_process_start: u64,
    /// When the container was created, RFC 3339 with nanoseconds, UTC.
    pub created: String,
    /// The essentials of config.json.
    pub config: Config,
    /// Made by a user other than root.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rootless: bool,
    /// Control groups by controller name ("" for v2), absolute directories.
    #[serde(default)]
    pub cgroup_paths: BTreeMap<String, PathBuf>,
    /// Its share of caches and memory bandwidth.
    #[serde(flatten)]
    pub rdt: rdt::Place,
    /// Namespaces of init by runc's names (`NEWNET`), as /proc paths.
    #[serde(default)]
    pub namespace_paths: BTreeMap<String, PathBuf>,
    /// What descriptors 0, 1 and 2 of init were at its start.
    #[serde(default)]
    pub external_descriptors: Vec<String>,
}

/// The part of config.json that commands need without reading all of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Config {
    /// Version of the OCI specification that config.json names.
    pub version: String,
    /// Root file system on the host.
    pub rootfs: PathBuf,
    /// `key=value`; `bundle=` and the annotations.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Namespaces that config.json lists.
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
    /// Started without pivot_root(2).
    #[serde(default)]
    pub no_pivot_root: bool,
    /// Started without a session keyring of its own.
    #[serde(default)]
    pub no_new_keyring: bool,
    /// systemd manages the control groups.
    #[serde(default)]
    pub systemd_cgroup: bool,
}

/// A namespace of config.json.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// runc's name: `NEWPID`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it was joined; empty for a new one.
    #[serde(default)]
    pub path: PathBuf,
}

impl State {
    /// Understands the text of a state.json.
    pub fn read(text: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(text)
    }

    /// Directory of the bundle.
    pub fn bundle(&self) -> &Path {
        Path::new(self.label("bundle").unwrap_or_default())
    }

    /// The annotations of config.json.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        let pairs = self.config.labels.iter().filter_map(|l| l.split_once('='));
        pairs.filter(|(k, _)| *k != "bundle").map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    fn label(&self, key: &str) -> Option<&str> {
        self.config.labels.iter().find_map(|l| l.strip_prefix(key)?.strip_prefix('='))
    }

    /// True where the container has a pid namespace of its own: the death of init ends every process.
    pub fn owns_pid_namespace(&self) -> bool {
        self.config.namespaces.iter().any(|n| n.kind == "NEWPID" && n.path.as_os_str().is_empty())
    }
}

/// The labels of a bundle: its directory first, then the annotations in order.
pub fn labels(bundle: &Path, spec: &oci_spec::runtime::Spec) -> Vec<String> {
    let mut labels = vec![format!("bundle={}", bundle.display())];
    if let Some(annotations) = spec.annotations() {
        let mut sorted: Vec<_> = annotations.iter().map(|(k, v)| format!("{k}={v}")).collect();
        sorted.sort_unstable();
        labels.extend(sorted);
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_give_back_bundle_and_annotations() {
        let mut spec = oci_spec::runtime::Spec::default();
        spec.set_annotations(Some([("a".to_owned(), "x=y".to_owned())].into()));
        let state = State {
            id: "c".into(),
            init_process_pid: 1,
            init_process_start: 2,
            created: String::new(),
            config: Config { labels: labels(Path::new("/b"), &spec), ..Config::default() },
            rootless: false,
            cgroup_paths: BTreeMap::new(),
            rdt: rdt::Place::default(),
            namespace_paths: BTreeMap::new(),
            external_descriptors: vec![],
        };
        let text = serde_json::to_string(&state).unwrap();
        let state: State = serde_json::from_str(&text).unwrap();
        assert_eq!(state.bundle(), Path::new("/b"));
        assert_eq!(state.annotations().into_iter().collect::<Vec<_>>(), [("a".to_owned(), "x=y".to_owned())]);
    }
}
