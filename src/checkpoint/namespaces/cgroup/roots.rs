//! Control group namespaces that the container has made: each has a group of every hierarchy for its root, in which
//! whoever made it was at that moment.
//!
//! ```text
//!   seen from here     /docker/ID/a/b        of a process below the root
//!   seen from inside             /b
//!                      ──────────            so the root is a, below the container's own
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::tree::{hierarchies, lines};
use super::{Places, put};
use crate::checkpoint::context::{Dump, NewTask, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::enter::{Doors, through};
use crate::checkpoint::namespaces::nested;
use crate::checkpoint::remote::Conduit;

/// Name of the extension in stasis.img: by namespace and hierarchy, the root as a path below the container's group.
const EXTENSION: &str = "cgroup-roots";

type Roots = BTreeMap<u32, BTreeMap<String, String>>;

/// Notes the roots of a namespace.
pub fn save(dump: &mut Dump<'_>, id: u32, doors: Doors) -> Result<()> {
    let hierarchies = hierarchies(&dump.source.cgroups, dump.source.init)?;
    let pids: Vec<i32> = dump.tasks.iter().filter(|task| !task.zombie).map(|task| task.pid).collect();
    let seen = through(doors, || {
        let read = |pid: &i32| {
            let path = format!("/proc/{pid}/cgroup");
            let text = std::fs::read_to_string(&path);
            Ok((*pid, text.during("cannot read the control groups", || format!("read({path:?})"))?))
        };
        pids.iter().map(read).collect::<Result<Vec<_>>>()
    })?;
    let mut roots = BTreeMap::new();
    for hierarchy in &hierarchies {
        let of = |(pid, text): &(i32, String)| {
            let (_, inside) = lines(text).find(|(name, _)| *name == hierarchy.name)?;
            root(hierarchy.members.get(pid)?, inside).map(str::to_owned)
        };
        let root = seen.iter().find_map(of).ok_or_else(|| {
            Error::new(
                "no process is below the root of a control group namespace that the container has made",
            )
            .remedy("let the program leave the namespace, or close its descriptor of it")
        })?;
        roots.insert(hierarchy.name.clone(), root);
    }
    let mut all: Roots = dump.model.extension(EXTENSION)?;
    all.insert(id, roots);
    dump.model.set_extension(EXTENSION, &all)
}

/// The root, as a path below the container's group, of whoever sees a process `inside` that is in `place`.
fn root<'a>(place: &'a str, inside: &str) -> Option<&'a str> {
    match inside.strip_prefix('/')? {
        "" => Some(place),
        rest => {
            let root = place.strip_suffix(rest)?;
            if root.is_empty() { Some(root) } else { root.strip_suffix('/') }
        }
    }
}

/// Makes the namespaces, as long as `stub` and all its children are in the container's own group.
pub(super) fn make(
    restore: &Restore<'_>,
    stub: &mut NewTask,
    conduit: &Conduit,
    places: &Places<'_>,
) -> Result<()> {
    let all: Roots = restore.model.extension(EXTENSION)?;
    let mut dirs: BTreeMap<u32, Vec<PathBuf>> = BTreeMap::new();
    for (id, roots) in &all {
        let mut of = Vec::new();
        for (name, place) in roots {
            if place.split('/').any(|part| part == "..") || place.starts_with('/') {
                return Err(Error::new(format!(
                    "the images have {place:?} for the root of a control group namespace"
                )));
            }
            if let Some((_, dir)) = places.bases.get(name).filter(|_| !place.is_empty()) {
                of.push(dir.join(place));
            }
        }
        dirs.insert(*id, of);
    }
    nested::make_placed(restore, stub, conduit, &dirs, &|dir, pid| put(dir, "cgroup.procs", pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_what_is_not_seen_from_inside() {
        assert_eq!(root("a/b", "/"), Some("a/b"));
        assert_eq!(root("a/b", "/b"), Some("a"));
        assert_eq!(root("a/b", "/a/b"), Some(""));
        assert_eq!(root("", "/"), Some(""));
        assert_eq!(root("ab", "/b"), None);
        assert_eq!(root("c", "/../c"), None);
        assert_eq!(root("a", "/docker/x/a"), None);
    }
}
