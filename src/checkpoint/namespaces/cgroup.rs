//! Control groups that the container has made inside its own, and who is in which.
//!
//! ```text
//!   /sys/fs/cgroup/memory/docker/ID          the container's: made, and set, by this config.json
//!                                  ├── a     made inside: made again, with owner and settings
//!                                  └── b/c   its processes and threads go back into it
//! ```
//!
//! At a restore all processes are born in the container's group. They go to theirs while they have no memory yet, so
//! that what they get is charged where it was. Settings come last; inside they cannot widen anything, for no group has
//! more than the one around it. Those of the container's own group come back only where that is asked for: see `limits`.

mod limits;
mod properties;
mod roots;
mod theirs;
mod tree;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::checkpoint::context::{Dump, NewTask, Options, Restore, Source};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{
    CgControllerEntry, CgMemberEntry, CgSetEntry, CgroupDirEntry, CgroupEntry, CoreEntry,
};
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::vpid;
use crate::checkpoint::remote::{Conduit, Thread};
pub use roots::save as save_root;
pub use theirs::rooted;
pub use tree::Limits;
use tree::{Hierarchy, hierarchies};

/// The set that CRIU means by "where the one who made the images is". The container's sets come after it.
const DUMPERS: u32 = 1;

/// The container's first process.
const INIT: i32 = 1;

/// What can be known of the container's groups before it stands still.
pub fn limits(options: &Options, source: &Source) -> Result<Limits> {
    if ignored(options.manage_cgroups.as_deref()) {
        return Ok(Limits::new());
    }
    tree::limits(&source.cgroups, source.init)
}

/// The groups of a container that stands still, and who is in them.
#[derive(Debug)]
pub struct Groups {
    hierarchies: Vec<Hierarchy>,
    controllers: Vec<CgControllerEntry>,
}

/// Looks at them; `frozen`: those that the container had frozen, `limits`: what is known already. None where they are not
/// kept.
pub fn look(
    options: &Options,
    source: &Source,
    frozen: &[PathBuf],
    limits: &Limits,
) -> Result<Option<Groups>> {
    if ignored(options.manage_cgroups.as_deref()) {
        return Ok(None);
    }
    let hierarchies = hierarchies(&source.cgroups, source.init)?;
    let controllers = hierarchies.iter().map(|h| h.entry(frozen, limits)).collect::<Result<_>>()?;
    Ok(Some(Groups { hierarchies, controllers }))
}

/// Saves the groups of the container and everybody's place in them.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let known = dump.groups.take();
    let groups =
        known.unwrap_or_else(|| look(dump.options, dump.source, &dump.frozen_groups, &dump.limits))?;
    let Some(Groups { hierarchies, controllers }) = groups else { return Ok(()) };
    let init = dump.source.init;
    let private = Kind::Cgroup.private(init)?;
    dump.model.inventory.root_cg_set = Some(DUMPERS);
    let mut sets: Vec<Vec<&str>> = Vec::new();
    let mut set_of = |tid: i32, leader: Option<u32>| -> Option<u32> {
        let places: Vec<&str> =
            hierarchies.iter().map(|h| h.members.get(&tid).map_or("", String::as_str)).collect();
        let at = sets.iter().position(|set| *set == places).unwrap_or_else(|| {
            sets.push(places);
            sets.len() - 1
        });
        let id = u32::try_from(at).ok()? + DUMPERS + 1;
        (leader != Some(id)).then_some(id)
    };
    for task in dump.tasks.iter().filter(|task| !task.zombie) {
        let leader = set_of(task.pid, None);
        let core = dump.model.cores.get_mut(&task.vpid.cast_unsigned());
        if let Some(tc) = core.and_then(|core| core.tc.as_mut()) {
            tc.cg_set = leader;
        }
        for thread in task.threads.iter().skip(1) {
            let Some(other) = set_of(thread.tid(), leader) else { continue };
            let core = dump.model.cores.get_mut(&vpid(init, thread.tid()).cast_unsigned());
            if let Some(thread) = core.and_then(|core| core.thread_core.as_mut()) {
                thread.cg_set = Some(other);
            }
        }
    }
    let member = |hierarchy: &Hierarchy, place: &&str| CgMemberEntry {
        name: hierarchy.name.clone(),
        path: hierarchy.full(place),
        cgns_prefix: private.then(|| u32::try_from(hierarchy.path.len()).unwrap_or(0)).filter(|n| *n > 1),
    };
    let sets = sets.iter().zip(DUMPERS + 1..).map(|(places, id)| CgSetEntry {
        id,
        ctls: hierarchies.iter().zip(places).map(|(h, place)| member(h, place)).collect(),
    });
    let sets = sets.collect();
    dump.model.cgroup = Some(CgroupEntry { sets, controllers });
    Ok(())
}

