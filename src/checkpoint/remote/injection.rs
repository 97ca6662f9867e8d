//! Running batches in a stopped thread.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::batch::{Arg, Batch, ENTRY, Placing, RESULT, Results};
use super::lift::Lifted;
use super::memory::Memory;
use super::thread::{Dispatch, Thread};
use super::wait::Stop;
use super::{pin, ptrace, signals};
use crate::checkpoint::arch::Regs;
use crate::checkpoint::arch::stub::{self, Place};
use crate::checkpoint::error::{Error, Result};

/// Entries are placed in windows of at most this size.
const WINDOW: usize = 256 << 10;
/// Page of the code in a task being restored.
pub(super) const CODE: u64 = 4096;

/// A stopped thread that runs batches.
///
/// In a *live* task ([`Self::start`]) code and record stand in the tail of the vdso, scratch memory is mapped for the
/// time being, and everything is put back by [`Self::finish`], by dropping this, or by the stub when the driver
/// dies. In a task that is being restored ([`Self::settle`]) code and scratch stand in a window at a fixed address,
/// which survives the unmapping of all else, and the task dies with its driver.
#[derive(Debug)]
pub struct Injection {
    pub(super) thread: Thread,
    pub(super) memory: Rc<Memory>,
    /// Where the stub stands.
    pub(super) code: u64,
    pub(super) scratch: u64,
    pub(super) scratch_len: u64,
    /// Thread group and thread, in the innermost pid namespace.
    pub(super) ids: (i32, i32),
    /// X
    pub(super) signal: i32,
    /// Segment registers, thread pointer and stack pointer.
    pub(super) template: Regs,
    /// What a live thread gets back.
    pub(super) home: Option<Home>,
    /// Base of the window of a task being restored, else 0.
    pub(super) window: u64,
    /// Signals that were queued to the process by batches; its threads share the set.
    pub(super) queued: Rc<Cell<u64>>,
    /// Children and threads born in the last run.
    pub(super) births: Vec<i32>,
    pub(super) patience: Duration,
    /// Where the thread ran last.
    pub(super) processor: i32,
}

/// A live thread's own state.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) slot: u64,
    /// What the slot held.
    pub(super) before: Vec<u8>,
    /// Raw, apart from an interrupted restartable sequence.
    pub(super) regs: Regs,
    pub(super) mask: u64,
    pub(super) dispatch: Option<Dispatch>,
    /// SIGSTOP arrived meanwhile.
    pub(super) stopped: bool,
    /// The scratch is a loan: [`super::beside::Beside`].
    pub(super) lent: bool,
    /// Where the stub stands that has left its slot: `apart`.
    pub(super) page: Option<u64>,
}

impl Drop for Injection {
    fn drop(&mut self) {
        // A thread that cannot be healed is dead, or heals by itself when it is detached.
        let _ = self.heal();
    }
}

impl Injection {
    /// Address space that code and scratch take in a task being restored.
    pub const FOOTPRINT: u64 = 16 << 20;

    /// The thread.
    pub fn thread(&self) -> &Thread {
        &self.thread
    }

    /// Gives up the injection and keeps the thread. A live thread is healed.
    pub fn into_thread(self) -> Thread {
        self.thread.clone()
    }

    /// Memory that the injection has mapped in the task, start and end; it is no part of the task's own.
    pub fn footprint(&self) -> (u64, u64) {
        if self.window != 0 {
            (self.window, self.window + Self::FOOTPRINT)
        } else {
            (self.scratch, self.scratch + self.scratch_len)
        }
    }

    /// All of it in a live task, with the page that its stub may have.
    pub fn footprints(&self) -> impl Iterator<Item = (u64, u64)> {
        let page = self.home.as_ref().and_then(|home| home.page).map(|page| (page, page + CODE));
        page.into_iter().chain(Some(self.footprint()))
    }

    /// Where [`Self::run_code`] puts its data.
    pub(in crate::checkpoint) fn scratch(&self) -> u64 {
        self.scratch
    }

    /// How long a batch may take.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// How long a batch may take; 10 seconds unless this is called.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Reads the task's memory.
    pub fn read_mem(&self, addr: u64, into: &mut [u8]) -> Result<()> {
        self.memory.read(addr, into)
    }

    /// Writes the task's memory, even where the task itself may not.
    pub fn write_mem(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        self.memory.write(addr, bytes)
    }

