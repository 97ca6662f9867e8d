//! Namespaces that the container has made itself: `unshare`, a sandbox, a container in the container.
//!
//! ```text
//!   init ── net 12, uts 14, ...           the container's: made by `container/` from config.json
//!    ├── task 7 ── net 21, uts 14         one that a task has left the container's for
//!    ├── task 8 ── net 21, uts 22         tasks that share one have the same number
//!    └── task 9    descriptor of ipc:[23]   nobody is in it: a file of /proc/PID/ns that is open keeps it
//! ```
//!
//! A namespace is known by its inode while the container lives, by a number in the images. It is numbered when it is met
//! first, be it in a task, behind a descriptor, or as the one a socket was made in; what is in it is saved then.
//!
//! **Images.** As CRIU has them: the numbers in ids-N.img, contents in utsns-21.img, netns-21.img and so on. CRIU
//! restores network and mount namespaces of single tasks, and refuses the other kinds by itself when it compares ids.
//! The extension `namespaces` says of each number what kind it is and which user namespace owns it; without it, it is
//! the container's.
//!
//! **User namespaces.** Ids in the images are those that the container knows, not those of the namespace: a process may
//! have ids that its namespace has no name for. Id maps lead to the user namespace around. Whoever enters one has every
//! capability in it and none outside, so tasks go there last:
//!
//! ```text
//!   groups, users as the container knows them ─▶ setns(CLONE_NEWUSER) ─▶ threads (their ids by ns_last_pid, for
//!   set_tid is not allowed any more) ─▶ limits, timers, signals ─▶ capabilities, which nobody outside lacks
//! ```
//!
//! A mount namespace of another user namespace is put together by the container and then copied by its owner. All that
//! is in it is locked together, as the kernel does with what is copied that way: nothing that is covered can be laid
//! bare, but what the namespace had mounted itself cannot be unmounted singly any more either.
//!
//! **Restore.** A namespace belongs to the user namespace of whoever makes it, so one of the container makes it:
//!
//! ```text
//!   init's stub ── clone3(CLONE_NEW*) ──▶ helper: we open its door, /proc/HELPER/ns/*, fill what is behind it, end it
//!   open files: sockets are made by a thread that has gone through the door of theirs
//!   tree: every task is born into the namespaces of init
//!   then, by setns(2) in the task, before its root and working directory are set:
//!         net, ipc, uts, cgroup, time, mnt; last of all user
//! ```
//!
//! The first process of a pid namespace that belongs to such a user namespace must be born there: see [`birth`].
//!
//! The door of a control group namespace can be opened only once its groups are there, the others before any file is.
//! A container that may not make namespaces (no CAP_SYS_ADMIN in config.json) gets none from an image, but for user
//! namespaces and what is owned by them, which anybody can make.

pub mod birth;
mod check;
mod enter;
mod make;
pub mod pids;
mod spaces;

pub use check::{check, check_connection, check_door, in_networks, trees};
pub use enter::{enter, hand};
pub use make::{Made, make, make_late, make_placed};
pub use spaces::{Spaces, contents, kind_of};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::TaskKobjIdsEntry;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::Kind;

/// Name of the extension in stasis.img.
pub const EXTENSION: &str = "namespaces";

/// The number of the first namespace that the container has made.
const FIRST: u32 = 21;

/// More than anybody makes.
const MAX: usize = 4096;

/// A namespace of the images that the container has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Its number.
    pub id: u32,
    /// Its kind.
    pub kind: Kind,
    /// The user namespace that it belongs to, or that a user namespace is in; 0 for the container's.
    #[serde(default)]
    pub owner: u32,
    /// Of a user namespace: nobody in it may change supplementary groups.
    #[serde(default)]
    pub fixed_groups: bool,
    /// Of a user namespace: the user that has made it, as the container knows him; he may do anything in it.
    #[serde(default)]
    pub maker: u32,
}

impl Space {
    /// As the only one in a record of ids.
    pub fn record(self) -> TaskKobjIdsEntry {
        let mut ids = TaskKobjIdsEntry::default();
        *self.kind.field(&mut ids) = Some(self.id);
        ids
    }
}

