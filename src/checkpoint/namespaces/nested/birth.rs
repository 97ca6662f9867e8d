//! Processes that must be born in a user namespace, for their pid namespace belongs to it.
//!
//! A pid namespace belongs to the user namespace of whoever makes it, and only its first process can be made with it:
//!
//! ```text
//!   parent, in the container's user namespace
//!     └─ helper: its namespaces ─▶ ids ─▶ setns(user) ─▶ clone3(CLONE_NEWPID | CLONE_PARENT) ──▶ first process
//!        exits                                                     a child of the parent, in both namespaces
//! ```
//!
//! Whoever is forked by it is in that user namespace, too. None of them may tell clone3(2) what to be called outside: they
//! get the next id of each namespace, which is set before (`ns_last_pid`). Namespaces that belong to the container they
//! can only inherit: tasks that have left for another one of these are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};

use super::make::child;
use super::pids::Pids;
use super::{Space, differs, enter, spaces, user_of};
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{CredsEntry, PstreeEntry};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::{Kind, user};
use crate::checkpoint::remote::{Batch, CloneArgs, Conduit, Injection, Thread};
use crate::checkpoint::task::credentials;
use crate::checkpoint::task::status::Status;
use crate::checkpoint::task::tree::Step;

/// Helpers of the tree have lower numbers where nobody is in their way.
const SPARE: i32 = 10_000;

const NEWPID: u64 = libc::CLONE_NEWPID as u64;

/// The user namespaces that processes are born in, where that is not the container's.
#[derive(Debug, Default)]
pub struct Births {
    users: BTreeMap<i32, u32>,
    /// A number that nobody of the images has, for helpers.
    spare: i32,
}

impl Births {
    /// Those of a tree.
    pub fn of(model: &Model, steps: &[Step], pids: &Pids) -> Result<Self> {
        let owners: BTreeMap<u32, u32> = spaces(model)?.iter().map(|space| (space.id, space.owner)).collect();
        let mut births = BTreeMap::new();
        for step in steps {
            let Step::Fork { by, pid, .. } = *step else { continue };
            let made = pids.made_by(pid).and_then(|space| owners.get(&space));
            let user = made.copied().filter(|owner| *owner != 0).or_else(|| births.get(&by).copied());
            births.extend(user.map(|user| (pid, user)));
        }
        let of = |e: &PstreeEntry| [e.pid, e.pgid, e.sid].into_iter().chain(e.threads.clone());
        let used: BTreeSet<i32> =
            model.pstree.iter().flat_map(of).map(u32::cast_signed).chain(pids.numbers()).collect();
        let spare = (SPARE..).find(|id| !used.contains(id)).unwrap_or(SPARE);
        Ok(Self { users: births, spare })
    }

    /// Where a process is born.
    pub fn get(&self, pid: i32) -> Option<u32> {
        self.users.get(&pid).copied()
    }

    /// Refuses those who could not go on to where they are.
    pub fn check(&self, model: &Model) -> Result<()> {
        let all = spaces(model)?;
        let owner = |id: u32| all.iter().find(|space| space.id == id).map_or(0, |space| space.owner);
        for (pid, user) in &self.users {
            let Some(ids) = model.ids.get(&pid.cast_unsigned()) else { continue };
            if user_of(model, pid.cast_unsigned()).is_none_or(|is| !within(&all, is, *user)) {
                return Err(Error::new(
                    "the process is not in the user namespace that it must have been born in",
                )
                .pid(*pid));
            }
            let first = model.ids.get(&self.first(model, *pid).cast_unsigned());
            let outer = |ids, kind| differs(model, ids, kind).filter(|id| owner(*id) == 0);
            let strange = |kind: &&Kind| {
                let left = differs(model, ids, **kind).is_some_and(|id| owner(id) != 0);
                let inherited =
                    first.and_then(|first| outer(first, **kind)).filter(|_| **kind != Kind::Cgroup);
                !left && outer(ids, **kind) != inherited
            };
            let kinds = [Kind::Net, Kind::Ipc, Kind::Uts, Kind::Cgroup, Kind::Time, Kind::Mnt];
            if let Some(kind) = kinds.iter().find(strange) {
                return Err(Error::new(format!(
                    "the process is in a {} namespace of the container's user namespace, and itself in another one",
                    kind.title()
                ))
                .pid(*pid)
                .remedy("have it made in the user namespace of its pid namespace"));
            }
        }
        Ok(())
    }

