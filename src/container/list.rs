//! What `state` and `list` tell.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Serialize;

use super::{Container, Result, Status, Store};
use crate::checkpoint::memory::lazy::status::Status as Fill;

/// Under this name the annotations say how far memory has been filled after `restore --lazy`, or why that has failed.
const FILL: &str = "org.stasis.fill";

/// One container, as runc prints it.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Version of the specification that config.json names.
    #[serde(rename = "ociVersion")]
    pub version: String,
    /// Container id.
    pub id: String,
    /// Init, 0 when the container has stopped.
    pub pid: i32,
    /// `created`, `running`, `paused`, `stopped`.
    pub status: &'static str,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// Root file system on the host.
    pub rootfs: PathBuf,
    /// When it was created.
    pub created: String,
    /// The annotations of config.json.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Name of the user who owns it; empty in `state`.
    pub owner: String,
}

/// `state`: takes no lock.
pub fn state(store: &Store, id: &str) -> Result<Summary> {
    summary(&Container::load(store, id)?)
}

fn summary(container: &Container) -> Result<Summary> {
    let status = container.status()?;
    let state = &container.state;
    let mut annotations = state.annotations();
    if let Some(fill) = Fill::read(container.dir.path()) {
        annotations.insert(FILL.to_owned(), fill.describe());
    }
    Ok(Summary {
        version: state.config.version.clone(),
        id: state.id.clone(),
        pid: if status == Status::Stopped { 0 } else { state.init_process_pid },
        status: status.as_str(),
        bundle: state.bundle().to_owned(),
        rootfs: state.config.rootfs.clone(),
        created: state.created.clone(),
        annotations,
        owner: String::new(),
    })
}

/// `list`: every container under the root, and what could not be read of the others. A root that does not exist is
/// an error for the caller to judge.
pub fn list(store: &Store) -> std::io::Result<(Vec<Summary>, Vec<String>)> {
    let (mut found, mut failed) = (vec![], vec![]);
    let mut names = BTreeMap::new();
    for id in store.ids()? {
        match Container::load(store, &id).and_then(|c| Ok((summary(&c)?, c))) {
            Ok((mut s, c)) => {
                let uid = std::fs::metadata(c.dir.path()).map_or(0, |m| m.uid());
                s.owner = names.entry(uid).or_insert_with(|| user_name(uid)).clone();
                found.push(s);
            }
            Err(e) => failed.push(format!("load container {id}: {e}")),
        }
    }
    Ok((found, failed))
}

fn user_name(uid: u32) -> String {
    let name = std::fs::read_to_string("/etc/passwd").ok().and_then(|text| {
        text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == uid.to_string()).then(|| name.to_owned())
        })
    });
    name.unwrap_or_else(|| format!("#{uid}"))
}
