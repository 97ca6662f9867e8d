//! Threads of a process in which another one already runs batches: they use its memory.
//!
//! ```text
//!   scratch of the first   │ its own            │ lent │         mapped once, unmapped once
//!                                                  ▲
//!   threads, one after the other ──────────────────┘              each in the same slot of the vdso
//! ```
//!
//! A thread thus runs on for its batch only, and not to map and unmap scratch of its own. What is lent belongs to the
//! thread that has it: if the driver dies, that one unmaps it, and the first only its own part. Between two threads it is
//! nobody's: a driver that is killed just then leaves so much memory behind.

use super::injection::Injection;
use super::memory::Facts;
use super::thread::Thread;
use super::vdso::{self, Room, Slot};
use crate::checkpoint::error::Result;

/// What is lent; a batch that needs more gets scratch of its own.
const LOAN: u64 = 16 << 10;

/// Part of the scratch of one thread's injection, for other threads of its process.
#[derive(Debug)]
pub struct Beside<'a> {
    first: &'a mut Injection,
    room: Room,
    /// Where the last thread's stub was.
    slot: Option<Slot>,
}

impl Injection {
    /// Lends part of the scratch. This injection runs nothing until it has it back.
    pub fn lend(&mut self) -> Result<Beside<'_>> {
        self.grow(self.scratch_len.max(2 * LOAN))?;
        let room = vdso::room(self.thread.tid(), &self.memory)?;
        self.scratch_len -= LOAN;
        let lent = Beside { first: self, room, slot: None };
        lent.first.park()?;
        Ok(lent)
    }
}

impl Beside<'_> {
    /// Gets another stopped thread of the process ready for batches, as [`Injection::start`] does. It has to be finished
    /// before the next one is started.
    pub fn start(&mut self, thread: &Thread, facts: &Facts, processor: i32) -> Result<Injection> {
        let first = &self.first;
        let known = self.slot.take();
        let slot = |ip: u64| match known {
            Some(slot) => Ok(slot),
            None => vdso::free_slot(&self.room, thread.tid(), &first.memory, ip),
        };
        let mut injection = Injection::enter_slot(thread, facts, processor, &first.memory, slot)?;
        (injection.scratch, injection.scratch_len) = (first.scratch + first.scratch_len, LOAN);
        if let Some(home) = &mut injection.home {
            home.lent = true;
            self.slot = Some(Slot { at: home.slot, before: home.before.clone() });
        }
        Ok(injection)
    }
}

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        self.first.scratch_len += LOAN;
        // One that cannot be told is dead.
        let _ = self.first.park();
    }
}