    /// Makes one system call.
    pub fn syscall(&mut self, nr: libc::c_long, args: &[Arg]) -> Result<i64> {
        let mut batch = Batch::new();
        let call = batch.call(nr, args);
        Ok(self.run(&batch)?.ret(call))
    }

    /// Runs a batch. The error of a call that ends it names that call; the calls before it have been made.
    pub fn run(&mut self, batch: &Batch) -> Result<Results> {
        self.births.clear();
        self.avoid_signals(batch)?;
        let _beside = pin::beside(self.processor);
        let fixed = batch.data_len() + batch.out_len();
        let room = batch.entries_len().clamp(ENTRY, WINDOW);
        let total = room + fixed;
        self.grow(total as u64)?;
        let base = self.scratch;
        let data = base + room as u64;
        let at = Placing { base, data, out: data + batch.data_len() as u64 };

        let mut results: Vec<i64> = Vec::with_capacity(batch.len());
        let mut first = true;
        while results.len() < batch.len() {
            let window = batch.window(results.len(), room, &at, &results);
            if window.entries.is_empty() {
                return Err(Error::new("a call has more arguments to be filled in than fit a window"));
            }
            let mut bytes: Vec<u8> = window.words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let end = base + bytes.len() as u64;
            if std::mem::take(&mut first) {
                bytes.resize(room, 0);
                bytes.extend_from_slice(&batch.placed_data(at.data, at.out));
                bytes.resize(total, 0);
            }
            self.memory.write(base, &bytes)?;

            let mut regs = self.enter(Place::Run);
            stub::set_entries(&mut regs, base, end);
            let after = self.drive(&regs, || batch.strace(results.len(), &results))?;

            let done = usize::try_from((stub::next_entry(&after) - base) / ENTRY as u64).unwrap_or(0);
            // With the last entries comes what lies behind them.
            let all = results.len() + window.entries.len() == batch.len() && total <= WINDOW;
            let mut entries = vec![0u8; if all { total } else { usize::try_from(end - base).unwrap_or(0) }];
            self.read_scratch(base, &mut entries)?;
            for &entry in &window.entries {
                let from = entry * ENTRY + RESULT * 8;
                let result = entries.get(from..from + 8).and_then(|word| word.try_into().ok());
                let result = result.map_or(0, i64::from_ne_bytes);
                if entry >= done {
                    return Err(batch.error(results.len(), result, &results));
                }
                results.push(result);
            }
            if all {
                return Ok(Results { results, out: entries.split_off(total - batch.out_len()) });
            }
        }
        let mut out = vec![0u8; batch.out_len()];
        self.read_scratch(at.out, &mut out)?;
        Ok(Results { results, out })
    }

    fn read_scratch(&self, addr: u64, into: &mut [u8]) -> Result<()> {
        // A live task's is not readable by name.
        if self.window == 0 { self.memory.read_forced(addr, into) } else { self.memory.read(addr, into) }
    }

