//! The namespaces of a live container, and what is in those that it has made.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{EXTENSION, FIRST, Made, Space};
use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::enter::{Doors, door};
use crate::checkpoint::namespaces::mount::nested::{Tree, look};
use crate::checkpoint::namespaces::{Kind, cgroup, ipc, mount, net, time, user, uts};
use crate::checkpoint::task::status::IdMap;
use crate::sys::ioctl;

/// What a dump has met of the namespaces that the container has made.
#[derive(Debug, Default)]
pub struct Spaces {
    /// What the kernel calls init's, and our own.
    around: BTreeMap<Kind, [Option<PathBuf>; 2]>,
    met: Vec<Met>,
    numbers: BTreeMap<PathBuf, u32>,
    /// How many of those met have been saved.
    saved: usize,
    /// Which pid namespaces proc file systems show, by their devices.
    procs: BTreeMap<u32, u32>,
}

/// A namespace that the container has made.
#[derive(Debug)]
struct Met {
    space: Space,
    door: OwnedFd,
    /// Processes in it, as pids of this host.
    pids: Vec<i32>,
    /// The pid namespace around it, if it is one; 0 for the container's.
    parent: u32,
    /// What it looks like, if it is of mounts.
    tree: Option<Arc<Tree>>,
}

impl Spaces {
    /// The number of a process's namespace; none where the kernel has no such kind.
    pub fn of_task(&mut self, init: i32, pid: i32, kind: Kind) -> Result<Option<u32>> {
        let Some(link) = kind.of(&pid.to_string())? else { return Ok(None) };
        if let Some(id) = self.known(init, kind, &link)? {
            if let Some(met) = self.met.iter_mut().find(|met| met.space.id == id) {
                met.space.fixed_groups |= kind == Kind::User && user::fixed_groups(pid);
                met.pids.push(pid);
            }
            return Ok(Some(id));
        }
        let door = door(pid, kind)?;
        self.meet(init, kind, link, door, vec![pid]).map(Some)
    }

    /// The number of the namespace behind a descriptor.
    pub fn of_door(&mut self, init: i32, door: OwnedFd) -> Result<u32> {
        let kind = kind_of(&door)?;
        // As /proc/PID/ns has it; of a file that was opened through a mount, /proc/self/fd has another name.
        let stat = nix::sys::stat::fstat(&door).during("cannot name a namespace", || "fstat(_)".into())?;
        let link = PathBuf::from(format!("{}:[{}]", kind.name(), stat.st_ino));
        match self.known(init, kind, &link)? {
            Some(id) => Ok(id),
            None => self.meet(init, kind, link, door, Vec::new()),
        }
    }

    /// The number of the network namespace that a socket is in, and a process in it.
    pub fn of_socket(&mut self, init: i32, socket: &OwnedFd) -> Result<(Option<u32>, i32)> {
        let Ok(door) = ioctl::socket_namespace(socket) else {
            // It cannot be asked, or we may not: then all are taken for the container's.
            return Ok((Some(Kind::Net.id(Kind::Net.private(init)?)), init));
        };
        let id = self.of_door(init, door)?;
        match self.met.iter().find(|met| met.space.id == id) {
            None => Ok((Some(id), init)),
            Some(met) => met.pids.first().map(|pid| (Some(id), *pid)).ok_or_else(|| {
                Error::new("a socket is in a network namespace that no process is in")
                    .remedy("let the program close it")
            }),
        }
    }

    /// The pid namespace around one that the container has made; 0 for the container's own.
    pub fn parent(&self, id: u32) -> Option<u32> {
        let mut pids = self.met.iter().filter(|met| met.space.kind == Kind::Pid);
        pids.find(|met| met.space.id == id).map(|met| met.parent)
    }

    /// A way into one that has been met.
    pub fn door(&self, id: u32) -> Option<&OwnedFd> {
        self.met.iter().find(|met| met.space.id == id).map(|met| &met.door)
    }

    /// Notes that the proc of that device shows the pid namespace of that name, if it is one that the container has made.
    pub fn show(&mut self, dev: u32, name: &Path) {
        self.procs.extend(self.numbers.get(name).map(|id| (dev, *id)));
    }

    /// The pid namespaces that proc file systems show.
    pub fn procs(&self) -> &BTreeMap<u32, u32> {
        &self.procs
    }

    /// The network namespaces, by their numbers.
    pub fn networks(&self) -> Result<Vec<(u32, OwnedFd)>> {
        let met = self.met.iter().filter(|met| met.space.kind == Kind::Net);
        met.map(|met| Ok((met.space.id, copy(&met.door)?))).collect()
    }

    /// The mount namespaces.
    pub fn trees(&self) -> Vec<Arc<Tree>> {
        self.met.iter().filter_map(|met| met.tree.clone()).collect()
    }

    /// A process of each network namespace that the container has made.
    pub fn in_networks(&self) -> Vec<i32> {
        let met = self.met.iter().filter(|met| met.space.kind == Kind::Net);
        met.filter_map(|met| met.pids.first().copied()).collect()
    }

    fn known(&mut self, init: i32, kind: Kind, link: &PathBuf) -> Result<Option<u32>> {
        if let std::collections::btree_map::Entry::Vacant(place) = self.around.entry(kind) {
            place.insert([kind.of(&init.to_string())?, kind.of("self")?]);
        }
        let [inits, ours] = &self.around[&kind];
        if inits.as_ref() == Some(link) {
            return Ok(Some(kind.id(inits != ours)));
        }
        if ours.as_ref() == Some(link) {
            return Err(outside(kind));
        }
        Ok(self.numbers.get(link).copied())
    }

