//! Seccomp filters: a tree of programs, each thread at one of its leaves.
//!
//! ```text
//!   0: the runtime's, from config.json    <- replaced by the destination's own: a restored program is never less confined
//!   1: the program's own, prev 0             than one that is started there
//!   2: a thread's own, prev 1
//! ```
//!
//! Filters are compared by content: two threads that loaded the same programs in the same order share a chain in the
//! image. While a thread is traced with PTRACE_O_SUSPEND_SECCOMP its filters sleep, so that batches run even under one
//! that kills.

use std::collections::HashMap;

use crate::checkpoint::image::{SeccompEntry, SeccompFilter, SeccompMode, ThreadCoreEntry};
use crate::checkpoint::remote::{Batch, Thread};
use crate::checkpoint::{Error, Result};

const SECCOMP_SET_MODE_FILTER: u64 = 1;
const PR_SET_SECCOMP: u64 = 22;
const MODE_STRICT: u64 = 1;
const MODE_FILTER: u32 = 2;
/// SECCOMP_FILTER_FLAG_LOG and SPEC_ALLOW: properties. The others say how to load, or ask for a listener.
const KEPT_FLAGS: u64 = 0b110;
/// The most instructions of a program.
const MAX: usize = 4096;
/// The most filters of a thread: the kernel stops at 32768 instructions in all.
const DEPTH: usize = 4096;

/// The filters of a dump so far.
#[derive(Debug, Default)]
pub struct Filters {
    ids: HashMap<(Option<u32>, Vec<u64>, u64), u32>,
    entry: SeccompEntry,
}

impl Filters {
    /// Adds what `thread` has, in `mode` as `/proc/PID/status` says.
    pub fn dump(&mut self, thread: &Thread, mode: u32, core: &mut ThreadCoreEntry) -> Result<()> {
        core.seccomp_mode = match mode {
            0 => return Ok(()),
            MODE_FILTER => Some(SeccompMode::Filter.into()),
            _ => {
                core.seccomp_mode = Some(SeccompMode::Strict.into());
                return Ok(());
            }
        };
        let mut prev = None;
        // The kernel counts from the oldest.
        for index in 0..DEPTH {
            let Some(program) = thread.seccomp_filter(index)? else { break };
            let flags = thread.seccomp_flags(index)?;
            prev = Some(self.add(prev, program, flags & KEPT_FLAGS));
        }
        core.seccomp_filter = prev;
        match prev {
            Some(_) => Ok(()),
            None => {
                Err(Error::new("the seccomp filters cannot be read").remedy("run stasis with CAP_SYS_ADMIN"))
            }
        }
    }

    fn add(&mut self, prev: Option<u32>, program: Vec<u64>, flags: u64) -> u32 {
        let filter: Vec<u8> = program.iter().flat_map(|i| i.to_ne_bytes()).collect();
        let next = u32::try_from(self.entry.seccomp_filters.len()).unwrap_or(u32::MAX);
        let filters = &mut self.entry.seccomp_filters;
        *self.ids.entry((prev, program, flags)).or_insert_with(|| {
            // Both kept flags fit.
            let flags = u32::try_from(flags).ok().filter(|f| *f != 0);
            filters.push(SeccompFilter { filter, prev, flags });
            next
        })
    }

    /// seccomp.img, if anybody has a filter.
    pub fn finish(self) -> Option<SeccompEntry> {
        Some(self.entry).filter(|entry| !entry.seccomp_filters.is_empty())
    }
}

/// A program to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Instructions, 8 bytes each, as the kernel takes them.
    pub code: Vec<u8>,
    /// Flags of seccomp(2).
    pub flags: u64,
}

/// What the destination's config.json puts under every process of the container; empty if it has no `seccomp`.
pub type Policy = Vec<Program>;

