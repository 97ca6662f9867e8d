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
//! **Restore.** A namespace belongs to the user namespace of whoever makes it, so one of the container makes it:
//!
//! ```text
//!   init's stub ── clone3(CLONE_NEW*) ──▶ helper: we open its door, /proc/HELPER/ns/*, fill what is behind it, end it
//!   open files: sockets are made by a thread that has gone through the door of theirs
//!   tree: every task is born into the namespaces of init
//!   then, by setns(2) in the task, before its root and working directory are set:
//!         net, ipc, uts, cgroup, time, mnt
//! ```
//!
//! The door of a control group namespace can be opened only once its groups are there, the others before any file is.
//! A container that may not make namespaces (no CAP_SYS_ADMIN in config.json) gets none from an image.

mod check;
mod enter;
mod make;
mod spaces;

pub use check::{check, check_connection, check_door, in_networks, trees};
pub use enter::enter;
pub use make::{Made, make, make_placed};
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

/// The kinds that can be made again.
const KINDS: [Kind; 6] = [Kind::Net, Kind::Ipc, Kind::Uts, Kind::Cgroup, Kind::Time, Kind::Mnt];

/// A namespace of the images that the container has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Its number.
    pub id: u32,
    /// Its kind.
    pub kind: Kind,
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
    let mut all: BTreeMap<u32, Kind> = BTreeMap::new();
    let init = model.pstree.first().and_then(|init| model.ids.get(&init.pid));
    let of_tasks = model.ids.values().flat_map(|ids| {
        let own = move |kind: &Kind| Some((kind.get(ids)?, *kind));
        let inits = |kind: Kind| init.and_then(|init| kind.get(init));
        Kind::ALL.iter().filter_map(own).filter(move |(id, kind)| inits(*kind) != Some(*id))
    });
    let named = model.extension::<Vec<Space>>(EXTENSION)?;
    for (id, kind) in of_tasks.chain(named.iter().map(|space| (space.id, space.kind))) {
        if all.insert(id, kind).is_some_and(|other| other != kind) {
            return Err(Error::new(format!("the images have two kinds of namespaces called {id}")));
        }
        if all.len() > MAX {
            return Err(Error::new(format!("the images have more than {MAX} namespaces")));
        }
    }
    Ok(all.into_iter().map(|(id, kind)| Space { id, kind }).collect())
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
        let space = |id, kind| Space { id, kind };
        assert_eq!(spaces(&model).unwrap(), [space(21, Kind::Net), space(22, Kind::Uts)]);
        model.set_extension(EXTENSION, &[space(22, Kind::Uts), space(23, Kind::Ipc)]).unwrap();
        assert_eq!(spaces(&model).unwrap().len(), 3);
        assert_eq!(differs(&model, &model.ids[&8], Kind::Uts), Some(22));
        assert_eq!(differs(&model, &model.ids[&7], Kind::Uts), None);
        model.set_extension(EXTENSION, &[space(22, Kind::Net)]).unwrap();
        assert!(spaces(&model).unwrap_err().to_string().contains("called 22"));
    }
}
