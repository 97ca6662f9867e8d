//! Memory that a child has from its parent: pages that neither has written since the fork are there once.
//!
//! ```text
//!   parent   mapped, filled ──clone3──> child: has all of it
//!
//!   mappings that both have      kept, as far as both have them, and grown where the child's is longer
//!   pages of those, as the images have them:
//!        alike                   left alone: shared copy-on-write
//!        not alike, the child's  written
//!        the parent's only       taken away
//! ```
//!
//! The images do not say what was shared. Pages that are alike may be: that is what a server which forks its workers
//! has, and it costs no memory where it had not been so.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{MmEntry, VmaEntry, vma as status};
use crate::checkpoint::memory::copy::{self, Piece};
use crate::checkpoint::memory::pagemap::{Pages, Run};
use crate::checkpoint::memory::pages::PAGE;
use crate::checkpoint::memory::vmas;
use crate::checkpoint::model::Model;
use crate::checkpoint::task::sharing;

/// Bytes compared at once.
const CHUNK: usize = 64 << 10;

/// A mapping of a child that its parent has, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// What it inherits.
    pub range: Range<u64>,
    /// Where the child's ends.
    pub end: u64,
}

/// Which process has memory of which other one that forks it: `(parent, child)` for every fork of the tree. Who runs on
/// another one's memory has it from that one.
pub fn heirs(model: &Model, forks: impl Iterator<Item = (i32, i32)>) -> BTreeMap<i32, i32> {
    let mm = |pid: i32| model.mm.get(&pid.cast_unsigned());
    let tenants = sharing::tenants(model);
    let owner = |pid: i32| tenants.get(&pid.cast_unsigned()).map_or(pid, |owner| owner.cast_signed());
    forks
        .filter(|(_, child)| owner(*child) == *child)
        .map(|(parent, child)| (owner(parent), child))
        .filter(|(parent, child)| match (mm(*parent), mm(*child)) {
            // Another executable cannot be set while the one before is mapped; who has called execve(2) shares nothing.
            (Some(parent), Some(child)) => {
                parent.exe_file_id == child.exe_file_id && !kept(parent, child).is_empty()
            }
            _ => false,
        })
        .map(|(parent, child)| (child, parent))
        .collect()
}

/// The mappings that a child keeps, in order.
pub fn kept(parent: &MmEntry, child: &MmEntry) -> Vec<Kept> {
    let mut theirs: Vec<&VmaEntry> = parent.vmas.iter().filter(|vma| may_be_kept(vma)).collect();
    theirs.sort_unstable_by_key(|vma| vma.start);
    let keep = |own: &VmaEntry| {
        let at = theirs.partition_point(|vma| vma.end <= own.start);
        let vma = theirs.get(at).filter(|vma| vma.start <= own.start && alike(vma, own))?;
        Some(Kept { range: own.start..own.end.min(vma.end), end: own.end })
    };
    child.vmas.iter().filter(|vma| may_be_kept(vma)).filter_map(keep).collect()
}

fn may_be_kept(vma: &VmaEntry) -> bool {
    vmas::may_be_watched(vma)
}

fn alike(parent: &VmaEntry, child: &VmaEntry) -> bool {
    let facts = |vma: &VmaEntry| (vma.prot, vma.flags, vma.status, vma.madv.unwrap_or(0));
    let file = |vma: &VmaEntry| (vma.shmid, vma.fdflags, vma.start.wrapping_sub(vma.pgoff));
    let anonymous = child.status & status::ANON_PRIVATE != 0;
    facts(parent) == facts(child) && (anonymous || file(parent) == file(child))
}

/// The processes that may share pages with another one. For a dump: reading such pages in the quick way would make each
/// its own.
pub fn relatives(all: &BTreeMap<u32, MmEntry>) -> BTreeSet<u32> {
    let mut by_place: BTreeMap<(u32, u64), Vec<u32>> = BTreeMap::new();
    for (pid, mm) in all {
        for vma in mm.vmas.iter().filter(|vma| may_be_kept(vma) && vma.status & status::ANON_PRIVATE != 0) {
            by_place.entry((mm.exe_file_id, vma.start)).or_default().push(*pid);
        }
    }
    by_place.into_values().filter(|pids| pids.len() > 1).flatten().collect()
}

