//! The namespaces come to be with their first processes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use super::Pids;
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::Kind;
use crate::checkpoint::namespaces::enter::{door, through};
use crate::checkpoint::namespaces::nested::spaces::copy;
use crate::checkpoint::remote::{Batch, Conduit, Injection};
use crate::sys::last_pid;

/// Keeps the door of the namespace that a process has just made, if it has.
pub fn arrive(restore: &Restore<'_>, pids: &Pids, task: &NewTask) -> Result<()> {
    if let Some(space) = pids.made_by(task.vpid) {
        restore.made.doors().insert(space, door(task.pid, Kind::Pid)?);
    }
    Ok(())
}

/// Has the next child of a process born where it was, if that is neither the namespace of the process nor a new one.
pub fn leave_for(
    restore: &Restore<'_>,
    pids: &Pids,
    task: &mut NewTask,
    child: i32,
    conduit: &Conduit,
) -> Result<()> {
    match away(pids, task.vpid, child) {
        Some(space) => give_birth_in(task, &door_to(restore, space)?, conduit),
        None => Ok(()),
    }
}

/// The children after it are born where the process is.
pub fn give_back(pids: &Pids, task: &mut NewTask, child: i32, conduit: &Conduit) -> Result<()> {
    match away(pids, task.vpid, child) {
        Some(_) => {
            let own = door(task.pid, Kind::Pid)?;
            give_birth_in(task, &own, conduit)
        }
        None => Ok(()),
    }
}

fn away(pids: &Pids, parent: i32, child: i32) -> Option<u32> {
    // Others that it does not know are helpers, born where their parents are.
    let space = pids.ids.get(&child)?.space;
    (space != pids.space(parent) && pids.made_by(child).is_none()).then_some(space)
}

fn give_birth_in(task: &mut NewTask, door: &OwnedFd, conduit: &Conduit) -> Result<()> {
    let [number] = conduit.send(&mut task.injection, &[door.as_fd()])?[..] else { return Ok(()) };
    let mut batch = Batch::new();
    batch.about("cannot have a child born in its pid namespace");
    batch.call(libc::SYS_setns, &[number.into(), libc::CLONE_NEWPID.into()]);
    batch.call(libc::SYS_close, &[number.into()]);
    task.injection.run(&batch).map(drop)
}

/// The door of a namespace of the images; 0: of the container's.
pub fn door_to(restore: &Restore<'_>, space: u32) -> Result<OwnedFd> {
    match restore.made.door(space)? {
        Some(door) => Ok(door),
        None if space == 0 => door(restore.target.init, Kind::Pid),
        None => Err(Error::new(format!("the pid namespace {space} was not made again"))),
    }
}

/// Gives every process whose threads have their children elsewhere doors to these namespaces: numbers of descriptors, by
/// thread. None: a namespace that is still to be made.
pub fn hand(
    restore: &Restore<'_>,
    pids: &Pids,
    tree: &mut BTreeMap<i32, NewTask>,
    conduit: &Conduit,
) -> Result<BTreeMap<i32, Option<i32>>> {
    let mut numbers = BTreeMap::new();
    for process in &restore.model.pstree {
        let pid = process.pid.cast_signed();
        let threads = process.threads.iter().map(|tid| tid.cast_signed());
        for (tid, space) in threads.filter_map(|tid| Some((tid, *pids.children.get(&tid)?))) {
            let Some(task) = tree.get_mut(&pid) else { continue };
            let number = match space {
                None => None,
                Some(space) => {
                    let door = door_to(restore, space)?;
                    conduit.send(&mut task.injection, &[door.as_fd()])?.first().copied()
                }
            };
            numbers.insert(tid, number);
        }
    }
    Ok(numbers)
}

/// What a thread does with what it was handed. It makes no thread any more.
pub fn enter(injection: &mut Injection, door: Option<i32>) -> Result<()> {
    let mut batch = Batch::new();
    batch.about("cannot have the children of a thread born in a pid namespace of their own");
    match door {
        Some(number) => {
            batch.call(libc::SYS_setns, &[number.into(), libc::CLONE_NEWPID.into()]);
            batch.call(libc::SYS_close, &[number.into()]);
        }
        None => _ = batch.call(libc::SYS_unshare, &[libc::CLONE_NEWPID.into()]),
    }
    injection.run(&batch).map(drop)
}

/// Lets ids go on where they were, when everybody has his.
pub fn finish(restore: &Restore<'_>) -> Result<()> {
    let pids = Pids::of(restore.model)?;
    for (id, level) in pids.spaces.iter().filter(|(_, level)| level.last != 0) {
        let door = restore.made.doors().get(id).map(copy).transpose()?;
        let Some(door) = door else { continue };
        through(vec![(door, Kind::Pid)], || {
            // Where the file is read-only, they start anew.
            let _ = last_pid::set(level.last);
            Ok(())
        })?;
    }
    Ok(())
}

impl Pids {
    /// Makes the next process or thread get the ids of that one, where clone3(2) may not be told.
    pub fn next_is(&self, restore: &Restore<'_>, pid: i32) -> Result<()> {
        self.next_are(restore, self.space(pid), &self.set_tid(pid, 0))
    }

    /// The same with its ids, in a namespace and in those around it.
    pub fn next_are(&self, restore: &Restore<'_>, mut space: u32, ids: &[i32]) -> Result<()> {
        for id in ids.iter().copied() {
            through(vec![(door_to(restore, space)?, Kind::Pid)], || {
                last_pid::set(id.cast_unsigned().saturating_sub(1))
                    .during("cannot choose the id of a thread", || format!("write(ns_last_pid, {})", id - 1))
            })?;
            space = self.spaces.get(&space).map_or(0, |level| level.parent);
        }
        Ok(())
    }
}
