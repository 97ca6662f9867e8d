//! Semaphore sets.

use nix::sched::{CloneFlags, unshare};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::IpcSemEntry;
use crate::checkpoint::namespaces::enter::{Doors, through};
use crate::checkpoint::namespaces::vpid;
use crate::sys::kcmp::{What, kcmp};
use crate::sys::sysv;

/// Processes with operations to undo at their exit: nobody can see which. Every process that has made a thread has a
/// list of them, empty or not, so only those without threads can be told.
pub(super) fn check(init: i32, doors: Doors, pids: &[i32]) -> Vec<Error> {
    let lists = through(doors, || {
        if sysv::sets().during("cannot list the semaphore sets", stat)?.is_empty() {
            return Ok(Vec::new());
        }
        // From here on this thread has no list. The kernel says that the lists of two are equal when both have none.
        unshare(CloneFlags::CLONE_SYSVSEM)
            .during("cannot compare processes", || "unshare(CLONE_SYSVSEM)".into())?;
        let me = nix::unistd::gettid().as_raw();
        let has_list = |pid: &i32| kcmp(me, *pid, What::SysvSem).is_ok_and(|order| order.is_ne());
        Ok(pids.iter().copied().filter(has_list).collect())
    });
    let lists = match lists {
        Ok(lists) => lists,
        Err(e) => return vec![e],
    };
    let alone =
        |pid: &i32| std::fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|tasks| tasks.count() == 1);
    let refusal = |pid: i32| {
        Error::new("the process has semaphore operations to be undone at its exit, which cannot be saved")
            .pid(vpid(init, pid))
            .remedy("let the program do without SEM_UNDO")
    };
    lists.into_iter().filter(alone).map(refusal).collect()
}

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
        let id = super::make(&set.desc, "sem", |perm| sysv::make_set(perm, set.nsems))?;
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
