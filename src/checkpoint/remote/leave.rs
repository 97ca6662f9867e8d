//! The last step of a restore: the window is unmapped and the thread stands in its own program.
//!
//! Nothing of the window can make that munmap(2) return, so one `syscall` instruction of the restored program's own
//! memory makes it: the thread is put there, and is stopped at the entry and at the return. A 32-bit program has
//! `int $0x80` for that, which takes addresses of 32 bits from 64-bit code, too.

use std::time::Instant;

use super::injection::Injection;
use super::memory;
use super::thread::Thread;
use super::wait::Stop;
use crate::checkpoint::arch::{Regs, SYSCALL, SYSCALL_32};
use crate::checkpoint::error::{Error, Result};

/// munmap(2) of 32-bit programs.
const MUNMAP_32: u64 = 91;

/// What a restored thread starts with.
#[derive(Debug, Clone, Copy)]
pub struct Final {
    /// General registers, as an image keeps them.
    pub regs: Regs,
    /// Blocked signals.
    pub sigmask: u64,
    /// Unmaps the window: to be asked of the last thread of its process, when the others have left.
    pub unmap_window: bool,
}

impl Injection {
    /// Leaves a restored thread stopped at the start of its own program. To be detached when all are ready.
    pub fn leave(self, last: &Final) -> Result<Thread> {
        let thread = self.thread.clone();
        if last.unmap_window && self.window != 0 {
            self.unmap_window(last.regs.is_compat())?;
        }
        let mut regs = last.regs;
        // It is no system call that we return from.
        regs.outside_calls();
        thread.set_sigmask(last.sigmask)?;
        thread.set_regs(&regs)?;
        Ok(thread)
    }

    fn unmap_window(&self, compat: bool) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        let what = "cannot unmap the restore's window";
        let mut regs = self.template;
        regs.set_ip(self.instruction(if compat { SYSCALL_32 } else { SYSCALL })?);
        if compat {
            regs.make_call_32(MUNMAP_32, [self.window, Self::FOOTPRINT, 0, 0]);
        } else {
            regs.make_call(libc::SYS_munmap, [self.window, Self::FOOTPRINT, 0, 0, 0, 0]);
        }
        self.thread.set_sigmask(u64::MAX)?;
        self.thread.set_regs(&regs)?;
        for _entry_and_return in 0..2 {
            self.thread.to_syscall()?;
            loop {
                match self.thread.wait_stop(deadline)? {
                    Stop::Syscall => break,
                    Stop::Exited(status) => {
                        return Err(Error::new(format!("{what}: the task died ({status:#x})")));
                    }
                    Stop::Signal(signal) => {
                        return Err(Error::new(format!("{what}: signal {signal} came between")));
                    }
                    _ => self.thread.to_syscall()?,
                }
            }
        }
        match self.thread.regs()?.answer() {
            0 => Ok(()),
            errno => Err(Error::new(what).call(
                format!("munmap({:#x}, {})", self.window, Self::FOOTPRINT),
                nix::errno::Errno::from_raw(i32::try_from(-errno).unwrap_or(0)),
            )),
        }
    }

    /// An instruction that makes a system call, of the restored program: in its vdso, else in any code that it has.
    fn instruction(&self, wanted: [u8; 2]) -> Result<u64> {
        let tid = self.thread.tid();
        let window = self.window..self.window + Self::FOOTPRINT;
        let search = |(start, end): (u64, u64)| {
            let mut at = start;
            while at < end && !window.contains(&start) {
                let len = (end - at).min(1 << 20);
                let mut bytes = vec![0u8; usize::try_from(len).unwrap_or(0)];
                self.memory.read(at, &mut bytes).ok()?;
                if let Some(found) = bytes.windows(wanted.len()).position(|pair| pair == wanted) {
                    return Some(at + found as u64);
                }
                at += len;
            }
            None
        };
        if let Some(found) = memory::vdso_of_maps(tid)?.and_then(search) {
            return Ok(found);
        }
        memory::executable(tid)?
            .into_iter()
            .find_map(search)
            .ok_or_else(|| Error::new("the restored task has no code with a system call in it, and no vdso"))
    }
}
