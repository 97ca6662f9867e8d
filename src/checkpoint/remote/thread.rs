//! One thread under ptrace: seized, never attached, so that no signal reaches it that was not there before.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::wait::{self, Stop};
use super::{memory, ptrace};
use crate::checkpoint::arch::{Regs, requests};
use crate::checkpoint::error::{Context, Error, Result};

/// A seized thread. Clones are the same seizure; when the last one is dropped, the thread is detached.
///
/// ptrace(2) belongs to the operating system's thread that seized, so this stays in it (it is not `Send`).
#[derive(Debug, Clone)]
pub struct Thread(Rc<Seized>);

#[derive(Debug)]
struct Seized {
    tid: i32,
    options: Cell<i32>,
    /// Detached or dead: there is nothing to detach at the end.
    gone: Cell<bool>,
}

impl Drop for Seized {
    fn drop(&mut self) {
        if self.gone.get() || ptrace::detach(self.tid, 0).is_ok() {
            return;
        }
        // Running: stop it, as only a stopped thread can be let go. A failure means that it is dead.
        let began = Instant::now();
        let left = STUCK.saturating_sub(WAITED.get());
        if ptrace::interrupt(self.tid).is_ok() {
            let deadline = began + left.min(Duration::from_millis(500));
            let signal = match wait::wait(self.tid, deadline) {
                Ok(Stop::Signal(signal)) => signal,
                _ => 0,
            };
            let _ = ptrace::detach(self.tid, signal);
            WAITED.set(WAITED.get() + began.elapsed());
        }
    }
}

/// So long are threads waited for in all which do not stop and are to be let go. The kernel lets go of the others when
/// this process ends.
const STUCK: Duration = Duration::from_secs(2);

thread_local! {
    /// How long they have been waited for.
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// A restartable-sequence registration, as `rseq(2)` was given it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RseqConfig {
    /// Address of the area; its `rseq_cs` pointer is 8 bytes in.
    pub addr: u64,
    /// Length of the area.
    pub len: u32,
    /// Signature that stands before abort handlers.
    pub sig: u32,
    /// Flags of the registration.
    pub flags: u32,
}

/// Syscall user dispatch: the thread gets SIGSYS for system calls from outside a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dispatch {
    /// Address of the byte that switches it on and off; 0 for none.
    pub selector: u64,
    /// Begin of the range, and its length.
    pub range: (u64, u64),
}

impl Thread {
    /// Seizes a thread; it goes on running. Seccomp filters sleep meanwhile, where we are allowed to do that.
    pub fn seize(tid: i32) -> Result<Self> {
        Self::seize_with(tid, 0)
    }

    /// Seizes with `PTRACE_O_*` options of the caller's.
    pub fn seize_with(tid: i32, options: i32) -> Result<Self> {
        let mut all = options | libc::PTRACE_O_TRACESYSGOOD | ptrace::O_SUSPEND_SECCOMP;
        let mut seized = ptrace::seize(tid, all);
        if matches!(seized, Err(Errno::EPERM | Errno::EINVAL)) {
            // Not privileged in the initial user namespace, or a kernel without it.
            all &= !ptrace::O_SUSPEND_SECCOMP;
            seized = ptrace::seize(tid, all);
        }
        match seized {
            Ok(()) => Ok(Self::adopt(tid, all)),
            Err(Errno::EPERM) => Err(Error::new("cannot stop the thread")
                .call(format!("ptrace(PTRACE_SEIZE, {tid}, 0, {all:#x})"), Errno::EPERM)
                .remedy("it may be traced by a debugger, or belong to a stranger")),
            Err(errno) => Err(Error::new("cannot stop the thread")
                .call(format!("ptrace(PTRACE_SEIZE, {tid}, 0, {all:#x})"), errno)),
        }
    }

    /// A thread that was born traced.
    pub(super) fn adopt(tid: i32, options: i32) -> Self {
        Self(Rc::new(Seized { tid, options: Cell::new(options), gone: Cell::new(false) }))
    }

    /// The thread's id, in our pid namespace.
    pub fn tid(&self) -> i32 {
        self.0.tid
    }

    /// True once the thread has exited or was detached.
    pub fn is_gone(&self) -> bool {
        self.0.gone.get()
    }

    /// The `PTRACE_O_*` options in force.
    pub fn options(&self) -> i32 {
        self.0.options.get()
    }

    /// Replaces the `PTRACE_O_*` options. The thread must be stopped.
    pub fn set_options(&self, options: i32) -> Result<()> {
        let tid = self.tid();
        ptrace::set_options(tid, options).during("cannot trace the thread", || {
            format!("ptrace(PTRACE_SETOPTIONS, {tid}, 0, {options:#x})")
        })?;
        self.0.options.set(options);
        Ok(())
    }

    /// Asks the thread to stop; [`Self::wait_stop`] sees it happen.
    pub fn interrupt(&self) -> Result<()> {
        let tid = self.tid();
        ptrace::interrupt(tid).during("cannot stop the thread", || format!("ptrace(PTRACE_INTERRUPT, {tid})"))
    }

