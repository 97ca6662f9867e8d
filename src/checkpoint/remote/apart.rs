//! A stub in a page of its own: of a process that runs on the memory of another one, in which batches run, too.
//!
//! ```text
//!   vdso      │ slot of the owner │ slot │      for whoever starts or ends, and threads, by turns
//!                                    │ ▲
//!                     page, mapped by the tenant itself      any number of them
//! ```
//!
//! The vdso has room for a few slots only. Where the driver dies the thread heals out of its page, as it would out of the
//! vdso, and leaves the page behind.

use super::batch::Batch;
use super::injection::{CODE, Injection};
use super::vdso::{self, Slot};
use crate::checkpoint::arch::stub;
use crate::checkpoint::error::{Error, Result};

impl Injection {
    /// Moves the stub of a live task out of the vdso.
    pub fn move_out(&mut self) -> Result<()> {
        let compat = self.home.as_ref().is_some_and(|home| home.regs.is_compat());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if compat { libc::MAP_32BIT } else { 0 };
        let prot = libc::PROT_READ | libc::PROT_EXEC;
        let map = [0.into(), CODE.into(), prot.into(), flags.into(), (-1).into(), 0.into()];
        let page = self.syscall(libc::SYS_mmap, &map)?.cast_unsigned();
        let moved = self.apart_from_neighbours(page).and_then(|()| self.move_to(page).map(drop));
        if let (Err(_), Some(home)) = (&moved, &mut self.home) {
            // It is unmapped with the scratch, whatever else fails.
            home.page = Some(page);
        }
        moved
    }

    /// A mapping of the program's with the same rights would be one with it.
    fn apart_from_neighbours(&mut self, page: u64) -> Result<()> {
        let mut batch = Batch::new();
        batch.about("cannot keep the page for system calls apart");
        for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
            batch.call(libc::SYS_madvise, &[page.into(), CODE.into(), advice.into()]);
        }
        self.run(&batch).map(drop)
    }

    /// Leaves the slot for the page, and gives the slot back.
    fn move_to(&mut self, page: u64) -> Result<()> {
        let home = self.home.as_mut().ok_or_else(|| Error::new("the task is no live one"))?;
        let slot = stub::slot(self.thread.tid(), home.mask, &home.regs.for_stub());
        self.memory.force(page, &slot)?;
        (self.code, home.page) = (page, Some(page));
        let (at, before) = (home.slot, std::mem::take(&mut home.before));
        self.park()?;
        self.memory.force(at, &before)
    }

    /// Moves the stub back into the vdso, and unmaps its page.
    pub(super) fn move_in(&mut self) -> Result<()> {
        let tid = self.thread.tid();
        let Some(home) = self.home.as_mut() else { return Ok(()) };
        let Some(page) = home.page else { return Ok(()) };
        if self.code == page {
            let room = vdso::room(tid, &self.memory)?;
            let Slot { at, before } = vdso::free_slot(&room, tid, &self.memory, page)?;
            self.memory.force(at, &stub::slot(tid, home.mask, &home.regs.for_stub()))?;
            (self.code, home.slot, home.before) = (at, at, before);
            self.park()?;
        }
        self.syscall(libc::SYS_munmap, &[page.into(), CODE.into()])?;
        if let Some(home) = &mut self.home {
            home.page = None;
        }
        Ok(())
    }
}
