//! Limits of memory that leave a task no room for scratch memory, lifted for the time of one call.

use nix::errno::Errno;

use crate::sys::prctl::{limit, set_limit};

/// What mmap(2) asks for: addresses, data, and, of a task that locks all it maps, locked memory. getrlimit(2)
const LIMITS: [u32; 3] = [libc::RLIMIT_AS, libc::RLIMIT_DATA, libc::RLIMIT_MEMLOCK];

/// Limits as they were. Dropping puts them back.
pub(super) struct Lifted {
    pid: i32,
    before: Vec<(u32, u64, u64)>,
}

impl Lifted {
    /// Lifts what limits the process of a thread. Whoever has no CAP_SYS_RESOURCE gets no further than the hard limits, and
    /// nowhere with another user's process.
    pub(super) fn of(tid: i32) -> Self {
        let mut lifted = Self { pid: tid, before: Vec::new() };
        for resource in LIMITS {
            let Ok((soft, hard)) = limit(tid, resource) else { continue };
            if soft == libc::RLIM64_INFINITY {
                continue;
            }
            let all = || set_limit(tid, resource, libc::RLIM64_INFINITY, libc::RLIM64_INFINITY);
            let most = |_: Errno| set_limit(tid, resource, hard, hard);
            if all().or_else(most).is_ok() {
                lifted.before.push((resource, soft, hard));
            }
        }
        lifted
    }

    /// Whether there was anything to lift.
    pub(super) fn any(&self) -> bool {
        !self.before.is_empty()
    }
}

impl Drop for Lifted {
    fn drop(&mut self) {
        for (resource, soft, hard) in &self.before {
            // Lowering needs no privilege; a task that is gone has no limits.
            let _ = set_limit(self.pid, *resource, *soft, *hard);
        }
    }
}
