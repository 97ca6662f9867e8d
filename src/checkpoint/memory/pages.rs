//! Which pages of a mapping are the process's own and have to be saved.
//!
//! A page is saved when it is in memory or in swap, and neither the zero page nor the file's. `PAGEMAP_SCAN` gives ranges
//! of such pages; before Linux 6.7 the eight bytes a page of `/proc/PID/pagemap` tell the same, except for the zero
//! page, which is then saved like any other.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::checkpoint::error::{Context, Error, Result};
use crate::sys::pagemap::{self as scan, Query, Region};

/// Size of a page.
pub const PAGE: u64 = 4096;

/// What `/proc/PID/pagemap` knows of one address space.
pub struct Pagemap {
    file: File,
    /// The kernel has `PAGEMAP_SCAN`: 6.7.
    scans: bool,
    /// The scan knows guards: 6.15. They can be installed since 6.13; those two kernels fail to read such a page.
    knows_guards: bool,
}

/// What is saved is none of these. A guard counts as swapped out.
const LEFT_OUT: u64 = scan::PAGE_IS_PFNZERO | scan::PAGE_IS_FILE | scan::PAGE_IS_GUARD;
const SAVED: Query = Query {
    inverted: LEFT_OUT,
    all: LEFT_OUT,
    any: scan::PAGE_IS_PRESENT | scan::PAGE_IS_SWAPPED,
    // Nothing is reported, so that ranges are cut only where a page is left out.
    report: 0,
};
const GUARDS: Query = Query { inverted: 0, all: scan::PAGE_IS_GUARD, any: 0, report: scan::PAGE_IS_GUARD };

// proc_pid_pagemap(5)
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_GUARD: u64 = 1 << 58;

impl Pagemap {
    /// The address space of a process.
    pub fn open(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).during("cannot read the page map", || format!("open({path:?})"))?;
        Ok(Self { file, scans: true, knows_guards: true })
    }

    /// As [`Self::open`], for a kernel without `PAGEMAP_SCAN`.
    #[cfg(test)]
    fn open_old(pid: i32) -> Result<Self> {
        Self::open(pid).map(|map| Self { scans: false, ..map })
    }

    /// The pages within `within` that have to be saved, in order, touching ranges joined.
    pub fn saved(&mut self, within: Range<u64>) -> Result<Vec<Range<u64>>> {
        self.find(within, SAVED, |entry| {
            entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 && entry & (ENTRY_FILE | ENTRY_GUARD) == 0
        })
    }

    /// The pages within `within` that `MADV_GUARD_INSTALL` made inaccessible.
    pub fn guards(&mut self, within: Range<u64>) -> Result<Vec<Range<u64>>> {
        self.find(within, GUARDS, |entry| entry & ENTRY_GUARD != 0)
    }

    fn find(
        &mut self,
        within: Range<u64>,
        query: Query,
        matches: impl Fn(u64) -> bool,
    ) -> Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        while self.scans {
            let known = if self.knows_guards { query } else { query.without(scan::PAGE_IS_GUARD) };
            if known.any | known.all == 0 {
                return Ok(found);
            }
            match self.scan(within.clone(), known, &mut found) {
                Err(error) if error.errno() == Some(Errno::ENOTTY) => self.scans = false,
                Err(error) if error.errno() == Some(Errno::EINVAL) && self.knows_guards => {
                    self.knows_guards = false;
                }
                done => return done.map(|()| found),
            }
        }
        self.read(within, matches, &mut found)?;
        Ok(found)
    }

    fn scan(&self, within: Range<u64>, query: Query, found: &mut Vec<Range<u64>>) -> Result<()> {
        let mut regions = [Region::default(); 512];
        let mut at = within.start;
        while at < within.end {
            let (count, walked) = scan::scan(&self.file, at, within.end, query, &mut regions)
                .during("cannot scan the page map", || format!("ioctl(pagemap, PAGEMAP_SCAN, {at:#x})"))?;
            for region in regions.iter().take(count) {
                push(found, region.start..region.end);
            }
            if walked <= at {
                return Err(Error::new("the scan of the page map does not advance"));
            }
            at = walked;
        }
        Ok(())
    }

    fn read(
        &self,
        within: Range<u64>,
        matches: impl Fn(u64) -> bool,
        found: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let mut entries = vec![0u8; 64 << 10];
        let mut at = within.start;
        while at < within.end {
            let bytes =
                usize::try_from((within.end - at) / PAGE * 8).unwrap_or(usize::MAX).min(entries.len());
            let part = &mut entries[..bytes];
            self.file
                .read_exact_at(part, at / PAGE * 8)
                .during("cannot read the page map", || format!("pread(pagemap, {at:#x})"))?;
            for entry in part.as_chunks::<8>().0 {
                if matches(u64::from_ne_bytes(*entry)) {
                    push(found, at..at + PAGE);
                }
                at += PAGE;
            }
        }
        Ok(())
    }
}

/// Adds a range behind the others, or makes the last one longer.
fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::checkpoint::memory::maps;
    use crate::sys::memory::Anonymous;

    fn eight_pages() -> (Anonymous, Range<u64>) {
        let memory = Anonymous::private(NonZeroUsize::new(8 * 4096).unwrap()).unwrap();
        let range = memory.address()..memory.address() + 8 * PAGE;
        (memory, range)
    }

    fn pid() -> i32 {
        std::process::id().cast_signed()
    }

    /// Pages 1, 2 and 5 of 8 written, page 7 read (the zero page), both ways of finding them.
    #[test]
    fn written_pages_are_found_and_the_zero_page_is_not() {
        let (mut memory, range) = eight_pages();
        for page in [1, 2, 5] {
            memory.as_mut_slice()[page * 4096] = 1;
        }
        assert_eq!(memory.as_slice()[7 * 4096], 0);
        let base = range.start;
        let expected = [base + PAGE..base + 3 * PAGE, base + 5 * PAGE..base + 6 * PAGE];
        assert_eq!(Pagemap::open(pid()).unwrap().saved(range.clone()).unwrap(), expected);
        let old = Pagemap::open_old(pid()).unwrap().saved(range).unwrap();
        assert_eq!(old[..2], expected);
    }

    #[test]
    fn clean_pages_of_a_file_are_not_saved() {
        let maps = maps::read(pid()).unwrap();
        let code = maps.iter().find(|m| m.prot & 4 != 0 && m.inode != 0).unwrap();
        for mut map in [Pagemap::open(pid()).unwrap(), Pagemap::open_old(pid()).unwrap()] {
            assert_eq!(map.saved(code.start..code.end).unwrap(), []);
        }
    }

    #[test]
    fn guards_are_found() {
        let (mut memory, range) = eight_pages();
        memory.as_mut_slice()[0] = 1;
        if !memory.guard(3 * 4096, 2 * 4096) {
            return; // before Linux 6.13
        }
        let base = range.start;
        let mut map = Pagemap::open(pid()).unwrap();
        assert_eq!(map.guards(range.clone()).unwrap(), vec![base + 3 * PAGE..base + 5 * PAGE]);
        assert_eq!(map.saved(range).unwrap(), [base..base + PAGE]);
    }
}