    fn meet(&mut self, init: i32, kind: Kind, link: PathBuf, door: OwnedFd, pids: Vec<i32>) -> Result<u32> {
        let owner = match ioctl::namespace_owner(&door) {
            // EPERM: it is above ours, so it is not the container's work.
            Err(_) => return Err(outside(kind)),
            Ok(owner) => self.of_door(init, owner)?,
        };
        let owner = if owner < FIRST { 0 } else { owner };
        let fixed_groups = kind == Kind::User && user::fixed_groups_in((pids.first().copied(), &door))?;
        let maker = match kind {
            Kind::User => {
                let uid = ioctl::namespace_maker(&door)
                    .during("cannot tell who has made a user namespace", || {
                        "ioctl(_, NS_GET_OWNER_UID)".into()
                    })?;
                IdMap::users(init)?.inside(uid)
            }
            _ => 0,
        };
        let parent = match kind {
            Kind::Pid => ioctl::namespace_parent(&door)
                .during("cannot tell what is around a pid namespace", || "ioctl(_, NS_GET_PARENT)".into())
                .and_then(|parent| self.of_door(init, parent))?,
            _ => 0,
        };
        let parent = if parent < FIRST { 0 } else { parent };
        let tree = (kind == Kind::Mnt).then(|| copy(&door).and_then(look)).transpose()?.map(Arc::new);
        let id = FIRST + u32::try_from(self.met.len()).unwrap_or(u32::MAX - FIRST);
        self.numbers.insert(link, id);
        self.met.push(Met {
            space: Space { id, kind, owner, fixed_groups, maker },
            door,
            pids,
            parent,
            tree,
        });
        Ok(id)
    }
}

/// The refusal of what is neither the container's nor shared with it.
pub(super) fn outside(kind: Kind) -> Error {
    Error::new(format!("this is of the {} namespace of the host, which is not the container's", kind.title()))
        .remedy("let the program close or leave it")
}

/// The kind of the namespace behind a descriptor.
pub fn kind_of(door: &OwnedFd) -> Result<Kind> {
    let flag = ioctl::namespace_kind(door).during("cannot tell the kind of a namespace", || {
        format!("ioctl({}, NS_GET_NSTYPE)", door.as_raw_fd())
    })?;
    Kind::with_flag(flag).ok_or_else(|| Error::new(format!("there is a namespace of unknown kind {flag:#x}")))
}

pub(super) fn copy(door: &OwnedFd) -> Result<OwnedFd> {
    door.try_clone().during("cannot hold a namespace", || "fcntl(_, F_DUPFD_CLOEXEC)".into())
}

/// Saves what is in the namespaces met since the last time.
pub fn contents(dump: &mut Dump<'_>) -> Result<()> {
    while let Some(met) = dump.spaces.met.get(dump.spaces.saved) {
        let Space { id, kind, owner, .. } = met.space;
        let pids = met.pids.clone();
        let doors: Doors = vec![(copy(&met.door)?, kind)];
        match kind {
            Kind::Uts => uts::save(dump, id, doors)?,
            Kind::Ipc => ipc::save(dump, id, doors, &pids)?,
            Kind::Net => net::save(dump, id, doors)?,
            Kind::Time => time::save(dump, id, &pids)?,
            Kind::Cgroup => cgroup::save_root(dump, id, doors)?,
            Kind::Mnt => {
                if let Some(tree) = met.tree.clone() {
                    let door = copy(&met.door)?;
                    mount::nested::save(dump, id, door, &tree)?;
                }
            }
            Kind::User => {
                // Whose init is in it where the container has made none around it.
                let around = dump.spaces.met.iter().find(|met| met.space.id == owner);
                let (outer, way) = match around {
                    Some(around) => (around.pids.first().copied(), copy(&around.door)?),
                    None => (Some(dump.source.init), copy(&met.door)?),
                };
                let own = copy(&met.door)?;
                user::save(dump, id, (pids.first().copied(), &own), (outer, &way))?;
            }
            // Their record is written at the end.
            Kind::Pid => {}
        }
        dump.spaces.saved += 1;
    }
    let all: Vec<Space> = dump.spaces.met.iter().map(|met| met.space).collect();
    if !all.is_empty() {
        dump.model.set_extension(EXTENSION, &all)?;
    }
    Ok(())
}

/// Puts back what was in a namespace that has just been made, through a process that is in it.
pub(super) fn fill(restore: &Restore<'_>, space: Space, helper: i32) -> Result<()> {
    let doors = vec![(door(helper, space.kind)?, space.kind)];
    match space.kind {
        Kind::Uts => uts::put_back(restore, space.id, doors),
        Kind::Ipc => ipc::put_back(restore, space.id, doors),
        Kind::Net => net::put_back(restore, space.id, doors),
        // Filled where they are made.
        Kind::Time | Kind::Cgroup | Kind::Pid | Kind::Mnt | Kind::User => Ok(()),
    }
}

impl Made {
    /// Doors to all that have been made, by their numbers.
    pub fn networks(&self) -> Result<BTreeMap<u32, OwnedFd>> {
        self.doors().iter().map(|(id, door)| Ok((*id, copy(door)?))).collect()
    }

    /// A door to the namespace with that number; none where it is init's.
    pub fn door(&self, id: u32) -> Result<Option<OwnedFd>> {
        match self.doors().get(&id) {
            Some(door) => copy(door).map(Some),
            None => Ok(None),
        }
    }
}
