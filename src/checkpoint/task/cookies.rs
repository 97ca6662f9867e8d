//! Core scheduling: threads with one cookie, and no others, run at the same time on the threads of one processor core.
//!
//! ```text
//!   cookies are the kernel's      ──>  groups: 1, 2, ...  ──>  a new cookie for each group
//! ```
//!
//! A cookie shows which threads trust each other. The numbers are good for nothing else, and no other thread can be given
//! one that is written down: who shared a cookie shares one afterwards, and nobody else has it.

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::checkpoint::image::TaskExtra;
use crate::checkpoint::remote::Thread;
use crate::checkpoint::task::status::{self, Status};
use crate::checkpoint::{Error, Result};
use crate::sys::sched;

/// The cookies that were seen.
#[derive(Debug, Default)]
pub struct Groups(Vec<u64>);

impl Groups {
    /// The number of the group that a thread is in, if it is in one.
    pub fn of(&mut self, tid: i32) -> Result<Option<u32>> {
        match sched::core_cookie(tid) {
            Ok(0) | Err(Errno::EINVAL | Errno::ENODEV) => Ok(None),
            Ok(cookie) => {
                let known = self.0.iter().position(|known| *known == cookie);
                let index = known.unwrap_or_else(|| {
                    self.0.push(cookie);
                    self.0.len() - 1
                });
                Ok(u32::try_from(index + 1).ok())
            }
            Err(errno) => Err(Error::new("cannot tell with whom the thread shares processor cores")
                .call(format!("prctl(PR_SCHED_CORE, PR_SCHED_CORE_GET, {tid})"), errno)),
        }
    }
}

/// Gives each group its cookie.
pub fn restore(extra: &TaskExtra, init: i32, threads: &[Thread]) -> Result<()> {
    let group_of: BTreeMap<u32, u32> =
        extra.threads.iter().filter_map(|thread| Some((thread.tid, thread.cookie?))).collect();
    if group_of.is_empty() {
        return Ok(());
    }
    let depth = status::depth(init)?;
    let mut groups: BTreeMap<u32, Vec<i32>> = BTreeMap::new();
    for thread in threads {
        let vtid = Status::of_thread(thread.tid(), thread.tid())?.tid_at(depth).unwrap_or(0);
        if let Some(group) = group_of.get(&vtid.cast_unsigned()) {
            groups.entry(*group).or_default().push(thread.tid());
        }
    }
    groups.values().try_for_each(|tids| match sched::share_core(tids) {
        // Without cores that have several threads there is nothing to share.
        Ok(()) | Err(Errno::ENODEV) => Ok(()),
        Err(errno) => Err(Error::new("cannot have threads share processor cores with nobody else")
            .call("prctl(PR_SCHED_CORE)", errno)
            .remedy("restore under a kernel with CONFIG_SCHED_CORE")),
    })
}