    /// The outermost ancestor that was born in the same user namespace.
    fn first(&self, model: &Model, pid: i32) -> i32 {
        let parents: BTreeMap<u32, u32> = model.pstree.iter().map(|e| (e.pid, e.ppid)).collect();
        let mut at = pid;
        while let Some(up) = parents.get(&at.cast_unsigned()).map(|up| up.cast_signed()) {
            if self.get(up) != self.get(pid) {
                break;
            }
            at = up;
        }
        at
    }

    /// Has `by` fork `pid`, where one of the two is born in another user namespace than the container's.
    pub fn fork(
        &self,
        restore: &Restore<'_>,
        pids: &Pids,
        by: &mut NewTask,
        pid: i32,
        args: CloneArgs,
        conduit: &Conduit,
    ) -> Result<(Thread, Injection)> {
        let new = args.flags & NEWPID != 0;
        // Of a new namespace the first id is 1 anyway. What images do not know, a helper, is called there as it comes.
        let (known, mut ids) = (pids.ids.get(&pid), args.set_tid.clone());
        let space = match known {
            Some(_) if new => pids.spaces.get(&pids.space(pid)).map_or(0, |level| level.parent),
            Some(known) => known.space,
            None => pids.space(by.vpid),
        };
        if new {
            ids.remove(0);
        }
        let (here, there) = (self.get(by.vpid), self.get(pid));
        let parent = by.vpid;
        let make = |injection: &mut Injection, args: &CloneArgs| {
            pids.next_are(restore, space, &ids)?;
            let (thread, injection) = injection.clone_child(args)?;
            if known.is_some() {
                called(&thread, &ids, new)?;
            }
            Ok((thread, injection))
        };
        let plain = CloneArgs { set_tid: Vec::new(), ..args };
        let Some(user) = there.filter(|there| here != Some(*there)) else {
            return make(&mut by.injection, &plain);
        };
        let helper = CloneArgs { flags: plain.flags & !NEWPID, ..plain.clone() };
        let child_args =
            CloneArgs { flags: plain.flags | libc::CLONE_PARENT as u64, exit_signal: 0, ..plain };
        // It must not take a number that somebody is to have.
        let around = pids.space(parent);
        pids.next_are(restore, around, &vec![self.spare; pids.depth(around) + 1])?;
        child(&mut by.injection, &helper, &mut |host, injection| {
            enter::early(restore, pid, host, injection, conduit)?;
            let mut batch = Batch::new();
            self.take_ids(restore.model, parent, pid, &mut batch)?;
            injection.run(&batch)?;
            let door = restore.made.door(user)?;
            let door =
                door.ok_or_else(|| Error::new(format!("the user namespace {user} was not made again")))?;
            go(injection, conduit, &door)?;
            make(injection, &child_args)
        })
        .map_err(|e| e.pid(pid))
    }

    /// Has a process, which was born where `from` was, take the ids of `pid`.
    pub fn take_ids(&self, model: &Model, from: i32, pid: i32, batch: &mut Batch) -> Result<()> {
        let Some(own) = creds(model, pid) else { return Ok(()) };
        let Some(user) = self.get(from) else {
            credentials::take_ids(batch, own);
            return Ok(());
        };
        let inherited = creds(model, self.first(model, from));
        let seen = seen(model, user, own)?;
        if inherited.is_none_or(|from| from.groups != own.groups) {
            credentials::take_ids(batch, &seen);
        } else if inherited.is_none_or(|from| ids(from) != ids(own)) {
            credentials::take_own_ids(batch, &seen);
        }
        Ok(())
    }
}

fn ids(c: &CredsEntry) -> [u32; 8] {
    [c.uid, c.euid, c.suid, c.fsuid, c.gid, c.egid, c.sgid, c.fsgid]
}

/// The ids of a process as a user namespace of the images has them.
fn seen(model: &Model, user: u32, creds: &CredsEntry) -> Result<CredsEntry> {
    let (all, mut path, mut at) = (spaces(model)?, Vec::new(), user);
    while at != 0 {
        path.insert(0, at);
        at = all.iter().find(|space| space.id == at).map_or(0, |space| space.owner);
    }
    path.iter().try_fold(creds.clone(), |creds, id| user::inside(model, *id, &creds))
}