    /// Lets the thread run from `regs` until the stub stops it.
    pub(super) fn drive(&mut self, regs: &Regs, doing: impl Fn() -> String) -> Result<Regs> {
        let deadline = Instant::now() + self.patience;
        self.thread.set_regs(regs)?;
        self.thread.set_sigmask(!signals::bit(self.signal))?;
        let stopped_at = self.code + stub::offset(Place::Stopped);
        loop {
            self.thread.cont(0)?;
            match self.thread.wait_stop(deadline) {
                Ok(Stop::Signal(signal)) if signal == self.signal => {
                    let regs = self.thread.regs()?;
                    if regs.ip() == stopped_at {
                        self.processor = stub::processor(&regs);
                        return Ok(regs);
                    }
                    // Somebody else's, and without effect.
                }
                Ok(Stop::Signal(signal @ (libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGSYS))) => {
                    let regs = self.thread.regs()?;
                    let why =
                        if signal == libc::SIGSYS { "its seccomp filter forbids it" } else { "it faulted" };
                    self.park()?;
                    return Err(Error::new(format!(
                        "the task cannot make {}: {why} (signal {signal} at {:#x})",
                        doing(),
                        regs.ip()
                    )));
                }
                Ok(Stop::Signal(libc::SIGSTOP)) => {
                    if let Some(home) = &mut self.home {
                        home.stopped = true;
                    }
                }
                Ok(Stop::Event(event, child)) => {
                    let birth = [libc::PTRACE_EVENT_CLONE, libc::PTRACE_EVENT_FORK, libc::PTRACE_EVENT_VFORK];
                    if let (true, Ok(child)) = (birth.contains(&event), i32::try_from(child)) {
                        self.births.push(child);
                    }
                }
                Ok(Stop::Exited(status)) => {
                    return Err(Error::new(format!(
                        "the task died (wait status {status:#x}) in {}",
                        doing()
                    )));
                }
                Ok(_) => {}
                Err(error) if error.errno() == Some(Errno::ETIMEDOUT) => {
                    return Err(self.give_up(&doing()));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Interrupts a call that takes too long, so that the thread is in our hands again.
    fn give_up(&mut self, doing: &str) -> Error {
        let standing = super::memory::standing(self.thread.tid());
        let error =
            Error::new(format!("the task did not return from {doing} in {:?} ({standing})", self.patience));
        let deadline = Instant::now() + Duration::from_secs(1);
        let parked = self.thread.interrupt().and_then(|()| {
            loop {
                match self.thread.wait_stop(deadline)? {
                    Stop::Trap | Stop::Group(_) | Stop::Exited(_) => break self.park(),
                    Stop::Signal(signal) if signal == self.signal => break Ok(()),
                    _ => self.thread.cont(0)?,
                }
            }
        });
        match parked {
            Ok(()) => error,
            Err(_) => error.remedy("is its control group frozen?"),
        }
    }

    /// Runs instructions that are no system call in a task being restored, behind the stub; see [`stub::set_code`].
    pub(in crate::checkpoint) fn run_code(&mut self, code: &[u8], data: &[u8], doing: &str) -> Result<()> {
        if self.window == 0 {
            return Err(Error::new(format!("{doing} is for tasks that are being restored")));
        }
        let at = self.code + (stub::code().len() as u64).next_multiple_of(16);
        self.memory.force(at, code)?;
        self.memory.write(self.scratch, data)?;
        let mut regs = self.enter(Place::Stop);
        stub::set_code(&mut regs, at, self.scratch);
        self.drive(&regs, || doing.to_owned()).map(drop)
    }

    /// Makes a thread that stands anywhere in the stub continue at its stop.
    pub(super) fn park(&self) -> Result<()> {
        if self.thread.is_gone() { Ok(()) } else { self.thread.set_regs(&self.enter(Place::Stop)) }
    }

    /// Makes sure that the scratch has `len` bytes.
    pub(super) fn grow(&mut self, len: u64) -> Result<()> {
        if len <= self.scratch_len {
            return Ok(());
        }
        if self.window != 0 {
            return Err(Error::new(format!(
                "a batch of {len} bytes is larger than the {} bytes of scratch memory",
                self.scratch_len
            )));
        }
        if self.home.as_mut().is_some_and(|home| std::mem::take(&mut home.lent)) {
            (self.scratch, self.scratch_len) = (0, 0);
        }
        let len = len.next_power_of_two();
        let compat = self.home.as_ref().is_some_and(|home| home.regs.is_compat());
        if compat {
            // mremap(2) would look for room where a 32-bit program has no addresses.
            self.unmap_scratch()?;
        }
        let (nr, args, call) = if self.scratch == 0 {
            // Not readable by name, which on most architectures is the same: so that it never merges with a mapping
            // of the task's.
            let (place, name) = if compat { (libc::MAP_32BIT, "|MAP_32BIT") } else { (0, "") };
            let flags = number(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | place);
            let call = format!("mmap(NULL, {len}, PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS{name}, -1, 0)");
            (libc::SYS_mmap, [0, len, number(libc::PROT_WRITE), flags, u64::MAX, 0], call)
        } else {
            let (from, old, may_move) = (self.scratch, self.scratch_len, number(libc::MREMAP_MAYMOVE));
            let call = format!("mremap({from:#x}, {old}, {len}, MREMAP_MAYMOVE)");
            (libc::SYS_mremap, [from, old, len, may_move, 0, 0], call)
        };
        let (mut scratch, mut errno) = self.map(nr, args, len, &call)?;
        if matches!(errno, Some(Errno::ENOMEM | Errno::EAGAIN)) {
            let lifted = Lifted::of(self.thread.tid());
            if lifted.any() {
                (scratch, errno) = self.map(nr, args, len, &call)?;
            }
        }
        if let Some(errno) = errno {
            return Err(Error::new("no memory for the system calls of the task").call(call, errno).remedy(
                "raise its limits of addresses (RLIMIT_AS), data and locked memory, or those of its maps",
            ));
        }
        (self.scratch, self.scratch_len) = scratch;
        Ok(())
    }

    /// Has the stub make a call that maps scratch memory: where that is, or why not.
    fn map(&mut self, nr: i64, args: [u64; 6], len: u64, call: &str) -> Result<((u64, u64), Option<Errno>)> {
        let mut regs = self.enter(Place::Boot);
        stub::set_boot(&mut regs, nr, args, len);
        let after = self.drive(&regs, || call.to_owned())?;
        let answer = stub::boot_answer(&after);
        let failed = (-4095..0).contains(&answer);
        let errno = failed.then(|| Errno::from_raw(i32::try_from(-answer).unwrap_or(0)));
        Ok((stub::scratch(&after), errno))
    }

    /// Unmaps the scratch of a live task.
    pub(super) fn unmap_scratch(&mut self) -> Result<()> {
        if self.scratch == 0 || self.window != 0 {
            return Ok(());
        }
        let mut regs = self.enter(Place::Boot);
        // The result, 0, becomes the address of the scratch.
        stub::set_boot(&mut regs, libc::SYS_munmap, [self.scratch, self.scratch_len, 0, 0, 0, 0], 0);
        let call = format!("munmap({:#x}, {})", self.scratch, self.scratch_len);
        self.drive(&regs, || call.clone())?;
        self.scratch = 0;
        self.scratch_len = 0;
        Ok(())
    }

    /// Moves to code and scratch memory at `base`, which no mapping of the task's may use, for the time of a restore.
    ///
    /// From now on nothing is healed, and the task dies with its driver. Batches may unmap everything outside
    /// `base .. base + FOOTPRINT`; the stub uses no stack.
    pub fn settle(&mut self, base: u64) -> Result<()> {
        let mut batch = Batch::new();
        batch.about("cannot map the restore's window");
        let fixed = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let mut map = |addr: u64, len: u64, prot: i32, flags: i32| {
            let call = batch.call(
                libc::SYS_mmap,
                &[addr.into(), len.into(), prot.into(), (fixed | flags).into(), (-1).into(), 0.into()],
            );
            batch.expect(call, addr);
        };
        map(base, CODE, libc::PROT_READ | libc::PROT_EXEC, 0);
        map(base + CODE, Self::FOOTPRINT - CODE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_NORESERVE);
        self.run(&batch)?;
        self.memory.force(base, stub::code())?;
        self.unmap_scratch()?;
        self.thread.set_options(
            self.thread.options() | ptrace::O_EXITKILL | ptrace::O_BIRTHS | libc::PTRACE_O_TRACESYSGOOD,
        )?;
        self.home = None;
        self.window = base;
        self.code = base;
        self.scratch = base + CODE;
        self.scratch_len = Self::FOOTPRINT - CODE;
        self.queued = Rc::new(Cell::new(0));
        self.signal = signals::unused(0).unwrap_or(self.signal);
        Ok(())
    }

    /// In a task being restored, X must be none of the signals that a batch queues: it would be taken for X.
    fn avoid_signals(&mut self, batch: &Batch) -> Result<()> {
        if self.window == 0 {
            return Ok(());
        }
        let mut queued = self.queued.get();
        for (nr, args) in batch.plain_args() {
            let signal = match nr {
                libc::SYS_kill | libc::SYS_tkill | libc::SYS_rt_sigqueueinfo => args[1],
                libc::SYS_tgkill | libc::SYS_rt_tgsigqueueinfo => args[2],
                _ => None,
            };
            queued |= signal.and_then(|signal| i32::try_from(signal).ok()).map_or(0, signals::bit);
        }
        self.queued.set(queued);
        if queued & signals::bit(self.signal) != 0 {
            self.signal = signals::unused(queued)
                .ok_or_else(|| Error::new("every signal is queued; none is left to stop the task with"))?;
        }
        Ok(())
    }
}

/// Flags in a register.
fn number(flags: i32) -> u64 {
    u64::from(flags.cast_unsigned())
}
