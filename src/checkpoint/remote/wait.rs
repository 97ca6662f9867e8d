//! Waiting for one thread, with a deadline.
//!
//! waitpid(2) knows no timeout. A timer whose signal goes to the waiting thread alone interrupts it; the timer
//! repeats, so a tick that comes before waitpid(2) sleeps is followed by one that comes after.

use std::cell::RefCell;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::Once;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::ptrace;

/// Period of the timer once the deadline has passed.
const TICK: Duration = Duration::from_millis(2);

/// Why a traced thread stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// By `PTRACE_INTERRUPT`, or because it was just born.
    Trap,
    /// Its process is stopped by this signal (job control).
    Group(i32),
    /// This signal is about to be delivered; it is lost unless it is passed on.
    Signal(i32),
    /// At the entry to or the return from a system call.
    Syscall,
    /// A `PTRACE_EVENT_*` with its message.
    Event(i32, u64),
    /// It is gone; the status is wait(2)'s.
    Exited(i32),
}

/// What a wait status of a seized thread means.
pub(super) fn decode(tid: i32, status: i32) -> Stop {
    if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
        return Stop::Exited(status);
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Trap,
        libc::PTRACE_EVENT_STOP => Stop::Group(signal),
        // A thread that is killed right now has no message any more; its exit is reported next.
        event if event != 0 => Stop::Event(event, ptrace::event_message(tid).unwrap_or(0)),
        _ if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        _ => Stop::Signal(signal),
    }
}

/// Waits for the next stop of `tid`; ETIMEDOUT at the deadline.
pub(super) fn wait(tid: i32, deadline: Instant) -> nix::Result<Stop> {
    // Most have stopped already: it was let go on the processor that we are on, and has handed that back.
    let mut status = 0;
    // SAFETY: status is a live int.
    match unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) } {
        0 => {}
        -1 if Errno::last() == Errno::EINTR => {}
        -1 => return Err(Errno::last()),
        _ => return Ok(decode(tid, status)),
    }
    ALARM.with_borrow_mut(|alarm| {
        let alarm = armed(alarm, deadline.saturating_duration_since(Instant::now()))?;
        let result = loop {
            let mut status = 0;
            // SAFETY: status is a live int.
            match unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) } {
                -1 if Errno::last() != Errno::EINTR => break Err(Errno::last()),
                -1 if Instant::now() >= deadline => break Err(Errno::ETIMEDOUT),
                -1 => {}
                _ => break Ok(decode(tid, status)),
            }
        };
        alarm.disarm();
        result
    })
}

thread_local! {
    static ALARM: RefCell<Option<Alarm>> = const { RefCell::new(None) };
}

/// The thread's timer, running.
fn armed(alarm: &mut Option<Alarm>, after: Duration) -> nix::Result<&Alarm> {
    // A forked child has inherited the number of a timer that it does not have.
    let usable = alarm.as_ref().is_some_and(|alarm| alarm.arm(after).is_ok());
    if !usable {
        std::mem::forget(alarm.take());
        let new = Alarm::new()?;
        new.arm(after)?;
        *alarm = Some(new);
    }
    alarm.as_ref().ok_or(Errno::EINVAL)
}

/// A timer whose signal, delivered to this thread, does nothing but interrupt its system call.
struct Alarm(libc::timer_t);

extern "C" fn ignore(_: i32) {}

impl Alarm {
    fn new() -> nix::Result<Self> {
        static HANDLER: Once = Once::new();
        let signal = libc::SIGRTMAX();
        HANDLER.call_once(|| {
            // SAFETY: zero is a valid sigaction; the handler does nothing. No SA_RESTART: it is to interrupt.
            unsafe {
                let mut action: libc::sigaction = zeroed();
                action.sa_sigaction = ignore as extern "C" fn(i32) as usize;
                libc::sigaction(signal, &raw const action, null_mut());
            }
        });
        // SAFETY: all pointers are to live locals; timer is written before it is read.
        unsafe {
            let mut set: libc::sigset_t = zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, null_mut());
            let mut event: libc::sigevent = zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = null_mut();
            Errno::result(libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer))?;
            Ok(Self(timer))
        }
    }

    fn arm(&self, after: Duration) -> nix::Result<()> {
        // Zero would disarm.
        let first = after.max(Duration::from_nanos(1));
        let spec = libc::itimerspec { it_interval: timespec(TICK), it_value: timespec(first) };
        // SAFETY: the timer is ours and lives as long as self.
        Errno::result(unsafe { libc::timer_settime(self.0, 0, &raw const spec, null_mut()) }).map(drop)
    }

    fn disarm(&self) {
        let spec =
            libc::itimerspec { it_interval: timespec(Duration::ZERO), it_value: timespec(Duration::ZERO) };
        // SAFETY: as above.
        unsafe { libc::timer_settime(self.0, 0, &raw const spec, null_mut()) };
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is ours.
        unsafe { libc::timer_delete(self.0) };
    }
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(duration.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
