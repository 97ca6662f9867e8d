//! What is still to be filled of one address space, and from where. It follows what the program does to its mappings.
//!
//! ```text
//!   0x1000 ─ 0x9000   file 0, from byte 0           fault 0x4000: taken out, filled    ─> 0x1000 ─ 0x4000, 0x5000 ─ 0x9000
//!                                                   mremap: moved with its place in the file
//!                                                   munmap, madvise: taken out
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

use crate::checkpoint::memory::pagemap::Run;

/// Where the rest of a run lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rest {
    end: u64,
    file: usize,
    offset: u64,
}

/// Runs that are still to be filled, by the address where they are now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    runs: BTreeMap<u64, Rest>,
    bytes: u64,
}

impl Table {
    /// Adds a run, of which nothing may be there yet.
    pub fn add(&mut self, run: Run) {
        self.bytes += run.range.end - run.range.start;
        self.runs.insert(run.range.start, Rest { end: run.range.end, file: run.file, offset: run.offset });
    }

    /// How many bytes are left.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first part, of at most `most` bytes.
    pub fn first(&self, most: u64) -> Option<Run> {
        let (&start, rest) = self.runs.first_key_value()?;
        let range = start..rest.end.min(start.saturating_add(most));
        Some(Run { range, file: rest.file, offset: rest.offset })
    }

    /// The part around `page` that lies within the `window` bytes, a power of two, around it.
    pub fn around(&self, page: u64, window: u64) -> Option<Run> {
        let (&start, rest) = self.runs.range(..=page).next_back()?;
        if rest.end <= page {
            return None;
        }
        let low = page & !(window - 1);
        let from = start.max(low);
        let range = from..rest.end.min(low.saturating_add(window));
        Some(Run { range, file: rest.file, offset: rest.offset + (from - start) })
    }

    /// Takes everything within a range out, and returns it.
    pub fn cut(&mut self, range: &Range<u64>) -> Vec<Run> {
        let mut found = Vec::new();
        let before = self.runs.range(..range.start).next_back().filter(|(_, rest)| rest.end > range.start);
        let first = before.map_or(range.start, |(&start, _)| start);
        let starts: Vec<u64> = self.runs.range(first..range.end).map(|(&start, _)| start).collect();
        for start in starts {
            let Some(rest) = self.runs.remove(&start) else { continue };
            if start < range.start {
                self.runs.insert(start, Rest { end: range.start, ..rest });
            }
            if rest.end > range.end {
                let offset = rest.offset + (range.end - start);
                self.runs.insert(range.end, Rest { offset, ..rest });
            }
            let part = start.max(range.start)..rest.end.min(range.end);
            self.bytes -= part.end - part.start;
            let offset = rest.offset + (part.start - start);
            found.push(Run { range: part, file: rest.file, offset });
        }
        found
    }

    /// Memory has moved.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        let moved = self.cut(&(from..from.saturating_add(len)));
        self.cut(&(to..to.saturating_add(len)));
        for run in moved {
            let start = run.range.start - from + to;
            self.add(Run { range: start..start + (run.range.end - run.range.start), ..run });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, end: u64, offset: u64) -> Run {
        Run { range: start..end, file: 0, offset }
    }

    fn table(runs: &[(u64, u64, u64)]) -> Table {
        let mut table = Table::default();
        runs.iter().for_each(|&(start, end, offset)| table.add(run(start, end, offset)));
        table
    }

    #[test]
    fn a_part_taken_out_leaves_the_rest_with_its_place() {
        let mut t = table(&[(0x1000, 0x9000, 0)]);
        assert_eq!(t.cut(&(0x4000..0x5000)), [run(0x4000, 0x5000, 0x3000)]);
        assert_eq!(t, table(&[(0x1000, 0x4000, 0), (0x5000, 0x9000, 0x4000)]));
        assert_eq!(t.bytes(), 0x7000);
        assert_eq!(t.cut(&(0x4000..0x5000)), []);
        assert_eq!(t.cut(&(0x3000..0x6000)), [run(0x3000, 0x4000, 0x2000), run(0x5000, 0x6000, 0x4000)]);
        assert_eq!(t.cut(&(0..u64::MAX)), [run(0x1000, 0x3000, 0), run(0x6000, 0x9000, 0x5000)]);
        assert_eq!(t, Table::default());
    }

    #[test]
    fn parts_to_be_filled_next() {
        let t = table(&[(0x3000, 0x2_3000, 0)]);
        assert_eq!(t.first(0x4000), Some(run(0x3000, 0x7000, 0)));
        assert_eq!(t.first(u64::MAX), Some(run(0x3000, 0x2_3000, 0)));
        assert_eq!(t.around(0x4000, 0x1_0000), Some(run(0x3000, 0x1_0000, 0)));
        assert_eq!(t.around(0x1_4000, 0x1_0000), Some(run(0x1_0000, 0x2_0000, 0xd000)));
        assert_eq!(t.around(0x2_2000, 0x1_0000), Some(run(0x2_0000, 0x2_3000, 0x1_d000)));
        assert_eq!(t.around(0x2_3000, 0x1_0000), None);
        assert_eq!(t.around(0x2000, 0x1_0000), None);
        assert_eq!(Table::default().first(1), None);
    }

    #[test]
    fn what_moves_keeps_its_place_in_the_file() {
        let mut t = table(&[(0x1000, 0x9000, 0), (0x2_0000, 0x2_4000, 0x8000)]);
        t.remap(0x2000, 0x2_1000, 0x2000);
        let expected = table(&[
            (0x1000, 0x2000, 0),
            (0x4000, 0x9000, 0x3000),
            (0x2_0000, 0x2_1000, 0x8000),
            (0x2_1000, 0x2_3000, 0x1000),
            (0x2_3000, 0x2_4000, 0xb000),
        ]);
        assert_eq!(t, expected);
    }
}
