//! What has been written of memory of which an earlier set has most, without looking at all of it.
//!
//! ```text
//!   known     ████████████████████████    of the earlier set
//!   written   ..#....##..........#....    a scan that reports nothing else: a tenth of the time of one that reports all
//!   clean     ██.████..██████████.████    known, and not written
//! ```
//!
//! A page that has been given back counts as written, and is not there.

use std::ops::Range;

use super::{FOUND, Pagemap};
use crate::checkpoint::error::Result;
use crate::sys::pagemap::{self as scan, Query};

/// Written since, or a guard. What is written may be there or not, and the zero page.
const CHANGED: Query = Query {
    inverted: 0,
    all: 0,
    any: scan::PAGE_IS_WRITTEN | scan::PAGE_IS_GUARD,
    report: scan::PAGE_IS_WRITTEN | THERE | scan::PAGE_IS_PFNZERO | scan::PAGE_IS_GUARD,
    flags: 0,
};
/// Written since, and there: protected again.
const PROTECTED: Query = Query {
    inverted: scan::PAGE_IS_PFNZERO,
    all: scan::PAGE_IS_PFNZERO | scan::PAGE_IS_WRITTEN,
    flags: scan::PM_SCAN_WP_MATCHING,
    ..FOUND
};
const THERE: u64 = scan::PAGE_IS_PRESENT | scan::PAGE_IS_SWAPPED;

/// A range of pages with its bits, as a scan reports it.
type Part = (Range<u64>, u64);

impl Pagemap {
    /// What is to be saved of anonymous mappings, the guards in them, and what of `known` is as it was, in order. `again`:
    /// what has been written is protected anew.
    ///
    /// None: the kernel cannot tell, or some pages look as if nobody had written to them because nobody watched.
    pub(super) fn changes(
        &mut self,
        mappings: &[Range<u64>],
        known: &[Range<u64>],
        again: bool,
    ) -> Result<Option<Vec<Part>>> {
        let none = |_: u64| None;
        let (Some(first), Some(last)) = (mappings.first(), mappings.last()) else { return Ok(None) };
        let hull = first.start..last.end;
        if !self.scans || !self.unwatched(mappings, true)?.is_empty() {
            return Ok(None);
        }
        let mut changed: Vec<Part> = Vec::new();
        self.find(mappings, CHANGED, &none, &mut |range, kind| changed.push((range, kind)))?;
        // Of a program that runs: what has been written since the first look is found by the second.
        let mut protected: Vec<Part> = Vec::new();
        if again {
            self.find(mappings, PROTECTED, &none, &mut |range, kind| protected.push((range, kind)))?;
        }
        if !self.scans {
            return Ok(None);
        }
        let inside = known.iter().map(|known| known.start.max(hull.start)..known.end.min(hull.end));
        let clean = without(inside.filter(|range| range.start < range.end), changed.iter().map(|(r, _)| r));
        let clean = without(clean.into_iter(), protected.iter().map(|(range, _)| range));
        let is_guard = |kind: u64| kind & scan::PAGE_IS_GUARD != 0;
        let to_save = |kind: u64| kind & THERE != 0 && kind & scan::PAGE_IS_PFNZERO == 0;
        changed.retain(|(_, kind)| is_guard(*kind) || !again && to_save(*kind));
        changed.extend(protected.into_iter().filter(|(_, kind)| !is_guard(*kind)));
        changed.extend(clean.into_iter().map(|range| (range, scan::PAGE_IS_WPALLOWED | THERE)));
        changed.sort_unstable_by_key(|(range, _)| range.start);
        Ok(Some(changed))
    }
}

