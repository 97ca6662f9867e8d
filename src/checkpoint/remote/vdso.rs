//! The end of the vdso, where stubs stand.
//!
//! The vdso is mapped in every task, executable, and its last page is not full. Writing there through
//! /proc/PID/mem gives the task a private copy of that page; no mapping is made that would be seen or refused.
//!
//! ```text
//!   base                                   end of the image       page boundary
//!   │ ELF header ... sections │ section headers │ zeros               │
//!                                    ... │ slot │ slot │ slot │ slot │
//!                                      4th    3rd    2nd    1st
//!          what it was before, or a stub that a thread is in, or one that was left behind
//! ```
//!
//! How many zeros there are depends on the kernel: 1504 bytes in Linux 6.18, room for a single slot in 6.12. Two slots are
//! needed, for a process and one of its threads. Section headers are for debuggers that read the vdso like a file; nobody
//! reads them while the process stands still, and afterwards they are there again.

use std::ops::Range;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::memory::{self, Memory};
use super::ptrace;
use super::thread::Thread;
use super::wait::Stop;
use crate::checkpoint::arch::{requests, stub};
use crate::checkpoint::error::{Context, Error, Result};

const PAGE: u64 = 4096;
/// More than any function of the vdso takes.
const MOST_STEPS: usize = 1 << 16;
/// How long so many steps may take where others want the processor, too.
const STEPPING: Duration = Duration::from_secs(30);
/// How long another thread may take to leave a stub whose driver is dead.
const HEALING: Duration = Duration::from_secs(5);

/// Where slots may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Room {
    /// The section headers, and what follows up to the end of the page.
    all: Range<u64>,
    /// The zeros behind the vdso's image.
    tail: u64,
}

/// A place for a stub, and what was there before.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Its address.
    pub(super) at: u64,
    /// To be written back.
    pub(super) before: Vec<u8>,
}

/// Finds the end of a task's vdso.
pub(super) fn room(tid: i32, memory: &Memory) -> Result<Room> {
    let mut header = [0u8; 64];
    let by_auxv = memory::vdso_of_auxv(tid)?;
    let base = match by_auxv {
        Some(base) if memory.read(base, &mut header).is_ok() && section_headers(&header).is_some() => base,
        // Moved since, or mapped by somebody else than exec.
        _ => {
            let Some((base, _)) = memory::vdso_of_maps(tid)? else {
                return Err(Error::new("the task has no vdso, so that no system call can be made in it"));
            };
            memory.read(base, &mut header)?;
            base
        }
    };
    let Some(headers) = section_headers(&header) else {
        return Err(Error::new(format!("the task's vdso at {base:#x} is no ELF image of this architecture")));
    };
    let (start, tail) = (base + headers.start, base + headers.end);
    Ok(Room { all: start..tail.next_multiple_of(PAGE), tail })
}

/// Where the section headers are in an ELF image that ends in them, as the vdso does.
fn section_headers(header: &[u8; 64]) -> Option<Range<u64>> {
    let half = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let word = |at: usize| half(at) | half(at + 2) << 16;
    // e_shoff; e_shentsize, which e_shnum follows.
    let (start, entry) = match &header[..5] {
        b"\x7fELF\x01" => (word(0x20), 0x2e),
        b"\x7fELF\x02" => (word(0x28) | word(0x2c) << 32, 0x3a),
        _ => return None,
    };
    let end = start.checked_add(half(entry) * half(entry + 2))?;
    (start >= 64 && (64..16 * PAGE).contains(&end)).then_some(start..end)
}