fn creds(model: &Model, pid: i32) -> Option<&CredsEntry> {
    model.cores.get(&pid.cast_unsigned())?.thread_core.as_ref()?.creds.as_ref()
}

/// Whether a user namespace is another one, or somewhere in it.
fn within(all: &[Space], mut user: u32, outer: u32) -> bool {
    while user != 0 && user != outer {
        user = all.iter().find(|space| space.id == user).map_or(0, |space| space.owner);
    }
    user == outer
}

fn go(injection: &mut Injection, conduit: &Conduit, door: &OwnedFd) -> Result<()> {
    let [number] = conduit.send(injection, &[door.as_fd()])?[..] else { return Ok(()) };
    let mut batch = Batch::new();
    batch.about("cannot enter a user namespace");
    batch.call(libc::SYS_setns, &[number.into(), Kind::User.flag().bits().into()]);
    batch.call(libc::SYS_close, &[number.into()]);
    injection.run(&batch).map(drop)
}

/// Whether a new process got the ids that it was to get, that of the outermost namespace last.
fn called(thread: &Thread, wanted: &[i32], new: bool) -> Result<()> {
    let got = Status::of(thread.tid())?.ns_pid;
    match got.iter().rev().skip(usize::from(new)).zip(wanted).all(|(got, wanted)| got == wanted) {
        true => Ok(()),
        false => Err(Error::new(format!("the process was made as {got:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::TaskKobjIdsEntry;
    use crate::checkpoint::namespaces::nested::EXTENSION;
    use crate::checkpoint::namespaces::nested::pids::tests::two;

    /// 8 is the first of pid namespace 21, which belongs to user namespace 20; 9 is its child, 7 its parent.
    fn model() -> Model {
        let entry = |pid, ppid| PstreeEntry { pid, ppid, ..PstreeEntry::default() };
        let ids = |user, uts| TaskKobjIdsEntry {
            user_ns_id: Some(user),
            uts_ns_id: Some(uts),
            ..TaskKobjIdsEntry::default()
        };
        let mut model = Model {
            pstree: vec![entry(1, 0), entry(7, 1), entry(8, 7), entry(9, 8)],
            ids: BTreeMap::from([(1, ids(6, 14)), (7, ids(20, 14)), (8, ids(20, 14)), (9, ids(20, 14))]),
            ..Model::default()
        };
        let space = |id, kind, owner| Space { id, kind, owner, fixed_groups: false, maker: 0 };
        let all = [
            space(20, Kind::User, 0),
            space(21, Kind::Pid, 20),
            space(23, Kind::Uts, 0),
            space(24, Kind::Uts, 20),
        ];
        model.set_extension(EXTENSION, &all).unwrap();
        model
    }

    fn births(model: &Model) -> Result<Births> {
        let fork = |by, pid| Step::Fork { by, pid, helper: false };
        let births = Births::of(model, &[fork(1, 7), fork(7, 8), fork(8, 9)], &two())?;
        births.check(model).map(|()| births)
    }

    #[test]
    fn the_first_process_and_its_children_are_born_inside() {
        let births = births(&model()).unwrap();
        assert_eq!([1, 7, 8, 9].map(|pid| births.get(pid)), [None, None, Some(20), Some(20)]);
    }

    #[test]
    fn who_could_not_have_gone_where_he_is_is_refused() {
        let with = |pid: u32, change: &dyn Fn(&mut TaskKobjIdsEntry)| {
            let mut model = model();
            change(model.ids.get_mut(&pid).unwrap());
            births(&model)
        };
        with(8, &|ids| ids.uts_ns_id = Some(23)).unwrap_err();
        with(8, &|ids| ids.uts_ns_id = Some(24)).unwrap();
        let both = |model: &mut Model, pids: &[u32]| {
            pids.iter().for_each(|pid| model.ids.get_mut(pid).unwrap().uts_ns_id = Some(23));
        };
        let mut inherited = model();
        both(&mut inherited, &[8, 9]);
        births(&inherited).unwrap();
        let error = with(9, &|ids| ids.uts_ns_id = Some(23)).unwrap_err();
        assert_eq!(error.fields().pid, Some(9), "{error}");
        assert!(with(9, &|ids| ids.user_ns_id = Some(6)).is_err(), "outside again");
    }
}
