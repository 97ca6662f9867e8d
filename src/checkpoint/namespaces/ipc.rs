//! System V IPC and POSIX message queues.
//!
//! ```text
//!   enter the IPC namespace ──▶ limits, then segments, queues, sets by index         ipcns-{var,shm,msg,sem}-N.img
//!                               pages of segments, as files                          pagemap-shmem-ID.img
//!                               POSIX queues, through a mount of our own             extension `mqueue`, `mqueue-N`
//! ```
//!
//! Objects come back under their ids: the kernel takes the next id from `*_next_id`. What a process has to undo at its exit
//! it is asked for itself (`undo`); its wish to be notified could not be made again, and is refused.

mod mq;
mod msg;
mod sem;
mod shm;
mod undo;
mod var;

pub use shm::finish;
pub use undo::restore as restore_undo;

use std::os::fd::OwnedFd;

use crate::checkpoint::context::{Dump, Restore, Source};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::IpcDescEntry;
use crate::checkpoint::model::IpcNamespace;
use crate::checkpoint::namespaces::enter::{Doors, doors, through, within};
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::uts;
use crate::sys::sysv::Perm;

/// What of the namespace cannot be saved, looked at while the container runs.
pub fn check(source: &Source, pids: &[i32]) -> Vec<Error> {
    match Kind::Ipc.owned(source.init, &source.spec) {
        Ok(true) => within(source.init, &[Kind::Ipc], mq::check).err().into_iter().collect(),
        Ok(false) => shm::check_joined(source.init, pids),
        Err(e) => vec![e],
    }
}

/// Saves everything in the namespace, if it is the container's own.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let (init, spec) = (dump.source.init, &dump.source.spec);
    if !Kind::Ipc.owned(init, spec)? {
        return Ok(());
    }
    let pids: Vec<i32> = dump.tasks.iter().filter(|t| !t.zombie).map(|t| t.pid).collect();
    let pids = inhabitants(init, &pids);
    // One thread for both kinds is quicker than two.
    let mut ways = doors(init, &[Kind::Ipc])?;
    if Kind::Uts.owned(init, spec)? {
        ways.extend(doors(init, &[Kind::Uts])?);
    }
    save(dump, Kind::Ipc.id(true), ways, &pids)
}

/// Of these processes, those in the namespace of init.
fn inhabitants(init: i32, pids: &[i32]) -> Vec<i32> {
    let of = |pid: i32| Kind::Ipc.of(&pid.to_string()).ok().flatten();
    let inits = of(init);
    pids.iter().copied().filter(|pid| of(*pid) == inits).collect()
}

/// What of a namespace that the container has made cannot be saved.
pub fn check_inside(door: &OwnedFd) -> Result<()> {
    through(enter_by(door)?, mq::check)
}

fn enter_by(door: &OwnedFd) -> Result<Doors> {
    let door = door.try_clone().during("cannot hold a namespace", || "fcntl(_, F_DUPFD_CLOEXEC)".into())?;
    Ok(vec![(door, Kind::Ipc)])
}

/// Saves everything in a namespace; `pids` are in it. A second door may be that of the names of host and domain.
pub fn save(dump: &mut Dump<'_>, id: u32, doors: Doors, pids: &[i32]) -> Result<()> {
    let Some((door, _)) = doors.first() else { return Ok(()) };
    let again = enter_by(door)?;
    let with_names = doors.iter().any(|(_, kind)| *kind == Kind::Uts);
    let (namespace, segments, (queues, mount), names) = through(doors, || {
        let names = with_names.then(uts::read).transpose()?;
        let (shm, files) = shm::dump()?;
        let (var, sem, msg) = (Some(var::dump()?), sem::dump()?, msg::dump()?);
        Ok((IpcNamespace { var, shm, sem, msg }, files, mq::dump()?, names))
    })?;
    dump.model.utsns.extend(names.map(|names| (Kind::Uts.id(true), names)));
    dump.to_close.push(mount);
    if !queues.is_empty() {
        dump.model.set_extension(&mq::extension(id), &queues)?;
    }
    shm::write(dump, id, segments)?;
    undo::dump(dump, &namespace.sem, again, pids)?;
    dump.model.ipcns.insert(id, namespace);
    Ok(())
}

