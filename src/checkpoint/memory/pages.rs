//! Which pages of a mapping are the process's own and have to be saved.
//!
//! A page is saved when it is in memory or in swap, and neither the zero page nor the file's. `PAGEMAP_SCAN` gives ranges
//! of such pages; before Linux 6.7 the eight bytes a page of `/proc/PID/pagemap` tell the same, except for the zero
//! page, which is then saved like any other.
//!
//! Where writes are noted (see `track`), the same pass tells which of the pages have not been written since; and it finds
//! the guards. One scan serves all mappings: it skips what lies between them, and a call for each would cost more than
//! what it finds. Whether a page is a file's is asked only where there may be a file: for that the kernel has to look at
//! the page itself, and not only at its entry in the page table.

mod changes;

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

/// What is found is none of these.
const LEFT_OUT: u64 = scan::PAGE_IS_PFNZERO | scan::PAGE_IS_FILE;
const FOUND: Query = Query {
    inverted: LEFT_OUT,
    all: LEFT_OUT,
    any: scan::PAGE_IS_PRESENT | scan::PAGE_IS_SWAPPED,
    // A guard counts as swapped out. Nothing else is reported, so that ranges are cut only where something differs.
    report: scan::PAGE_IS_GUARD,
    flags: 0,
};
/// Regions that one call can find: as many as the kernel gathers at once. With room for more it goes on, but (in Linux
/// 6.18) says of a walk that then reaches its end that it ended where the first of these were full.
const REGIONS: usize = 512;

// proc_pid_pagemap(5)
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_GUARD: u64 = 1 << 58;
const ENTRY_SOFT_DIRTY: u64 = 1 << 55;

/// A mapping to be surveyed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    /// Where it is.
    pub range: Range<u64>,
    /// There is no file behind it, nor memory that others share.
    pub anonymous: bool,
}

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

