//! System V IPC and POSIX message queues.
//!
//! ```text
//!   enter the IPC namespace ──▶ limits, then segments, queues, sets by index         ipcns-{var,shm,msg,sem}-N.img
//!                               pages of segments, as files                          pagemap-shmem-ID.img
//!                               POSIX queues, through a mount of our own             extension `mqueue`
//! ```
//!
//! Objects come back under their ids: the kernel takes the next id from `*_next_id`. What only a process of the
//! container could do again (operations to undo at its exit, a wish to be notified) cannot be seen from outside, or
//! not made: such processes are refused.

mod mq;
mod msg;
mod sem;
mod shm;
mod var;

pub use shm::finish;

use crate::checkpoint::context::{Dump, Restore, Source};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::IpcDescEntry;
use crate::checkpoint::model::IpcNamespace;
use crate::checkpoint::namespaces::enter::within;
use crate::checkpoint::namespaces::kind::Kind;
use crate::sys::sysv::Perm;

/// What of the namespace cannot be saved, looked at while the container runs.
pub fn check(source: &Source, pids: &[i32]) -> Vec<Error> {
    match Kind::Ipc.owned(source.init, &source.spec) {
        Ok(true) => {
            let mut found = sem::check(source.init, pids);
            found.extend(within(source.init, &[Kind::Ipc], mq::check).err());
            found
        }
        Ok(false) => shm::check_joined(pids),
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
    if let Some(e) = sem::check(init, &pids).into_iter().next() {
        return Err(e);
    }
    let (namespace, segments, queues) = within(init, &[Kind::Ipc], || {
        let (shm, files) = shm::dump()?;
        let (var, sem, msg) = (Some(var::dump()?), sem::dump()?, msg::dump()?);
        Ok((IpcNamespace { var, shm, sem, msg }, files, mq::dump()?))
    })?;
    if !queues.is_empty() {
        dump.model.set_extension(mq::EXTENSION, &queues)?;
    }
    shm::write(dump, segments)?;
    dump.model.ipcns.insert(Kind::Ipc.id(true), namespace);
    Ok(())
}

/// Makes everything again in the new namespace.
pub fn restore(restore: &Restore<'_>) -> Result<()> {
    let (init, spec) = (restore.target.init, &restore.target.spec);
    let Some(namespace) = restore.model.ipcns.values().next() else { return Ok(()) };
    let queues = mq::read(restore.model)?;
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
    let segments = within(init, &[Kind::Ipc], || {
        if let Some(entry) = &namespace.var {
            var::restore(entry, spec)?;
        }
        sem::restore(&namespace.sem)?;
        msg::restore(&namespace.msg)?;
        mq::restore(&queues)?;
        shm::restore(&namespace.shm)
    })?;
    shm::fill(restore, segments)
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

/// Makes one object under its old id, by a creator with its old ids.
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
    let id = crate::sys::sysv::created_by(perm.cuid, perm.cgid, || call(&perm))
        .during(&what, || format!("{kind}get({:#x}, ...)", desc.key))?;
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