    /// Waits for the next stop of any kind. `errno()` of the error is ETIMEDOUT at the deadline.
    pub fn wait_stop(&self, deadline: Instant) -> Result<Stop> {
        let tid = self.tid();
        let stop = wait::wait(tid, deadline).map_err(|errno| match errno {
            Errno::ETIMEDOUT => {
                Error::new(format!("the thread did not stop in time ({})", memory::standing(tid)))
                    .call(format!("waitpid({tid}, __WALL)"), errno)
            }
            errno => Error::new("cannot wait for the thread").call(format!("waitpid({tid}, __WALL)"), errno),
        })?;
        if let Stop::Exited(_) = stop {
            self.0.gone.set(true);
        }
        Ok(stop)
    }

    /// Interrupts and waits until the thread stands still with nothing in its hands: [`Stop::Trap`],
    /// [`Stop::Group`] or [`Stop::Exited`]. Signals that arrive first are passed on to it.
    ///
    /// A thread that is healing from a driver that died is let out of the stub first, so that its registers are
    /// its own.
    pub fn stop(&self, deadline: Instant) -> Result<Stop> {
        self.interrupt()?;
        self.wait_quiet(deadline)
    }

    /// The second half of [`Self::stop`], for callers that interrupt many threads before they wait for any.
    ///
    /// Any other stop takes the interruption with it, if it was on its way already (`ptrace_stop` in the kernel).
    pub fn wait_quiet(&self, deadline: Instant) -> Result<Stop> {
        let go_on = |signal: i32| self.interrupt().and_then(|()| self.cont(signal));
        loop {
            match self.wait_stop(deadline)? {
                Stop::Signal(signal) => go_on(signal)?,
                Stop::Event(..) | Stop::Syscall => go_on(0)?,
                stop @ Stop::Exited(_) => return Ok(stop),
                stop @ (Stop::Trap | Stop::Group(_)) => {
                    if !super::start::is_in_stub(self)? {
                        return Ok(stop);
                    }
                    super::start::let_out(self, deadline)?;
                }
            }
        }
    }

    /// Lets the stopped thread run on, delivering `signal` if it is not 0.
    pub fn cont(&self, signal: i32) -> Result<()> {
        let tid = self.tid();
        ptrace::cont(tid, signal)
            .during("cannot resume the thread", || format!("ptrace(PTRACE_CONT, {tid}, 0, {signal})"))
    }

    /// Keeps a thread of a stopped process (job control) stopped while it stays traced.
    pub fn listen(&self) -> Result<()> {
        let tid = self.tid();
        ptrace::listen(tid).during("cannot let the thread rest", || format!("ptrace(PTRACE_LISTEN, {tid})"))
    }

    /// Runs to the next entry or return of a system call.
    pub(super) fn to_syscall(&self) -> Result<()> {
        let tid = self.tid();
        ptrace::to_syscall(tid)
            .during("cannot resume the thread", || format!("ptrace(PTRACE_SYSCALL, {tid})"))
    }

    /// General registers, raw: an interrupted system call still shows as -512, -513, -514 or -516 in `rax`.
    /// See [`Regs::for_image`].
    pub fn regs(&self) -> Result<Regs> {
        let tid = self.tid();
        requests::regs(tid).during("cannot read the registers", || format!("ptrace(PTRACE_GETREGS, {tid})"))
    }

    /// Sets the general registers.
    pub fn set_regs(&self, regs: &Regs) -> Result<()> {
        let tid = self.tid();
        requests::set_regs(tid, regs).during("cannot set the registers", || {
            format!("ptrace(PTRACE_SETREGS, {tid}, ip={:#x})", regs.ip())
        })
    }

    /// Floating point, vector and tile registers: the xsave area in its standard format.
    pub fn xstate(&self) -> Result<Vec<u8>> {
        let tid = self.tid();
        requests::extended(tid).during("cannot read the vector registers", || {
            format!("ptrace(PTRACE_GETREGSET, {tid}, NT_X86_XSTATE)")
        })
    }

    /// Sets what [`Self::xstate`] read.
    pub fn set_xstate(&self, area: &[u8]) -> Result<()> {
        let tid = self.tid();
        requests::set_extended(tid, area).during("cannot set the vector registers", || {
            format!("ptrace(PTRACE_SETREGSET, {tid}, NT_X86_XSTATE, {} bytes)", area.len())
        })
    }

    /// Blocked signals; the mask to be restored where the thread is in sigsuspend(2), ppoll(2) and the like.
    pub fn sigmask(&self) -> Result<u64> {
        let tid = self.tid();
        ptrace::sigmask(tid)
            .during("cannot read the signal mask", || format!("ptrace(PTRACE_GETSIGMASK, {tid})"))
    }

    /// Sets the blocked signals.
    pub fn set_sigmask(&self, mask: u64) -> Result<()> {
        let tid = self.tid();
        ptrace::set_sigmask(tid, mask)
            .during("cannot set the signal mask", || format!("ptrace(PTRACE_SETSIGMASK, {tid}, {mask:#x})"))
    }

