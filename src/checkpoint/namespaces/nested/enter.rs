//! The tasks go where they were.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use super::{differs, spaces, user_of};
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::{Kind, enter};
use crate::checkpoint::remote::{Batch, Conduit, Injection};

/// In this order: what comes first needs capabilities that what comes last may take away.
const ORDER: [Kind; 6] = [Kind::Net, Kind::Ipc, Kind::Uts, Kind::Cgroup, Kind::Time, Kind::Mnt];

/// Every task that was not in the namespaces of init leaves them.
pub fn enter(restore: &Restore<'_>, tree: &mut BTreeMap<i32, NewTask>, conduit: &Conduit) -> Result<()> {
    for (vpid, task) in tree {
        one(restore, *vpid, (task.pid, &mut task.injection), conduit, &ORDER).map_err(|e| e.pid(*vpid))?;
    }
    Ok(())
}

/// A process that is forked in a user namespace of its own is to be in what belongs to the container already: process
/// `host` of this host enters that of `vpid`, without the control groups', which are not there yet.
pub(super) fn early(
    restore: &Restore<'_>,
    vpid: i32,
    host: i32,
    injection: &mut Injection,
    conduit: &Conduit,
) -> Result<()> {
    let (all, ids) = (spaces(restore.model)?, restore.model.ids.get(&vpid.cast_unsigned()));
    let outer = |kind: &Kind| {
        let id = ids.and_then(|ids| differs(restore.model, ids, *kind));
        *kind != Kind::Cgroup && all.iter().any(|space| Some(space.id) == id && space.owner == 0)
    };
    let kinds: Vec<Kind> = ORDER.into_iter().filter(outer).collect();
    one(restore, vpid, (host, injection), conduit, &kinds)
}

/// Whether a process, by its pid on this host, is behind that door already.
fn is_there(pid: i32, kind: Kind, door: &OwnedFd) -> Result<bool> {
    let what = "cannot look at a namespace";
    let inode =
        |fd: &OwnedFd| nix::sys::stat::fstat(fd).map(|stat| stat.st_ino).during(what, || "fstat(_)".into());
    Ok(inode(&enter::door(pid, kind)?)? == inode(door)?)
}

/// Gives every task that is to enter a user namespace a door to it: the numbers of the descriptors, by process. The
/// task goes through it when nothing is left to do that takes what it is outside.
pub fn hand(
    restore: &Restore<'_>,
    tree: &mut BTreeMap<i32, NewTask>,
    conduit: &Conduit,
) -> Result<BTreeMap<i32, i32>> {
    let mut numbers = BTreeMap::new();
    for (vpid, task) in tree {
        let Some(id) = user_of(restore.model, vpid.cast_unsigned()) else { continue };
        let door = restore.made.door(id)?;
        let door =
            door.ok_or_else(|| Error::new(format!("the user namespace {id} was not made again")).pid(*vpid))?;
        if is_there(task.pid, Kind::User, &door)? {
            continue;
        }
        numbers.extend(
            conduit.send(&mut task.injection, &[door.as_fd()])?.first().map(|number| (*vpid, *number)),
        );
    }
    Ok(numbers)
}

fn one(
    restore: &Restore<'_>,
    vpid: i32,
    (host, injection): (i32, &mut Injection),
    conduit: &Conduit,
    kinds: &[Kind],
) -> Result<()> {
    let Some(ids) = restore.model.ids.get(&vpid.cast_unsigned()) else { return Ok(()) };
    let mut doors = Vec::new();
    for &kind in kinds {
        if let Some(id) = differs(restore.model, ids, kind) {
            let door = restore.made.door(id)?;
            let door = door.ok_or_else(|| {
                Error::new(format!("the {} namespace {id} was not made again", kind.title()))
            })?;
            if !is_there(host, kind, &door)? {
                doors.push((kind, door));
            }
        }
    }
    if doors.is_empty() {
        return Ok(());
    }
    let fds: Vec<_> = doors.iter().map(|(_, door)| door.as_fd()).collect();
    let numbers = conduit.send(injection, &fds)?;
    let mut batch = Batch::new();
    for ((kind, _), number) in doors.iter().zip(numbers) {
        batch.about(format!("cannot put the process into its {} namespace", kind.title()));
        batch.call(libc::SYS_setns, &[number.into(), kind.flag().bits().into()]);
        batch.call(libc::SYS_close, &[number.into()]);
    }
    injection.run(&batch).map(drop)
}
