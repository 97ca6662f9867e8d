//! Beginning and ending an injection in a live task, in an order that lets the task heal at any moment.
//!
//! ```text
//!   write slot (code, record) → SETREGS rip = boot → SETSIGMASK all but X → CONT … scratch is mapped
//!        … batches …
//!   unmap scratch → SETSIGMASK old → SETREGS raw → slot as it was
//! ```
//!
//! If the driver dies before SETREGS, nothing has happened; after it, the thread runs through the stub into `heal`.
//! While the mask and the registers are put back, `rip` stands at the start of `heal`, which does the same.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::injection::{Home, Injection};
use super::memory::{Facts, Memory, process_of};
use super::thread::Thread;
use super::vdso::{self, Slot};
use super::wait::Stop;
use super::{pin, ptrace, rseq, signals};
use crate::checkpoint::arch::Regs;
use crate::checkpoint::arch::stub::{self, Frame, Place};
use crate::checkpoint::error::{Error, Result};

/// How long a batch may take before it is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// First scratch of a live task.
const FIRST_SCRATCH: u64 = 64 << 10;

impl Injection {
    /// Gets a stopped live thread ready for batches.
    ///
    /// If the driver dies from here on, the thread finishes the system call it is in, and goes on with its
    /// program: the stub heals it. Its general registers and signal mask are the stub's until
    /// [`Self::finish`]: read them before, or with [`Self::image_regs`] and [`Self::sigmask`].
    pub fn start(thread: &Thread) -> Result<Self> {
        let tid = thread.tid();
        Self::start_known(thread, &Facts::read(tid)?, pin::last_processor(tid))
    }

    /// The same, of a thread about which the caller knows that much: its status, and where it ran last.
    pub fn start_known(thread: &Thread, facts: &Facts, processor: i32) -> Result<Self> {
        let tid = thread.tid();
        let memory = Rc::new(Memory::new(tid));
        let room = vdso::room(tid, &memory)?;
        let slot = |ip: u64| vdso::free_slot(&room, tid, &memory, ip);
        let mut injection = Self::enter_slot(thread, facts, processor, &memory, slot)?;
        let _beside = pin::beside(injection.processor);
        injection.grow(FIRST_SCRATCH)?;
        Ok(injection)
    }

    /// Writes a slot for the thread, whose scratch is yet to come.
    pub(super) fn enter_slot(
        thread: &Thread,
        facts: &Facts,
        processor: i32,
        memory: &Rc<Memory>,
        slot: impl FnOnce(u64) -> Result<Slot>,
    ) -> Result<Self> {
        let raw = thread.regs()?;
        if !raw.is_native() && !raw.is_compat() {
            return Err(Error::new("the task runs in a code segment of its own making"));
        }
        let mask = thread.sigmask()?;
        let stopped = status_is_stopped(thread);
        let blocked = facts.blocked | mask;
        let signal = signals::harmless(blocked, facts.caught, facts.ignored, facts.pending, stopped)
            .ok_or_else(|| Error::new("the thread leaves no signal free that could stop it after a batch"))?;
        let mut home_regs = raw;
        if let Some(abort) = section_abort(thread, memory, raw.ip())? {
            home_regs.set_ip(abort);
        }
        let Slot { at: slot, before } = slot(raw.ip())?;
        memory.force(slot, &stub::slot(thread.tid(), mask, &home_regs.for_stub()))?;

        let dispatch = thread.dispatch()?;
        if dispatch.is_some() {
            thread.set_dispatch(None)?;
        }
        let home =
            Home { slot, before, regs: home_regs, mask, dispatch, stopped: false, lent: false, page: None };
        Ok(Self {
            thread: thread.clone(),
            memory: Rc::clone(memory),
            code: slot,
            scratch: 0,
            scratch_len: 0,
            ids: facts.ids,
            signal,
            template: raw.native(),
            home: Some(home),
            window: 0,
            queued: Rc::new(Cell::new(0)),
            births: Vec::new(),
            patience: PATIENCE,
            processor,
        })
    }

    /// Ends the injection: the thread has its registers, mask and memory again, and is still stopped.
    pub fn finish(mut self) -> Result<()> {
        self.heal()
    }

    /// As [`Self::finish`]; does nothing when it was done.
    pub(super) fn heal(&mut self) -> Result<()> {
        let moved = if self.thread.is_gone() { Ok(()) } else { self.move_in() };
        moved.and(self.heal_in_place())
    }