/// The programs of a thread, the first to be loaded first. `runtimes`: the lowest one of the image is the runtime's.
pub fn chain(
    image: Option<&SeccompEntry>,
    core: &ThreadCoreEntry,
    runtimes: bool,
    policy: &Policy,
) -> Result<Vec<Program>> {
    let bad = |what: &str| Error::new(format!("seccomp.img is damaged: {what}"));
    let filters = image.map_or(&[][..], |entry| &entry.seccomp_filters);
    let mut own = Vec::new();
    let mut next = match core.seccomp_mode {
        Some(mode) if mode == i32::from(SeccompMode::Filter) => core.seccomp_filter,
        _ => None,
    };
    while let Some(id) = next {
        let filter = filters.get(id as usize).ok_or_else(|| bad("a filter that is not there is named"))?;
        // Older filters have smaller numbers: no cycles.
        next = filter.prev;
        if next.is_some_and(|prev| prev >= id) {
            return Err(bad("a filter comes before itself"));
        }
        if filter.filter.is_empty() || filter.filter.len() % 8 != 0 || filter.filter.len() / 8 > MAX {
            return Err(bad("a program has an impossible length"));
        }
        own.push(Program {
            code: filter.filter.clone(),
            flags: u64::from(filter.flags.unwrap_or(0)) & KEPT_FLAGS,
        });
    }
    own.reverse();
    let skip = usize::from(runtimes && !policy.is_empty() && !own.is_empty());
    Ok(policy.iter().cloned().chain(own.into_iter().skip(skip)).collect())
}

/// Loads the programs, in the thread. It needs CAP_SYS_ADMIN or no_new_privs: before its credentials are set.
pub fn restore(batch: &mut Batch, programs: &[Program], strict: bool) -> Result<()> {
    batch.about("cannot load the seccomp filter");
    for program in programs {
        let code = batch.data(&program.code);
        let count =
            u16::try_from(program.code.len() / 8).map_err(|_| Error::new("a seccomp filter is too long"))?;
        let mut raw = [0_u8; 16];
        raw[..2].copy_from_slice(&count.to_ne_bytes());
        let prog = batch.data(&raw);
        batch.link(prog, 8, code);
        batch.call(libc::SYS_seccomp, &[SECCOMP_SET_MODE_FILTER.into(), program.flags.into(), prog]);
    }
    if strict {
        batch.call(libc::SYS_prctl, &[PR_SET_SECCOMP.into(), MODE_STRICT.into()]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(byte: u8, prev: Option<u32>) -> SeccompFilter {
        SeccompFilter { filter: vec![byte; 8], prev, flags: Some(7) }
    }
    fn thread(filter: u32) -> ThreadCoreEntry {
        ThreadCoreEntry {
            seccomp_mode: Some(SeccompMode::Filter.into()),
            seccomp_filter: Some(filter),
            ..ThreadCoreEntry::default()
        }
    }
    fn codes(programs: &[Program]) -> Vec<u8> {
        programs.iter().map(|p| p.code[0]).collect()
    }

    #[test]
    fn the_destinations_filter_replaces_the_lowest() {
        let image =
            SeccompEntry { seccomp_filters: vec![filter(1, None), filter(2, Some(0)), filter(3, Some(0))] };
        let policy = vec![Program { code: vec![9; 8], flags: 0 }];
        let get = |core: &ThreadCoreEntry, runtimes, policy: &Policy| {
            chain(Some(&image), core, runtimes, policy).unwrap()
        };
        assert_eq!(codes(&get(&thread(2), true, &policy)), [9, 3]);
        assert_eq!(codes(&get(&thread(0), true, &policy)), [9]);
        assert_eq!(codes(&get(&thread(1), false, &policy)), [9, 1, 2]);
        // Without one of its own, the destination keeps the image's: never less confined.
        assert_eq!(codes(&get(&thread(1), true, &Vec::new())), [1, 2]);
        // A process without any filter gets the destination's.
        assert_eq!(codes(&get(&ThreadCoreEntry::default(), true, &policy)), [9]);
        assert_eq!(get(&thread(0), false, &Vec::new())[0].flags, 6, "only flags that are properties");
    }

    #[test]
    fn damaged_chains_are_refused() {
        let image = SeccompEntry { seccomp_filters: vec![filter(1, Some(0)), SeccompFilter::default()] };
        let policy = Vec::new();
        assert!(chain(Some(&image), &thread(0), true, &policy).is_err());
        assert!(chain(Some(&image), &thread(1), true, &policy).is_err());
        assert!(chain(Some(&image), &thread(2), true, &policy).is_err());
        assert!(chain(None, &thread(0), true, &policy).is_err());
    }

    #[test]
    fn equal_filters_are_stored_once() {
        let mut filters = Filters::default();
        let a = filters.add(None, vec![1], 0);
        let b = filters.add(Some(a), vec![1], 0);
        assert_eq!(filters.add(None, vec![1], 0), a);
        assert_ne!(a, b);
        assert_eq!(filters.finish().unwrap().seccomp_filters.len(), 2);
        assert_eq!(Filters::default().finish(), None);
    }
}
