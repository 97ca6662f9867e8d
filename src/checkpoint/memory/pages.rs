//! Which pages of a mapping are the process's own and have to be saved.
//!
//! A page is saved when it is in memory or in swap, and neither the zero page nor the file's. `PAGEMAP_SCAN` gives ranges
//! of such pages; before Linux 6.7 the eight bytes a page of `/proc/PID/pagemap` tell the same, except for the zero
//! page, which is then saved like any other.
//!
//! Where writes are noted (see `track`), the same pass tells which of the pages have not been written since.

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
    flags: 0,
};
const GUARDS: Query =
    Query { inverted: 0, all: scan::PAGE_IS_GUARD, any: 0, report: scan::PAGE_IS_GUARD, flags: 0 };

// proc_pid_pagemap(5)
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_GUARD: u64 = 1 << 58;
const ENTRY_SOFT_DIRTY: u64 = 1 << 55;

/// How writes have been noted, if they have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// They have not: every page counts as written.
    None,
    /// By write protection.
    Protection,
    /// By write protection, and what was written is protected again in the same pass.
    ProtectionAgain,
    /// By soft-dirty bits.
    SoftDirty,
}

/// Pages to be saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Where they are.
    pub range: Range<u64>,
    /// They have not been written since writes were last begun to be noted.
    pub clean: bool,
}

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
    #[cfg(test)]
    fn saved(&mut self, within: Range<u64>) -> Result<Vec<Range<u64>>> {
        Ok(self.saved_since(within, Marks::None)?.into_iter().map(|saved| saved.range).collect())
    }

    /// The pages within `within` that have to be saved, in order, touching ranges that are alike joined.
    pub fn saved_since(&mut self, within: Range<u64>, marks: Marks) -> Result<Vec<Saved>> {
        const NOTED: u64 = scan::PAGE_IS_WPALLOWED | scan::PAGE_IS_WRITTEN;
        let (report, flags) = match marks {
            Marks::None => (0, 0),
            // A kernel that has soft-dirty bits and scans is asked for them in the old way.
            Marks::SoftDirty => {
                self.scans = false;
                (0, 0)
            }
            Marks::Protection => (NOTED, 0),
            Marks::ProtectionAgain => (NOTED, scan::PM_SCAN_WP_MATCHING),
        };
        let mut found: Vec<Saved> = Vec::new();
        let matches = |entry: u64| {
            let saved =
                entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 && entry & (ENTRY_FILE | ENTRY_GUARD) == 0;
            let clean = marks == Marks::SoftDirty && entry & ENTRY_SOFT_DIRTY == 0;
            saved.then_some(if clean { scan::PAGE_IS_WPALLOWED } else { 0 })
        };
        self.find(within, Query { report, flags, ..SAVED }, matches, &mut |range, kind| {
            let clean = kind & NOTED == scan::PAGE_IS_WPALLOWED;
            match found.last_mut() {
                Some(last) if last.range.end == range.start && last.clean == clean => {
                    last.range.end = range.end;
                }
                _ => found.push(Saved { range, clean }),
            }
        })?;
        Ok(found)
    }

    /// The pages within `within` that are there, whatever is in them.
    pub fn present(&mut self, within: Range<u64>) -> Result<Vec<Range<u64>>> {
        const THERE: Query = Query {
            inverted: 0,
            all: 0,
            any: scan::PAGE_IS_PRESENT | scan::PAGE_IS_SWAPPED,
            report: 0,
            flags: 0,
        };
        let mut found = Vec::new();
        let matches = |entry: u64| (entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0).then_some(0);
        self.find(within, THERE, matches, &mut |range, _| push(&mut found, range))?;
        Ok(found)
    }

    /// The pages within `within` that `MADV_GUARD_INSTALL` made inaccessible.
    pub fn guards(&mut self, within: Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        self.find(within, GUARDS, |entry| (entry & ENTRY_GUARD != 0).then_some(0), &mut |range, _| {
            push(&mut found, range);
        })?;
        Ok(found)
    }

    /// Calls `found` for each range of pages of one kind: a scan's, or, without scans, a page's of the kind that
    /// `matches` gives.
    fn find(
        &mut self,
        within: Range<u64>,
        query: Query,
        matches: impl Fn(u64) -> Option<u64>,
        found: &mut dyn FnMut(Range<u64>, u64),
    ) -> Result<()> {
        while self.scans {
            let known = if self.knows_guards { query } else { query.without(scan::PAGE_IS_GUARD) };
            if known.any | known.all == 0 {
                return Ok(());
            }
            // An unknown bit or ioctl is refused before anything is found.
            match self.scan(within.clone(), known, found) {
                Err(error) if error.errno() == Some(Errno::ENOTTY) => self.scans = false,
                Err(error) if error.errno() == Some(Errno::EINVAL) && self.knows_guards => {
                    self.knows_guards = false;
                }
                done => return done,
            }
        }
        self.read(within, matches, found)
    }

    fn scan(&self, within: Range<u64>, query: Query, found: &mut dyn FnMut(Range<u64>, u64)) -> Result<()> {
        let mut regions = [Region::default(); 512];
        let mut at = within.start;
        while at < within.end {
            let (count, walked) = scan::scan(&self.file, at, within.end, query, &mut regions)
                .during("cannot scan the page map", || format!("ioctl(pagemap, PAGEMAP_SCAN, {at:#x})"))?;
            for region in regions.iter().take(count) {
                found(region.start..region.end, region.categories);
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
        matches: impl Fn(u64) -> Option<u64>,
        found: &mut dyn FnMut(Range<u64>, u64),
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
                if let Some(kind) = matches(u64::from_ne_bytes(*entry)) {
                    found(at..at + PAGE, kind);
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