    fn heal_in_place(&mut self) -> Result<()> {
        let Some(home) = self.home.take() else { return Ok(()) };
        if self.thread.is_gone() {
            return Ok(());
        }
        let unmapped = if home.lent { Ok(()) } else { self.unmap_scratch() };
        if self.thread.is_gone() {
            return unmapped;
        }
        if home.stopped {
            self.stop_process()?;
        }
        if home.dispatch.is_some() {
            self.thread.set_dispatch(home.dispatch)?;
        }
        self.thread.set_sigmask(home.mask)?;
        self.thread.set_regs(&home.regs)?;
        // Empty where it has left its slot, and could not come back.
        self.memory.force(home.slot, &home.before)?;
        unmapped
    }

    /// Registers of the thread's own program, as an image keeps them.
    pub fn image_regs(&self) -> Option<Regs> {
        self.home.as_ref().map(|home| home.regs.for_image())
    }

    /// Signal mask of the thread's own program.
    pub fn sigmask(&self) -> Option<u64> {
        self.home.as_ref().map(|home| home.mask)
    }

    /// A stop signal that came during the injection is sent again.
    fn stop_process(&self) -> Result<()> {
        let pid = process_of(self.thread.tid())?;
        // SAFETY: kill takes numbers only.
        nix::errno::Errno::result(unsafe { libc::kill(pid, libc::SIGSTOP) }).map(drop).map_err(|errno| {
            Error::new("cannot stop the process again").call(format!("kill({pid}, SIGSTOP)"), errno)
        })
    }
}

impl Thread {
    /// Registers as an image keeps them: an interrupted system call is made again or sees EINTR, an interrupted
    /// restartable sequence starts again. Not for a thread with an injection: ask that.
    pub fn image_regs(&self) -> Result<Regs> {
        let mut raw = self.regs()?;
        if let Some(abort) = section_abort(self, &Memory::new(self.tid()), raw.ip())? {
            raw.set_ip(abort);
        }
        Ok(raw.for_image())
    }
}

/// True while the process is stopped by job control.
fn status_is_stopped(thread: &Thread) -> bool {
    // PTRACE_GETSIGINFO has no siginfo to give in a group stop only.
    ptrace::siginfo(thread.tid()).is_err()
}

/// Where the restartable sequence that `rip` is in goes when it is interrupted.
fn section_abort(thread: &Thread, memory: &Memory, rip: u64) -> Result<Option<u64>> {
    let Some(rseq) = thread.rseq()? else { return Ok(None) };
    let section = match memory.word(rseq.addr + 8) {
        Ok(section) if section != 0 => section,
        _ => return Ok(None),
    };
    let mut descriptor = [0u8; 32];
    // A stale pointer to memory that is gone is legal as long as no sequence is entered.
    match memory.read(section, &mut descriptor) {
        Ok(()) => Ok(rseq::abort_ip(&descriptor, rip)),
        Err(_) => Ok(None),
    }
}

/// True for a thread inside a stub: its driver died, and it was stopped again before it had healed.
pub(super) fn is_in_stub(thread: &Thread) -> Result<bool> {
    let regs = thread.regs()?;
    if stub::signal_inside(&regs).is_some() {
        return Ok(true);
    }
    let memory = Memory::new(thread.tid());
    let mut code = [0; 2];
    if memory.read(regs.ip(), &mut code).is_err() || !stub::is_jump(code) {
        return Ok(false);
    }
    let magic = regs.ip().wrapping_sub(stub::offset(Place::Jump)).wrapping_add(stub::magic_offset());
    Ok(memory.word(magic).is_ok_and(|word| word == stub::MAGIC))
}

/// Lets a thread that a dead driver left in a stub heal, and stops it again behind that.
pub(super) fn let_out(thread: &Thread, deadline: Instant) -> Result<()> {
    loop {
        let regs = thread.regs()?;
        let signal = stub::signal_inside(&regs).unwrap_or(0);
        thread.cont(0)?;
        match thread.wait_stop(deadline)? {
            // The segment has ended; what follows heals without stopping again.
            Stop::Signal(stop) if stop == signal => {
                thread.interrupt()?;
                thread.cont(0)?;
                return Ok(());
            }
            Stop::Signal(other) => thread.cont(other)?,
            Stop::Exited(_) => return Err(Error::new("the thread died")),
            _ => {
                if !is_in_stub(thread)? {
                    thread.interrupt()?;
                    thread.cont(0)?;
                    return Ok(());
                }
            }
        }
    }
}

impl Injection {
    /// Registers that enter the stub at `place`.
    pub(super) fn enter(&self, place: Place) -> Regs {
        let frame = Frame {
            code: self.code,
            signal: self.signal,
            ids: self.ids,
            scratch: (self.scratch, self.scratch_len),
        };
        stub::enter(&self.template, &frame, place)
    }
}