fn ignored(mode: Option<&str>) -> bool {
    mode == Some("ignore")
}

/// The groups of the images, where they are to be.
struct Places<'a> {
    entry: &'a CgroupEntry,
    /// By the names of a hierarchy as sets have them: its path in the images, and its directory here.
    bases: BTreeMap<String, (&'a str, PathBuf)>,
}

impl<'a> Places<'a> {
    fn of(restore: &'a Restore<'_>) -> Result<Option<Self>> {
        let Some(entry) = restore.model.cgroup.as_ref() else { return Ok(None) };
        if ignored(restore.options.manage_cgroups.as_deref()) {
            return Ok(None);
        }
        let full = limits::wanted(restore.options.manage_cgroups.as_deref());
        let limits_any = |top: &CgroupDirEntry| !top.properties.is_empty();
        let mut bases = BTreeMap::new();
        for controller in &entry.controllers {
            let Some(top) = controller.dirs.first() else { continue };
            let name = controller.cnames.join(",");
            let dir = controller.cnames.iter().find_map(|name| restore.target.cgroups.get(name));
            match dir {
                Some(dir) => _ = bases.insert(name, (top.dir_name.as_str(), dir.clone())),
                None if top.children.is_empty() && !(full && limits_any(top)) => {}
                None if top.children.is_empty() => {
                    let what = if name.is_empty() { "version 2".into() } else { name };
                    return Err(Error::new(format!(
                        "the checkpoint has settings of the controller {what}, which this machine does not give the container"
                    ))
                    .remedy("restore on a machine with the same, or with --manage-cgroups-mode soft"));
                }
                None => {
                    let what = if name.is_empty() { "of version 2".into() } else { format!("for {name}") };
                    return Err(Error::new(format!(
                        "the container has made control groups {what}, which this machine does not give it"
                    ))
                    .remedy("restore on a machine with the same, or with --manage-cgroups-mode ignore"));
                }
            }
        }
        Ok(Some(Self { entry, bases }))
    }

    /// The directories of a set that are not the container's own.
    fn inside(&self, set: u32) -> Vec<PathBuf> {
        let Some(set) = self.entry.sets.iter().find(|s| s.id == set) else { return Vec::new() };
        let dir = |member: &CgMemberEntry| {
            let (base, dir) = self.bases.get(&member.name)?;
            let place = Path::new(&member.path).strip_prefix(base).ok()?;
            (place != Path::new("")).then(|| dir.join(place))
        };
        set.ctls.iter().filter_map(dir).collect()
    }

    /// Each group of the images with its directory here, outer ones first, the container's own included.
    fn each(
        &self,
        work: &mut dyn FnMut(&CgControllerEntry, &CgroupDirEntry, &Path) -> Result<()>,
    ) -> Result<()> {
        for controller in &self.entry.controllers {
            let Some((_, dir)) = self.bases.get(&controller.cnames.join(",")) else { continue };
            let Some(top) = controller.dirs.first() else { continue };
            let mut left = vec![(top, dir.clone())];
            while let Some((group, dir)) = left.pop() {
                work(controller, group, &dir).map_err(|e| e.path(&dir))?;
                left.extend(group.children.iter().map(|child| (child, dir.join(&child.dir_name))));
            }
        }
        Ok(())
    }
}

