//! The tasks go where they were.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use super::{differs, user_of};
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::namespaces::Kind;
use crate::checkpoint::remote::{Batch, Conduit};

/// In this order: what comes first needs capabilities that what comes last may take away.
const ORDER: [Kind; 6] = [Kind::Net, Kind::Ipc, Kind::Uts, Kind::Cgroup, Kind::Time, Kind::Mnt];

/// Every task that was not in the namespaces of init leaves them.
pub fn enter(restore: &Restore<'_>, tree: &mut BTreeMap<i32, NewTask>, conduit: &Conduit) -> Result<()> {
    for (vpid, task) in tree {
        one(restore, task, conduit).map_err(|e| e.pid(*vpid))?;
    }
    Ok(())
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
        numbers.extend(
            conduit.send(&mut task.injection, &[door.as_fd()])?.first().map(|number| (*vpid, *number)),
        );
    }
    Ok(numbers)
}

fn one(restore: &Restore<'_>, task: &mut NewTask, conduit: &Conduit) -> Result<()> {
    let Some(ids) = restore.model.ids.get(&task.vpid.cast_unsigned()) else { return Ok(()) };
    let mut doors = Vec::new();
    for kind in ORDER {
        if let Some(id) = differs(restore.model, ids, kind) {
            let door = restore.made.door(id)?;
            doors.push((
                kind,
                door.ok_or_else(|| {
                    Error::new(format!("the {} namespace {id} was not made again", kind.title()))
                })?,
            ));
        }
    }
    if doors.is_empty() {
        return Ok(());
    }
    let fds: Vec<_> = doors.iter().map(|(_, door)| door.as_fd()).collect();
    let numbers = conduit.send(&mut task.injection, &fds)?;
    let mut batch = Batch::new();
    for ((kind, _), number) in doors.iter().zip(numbers) {
        batch.about(format!("cannot put the process into its {} namespace", kind.title()));
        batch.call(libc::SYS_setns, &[number.into(), kind.flag().bits().into()]);
        batch.call(libc::SYS_close, &[number.into()]);
    }
    task.injection.run(&batch).map(drop)
}