/// What is left of `ranges` when `cuts` are taken out; both are in order.
fn without<'a>(
    ranges: impl Iterator<Item = Range<u64>>,
    cuts: impl Iterator<Item = &'a Range<u64>>,
) -> Vec<Range<u64>> {
    let mut cuts = cuts.peekable();
    let mut left = Vec::new();
    for Range { start: mut at, end } in ranges {
        while at < end {
            while cuts.next_if(|cut| cut.end <= at).is_some() {}
            let Some(cut) = cuts.peek().filter(|cut| cut.start < end) else {
                left.push(at..end);
                break;
            };
            if at < cut.start {
                left.push(at..cut.start);
            }
            at = cut.end;
        }
    }
    left
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use std::num::NonZeroUsize;
    use std::os::fd::AsFd;

    use super::super::{Area, Found, Marks, PAGE};
    use super::*;
    use crate::sys::memory::Anonymous;
    use crate::sys::userfaultfd;

    #[test]
    fn cuts_are_taken_out() {
        let left = |ranges: &[Range<u64>], cuts: &[Range<u64>]| without(ranges.iter().cloned(), cuts.iter());
        assert_eq!(left(&[0..10, 20..30], &[]), [0..10, 20..30]);
        assert_eq!(left(&[0..10, 20..30], &[2..4, 8..22, 25..26]), [0..2, 4..8, 22..25, 26..30]);
        assert_eq!(left(&[4..6, 8..9], &[0..10]), []);
        assert_eq!(left(&[0..10], &[0..1, 9..12]), [1..9]);
        assert_eq!(left(&[10..20], &[0..5, 20..25]), [10..20]);
    }

    const PAGES: u64 = 64;

    /// What is found of 64 pages, one letter each: written, clean, guard, or nothing to be saved.
    fn letters(base: u64, marks: Marks, known: &[Range<u64>]) -> String {
        let mut map = Pagemap::open(std::process::id().cast_signed()).unwrap();
        let mut letters = vec![b'.'; PAGES as usize];
        let area = [Area { range: base..base + PAGES * PAGE, anonymous: true }];
        map.survey(&area, marks, known, &mut |_, range, what| {
            let letter = match what {
                Found::Written => b'w',
                Found::Clean => b'c',
                Found::Guard => b'g',
            };
            letters[((range.start - base) / PAGE) as usize..((range.end - base) / PAGE) as usize]
                .fill(letter);
        })
        .unwrap();
        String::from_utf8(letters).unwrap()
    }

    /// Both ways of looking find the same, whatever has been done to the memory in between.
    #[test]
    fn what_is_found_by_its_changes_is_what_a_look_at_all_of_it_finds() {
        let Ok(uffd) = userfaultfd::open(libc::O_CLOEXEC | userfaultfd::UFFD_USER_MODE_ONLY) else { return };
        let features = userfaultfd::FEATURE_WP_ASYNC | userfaultfd::FEATURE_WP_UNPOPULATED;
        if userfaultfd::api(uffd.as_fd(), features).is_err() {
            return; // before Linux 6.7
        }
        let size = NonZeroUsize::new((PAGES * PAGE) as usize).unwrap();
        let mut memory = Anonymous::private(size).unwrap();
        let base = memory.address();
        userfaultfd::register_protected(uffd.as_fd(), base, PAGES * PAGE).unwrap();
        for page in (0..PAGES as usize).filter(|page| page % 8 != 7) {
            memory.as_mut_slice()[page * 4096] = 1;
        }
        let mut x = 88_172_645_463_325_252_u64;
        let mut next = move |below: u64| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x % below) as usize
        };
        for round in 0..200 {
            // All that is there is known then, and protected.
            let all = letters(base, Marks::ProtectionAgain, &[]);
            let known: Vec<Range<u64>> = (0u64..)
                .zip(all.bytes())
                .filter(|(_, letter)| matches!(letter, b'w' | b'c'))
                .map(|(page, _)| base + page * PAGE..base + (page + 1) * PAGE)
                .collect();
            for _ in 0..next(12) {
                let page = next(PAGES);
                match next(4) {
                    0 => memory.give_back(page * 4096, 4096 * (1 + next(3)).min(PAGES as usize - page)),
                    1 => _ = memory.guard(page * 4096, 4096),
                    // Reading maps the zero page where there is none; a guard is not to be touched.
                    what => {
                        let now = letters(base, Marks::Protection, &[]);
                        if now.as_bytes()[page] == b'g' {
                            memory.give_back(page * 4096, 4096);
                        } else if what == 2 {
                            memory.as_mut_slice()[page * 4096] = 2;
                        } else {
                            assert!(memory.as_slice()[page * 4096] < 3);
                        }
                    }
                }
            }
            let (slow, quick) =
                (letters(base, Marks::Protection, &[]), letters(base, Marks::Protection, &known));
            assert_eq!(slow, quick, "round {round}");
            if round % 2 == 0 {
                assert_eq!(quick, letters(base, Marks::ProtectionAgain, &known), "round {round}, protected");
                assert!(
                    !letters(base, Marks::Protection, &[]).contains('w'),
                    "round {round}: all is protected"
                );
            }
        }
    }
}