/// Makes the groups inside. Mounts may show them.
pub fn restore(restore: &Restore<'_>) -> Result<()> {
    let Some(places) = Places::of(restore)? else { return Ok(()) };
    places.each(&mut |controller, group, dir| {
        let inside = !controller.dirs.first().is_some_and(|top| std::ptr::eq(top, group));
        if inside {
            make(controller, group, dir)?;
        }
        Ok(())
    })
}

/// Puts each process into its own group. `tree` has them by their pids inside.
pub fn place(restore: &Restore<'_>, tree: &mut BTreeMap<i32, NewTask>, conduit: &Conduit) -> Result<()> {
    let Some(places) = Places::of(restore)? else { return Ok(()) };
    if let Some(stub) = tree.get_mut(&INIT) {
        roots::make(restore, stub, conduit, &places)?;
    }
    let set_of = |vpid: i32| restore.model.cores.get(&vpid.cast_unsigned())?.tc.as_ref()?.cg_set;
    let init = set_of(INIT);
    for (vpid, task) in tree {
        // Those that are to be zombies, and helpers, have none: with init they are in nobody's way.
        let set = set_of(*vpid).or(init);
        for dir in set.map(|set| places.inside(set)).unwrap_or_default() {
            put(&dir, "cgroup.procs", task.pid).map_err(|e| e.pid(*vpid))?;
        }
    }
    // Only now: a group of version 2 that distributes controllers has no processes of its own.
    places.each(&mut |controller, group, dir| {
        if properties::unified(controller) { properties::distribute(group, dir) } else { Ok(()) }
    })
}

fn make(controller: &CgControllerEntry, group: &CgroupDirEntry, dir: &Path) -> Result<()> {
    match fs::create_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        done => done.during("cannot make a control group", || format!("mkdir({})", dir.display()))?,
    }
    if let Some(perms) = &group.dir_perms {
        own(dir, perms.mode, perms.uid, perms.gid)?;
    }
    for property in &group.properties {
        if let Some(perms) = &property.perms {
            let file = dir.join(&property.name);
            if file.exists() {
                own(&file, perms.mode, perms.uid, perms.gid)?;
            }
        }
    }
    properties::before(controller, group, dir)
}

fn own(path: &Path, mode: u32, uid: u32, gid: u32) -> Result<()> {
    let call = || format!("chown({}, {uid}, {gid})", path.display());
    chown(path, Some(uid), Some(gid)).during("cannot give a control group to its owner", call)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777))
        .during("cannot set the mode of a control group", || format!("chmod({}, {mode:o})", path.display()))
}

fn put(dir: &Path, file: &str, id: i32) -> Result<()> {
    let path = dir.join(file);
    fs::write(&path, id.to_string())
        .during("cannot put a process into its control group", || format!("write({}, {id})", path.display()))
}

/// Puts threads into the groups that are not those of their processes, and sets what groups inside were set to.
pub fn finish(restore: &Restore<'_>, threads: &[Thread]) -> Result<()> {
    let Some(places) = Places::of(restore)? else { return Ok(()) };
    let wandering =
        |core: &CoreEntry| core.tc.is_none() && core.thread_core.as_ref().is_some_and(|t| t.cg_set.is_some());
    if restore.model.cores.values().any(wandering) {
        for thread in threads {
            let vtid = vpid(restore.target.init, thread.tid());
            let core = restore.model.cores.get(&vtid.cast_unsigned());
            let set = core.filter(|core| wandering(core)).and_then(|core| core.thread_core.as_ref()?.cg_set);
            for dir in set.map(|set| places.inside(set)).unwrap_or_default() {
                let file = if dir.join("tasks").exists() { "tasks" } else { "cgroup.threads" };
                put(&dir, file, thread.tid()).map_err(|e| e.pid(vtid))?;
            }
        }
    }
    let mode = restore.options.manage_cgroups.as_deref();
    places.each(&mut |controller, group, dir| {
        let inside = !controller.dirs.first().is_some_and(|top| std::ptr::eq(top, group));
        match inside {
            true => properties::after(group, dir),
            false if limits::wanted(mode) => limits::restore(group, dir, &restore.target.spec),
            false => Ok(()),
        }
    })
}