/// Makes everything again in the new namespace.
pub fn restore(restore: &Restore<'_>) -> Result<()> {
    let (init, spec) = (restore.target.init, &restore.target.spec);
    let id = Kind::Ipc.inits(restore.model);
    let Some(namespace) = restore.model.ipcns.get(&id) else { return Ok(()) };
    let queues = mq::read(restore.model, id, &restore.owners)?;
    if !Kind::Ipc.owned(init, spec)? {
        let system_v = namespace.shm.is_empty() && namespace.sem.is_empty() && namespace.msg.is_empty();
        let empty = system_v && queues.is_empty();
        return match empty {
            true => Ok(()),
            false => Err(Error::new(
                "config.json gives the container no IPC namespace of its own, which the \
                                     checkpoint has, with objects in it",
            )),
        };
    }
    put_back(restore, id, doors(init, &[Kind::Ipc])?)
}

/// Makes everything again in one namespace.
pub fn put_back(restore: &Restore<'_>, id: u32, doors: Doors) -> Result<()> {
    let Some(namespace) = restore.model.ipcns.get(&id) else { return Ok(()) };
    let (queues, spec) = (mq::read(restore.model, id, &restore.owners)?, &restore.target.spec);
    let segments = through(doors, || {
        if let Some(entry) = &namespace.var {
            var::restore(entry, spec)?;
        }
        sem::restore(&namespace.sem)?;
        msg::restore(&namespace.msg)?;
        mq::restore(&queues)?;
        shm::restore(&namespace.shm)
    })?;
    shm::fill(restore, id, segments)
}

fn describe(id: i32, perm: &Perm) -> IpcDescEntry {
    IpcDescEntry {
        key: perm.key,
        uid: perm.uid,
        gid: perm.gid,
        cuid: perm.cuid,
        cgid: perm.cgid,
        mode: perm.mode,
        id: id.cast_unsigned(),
    }
}

fn perm(desc: &IpcDescEntry) -> Perm {
    Perm { key: desc.key, uid: desc.uid, gid: desc.gid, cuid: desc.cuid, cgid: desc.cgid, mode: desc.mode }
}

/// Makes one object under its old id; `call` does so as a creator with its old ids.
fn make(
    desc: &IpcDescEntry,
    kind: &str,
    call: impl FnOnce(&Perm) -> Result<i32, nix::errno::Errno>,
) -> Result<i32> {
    let title = match kind {
        "shm" => "shared memory segment",
        "sem" => "semaphore set",
        _ => "message queue",
    };
    let what = format!("cannot make the {title} {}", desc.id);
    let next = format!("/proc/sys/kernel/{kind}_next_id");
    std::fs::write(&next, desc.id.to_string()).during(&what, || format!("write({next:?}, {})", desc.id))?;
    let perm = perm(desc);
    let id = call(&perm).during(&what, || format!("{kind}get({:#x}, ...)", desc.key))?;
    match id.cast_unsigned() == desc.id {
        true => Ok(id),
        false => Err(Error::new(format!("{what}: the kernel made it as {id}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::{IpcMsg, IpcMsgEntry, IpcSemEntry};
    use crate::sys::testing::in_child;

    #[test]
    fn sets_and_queues_come_back_under_their_ids() {
        let desc = |id, key| IpcDescEntry { key, uid: 1, gid: 2, cuid: 3, cgid: 4, mode: 0o600, id };
        let sets = vec![
            (IpcSemEntry { desc: desc(0x8001, 77), nsems: 3 }, vec![0, 5, 9]),
            (IpcSemEntry { desc: desc(3, 0), nsems: 1 }, vec![1]),
        ];
        let message = |text: &[u8]| (IpcMsg { mtype: 4, msize: text.len() as u32 }, text.to_vec());
        let messages = vec![message(b"one"), message(b""), message(&[7; 4000])];
        let queues = vec![(IpcMsgEntry { desc: desc(0x1_8000, 78), qbytes: 5000, qnum: 3 }, messages)];
        in_child(libc::CLONE_NEWIPC, || {
            sem::restore(&sets).unwrap();
            msg::restore(&queues).unwrap();
            let mut found = sem::dump().unwrap();
            found.sort_by_key(|(set, _)| set.desc.key != 77);
            assert_eq!(found, sets);
            assert_eq!(msg::dump().unwrap(), queues);
            let again = sem::restore(&sets).unwrap_err().to_string();
            assert!(again.contains("semaphore set 32769"), "{again}");
        });
    }
}
