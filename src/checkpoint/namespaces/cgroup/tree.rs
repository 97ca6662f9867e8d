//! The groups below a container's own, and their members, as directories list them: that does not depend on what
//! cgroup namespace anybody is in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::properties;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{CgControllerEntry, CgroupDirEntry, CgroupPerms, CgroupPropEntry};
use crate::sys::procfs::read_text;

/// Deeper than anybody nests groups.
const DEPTH_MAX: usize = 64;

/// A tree of groups: one a controller, or a few, or that of version 2.
#[derive(Debug)]
pub(super) struct Hierarchy {
    /// Its controllers as /proc/PID/cgroup names them, joined by commas; empty for version 2.
    pub name: String,
    /// The container's directory.
    dir: PathBuf,
    /// Its path from the root of the hierarchy.
    pub path: String,
    /// Which group each thread of the container is in, as a path below the container's, by id on this host.
    pub members: BTreeMap<i32, String>,
}

/// What the container's own groups are limited to, by directory.
pub type Limits = BTreeMap<PathBuf, Vec<CgroupPropEntry>>;

/// Reads them while the container runs: they are dozens of files, which whoever runs the container changes, not the
/// container.
pub(super) fn limits(cgroups: &BTreeMap<String, PathBuf>, init: i32) -> Result<Limits> {
    let of = |h: Hierarchy| Ok((h.dir.clone(), properties::read_limits(&h.name, &h.dir)?));
    hierarchies(cgroups, init)?.into_iter().map(of).collect()
}

/// The hierarchies in which the container has a group of its own.
pub(super) fn hierarchies(cgroups: &BTreeMap<String, PathBuf>, init: i32) -> Result<Vec<Hierarchy>> {
    let path = format!("/proc/{init}/cgroup");
    let text = read_text(&path)
        .during("cannot read the control groups of the container", || format!("read({path:?})"))?;
    let mut seen = BTreeSet::new();
    let mut all = Vec::new();
    for (controller, dir) in cgroups {
        // Controllers that are mounted together.
        let Ok(meta) = fs::metadata(dir) else { continue };
        if !seen.insert((meta.dev(), meta.ino())) {
            continue;
        }
        let Some((name, path)) = lines(&text).find(|(name, _)| name.split(',').any(|n| n == controller))
        else {
            continue;
        };
        let mut members = BTreeMap::new();
        let file = if controller.is_empty() { "cgroup.threads" } else { "tasks" };
        walk(dir, "", file, &mut members)?;
        // Where init is not below, somebody outside has moved it: the tree is none of the container's.
        let Some(place) = members.get(&init) else { continue };
        let Some(path) = base(path, place) else { continue };
        all.push(Hierarchy { name: name.to_owned(), dir: dir.clone(), path: path.to_owned(), members });
    }
    Ok(all)
}

/// Names and paths of /proc/PID/cgroup.
pub(super) fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.split_once(':')
    })
}

/// The path of the container's group, from that of a group inside; none for the root, which is everybody's.
fn base<'a>(path: &'a str, place: &str) -> Option<&'a str> {
    let base = if place.is_empty() { path } else { path.strip_suffix(place)?.strip_suffix('/')? };
    (base.len() > 1).then_some(base)
}

fn walk(dir: &Path, place: &str, file: &str, members: &mut BTreeMap<i32, String>) -> Result<()> {
    if place.split('/').count() > DEPTH_MAX {
        return Err(Error::new("control groups are nested too deeply").path(dir));
    }
    let path = dir.join(file);
    let text =
        read_text(&path).during("cannot read a control group", || format!("read({})", path.display()))?;
    members.extend(text.lines().filter_map(|tid| Some((tid.parse().ok()?, place.to_owned()))));
    for name in children(dir)? {
        let inner = if place.is_empty() { name.clone() } else { format!("{place}/{name}") };
        walk(&dir.join(&name), &inner, file, members)?;
    }
    Ok(())
}

/// The names of the groups right inside, in order.
fn children(dir: &Path) -> Result<Vec<String>> {
    // Its own link, that of the one around it, and one of each inside.
    if fs::metadata(dir).is_ok_and(|meta| meta.nlink() == 2) {
        return Ok(Vec::new());
    }
    let list = || -> std::io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.push(entry.file_name().into_string().map_err(|_| std::io::ErrorKind::InvalidData)?);
            }
        }
        names.sort_unstable();
        Ok(names)
    };
    list().during("cannot list control groups", || format!("getdents64({})", dir.display()))
}

pub(super) fn perms(path: &Path) -> Result<CgroupPerms> {
    let meta = fs::metadata(path)
        .during("cannot look at a control group", || format!("stat({})", path.display()))?;
    Ok(CgroupPerms { mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid() })
}

impl Hierarchy {
    /// The path, from the root of the hierarchy, of a group inside.
    pub fn full(&self, place: &str) -> String {
        if place.is_empty() { self.path.clone() } else { format!("{}/{place}", self.path) }
    }

    /// Its record, with all groups; `frozen` are thawed for the dump alone.
    pub fn entry(&self, frozen: &[PathBuf], limits: &Limits) -> Result<CgControllerEntry> {
        let mut top = self.group(&self.dir, frozen, true)?;
        match limits.get(&self.dir) {
            Some(known) => top.properties.extend_from_slice(known),
            None => top.properties.extend(properties::read_limits(&self.name, &self.dir)?),
        }
        top.dir_name.clone_from(&self.path);
        let cnames = self.name.split(',').map(str::to_owned).collect();
        let is_threaded = Some(top.children.iter().any(properties::threaded));
        Ok(CgControllerEntry { cnames, dirs: vec![top], is_threaded })
    }

    fn group(&self, dir: &Path, frozen: &[PathBuf], top: bool) -> Result<CgroupDirEntry> {
        let child = |name: String| {
            let mut group = self.group(&dir.join(&name), frozen, false)?;
            group.dir_name = name;
            Ok(group)
        };
        let mut properties = properties::read(&self.name, dir, top)?;
        if frozen.iter().any(|group| group == dir) {
            properties::freeze(&mut properties);
        }
        Ok(CgroupDirEntry {
            dir_name: String::new(),
            children: children(dir)?.into_iter().map(child).collect::<Result<_>>()?,
            properties,
            dir_perms: Some(perms(dir)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_containers_own_path_is_what_is_left() {
        assert_eq!(base("/docker/x", ""), Some("/docker/x"));
        assert_eq!(base("/docker/x/a/b", "a/b"), Some("/docker/x"));
        assert_eq!(base("/docker/x", "a"), None);
        assert_eq!(base("/", ""), None);
        let text = "4:cpu,cpuacct:/x:y\n1:name=systemd:/\n0::/u\n";
        assert_eq!(
            lines(text).collect::<Vec<_>>(),
            [("cpu,cpuacct", "/x:y"), ("name=systemd", "/"), ("", "/u")]
        );
    }
}
