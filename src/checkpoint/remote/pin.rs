//! Running the driver on the processor of the thread that it drives.
//!
//! A stop costs 3 µs when both share a processor, as one hands over to the other; and up to 80 µs when they don't,
//! as an idle processor has to be woken each time.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::sys::procfs::read_text;

/// Keeps the calling thread on one processor; dropping it gives back the affinity from before.
#[derive(Debug)]
pub(super) struct Beside(Option<CpuSet>);

impl Drop for Beside {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // Without it we would be slower, and no more than that.
            let _ = sched_setaffinity(Pid::from_raw(0), before);
        }
    }
}

/// Moves the calling thread to `processor`, if it is elsewhere. Where that is not allowed, it stays. Once there it
/// tends to stay, so that most calls find nothing to do.
pub(super) fn beside(processor: i32) -> Beside {
    // SAFETY: no arguments.
    if unsafe { libc::sched_getcpu() } == processor { Beside(None) } else { Beside(move_to(processor)) }
}

fn move_to(processor: i32) -> Option<CpuSet> {
    let before = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let mut only = CpuSet::new();
    only.set(usize::try_from(processor).ok()?).ok()?;
    sched_setaffinity(Pid::from_raw(0), &only).ok()?;
    Some(before)
}

/// The processor where a thread ran last; -1 if that can't be told.
pub(super) fn last_processor(tid: i32) -> i32 {
    // Not /proc/TID/stat, for which the kernel adds up what all threads have used.
    let stat = read_text(format!("/proc/{tid}/task/{tid}/stat")).unwrap_or_default();
    // Field 39; the name, field 2, may contain anything.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    fields.split(' ').nth(36).and_then(|field| field.parse().ok()).unwrap_or(-1)
}