/// What a child has to do with its pages.
#[derive(Debug)]
pub struct Difference {
    /// Those to be filled in.
    pub pages: Pages,
    /// Those to be taken away.
    pub gone: Vec<Range<u64>>,
}

/// Compares the pages of a child with those of its parent, in the mappings that are kept.
pub fn compare(child: Pages, parent: &Pages, kept: &[Kept]) -> Result<Difference> {
    let kept: Vec<Range<u64>> = kept.iter().map(|kept| kept.range.clone()).collect();
    let ranges = |pages: &Pages| -> Vec<Range<u64>> { pages.runs.iter().map(|r| r.range.clone()).collect() };
    let (own, theirs) = (ranges(&child), ranges(parent));
    let within = |run: &Run, ranges: &[Range<u64>], is: bool| -> Vec<Run> {
        run.divide(ranges).into_iter().filter(|(_, within)| *within == is).map(|(run, _)| run).collect()
    };
    let gone = parent.runs.iter().flat_map(|run| within(run, &kept, true));
    let gone = gone.flat_map(|run| within(&run, &own, false)).map(|run| run.range).collect();

    let (mut runs, mut both) = (Vec::new(), Vec::new());
    for (part, is_kept) in child.runs.iter().flat_map(|run| run.divide(&kept)) {
        if !is_kept {
            runs.push(part);
            continue;
        }
        for (part, has) in part.divide(&theirs) {
            if has { both.push(part) } else { runs.push(part) }
        }
    }
    for (index, file) in child.files.iter().enumerate() {
        let placed = both.iter().filter(|run| run.file == index).map(|run| (run.range.clone(), run.offset));
        let found = Mutex::new(Vec::new());
        copy::each(&copy::pieces(placed), |piece, buffer| {
            file.read_exact_at(buffer, piece.offset).during("cannot read the pages", || {
                format!("pread(pages, {}, {})", buffer.len(), piece.offset)
            })?;
            let differing = differing(piece, buffer, parent)?;
            found.lock().unwrap_or_else(PoisonError::into_inner).extend(differing);
            Ok(())
        })?;
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        runs.extend(found.into_iter().map(|(range, offset)| Run { range, file: index, offset }));
    }
    runs.sort_unstable_by_key(|run| run.range.start);
    Ok(Difference { pages: Pages { runs, files: child.files }, gone })
}