/// The namespaces of the images that the container has made: those of tasks, and those that the extension names.
pub fn spaces(model: &Model) -> Result<Vec<Space>> {
    let mut all: BTreeMap<u32, Space> = BTreeMap::new();
    let init = model.pstree.first().and_then(|init| model.ids.get(&init.pid));
    let of_tasks = model.ids.values().flat_map(|ids| {
        let own = move |kind: &Kind| Some((kind.get(ids)?, *kind));
        let inits = |kind: Kind| init.and_then(|init| kind.get(init));
        Kind::ALL.iter().filter_map(own).filter(move |(id, kind)| inits(*kind) != Some(*id))
    });
    let named = model.extension::<Vec<Space>>(EXTENSION)?;
    let of_tasks = of_tasks.map(|(id, kind)| Space { id, kind, owner: 0, fixed_groups: false, maker: 0 });
    for space in of_tasks.chain(named) {
        let id = space.id;
        if all.insert(id, space).is_some_and(|other| other.kind != space.kind) {
            return Err(Error::new(format!("the images have two kinds of namespaces called {id}")));
        }
        if all.len() > MAX {
            return Err(Error::new(format!("the images have more than {MAX} namespaces")));
        }
    }
    // Owners come first.
    for space in all.values().filter(|space| space.owner != 0) {
        let owner = all.get(&space.owner);
        if space.owner >= space.id || owner.is_none_or(|owner| owner.kind != Kind::User) {
            return Err(Error::new(format!(
                "namespace {} of the images has no owner, {}",
                space.id, space.owner
            )));
        }
    }
    Ok(all.into_values().collect())
}

/// The user namespace of a task, where that is one that the container has made.
pub fn user_of(model: &Model, pid: u32) -> Option<u32> {
    differs(model, model.ids.get(&pid)?, Kind::User)
}

/// Refuses threads that have other ids than their process in a user namespace that the container has made: once they are
/// there, they cannot be given ids that it has no name for.
pub fn check_threads(model: &Model) -> Result<()> {
    for process in model.pstree.iter().filter(|process| user_of(model, process.pid).is_some()) {
        let ids = |tid: u32| {
            let creds = model.cores.get(&tid)?.thread_core.as_ref()?.creds.as_ref()?;
            let users = [creds.uid, creds.euid, creds.suid, creds.fsuid];
            Some((users, [creds.gid, creds.egid, creds.sgid, creds.fsgid], &creds.groups))
        };
        if let Some(tid) = process.threads.iter().find(|tid| ids(**tid) != ids(process.pid)) {
            return Err(Error::new(format!(
                "thread {tid} has other ids than its process, in a user namespace of its own"
            ))
            .pid(process.pid.cast_signed())
            .remedy("such a thread cannot be restored; end it"));
        }
    }
    Ok(())
}

/// Whether a task has another namespace than init.
fn differs(model: &Model, ids: &TaskKobjIdsEntry, kind: Kind) -> Option<u32> {
    let init = model.pstree.first().and_then(|init| model.ids.get(&init.pid))?;
    kind.get(ids).filter(|id| kind.get(init) != Some(*id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::PstreeEntry;

    #[test]
    fn what_is_not_inits_is_the_containers_work() {
        let pstree = vec![PstreeEntry { pid: 1, ..Default::default() }];
        let mut model = Model { pstree, ..Model::default() };
        let ids = |net, uts| TaskKobjIdsEntry {
            net_ns_id: Some(net),
            uts_ns_id: Some(uts),
            ..TaskKobjIdsEntry::default()
        };
        model.ids = BTreeMap::from([(1, ids(12, 14)), (7, ids(21, 14)), (8, ids(21, 22))]);
        let space = |id, kind| Space { id, kind, owner: 0, fixed_groups: false, maker: 0 };
        assert_eq!(spaces(&model).unwrap(), [space(21, Kind::Net), space(22, Kind::Uts)]);
        model.set_extension(EXTENSION, &[space(22, Kind::Uts), space(23, Kind::Ipc)]).unwrap();
        assert_eq!(spaces(&model).unwrap().len(), 3);
        assert_eq!(differs(&model, &model.ids[&8], Kind::Uts), Some(22));
        assert_eq!(differs(&model, &model.ids[&7], Kind::Uts), None);
        model.set_extension(EXTENSION, &[space(22, Kind::Net)]).unwrap();
        assert!(spaces(&model).unwrap_err().to_string().contains("called 22"));
    }
}