/// A slot that no thread can be in.
pub(super) fn free_slot(room: &Room, tid: i32, memory: &Memory, rip: u64) -> Result<Slot> {
    let len = usize::try_from(stub::slot_len()).unwrap_or(usize::MAX);
    let mut bytes = vec![0u8; usize::try_from(room.all.end - room.all.start).unwrap_or(0)];
    memory.read(room.all.start, &mut bytes)?;
    // Slots whose threads run are looked at when there is no other: those threads have to be stopped for it.
    for stopping in [false, true] {
        for (slot, at) in bytes
            .rchunks_exact(len)
            .zip((room.all.start..=room.all.end - stub::slot_len()).rev().step_by(len))
        {
            if is_abandoned(slot, at, tid, rip, stopping) {
                return Ok(Slot { at, before: vec![0; len] });
            }
            let headers = at.max(room.tail) - at;
            let is_free =
                slot.iter().skip(usize::try_from(headers).unwrap_or(0)).all(|&b| b == 0) && !is_stub(slot);
            if is_free {
                return Ok(Slot { at, before: slot.to_vec() });
            }
        }
    }
    Err(Error::new("no room is left in the task's vdso for another stub")
        .remedy("a driver was killed several times in this task; it makes room when its threads have run on"))
}

/// A word of a slot.
fn word(slot: &[u8], offset: u64) -> u64 {
    let from = usize::try_from(offset).unwrap_or(0);
    slot.get(from..from + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

fn is_stub(slot: &[u8]) -> bool {
    word(slot, stub::magic_offset()) == stub::MAGIC
}

/// A slot that was left behind, and that no thread can be inside: its thread is gone, or is elsewhere (this one,
/// another that we have stopped, or one that is stopped for the question), or belongs to another process, of which
/// this is a forked copy.
fn is_abandoned(slot: &[u8], at: u64, tid: i32, rip: u64, stopping: bool) -> bool {
    if !is_stub(slot) {
        return false;
    }
    let Ok(owner) = i32::try_from(word(slot, stub::magic_offset() + 8)) else { return false };
    let is_elsewhere = |rip: u64| !(at..at + stub::slot_len()).contains(&rip);
    if owner == tid {
        return is_elsewhere(rip);
    }
    match memory::shares_memory(owner, tid) {
        Ok(true) => match requests::regs(owner) {
            Ok(regs) => is_elsewhere(regs.ip()),
            Err(_) => stopping && has_healed(owner).unwrap_or(false),
        },
        Ok(false) | Err(Errno::ESRCH) => true,
        Err(_) => false,
    }
}

/// Waits until a running thread, whose driver is dead, has left the stub. It goes on running.
fn has_healed(owner: i32) -> Result<bool> {
    let thread = Thread::seize(owner)?;
    // Stopping lets it out of the stub, if it is inside.
    thread.stop(Instant::now() + HEALING).map(|_stopped_or_gone| true)
}

impl Thread {
    /// Lets a stopped thread that stands inside the vdso go on until it is out of it, so that it can be restored under
    /// a kernel with another vdso. Signals wait meanwhile, but for those that the kernel itself raises: one that it finds
    /// blocked or ignored it raises all the same, and the program's handler is gone. Where it is: a thread that job control
    /// has stopped, that stumbles inside (over a bad address, say), or whose process ignores SIGTRAP. signal(7)
    pub fn leave_vdso(&self, ignored: u64) -> Result<()> {
        let regs = self.regs()?;
        // Most threads sleep in a call of their own, and need no second look.
        if !regs.may_be_in_vdso() || ptrace::siginfo(self.tid()).is_err() {
            return Ok(());
        }
        let Some((start, end)) = memory::vdso_of_maps(self.tid())? else { return Ok(()) };
        if !(start..end).contains(&regs.ip()) || ignored & bit(libc::SIGTRAP) != 0 {
            return Ok(());
        }
        let mask = self.sigmask()?;
        self.set_sigmask(!RAISED.map(bit).iter().fold(0, |all, one| all | one))?;
        let out = self.step_out(start..end);
        if self.is_gone() { out } else { self.set_sigmask(mask).and(out) }
    }

    fn step_out(&self, vdso: Range<u64>) -> Result<()> {
        let deadline = Instant::now() + STEPPING;
        let mut again = 0;
        for _ in 0..MOST_STEPS {
            ptrace::step(self.tid()).during("cannot let the thread out of the vdso", || {
                format!("ptrace(PTRACE_SINGLESTEP, {})", self.tid())
            })?;
            match self.wait_stop(deadline)? {
                // Stopped by job control, or gone: it is where it is.
                Stop::Group(_) | Stop::Trap | Stop::Exited(_) => return Ok(()),
                Stop::Signal(signal) if !is_raised(&self.siginfo()?) => {
                    // Somebody has sent it. It is queued again when it is passed on to a thread that blocks it.
                    again = signal;
                    break;
                }
                Stop::Signal(libc::SIGTRAP) if vdso.contains(&self.regs()?.ip()) => {}
                // Out of it; or the instruction will stumble again when the thread goes on.
                Stop::Signal(_) => break,
                other => return Err(Error::new(format!("the thread did not leave the vdso: {other:?}"))),
            }
        }
        // From the stop of a signal to that of an interruption, which is where everybody else stands.
        self.set_sigmask(u64::MAX)?;
        self.interrupt()?;
        self.cont(again)?;
        match self.wait_stop(deadline)? {
            Stop::Trap | Stop::Group(_) | Stop::Exited(_) => Ok(()),
            other => Err(Error::new(format!("the thread did not stop behind the vdso: {other:?}"))),
        }
    }
}

/// What the kernel raises in a thread for what that does.
const RAISED: [i32; 6] =
    [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS];

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Whether the kernel has raised the signal, rather than anybody sent it: its `si_code` is positive. sigaction(2)
fn is_raised(info: &[u8; 128]) -> bool {
    i32::from_ne_bytes([info[8], info[9], info[10], info[11]]) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_vdso_has_room_for_two_stubs() {
        let me = i32::try_from(std::process::id()).unwrap();
        let memory = Memory::new(me);
        let mut room = room(me, &memory).unwrap();
        let len = stub::slot_len();
        assert!(room.all.end - room.all.start >= 2 * len, "{room:x?} for stubs of {len}");
        let first = free_slot(&room, me, &memory, 0).unwrap();
        assert_eq!((first.at, first.before), (room.all.end - len, vec![0; len as usize]));
        // As if the image ended with the page.
        room = Room { all: room.tail - len..room.tail, tail: room.tail };
        let slot = free_slot(&room, me, &memory, 0).unwrap();
        let mut there = vec![0; len as usize];
        memory.read(slot.at, &mut there).unwrap();
        assert_eq!((slot.at, slot.before), (room.all.start, there));
    }

    #[test]
    fn only_elf_has_section_headers() {
        assert_eq!(section_headers(&[0; 64]), None);
        let mut header = [0u8; 64];
        header[..5].copy_from_slice(b"\x7fELF\x02");
        assert_eq!(section_headers(&header), None);
        header[0x28] = 0x80;
        header[0x3a] = 64;
        header[0x3c] = 2;
        assert_eq!(section_headers(&header), Some(0x80..0x100));
        let mut header = [0u8; 64];
        header[..5].copy_from_slice(b"\x7fELF\x01");
        (header[0x20], header[0x2e], header[0x30]) = (0x80, 40, 2);
        assert_eq!(section_headers(&header), Some(0x80..0xd0));
    }

    #[test]
    fn a_slot_is_taken_while_its_thread_may_be_in_it() {
        let me = i32::try_from(std::process::id()).unwrap();
        // SAFETY: a plain structure of integers, for which zero is a value.
        let regs: crate::checkpoint::arch::Regs = unsafe { std::mem::zeroed() };
        let slot = stub::slot(me, 0, &regs);
        assert!(!is_abandoned(&slot, 0x1000, me, 0x1010, false), "this thread is in it");
        assert!(is_abandoned(&slot, 0x1000, me, 0x9000, false), "this thread is elsewhere");
        let dead = stub::slot(i32::MAX - 1, 0, &regs);
        assert!(is_abandoned(&dead, 0x1000, me, 0x9000, false), "its owner is gone");
        assert!(!is_abandoned(&vec![1; slot.len()], 0x1000, me, 0x9000, false), "not ours");
    }
}