/// The pages of a piece that the parent's images have otherwise, with their places in the file.
fn differing(piece: &Piece, bytes: &[u8], parent: &Pages) -> Result<Vec<(Range<u64>, u64)>> {
    let mut found: Vec<(Range<u64>, u64)> = Vec::new();
    let mut buffer = vec![0; CHUNK];
    let (mut rest, mut offset) = (bytes, piece.offset);
    for run in piece.ranges.iter().flat_map(|range| parent.within(range)) {
        let file = parent.files.get(run.file).ok_or_else(|| Error::new("the pages are nowhere"))?;
        let mut at = run.range.start;
        while at < run.range.end {
            let len = usize::try_from(run.range.end - at).unwrap_or(CHUNK).min(CHUNK).min(rest.len());
            let (own, others) = rest.split_at(len);
            let from = run.offset + (at - run.range.start);
            file.read_exact_at(&mut buffer[..len], from)
                .during("cannot read the pages", || format!("pread(pages, {len}, {from})"))?;
            if own != &buffer[..len] {
                let pages = own.chunks(PAGE as usize).zip(buffer[..len].chunks(PAGE as usize));
                for (n, _) in (0..).zip(pages).filter(|(_, (own, theirs))| own != theirs) {
                    let page = at + n * PAGE..at + (n + 1) * PAGE;
                    match found.last_mut() {
                        Some((last, place))
                            if last.end == page.start
                                && *place + (page.start - last.start) == offset + n * PAGE =>
                        {
                            last.end = page.end;
                        }
                        _ => found.push((page, offset + n * PAGE)),
                    }
                }
            }
            (rest, offset, at) = (others, offset + len as u64, at + len as u64);
            if len == 0 {
                return Err(Error::new("the pages of a child and its parent do not fit"));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anonymous(start: u64, end: u64) -> VmaEntry {
        let status = status::REGULAR | status::ANON_PRIVATE;
        VmaEntry { start, end, status, prot: 3, flags: 0x22, fd: -1, ..VmaEntry::default() }
    }

    fn file(start: u64, end: u64, pgoff: u64) -> VmaEntry {
        let status = status::REGULAR | status::FILE_PRIVATE;
        VmaEntry { status, pgoff, shmid: 5, flags: 2, ..anonymous(start, end) }
    }

    fn mm(vmas: Vec<VmaEntry>) -> MmEntry {
        MmEntry { vmas, exe_file_id: 1, ..MmEntry::default() }
    }

    #[test]
    fn what_both_have_is_kept() {
        let keeps = |parent: VmaEntry, child: VmaEntry| {
            kept(&mm(vec![parent]), &mm(vec![child])).pop().map(|kept| (kept.range, kept.end))
        };
        let parent = || anonymous(0x2000, 0x6000);
        assert_eq!(keeps(parent(), anonymous(0x2000, 0x6000)), Some((0x2000..0x6000, 0x6000)));
        assert_eq!(keeps(parent(), anonymous(0x3000, 0x4000)), Some((0x3000..0x4000, 0x4000)));
        assert_eq!(keeps(parent(), anonymous(0x3000, 0x9000)), Some((0x3000..0x6000, 0x9000)));
        assert_eq!(keeps(parent(), anonymous(0x1000, 0x4000)), None);
        assert_eq!(keeps(parent(), anonymous(0x6000, 0x7000)), None);
        assert_eq!(keeps(parent(), VmaEntry { prot: 1, ..parent() }), None);
        assert_eq!(keeps(parent(), VmaEntry { madv: Some(1 << 14), ..parent() }), None);
        let library = || file(0x2000, 0x6000, 0x1000);
        assert_eq!(keeps(library(), file(0x3000, 0x4000, 0x2000)), Some((0x3000..0x4000, 0x4000)));
        assert_eq!(keeps(library(), file(0x3000, 0x4000, 0x1000)), None);
        assert_eq!(keeps(library(), VmaEntry { shmid: 6, ..library() }), None);
        assert_eq!(keeps(library(), parent()), None);
    }

    #[test]
    fn heirs_have_the_same_program_at_the_same_place() {
        let mut model = Model::default();
        model.mm.insert(1, mm(vec![anonymous(0x2000, 0x6000)]));
        model.mm.insert(2, mm(vec![anonymous(0x2000, 0x4000)]));
        model.mm.insert(3, MmEntry { exe_file_id: 2, ..mm(vec![anonymous(0x2000, 0x6000)]) });
        model.mm.insert(4, mm(vec![anonymous(0x8000, 0x9000)]));
        let forks = [(1, 2), (1, 3), (1, 4), (1, 5), (5, 2)];
        assert_eq!(heirs(&model, forks.into_iter()), BTreeMap::from([(2, 1)]));
        assert_eq!(relatives(&model.mm), BTreeSet::from([1, 2]));
    }

    #[test]
    fn only_pages_that_differ_are_left() {
        let with = |runs: &[(u64, u64)], content: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&content.iter().flat_map(|byte| [*byte; 4096]).collect::<Vec<_>>(), 0).unwrap();
            let mut offset = 0;
            let run = |&(start, end): &(u64, u64)| {
                let run = Run { range: start << 12..end << 12, file: 0, offset };
                offset += (end - start) << 12;
                run
            };
            Pages { runs: runs.iter().map(run).collect(), files: vec![file] }
        };
        let parent = with(&[(1, 5), (6, 9), (20, 22)], &[1, 2, 3, 4, 6, 7, 8, 20, 21]);
        // Other: page 2, 3. Only the child's: 5, and 20, 21, which are not kept. Only the parent's: 1, 8.
        let child = with(&[(2, 8), (20, 22)], &[9, 9, 4, 5, 6, 7, 20, 21]);
        let kept = [Kept { range: 1 << 12..9 << 12, end: 9 << 12 }];
        let found = compare(child, &parent, &kept).unwrap();
        let run = |start: u64, end: u64, offset: u64| Run {
            range: start << 12..end << 12,
            file: 0,
            offset: offset << 12,
        };
        assert_eq!(found.pages.runs, [run(2, 4, 0), run(5, 6, 3), run(20, 22, 6)]);
        assert_eq!(found.gone, [1 << 12..2 << 12, 8 << 12..9 << 12]);
    }
}