/// What pages next to each other are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// To be saved: written, as far as is known.
    Written,
    /// To be saved, but not written since writes were last begun to be noted.
    Clean,
    /// Inaccessible by `MADV_GUARD_INSTALL`.
    Guard,
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

    /// Calls `found` for the pages of each of the mappings, which are in ascending order: with its index, and in order,
    /// touching ranges that are alike joined. `known`: the pages that an earlier set has, in ascending order. Others that
    /// have not been written since need not be found.
    pub fn survey(
        &mut self,
        areas: &[Area],
        marks: Marks,
        known: &[Range<u64>],
        found: &mut dyn FnMut(usize, Range<u64>, Found),
    ) -> Result<()> {
        const NOTED: u64 = scan::PAGE_IS_WPALLOWED | scan::PAGE_IS_WRITTEN;
        let noted = NOTED | scan::PAGE_IS_PRESENT;
        let (report, flags) = match marks {
            Marks::None => (0, 0),
            // A kernel that has soft-dirty bits and scans is asked for them in the old way.
            Marks::SoftDirty => {
                self.scans = false;
                (0, 0)
            }
            Marks::Protection => (noted, 0),
            Marks::ProtectionAgain => (noted, scan::PM_SCAN_WP_MATCHING),
        };
        let query = Query { report: FOUND.report | report, flags, ..FOUND };
        let matches = |entry: u64| {
            let there = entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 && entry & ENTRY_FILE == 0;
            let clean = marks == Marks::SoftDirty && entry & ENTRY_SOFT_DIRTY == 0;
            match () {
                () if entry & ENTRY_GUARD != 0 => Some(scan::PAGE_IS_GUARD),
                () if there && clean => Some(scan::PAGE_IS_WPALLOWED | scan::PAGE_IS_PRESENT),
                () if there => Some(0),
                () => None,
            }
        };
        let mut next = 0;
        // What is held back until it is known whether it goes on.
        let mut last: Option<(usize, Range<u64>, Found)> = None;
        let mut sort = |range: Range<u64>, kind: u64| {
            let what = match () {
                () if kind & scan::PAGE_IS_GUARD != 0 => Found::Guard,
                () if kind & NOTED == scan::PAGE_IS_WPALLOWED => Found::Clean,
                () => Found::Written,
            };
            while areas.get(next).is_some_and(|area| area.range.end <= range.start) {
                next += 1;
            }
            let there = areas.iter().enumerate().skip(next);
            for (index, area) in there.take_while(|(_, area)| area.range.start < range.end) {
                let part = area.range.start.max(range.start)..area.range.end.min(range.end);
                // What was given back of a private mapping of a file keeps its mark, and is the file's again.
                let given_back = !area.anonymous && kind & scan::PAGE_IS_PRESENT == 0;
                let what = if what == Found::Clean && given_back { Found::Written } else { what };
                match &mut last {
                    Some((of, before, kind)) if *of == index && *kind == what && before.end == part.start => {
                        before.end = part.end;
                    }
                    _ => {
                        if let Some((index, range, what)) = last.replace((index, part, what)) {
                            found(index, range, what);
                        }
                    }
                }
            }
        };
        for group in areas.chunk_by(|one, next| one.anonymous == next.anonymous) {
            let ranges: Vec<Range<u64>> = group.iter().map(|area| area.range.clone()).collect();
            let anonymous = group.first().is_some_and(|area| area.anonymous);
            if anonymous && !known.is_empty() && matches!(marks, Marks::Protection | Marks::ProtectionAgain) {
                if let Some(parts) = self.changes(&ranges, known, marks == Marks::ProtectionAgain)? {
                    parts.into_iter().for_each(|(range, kind)| sort(range, kind));
                    continue;
                }
            }
            let query = if anonymous { query.without(scan::PAGE_IS_FILE) } else { query };
            self.find(&ranges, query, &matches, &mut sort)?;
        }
        if let Some((index, range, what)) = last {
            found(index, range, what);
        }
        Ok(())
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
        self.find(&[within], THERE, &matches, &mut |range, _| push(&mut found, range))?;
        Ok(found)
    }

    /// Pages of the mappings, which are in ascending order, to which writes are not noted; where the kernel cannot say,
    /// none. `marked`: only those that look as if nobody had written to them all the same.
    pub fn unwatched(&self, mappings: &[Range<u64>], marked: bool) -> Result<Vec<Range<u64>>> {
        let left_out = LEFT_OUT | scan::PAGE_IS_WPALLOWED | if marked { scan::PAGE_IS_WRITTEN } else { 0 };
        let query = Query { inverted: left_out, all: left_out, report: 0, ..FOUND };
        let (Some(first), Some(last)) = (mappings.first(), mappings.last()) else { return Ok(Vec::new()) };
        let (mut parts, mut next) = (Vec::new(), 0);
        self.scan(first.start..last.end, query, &mut |range, _| {
            while mappings.get(next).is_some_and(|mapping| mapping.end <= range.start) {
                next += 1;
            }
            for mapping in mappings[next..].iter().take_while(|mapping| mapping.start < range.end) {
                push(&mut parts, mapping.start.max(range.start)..mapping.end.min(range.end));
            }
        })?;
        Ok(parts)
    }

    /// Calls `found` for each range of pages of one kind: a scan's, which may reach beyond the mappings, or, without scans,
    /// a page's of the kind that `matches` gives.
    fn find(
        &mut self,
        mappings: &[Range<u64>],
        query: Query,
        matches: &impl Fn(u64) -> Option<u64>,
        found: &mut dyn FnMut(Range<u64>, u64),
    ) -> Result<()> {
        let (Some(first), Some(last)) = (mappings.first(), mappings.last()) else { return Ok(()) };
        while self.scans {
            let known = if self.knows_guards { query } else { query.without(scan::PAGE_IS_GUARD) };
            // An unknown bit or ioctl is refused before anything is found.
            match self.scan(first.start..last.end, known, found) {
                Err(error) if error.errno() == Some(Errno::ENOTTY) => self.scans = false,
                Err(error) if error.errno() == Some(Errno::EINVAL) && self.knows_guards => {
                    self.knows_guards = false;
                }
                done => return done,
            }
        }
        mappings.iter().try_for_each(|mapping| self.read(mapping.clone(), matches, found))
    }

    fn scan(&self, within: Range<u64>, query: Query, found: &mut dyn FnMut(Range<u64>, u64)) -> Result<()> {
        let mut regions = vec![Region::default(); REGIONS];
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
        matches: &impl Fn(u64) -> Option<u64>,
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

    fn found(map: &mut Pagemap, mappings: &[Range<u64>]) -> Vec<(usize, Range<u64>, Found)> {
        let mut all = Vec::new();
        let areas: Vec<_> = mappings.iter().map(|m| Area { range: m.clone(), anonymous: true }).collect();
        let mut add = |index, range, what| all.push((index, range, what));
        map.survey(&areas, Marks::None, &[], &mut add).unwrap();
        all
    }

    /// Pages 1, 2 and 5 of 8 written, page 7 read (the zero page), both ways of finding them.
    #[test]
    fn written_pages_are_found_and_the_zero_page_is_not() {
        let (mut memory, range) = eight_pages();
        for page in [1, 2, 5] {
            memory.as_mut_slice()[page * 4096] = 1;
        }
        assert_eq!(memory.as_slice()[7 * 4096], 0);
        let at = |page: u64| range.start + page * PAGE;
        let written = |index, from, to| (index, at(from)..at(to), Found::Written);
        let expected = [written(0, 1, 3), written(0, 5, 6)];
        let whole = std::slice::from_ref(&range);
        assert_eq!(found(&mut Pagemap::open(pid()).unwrap(), whole), expected);
        assert_eq!(found(&mut Pagemap::open_old(pid()).unwrap(), whole)[..2], expected);
        // Each mapping gets its own, and nobody what lies between.
        let parts = [at(0)..at(2), at(2)..at(3), at(4)..at(5), at(5)..at(7)];
        let expected = [written(0, 1, 2), written(1, 2, 3), written(3, 5, 6)];
        assert_eq!(found(&mut Pagemap::open(pid()).unwrap(), &parts), expected);
        assert_eq!(found(&mut Pagemap::open_old(pid()).unwrap(), &parts), expected);
        assert_eq!(found(&mut Pagemap::open(pid()).unwrap(), &[]), []);
    }

    #[test]
    fn more_ranges_than_one_call_finds_come_once_and_in_order() {
        let pages = 2 * REGIONS as u64 * 3 + 1;
        let size = NonZeroUsize::new(usize::try_from(pages * PAGE).unwrap()).unwrap();
        let mut memory = Anonymous::private(size).unwrap();
        memory.as_mut_slice().chunks_mut(4096).step_by(2).for_each(|page| page[0] = 1);
        let (start, end) = (memory.address(), memory.address() + pages * PAGE);
        let expected: Vec<_> =
            (start..end).step_by(8192).map(|at| (0, at..at + PAGE, Found::Written)).collect();
        assert!(found(&mut Pagemap::open(pid()).unwrap(), &[start..end]) == expected);
    }

    #[test]
    fn clean_pages_of_a_file_are_not_saved() {
        let maps = maps::read(pid()).unwrap();
        let code = maps.iter().find(|m| m.prot & 4 != 0 && m.inode != 0).unwrap();
        let areas = [Area { range: code.start..code.end, anonymous: false }];
        for mut map in [Pagemap::open(pid()).unwrap(), Pagemap::open_old(pid()).unwrap()] {
            map.survey(&areas, Marks::None, &[], &mut |_, range, _| panic!("{range:x?}")).unwrap();
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
        let expected =
            [(0, base..base + PAGE, Found::Written), (0, base + 3 * PAGE..base + 5 * PAGE, Found::Guard)];
        for mut map in [Pagemap::open(pid()).unwrap(), Pagemap::open_old(pid()).unwrap()] {
            assert_eq!(found(&mut map, std::slice::from_ref(&range)), expected);
        }
    }
}
