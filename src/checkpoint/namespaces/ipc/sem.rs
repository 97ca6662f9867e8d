//! Semaphore sets.

use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::IpcSemEntry;
use crate::sys::sysv;

fn stat() -> String {
    "semctl(_, 0, SEM_STAT)".into()
}

pub(super) fn dump() -> Result<Vec<(IpcSemEntry, Vec<u16>)>> {
    let sets = sysv::sets().during("cannot list the semaphore sets", stat)?;
    let one = |set: &sysv::Set| {
        let values = sysv::values(set.id, set.count)
            .during("cannot read the semaphores", || format!("semctl({}, 0, GETALL)", set.id))?;
        Ok((IpcSemEntry { desc: super::describe(set.id, &set.perm), nsems: set.count }, values))
    };
    sets.iter().map(one).collect()
}

pub(super) fn restore(sets: &[(IpcSemEntry, Vec<u16>)]) -> Result<()> {
    for (set, values) in sets {
        let id = super::make(&set.desc, "sem", |perm| {
            sysv::created_by(perm.cuid, perm.cgid, || sysv::make_set(perm, set.nsems))
        })?;
        let what = "cannot set the semaphores";
        sysv::set_values(id, values).during(what, || format!("semctl({id}, 0, SETALL)"))?;
        // Programs take a set without a time of use for one that nobody has initialized yet.
        if let Some(first) = values.first() {
            sysv::touch_set(id, *first).during(what, || format!("semop({id}, _, 2)"))?;
        }
        sysv::own_set(id, &super::perm(&set.desc)).during(what, || format!("semctl({id}, 0, IPC_SET)"))?;
    }
    Ok(())
}
