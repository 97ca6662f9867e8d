//! Who is told about I/O on an open file: F_SETOWN, F_SETSIG, O_ASYNC.

use std::collections::BTreeMap;

use nix::fcntl::OFlag;

use crate::checkpoint::error::Context;
use crate::checkpoint::files::external;
use crate::checkpoint::files::opener::{Files, Owned};
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
            fcntl::set_owner_as(file, owner, [fown.uid, fown.euid])
                .during(what, || format!("fcntl(_, F_SETOWN_EX, {{{}, {pid}}})", owner.kind))?;
        }
        if fown.signum != 0 {
            fcntl::set_signal(file, fown.signum.cast_signed())
                .during(what, || format!("fcntl(_, F_SETSIG, {})", fown.signum))?;
        }
        if owned.r#async {
            let flags = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GETFL)
                .during(what, || "fcntl(_, F_GETFL)".into())?;
            let file = file.try_clone_to_owned().during(what, || "fcntl(_, F_DUPFD_CLOEXEC)".into())?;
            external::set_flags(&file, (flags | OFlag::O_ASYNC.bits()).cast_unsigned())?;
        }
        Ok(())
    }
}