    /// Queued signals of the thread, or of its process if `shared`, as siginfo structures; they stay queued.
    pub fn pending(&self, shared: bool) -> Result<Vec<[u8; 128]>> {
        let tid = self.tid();
        let mut all = Vec::new();
        let mut slots = [[0u8; 128]; 32];
        loop {
            let some = ptrace::peek_siginfo(tid, shared, all.len() as u64, &mut slots).during(
                "cannot read the queued signals",
                || {
                    format!(
                        "ptrace(PTRACE_PEEKSIGINFO, {tid}, {{off={}, flags={}}})",
                        all.len(),
                        u8::from(shared)
                    )
                },
            )?;
            all.extend_from_slice(&slots[..some.min(slots.len())]);
            if some < slots.len() {
                return Ok(all);
            }
        }
    }

    /// The siginfo of the signal or trap that the thread is stopped at.
    pub fn siginfo(&self) -> Result<[u8; 128]> {
        let tid = self.tid();
        ptrace::siginfo(tid).during("cannot read the signal", || format!("ptrace(PTRACE_GETSIGINFO, {tid})"))
    }

    /// The thread's restartable-sequence registration. None also on kernels that cannot tell.
    pub fn rseq(&self) -> Result<Option<RseqConfig>> {
        let tid = self.tid();
        match ptrace::rseq(tid) {
            Ok(raw) if raw.addr == 0 => Ok(None),
            Ok(raw) => Ok(Some(RseqConfig { addr: raw.addr, len: raw.len, sig: raw.sig, flags: raw.flags })),
            Err(Errno::EIO | Errno::EINVAL) => Ok(None),
            Err(errno) => Err(Error::new("cannot read the rseq registration")
                .call(format!("ptrace(PTRACE_GET_RSEQ_CONFIGURATION, {tid})"), errno)),
        }
    }

    /// Whose system calls become SIGSYS. None also on kernels that cannot tell (before Linux 6.4).
    pub fn dispatch(&self) -> Result<Option<Dispatch>> {
        let tid = self.tid();
        match ptrace::dispatch(tid) {
            Ok(raw) if raw.mode == 0 => Ok(None),
            Ok(raw) => Ok(Some(Dispatch { selector: raw.selector, range: (raw.offset, raw.len) })),
            Err(Errno::EIO | Errno::EINVAL) => Ok(None),
            Err(errno) => Err(Error::new("cannot read syscall user dispatch")
                .call(format!("ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, {tid})"), errno)),
        }
    }

    /// Sets what [`Self::dispatch`] told; none switches it off.
    pub fn set_dispatch(&self, dispatch: Option<Dispatch>) -> Result<()> {
        let tid = self.tid();
        let raw = dispatch.map_or_else(ptrace::RawDispatch::default, |d| ptrace::RawDispatch {
            mode: 1,
            selector: d.selector,
            offset: d.range.0,
            len: d.range.1,
        });
        ptrace::set_dispatch(tid, raw).map_err(|errno| {
            Error::new("cannot switch syscall user dispatch")
                .call(format!("ptrace(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, {tid}, {raw:?})"), errno)
                .remedy("Linux 6.4 or newer is needed")
        })
    }

    /// The instructions of a seccomp filter; index 0 is the newest. None past the oldest.
    pub fn seccomp_filter(&self, index: usize) -> Result<Option<Vec<u64>>> {
        let tid = self.tid();
        match ptrace::seccomp_filter(tid, index) {
            Ok(program) => Ok(Some(program)),
            // EINVAL: the thread has no filter at all.
            Err(Errno::ENOENT | Errno::EINVAL) => Ok(None),
            Err(errno) => Err(Error::new("cannot read the seccomp filter")
                .call(format!("ptrace(PTRACE_SECCOMP_GET_FILTER, {tid}, {index})"), errno)),
        }
    }

    /// The `SECCOMP_FILTER_FLAG_*` that a filter was loaded with, for the same index.
    pub fn seccomp_flags(&self, index: usize) -> Result<u64> {
        let tid = self.tid();
        ptrace::seccomp_flags(tid, index as u64).during("cannot read the flags of the seccomp filter", || {
            format!("ptrace(PTRACE_SECCOMP_GET_METADATA, {tid}, {{filter_off={index}}})")
        })
    }

    /// Lets the stopped thread go.
    pub fn detach(self) -> Result<()> {
        self.detach_with(0)
    }

    /// Lets the stopped thread go, delivering `signal` if it is not 0 and the thread is stopped at a signal.
    pub fn detach_with(self, signal: i32) -> Result<()> {
        let tid = self.tid();
        if self.0.gone.get() {
            return Ok(());
        }
        ptrace::detach(tid, signal)
            .during("cannot let the thread go", || format!("ptrace(PTRACE_DETACH, {tid}, 0, {signal})"))?;
        self.0.gone.set(true);
        Ok(())
    }
}
