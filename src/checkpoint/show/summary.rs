//! What a set of images is.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::{clean, size};
use crate::checkpoint::Result;
use crate::checkpoint::image::{ImageDir, MntEntry, TaskKobjIdsEntry};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::Kind;
use crate::checkpoint::report;

/// A set at a glance.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// The directory.
    pub path: String,
    /// Who wrote it.
    pub writer: String,
    /// Id of the container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Kernel that it ran on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Host name inside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Name of the first process.
    pub command: String,
    /// Processes, zombies included.
    pub processes: usize,
    /// Threads of all of them.
    pub threads: usize,
    /// Namespaces that are the container's own.
    pub namespaces: Vec<&'static str>,
    /// Mounts that the destination's config.json has to supply, by their places.
    pub external_mounts: Vec<String>,
    /// Open files by kind.
    pub files: BTreeMap<&'static str, usize>,
    /// Established TCP connections.
    pub tcp_connections: usize,
    /// Images in the directory.
    pub images: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of memory among them.
    pub memory_bytes: u64,
    /// An earlier set that has the rest of the memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
}

/// Looks at a set.
pub fn summary(images: &ImageDir, model: &Model) -> Result<Summary> {
    let extension = model.extension.as_ref();
    let init = model.pstree.first().map_or(1, |p| p.pid);
    let mut files = BTreeMap::new();
    for file in &model.files {
        *files.entry(super::files::kind(file.r#type())).or_insert(0) += 1;
    }
    let mounts = model.mountpoints.values().flatten();
    Ok(Summary {
        path: images.path().display().to_string(),
        writer: extension.map_or_else(|| "CRIU".to_owned(), |x| format!("Stasis {}", clean(&x.version))),
        container: extension.map(|x| clean(&x.container)),
        kernel: extension.map(|x| clean(&x.kernel)),
        hostname: model.utsns.values().next().map(|uts| clean(&uts.nodename)),
        command: super::comm(model, init),
        processes: model.pstree.len(),
        threads: model.pstree.iter().map(|p| p.threads.len()).sum(),
        namespaces: model.ids.get(&init).map(|ids| own(ids, model)).unwrap_or_default(),
        external_mounts: mounts.filter(external).map(|m| clean(&m.mountpoint)).collect(),
        tcp_connections: model.tcp_streams.len(),
        files,
        images: images.names()?.iter().filter(|name| name.ends_with(".img")).count(),
        bytes: report::bytes(images.path(), ""),
        memory_bytes: report::bytes(images.path(), "pages-"),
        parent: images.parent()?.map(|parent| parent.path().display().to_string()),
    })
}

/// Whether a mount comes from outside. What masks a file is the container's own /dev/null.
fn external(mount: &&MntEntry) -> bool {
    mount.ext_key.as_deref().is_some_and(|key| key != "/dev/null")
}

/// The namespaces that are not those of whoever made the images.
fn own(ids: &TaskKobjIdsEntry, model: &Model) -> Vec<&'static str> {
    let mut theirs = model.inventory.root_ids.clone().unwrap_or_default();
    let mut ids = ids.clone();
    let differs =
        |kind: &Kind| kind.field(&mut ids).is_some() && *kind.field(&mut ids) != *kind.field(&mut theirs);
    Kind::ALL.into_iter().filter(differs).map(Kind::title).collect()
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &str| match value.is_empty() {
            true => Ok(()),
            false => writeln!(f, "{name:<16} {value}"),
        };
        line("images", &format!("{}, {} files, {}", self.path, self.images, size(self.bytes)))?;
        line("written by", &self.writer)?;
        line("container", self.container.as_deref().unwrap_or_default())?;
        line("kernel", self.kernel.as_deref().unwrap_or_default())?;
        line("host name", self.hostname.as_deref().unwrap_or_default())?;
        line("first process", &self.command)?;
        line("processes", &format!("{}, threads {}", self.processes, self.threads))?;
        line("memory", &size(self.memory_bytes))?;
        line("earlier set", self.parent.as_deref().unwrap_or_default())?;
        line("own namespaces", &self.namespaces.join(", "))?;
        line("external mounts", &self.external_mounts.join(", "))?;
        let files: Vec<String> = self.files.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        line("open files", &files.join(", "))?;
        line("tcp connections", &self.tcp_connections.to_string())
    }
}
