//! Requests that are under way, looked at while the program runs.
//!
//! A dump waits for them, a little. What takes longer shows before that: nothing moves on such a ring.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::facts::Facts;
use super::look::{self, PATIENCE};
use crate::checkpoint::Error;
use crate::checkpoint::files::live::{Live, names};
use crate::checkpoint::memory::look::Looks;
use crate::checkpoint::task::status::Status;
use crate::sys::pidfd;

/// How `maps` calls a ring.
const NAME: &[u8] = b"anon_inode:[io_uring]";
/// A ring tells by nothing but its counters that it has moved; so often is it asked.
const PAUSE: Duration = Duration::from_millis(2);

/// What a dump would have to wait for, of the container whose first process is `init`.
pub fn under_way(init: i32, looks: &Looks) -> Vec<Error> {
    busy(init, looks).iter().map(|(live, facts)| live.name(look::under_way(facts))).collect()
}

/// What does not move although it is given the time that a dump would wait for it.
pub fn stuck(init: i32, looks: &Looks) -> Vec<Error> {
    let mut all = busy(init, looks);
    let end = Instant::now() + Duration::from_secs(PATIENCE);
    while !all.is_empty() && Instant::now() < end {
        std::thread::sleep(PAUSE);
        let counters = |facts: &Facts| (facts.taken, facts.posted);
        all.retain(|(live, before)| Facts::of(live).is_ok_and(|now| counters(&now) == counters(before)));
    }
    all.iter().map(|(live, facts)| live.name(look::under_way(facts))).collect()
}

/// The rings on which requests are under way.
fn busy(init: i32, looks: &Looks) -> Vec<(Live, Facts)> {
    let depth = crate::checkpoint::task::status::depth(init).unwrap_or(0);
    let mut found = Vec::new();
    for pid in looks.pids().filter(|pid| looks.of(*pid).iter().any(|(mapping, _)| mapping.name() == NAME)) {
        let Ok(handle) = pidfd::open(pid, 0) else { continue };
        let vpid = Status::of(pid).ok().and_then(|status| status.pid_at(depth)).unwrap_or(pid);
        for (fd, _) in
            names(pid).unwrap_or_default().into_iter().filter(|(_, n)| n.as_encoded_bytes() == NAME)
        {
            let Ok(Some(live)) = Live::look(pid, vpid, handle.as_fd(), fd) else { continue };
            match Facts::of(&live) {
                Ok(facts) if facts.under_way() != 0 => found.push((live, facts)),
                _ => {}
            }
        }
    }
    found
}
