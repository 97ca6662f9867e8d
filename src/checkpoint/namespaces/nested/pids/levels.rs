//! What processes are called in the pid namespaces below the container's.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::EXTENSION;
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::model::Model;

/// The kernel's own limits: of pid namespaces in each other, and of process ids.
const DEEPEST: usize = 32;
const PID_MAX: i32 = 1 << 22;

/// The record. Every id that stands for a process, thread, session or group is one in the container's namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pids {
    /// The namespaces, by their numbers.
    pub spaces: BTreeMap<u32, Level>,
    /// Those whose own namespace is one of these.
    pub ids: BTreeMap<i32, Ids>,
    /// Threads whose children are born elsewhere: in a namespace, or in a new one.
    pub children: BTreeMap<i32, Option<u32>>,
    /// Devices of proc file systems, and what they show.
    pub procs: BTreeMap<u32, u32>,
}

/// A pid namespace that the container has made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Level {
    /// The namespace around it; 0 for the container's.
    pub parent: u32,
    /// Its first process; 0 where that is gone.
    pub init: i32,
    /// The id that it has given last; 0 where nobody knows.
    pub last: u32,
}

/// What a process or thread is called below the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    /// Its own namespace.
    pub space: u32,
    /// Its ids, that of its own namespace last.
    pub inner: Vec<i32>,
}

impl Pids {
    /// That of a set of images, if it makes sense.
    pub fn of(model: &Model) -> Result<Self> {
        let all: Self = model.extension(EXTENSION)?;
        all.validate().map(|()| all)
    }

    fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::new(format!("the pid namespaces of the images: {what}")));
        for (id, level) in &self.spaces {
            if self.path(*id).is_none() {
                return bad(format!("{id} is in none, or in too many"));
            }
            let first = self.ids.get(&level.init);
            if level.init != 0 && first.is_none_or(|i| i.space != *id || i.inner.last() != Some(&1)) {
                return bad(format!("the first process of {id} is not in it"));
            }
        }
        let mut used = BTreeSet::new();
        for (pid, ids) in &self.ids {
            let depth = self.path(ids.space).map_or(0, |path| path.len());
            let sane = ids.inner.iter().all(|id| (1..=PID_MAX).contains(id));
            if depth == 0 || ids.inner.len() != depth || !sane {
                return bad(format!("the ids of process {pid} are not those of its namespace"));
            }
            if !used.insert((ids.space, ids.inner.last())) {
                return bad(format!("process {pid} has the id of another one"));
            }
        }
        match self
            .children
            .values()
            .flatten()
            .chain(self.procs.values())
            .find(|id| **id != 0 && !self.spaces.contains_key(id))
        {
            Some(id) => bad(format!("there is no {id}")),
            None => Ok(()),
        }
    }

    /// The namespaces from the container's down to that one, without the container's.
    fn path(&self, space: u32) -> Option<Vec<u32>> {
        let (mut path, mut at) = (Vec::new(), space);
        while at != 0 {
            path.insert(0, at);
            at = self.spaces.get(&at).filter(|_| path.len() <= DEEPEST)?.parent;
        }
        Some(path)
    }

    /// The namespace of a process; 0 for the container's.
    pub fn space(&self, pid: i32) -> u32 {
        self.ids.get(&pid).map_or(0, |ids| ids.space)
    }

    /// How many namespaces that one lies below the container's.
    pub fn depth(&self, space: u32) -> usize {
        self.path(space).map_or(0, |path| path.len())
    }

    /// Whether a namespace is another one, or somewhere in it.
    pub fn within(&self, space: u32, outer: u32) -> bool {
        outer == 0 || self.path(space).is_some_and(|path| path.contains(&outer))
    }

    /// The namespace that a process is the first one of.
    pub fn made_by(&self, pid: i32) -> Option<u32> {
        let space = self.space(pid);
        self.spaces.get(&space).filter(|level| level.init == pid).map(|_| space)
    }

    /// What somebody in a namespace calls a process; none where he cannot see it.
    pub fn seen(&self, pid: i32, from: u32) -> Option<i32> {
        if from == 0 {
            return Some(pid);
        }
        let ids = self.ids.get(&pid).filter(|ids| self.within(ids.space, from))?;
        ids.inner.get(self.depth(from) - 1).copied()
    }

    /// What a process calls itself.
    pub fn own(&self, pid: i32) -> i32 {
        self.ids.get(&pid).and_then(|ids| ids.inner.last().copied()).unwrap_or(pid)
    }

    /// The ids of a process for clone3(2), its own first. One that the images do not know has the same number in every
    /// namespace of its parent.
    pub fn set_tid(&self, pid: i32, parents: u32) -> Vec<i32> {
        match self.ids.get(&pid) {
            Some(ids) => ids.inner.iter().rev().copied().chain([pid]).collect(),
            None => vec![pid; self.depth(parents) + 1],
        }
    }

    /// Every number in use below the container.
    pub fn numbers(&self) -> impl Iterator<Item = i32> {
        self.ids.values().flat_map(|ids| ids.inner.iter().copied())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.spaces.is_empty() && self.children.is_empty()
    }
}

#[cfg(test)]
pub(in crate::checkpoint) mod tests {
    use super::*;

    /// 8 is the first of 21, in the container; 10 that of 22, in 21.
    pub(in crate::checkpoint) fn two() -> Pids {
        let level = |parent, init| Level { parent, init, last: 9 };
        let ids = |space, inner: &[i32]| Ids { space, inner: inner.to_vec() };
        Pids {
            spaces: BTreeMap::from([(21, level(0, 8)), (22, level(21, 10))]),
            ids: BTreeMap::from([(8, ids(21, &[1])), (9, ids(21, &[2])), (10, ids(22, &[3, 1]))]),
            ..Pids::default()
        }
    }

    #[test]
    fn everybody_has_an_id_for_each_who_sees_him() {
        let pids = two();
        pids.validate().unwrap();
        assert_eq!((pids.seen(10, 0), pids.seen(10, 21), pids.seen(10, 22)), (Some(10), Some(3), Some(1)));
        assert_eq!((pids.seen(8, 22), pids.seen(7, 21), pids.seen(7, 0)), (None, None, Some(7)));
        assert_eq!((pids.own(10), pids.own(7)), (1, 7));
        assert_eq!(pids.set_tid(10, 21), [1, 3, 10]);
        assert_eq!((pids.set_tid(300, 22), pids.set_tid(7, 0)), (vec![300; 3], vec![7]));
        assert_eq!((pids.made_by(10), pids.made_by(9)), (Some(22), None));
    }

    #[test]
    fn hostile_records_are_refused() {
        let refused = |change: &dyn Fn(&mut Pids)| {
            let mut pids = two();
            change(&mut pids);
            pids.validate().unwrap_err().to_string()
        };
        let level = |p: &mut Pids, id: u32| p.spaces.remove(&id).unwrap();
        assert!(refused(&|p| p.spaces.get_mut(&21).unwrap().parent = 22).contains("too many"));
        assert!(refused(&|p| _ = level(p, 21)).contains("22"));
        assert!(refused(&|p| p.spaces.get_mut(&21).unwrap().init = 9).contains("first"));
        assert!(refused(&|p| p.ids.get_mut(&9).unwrap().inner = vec![1]).contains("another"));
        assert!(refused(&|p| p.ids.get_mut(&9).unwrap().inner = vec![0]).contains("9"));
        assert!(refused(&|p| _ = p.procs.insert(5, 23)).contains("23"));
    }
}
