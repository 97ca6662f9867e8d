//! Who is told about I/O on an open file: F_SETOWN, F_SETSIG, O_ASYNC.
//!
//! O_ASYNC is set by a task that has the file: what a signal says in `si_fd` is the number under which it was set. That
//! number itself can't be read; the lowest of the first process that has the file is taken for it.

use std::collections::BTreeMap;

use crate::checkpoint::context::NewTask;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::external;
use crate::checkpoint::files::opener::{Files, Owned};
use crate::checkpoint::remote::Batch;
use crate::checkpoint::{Error, Result};
use crate::sys::fcntl::{self, Owner};

impl Files<'_> {
    /// Sets the owners of all files, once every process and group exists. `pids` are the processes by their number
    /// inside, with their pids on this host.
    pub fn set_owners(&self, pids: &BTreeMap<i32, i32>) -> Result<()> {
        for owned in &self.owners {
            self.set_one(owned, pids).map_err(|e| match owned.fown.pid {
                0 => e,
                pid => e.pid(pid.cast_signed()),
            })?;
        }
        Ok(())
    }

    fn set_one(&self, owned: &Owned, pids: &BTreeMap<i32, i32>) -> Result<()> {
        let file = self.vma_file(owned.id)?;
        let what = "cannot set the owner of an open file";
        let fown = &owned.fown;
        if fown.pid != 0 {
            let inside = fown.pid.cast_signed();
            let pid = *pids
                .get(&inside)
                .ok_or_else(|| Error::new("the owner of an open file is not among the processes"))?;
            let owner = Owner { kind: fown.pid_type.cast_signed(), pid };
            let owners = &self.restore.owners;
            fcntl::set_owner_as(file, owner, [owners.user(fown.uid)?, owners.user(fown.euid)?])
                .during(what, || format!("fcntl(_, F_SETOWN_EX, {{{}, {pid}}})", owner.kind))?;
        }
        if fown.signum != 0 {
            fcntl::set_signal(file, fown.signum.cast_signed())
                .during(what, || format!("fcntl(_, F_SETSIG, {})", fown.signum))?;
        }
        if owned.r#async && !self.asyncs.contains(&owned.id) {
            // On its way through a socket: no task has it.
            let file = file.try_clone_to_owned().during(what, || "fcntl(_, F_DUPFD_CLOEXEC)".into())?;
            external::set_flags(&file, self.flags(owned.id)? | libc::O_ASYNC.cast_unsigned())?;
        }
        Ok(())
    }

    fn flags(&self, id: u32) -> Result<u32> {
        nix::fcntl::fcntl(self.vma_file(id)?, nix::fcntl::FcntlArg::F_GETFL)
            .during("cannot read the flags of an open file", || "fcntl(_, F_GETFL)".into())
            .map(i32::cast_unsigned)
    }

    /// Lets a task ask for signals on those of its files that no task before it had.
    pub(super) fn set_async(&mut self, task: &mut NewTask) -> Result<()> {
        let mut batch = Batch::new();
        batch.about("cannot ask for signals on an open file");
        let ids: Vec<u32> = self.owners.iter().filter(|o| o.r#async).map(|o| o.id).collect();
        for id in ids.into_iter().filter(|id| !self.asyncs.contains(id)).collect::<Vec<_>>() {
            let number = self.table(task.vpid).iter().filter(|e| e.id == id).map(|e| e.fd).min();
            if let Some(fd) = number {
                let flags = self.flags(id)? | libc::O_ASYNC.cast_unsigned();
                batch.call(libc::SYS_fcntl, &[fd.into(), libc::F_SETFL.into(), flags.into()]);
                self.asyncs.insert(id);
            }
        }
        if !batch.is_empty() {
            task.injection.run(&batch)?;
        }
        Ok(())
    }
}
