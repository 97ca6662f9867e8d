//! The signal X that a stub stops itself with.
//!
//! In a live task X must do nothing if the driver is dead by then; in a task that is being restored the driver's
//! death kills the task, so any signal will do that the images do not queue.

use libc::{SIGALRM, SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGPIPE, SIGPWR, SIGQUIT};
use libc::{SIGSTKFLT, SIGTERM, SIGURG, SIGUSR1, SIGUSR2, SIGWINCH, SIGXFSZ};

/// The bit of a signal in a mask.
pub(super) fn bit(signal: i32) -> u64 {
    u32::try_from(signal - 1).ok().and_then(|shift| 1u64.checked_shl(shift)).unwrap_or(0)
}

/// X for a live task: ignored, by default or by the program's wish; not blocked (somebody may read it from a
/// signalfd), not queued. Where the program catches all of those, its handler of one is called without a cause when
/// the driver dies, and a call that no handler may interrupt gives EINTR.
pub(super) fn harmless(blocked: u64, caught: u64, ignored: u64, pending: u64, stopped: bool) -> Option<i32> {
    const IGNORED: [i32; 3] = [SIGURG, SIGWINCH, SIGCHLD];
    const WISHED: [i32; 8] = [SIGPIPE, SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGTERM];
    let free = |signal: i32| (blocked | pending) & bit(signal) == 0;
    let quiet = |signal: i32| free(signal) && caught & bit(signal) == 0;
    let first = IGNORED.into_iter().find(|&signal| quiet(signal));
    // SIGCONT would wake a stopped task.
    let cont = || Some(SIGCONT).filter(|&signal| !stopped && quiet(signal));
    let wished = || WISHED.into_iter().find(|&signal| ignored & bit(signal) != 0 && quiet(signal));
    first
        .or_else(cont)
        .or_else(wished)
        .or_else(|| IGNORED.into_iter().find(|&signal| free(signal)))
        .or_else(|| IGNORED.into_iter().find(|&signal| pending & bit(signal) == 0))
}

/// X for a task that is being restored, given the signals that were queued to it.
pub(super) fn unused(queued: u64) -> Option<i32> {
    [SIGSTKFLT, SIGPWR, SIGXFSZ, SIGURG, SIGWINCH, SIGUSR2, SIGUSR1]
        .into_iter()
        .chain(34..=63)
        .find(|&signal| queued & bit(signal) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harmless_avoids_what_the_task_uses() {
        assert_eq!(harmless(0, 0, 0, 0, false), Some(SIGURG));
        assert_eq!(harmless(0, bit(SIGURG), 0, 0, false), Some(SIGWINCH));
        assert_eq!(harmless(bit(SIGURG), bit(SIGWINCH), 0, 0, false), Some(SIGCHLD));
        let all = bit(SIGURG) | bit(SIGWINCH) | bit(SIGCHLD);
        assert_eq!(harmless(0, all, 0, 0, false), Some(SIGCONT));
        assert_eq!(harmless(0, all, 0, 0, true), Some(SIGURG));
        assert_eq!(harmless(0, all, bit(SIGPIPE), 0, true), Some(SIGPIPE));
        assert_eq!(harmless(bit(SIGURG), u64::MAX, 0, 0, false), Some(SIGWINCH));
        assert_eq!(harmless(0, 0, 0, u64::MAX, false), None);
    }

    #[test]
    fn unused_avoids_what_is_queued() {
        assert_eq!(unused(0), Some(SIGSTKFLT));
        assert_eq!(unused(bit(SIGSTKFLT)), Some(SIGPWR));
        assert_eq!(unused(u64::MAX), None);
    }
}
