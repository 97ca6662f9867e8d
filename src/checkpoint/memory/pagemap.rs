//! pagemap-N.img: which pages are in pages-N.img, and where.
//!
//! ```text
//!   pagemap-1.img   head: pages_id 7
//!                   0x55d0_0000  3 pages  PRESENT|LAZY ─┐     pages-7.img
//!                   0x7f10_0000  1 page   PARENT        │     ┌───┬───┬───┬───┬───┐
//!                   0x7f20_0000  2 pages  PRESENT ──────┼──┐  │   │   │   │   │   │
//!                                                       └──┼─>└───┴───┴───┘   │   │
//!                                                          └────────────────>─┴───┘
//! ```
//!
//! Positions in pages-N.img are implied: present runs follow each other. A page that no run has is zero, or the file's.
//! A page that is in the parent is in the set that the link `parent` leads to, or again in the parent of that one.

use std::fs::File;
use std::ops::Range;

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{ImageDir, Kind, PagemapEntry, PagemapHead, pagemap as flag};
use crate::checkpoint::memory::compressed;
use crate::checkpoint::memory::copy::Placed;
use crate::checkpoint::memory::pages::PAGE;

/// How many sets may follow each other.
const CHAIN: usize = 256;

/// Where an entry's pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In pages-N.img, from this byte on.
    Here(u64),
    /// In the set that the link `parent` points to.
    Parent,
}

/// What an entry says.
type Found = (Range<u64>, Place);

/// Pages next to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Their addresses, or their positions within shared memory.
    pub range: Range<u64>,
    /// Which of the files has them.
    pub file: usize,
    /// From which of its bytes on.
    pub offset: u64,
}

impl Run {
    /// Cuts it into what lies within `ranges`, which are in order, and what does not.
    pub fn divide(&self, ranges: &[Range<u64>]) -> Vec<(Self, bool)> {
        let mut parts = Vec::new();
        let mut at = self.range.start;
        let mut push = |range: Range<u64>, within: bool| {
            if range.start < range.end {
                let offset = self.offset + (range.start - self.range.start);
                parts.push((Self { range, file: self.file, offset }, within));
            }
        };
        let first = ranges.partition_point(|range| range.end <= self.range.start);
        for range in ranges[first..].iter().take_while(|range| range.start < self.range.end) {
            let (start, end) = (range.start.max(at), range.end.min(self.range.end));
            push(at..start, false);
            push(start..end, true);
            at = end;
        }
        push(at..self.range.end, false);
        parts
    }
}

/// A pagemap that was read.
#[derive(Debug)]
pub struct Pages {
    /// In ascending order.
    pub runs: Vec<Run>,
    /// pages-N.img of the set, and of those before it.
    pub files: Vec<File>,
}

impl Pages {
    /// For each file, the pages that are in it.
    pub fn by_file(&self) -> impl Iterator<Item = (&File, Vec<Placed>)> {
        self.files.iter().enumerate().map(|(index, file)| {
            let runs = self.runs.iter().filter(move |run| run.file == index);
            (file, runs.map(|run| (run.range.clone(), run.offset)).collect())
        })
    }

    /// The parts of `range`, in order.
    pub fn within(&self, range: &Range<u64>) -> Vec<Run> {
        let first = self.runs.partition_point(|run| run.range.end <= range.start);
        let after = self.runs[first..].iter().take_while(|run| run.range.start < range.end);
        after
            .map(|run| {
                let part = run.range.start.max(range.start)..run.range.end.min(range.end);
                let offset = run.offset + (part.start - run.range.start);
                Run { range: part, file: run.file, offset }
            })
            .collect()
    }
}

/// Name of the pagemap of a process's private memory.
pub fn of_task(vpid: u32) -> String {
    format!("pagemap-{vpid}.img")
}

/// Name of the pagemap of shared memory.
pub fn of_shared(id: u64) -> String {
    format!("pagemap-shmem-{id}.img")
}

/// Name of a file of pages.
pub fn pages_name(id: u32) -> String {
    format!("pages-{id}.img")
}

/// The entry for pages that are present; `lazy` if they may be filled later.
pub fn present(range: &Range<u64>, lazy: bool) -> PagemapEntry {
    entry(range, flag::PRESENT | if lazy { flag::LAZY } else { 0 })
}

/// The entry for pages that are as they are in the parent.
pub fn in_parent(range: &Range<u64>, lazy: bool) -> PagemapEntry {
    entry(range, flag::PARENT | if lazy { flag::LAZY } else { 0 })
}

fn entry(range: &Range<u64>, flags: u32) -> PagemapEntry {
    let pages = (range.end - range.start) / PAGE;
    PagemapEntry {
        vaddr: range.start,
        // CRIU before 4.0 knows only this one. No run of pages that it can restore is too long for it.
        compat_nr_pages: u32::try_from(pages).unwrap_or(0),
        in_parent: None,
        flags: Some(flags),
        nr_pages: Some(pages),
    }
}

/// Writes a pagemap.
pub fn write(images: &ImageDir, name: &str, pages_id: u32, entries: &[PagemapEntry]) -> Result<()> {
    let mut writer = images.writer(Kind::Pagemap, name)?;
    writer.record(&PagemapHead { pages_id })?;
    entries.iter().try_for_each(|entry| writer.record(entry))?;
    writer.finish().map(drop)
}

/// Writes a pagemap, and creates the file for the pages it tells of; `large`: these are too many to stand in memory first.
pub fn create(
    images: &ImageDir,
    name: &str,
    pages_id: u32,
    entries: &[PagemapEntry],
    large: bool,
) -> Result<File> {
    write(images, name, pages_id, entries)?;
    let name = pages_name(pages_id);
    if large { images.raw_create_large(&name) } else { images.raw_create(&name) }
}

/// Reads a pagemap and opens its pages, and those of the sets before it as far as they are needed. Order, alignment and
/// size are checked: the images are hostile input.
pub fn open(images: &ImageDir, name: &str) -> Result<Pages> {
    open_chain(images, name, CHAIN)
}

fn open_chain(images: &ImageDir, name: &str, left: usize) -> Result<Pages> {
    let at = |e: Error| e.path(images.path().join(name));
    let (entries, pages_id) = entries(images, name)?;
    let (found, total) = runs(&entries).map_err(at)?;
    let file = match compressed::open(images, &pages_name(pages_id), total)? {
        Some(file) => file,
        None => images.raw_open(&pages_name(pages_id))?,
    };
    let size = file.metadata().map_or(0, |m| m.len());
    if size < total {
        return Err(Error::new(format!("the image has {size} bytes of pages, {total} are needed"))
            .path(images.path().join(pages_name(pages_id))));
    }
    let mut pages = Pages { runs: Vec::with_capacity(found.len()), files: vec![file] };
    let earlier = match found.iter().any(|(_, place)| *place == Place::Parent) {
        false => None,
        true if left == 0 => return Err(at(Error::new("too many sets of images follow each other"))),
        true => {
            let parent = images.parent()?.ok_or_else(|| {
                at(Error::new("pages are in an earlier set, to which no link `parent` leads"))
            })?;
            Some(open_chain(&parent, name, left - 1)?)
        }
    };
    for (range, place) in found {
        match (place, &earlier) {
            (Place::Here(offset), _) => pages.runs.push(Run { range, file: 0, offset }),
            (Place::Parent, Some(earlier)) => {
                let parts = earlier.within(&range);
                let have: u64 = parts.iter().map(|run| run.range.end - run.range.start).sum();
                if have != range.end - range.start {
                    return Err(at(Error::new(format!("an earlier set lacks pages of {range:x?}"))));
                }
                pages.runs.extend(parts.into_iter().map(|run| Run { file: run.file + 1, ..run }));
            }
            (Place::Parent, None) => return Err(at(Error::new("pages are in an earlier set"))),
        }
    }
    pages.files.extend(earlier.into_iter().flat_map(|earlier| earlier.files));
    Ok(pages)
}

/// The entries of a pagemap, and the number of its file of pages.
fn entries(images: &ImageDir, name: &str) -> Result<(Vec<PagemapEntry>, u32)> {
    let mut reader = images.reader(Kind::Pagemap, name)?;
    let head: PagemapHead =
        reader.record()?.ok_or_else(|| Error::new("the pagemap is empty").path(images.path().join(name)))?;
    Ok((reader.records()?, head.pages_id))
}

/// Which pages a set has, whether they are in it or in an earlier one; none if it does not know the process.
pub fn known(images: &ImageDir, name: &str) -> Result<Vec<Range<u64>>> {
    if !images.exists(name) {
        return Ok(Vec::new());
    }
    let (found, _) = runs(&entries(images, name)?.0).map_err(|e| e.path(images.path().join(name)))?;
    Ok(found.into_iter().map(|(range, _)| range).collect())
}

/// Which pages are in the set itself.
pub fn present_in(images: &ImageDir, name: &str) -> Result<Vec<Range<u64>>> {
    let (found, _) = runs(&entries(images, name)?.0).map_err(|e| e.path(images.path().join(name)))?;
    let here = |(range, place): Found| matches!(place, Place::Here(_)).then_some(range);
    Ok(found.into_iter().filter_map(here).collect())
}

/// Positions of the entries' pages, and how long their file is.
fn runs(entries: &[PagemapEntry]) -> Result<(Vec<Found>, u64)> {
    let mut runs = Vec::with_capacity(entries.len());
    let (mut behind, mut offset) = (0, 0u64);
    for entry in entries {
        // CRIU before 4.0 wrote the first of these two fields, and before 1.9 `in_parent` instead of flags.
        let count = entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages));
        let old = if entry.in_parent == Some(true) { flag::PARENT } else { flag::PRESENT };
        let flags = entry.flags.unwrap_or(old);
        let wrong =
            || Error::new(format!("the pagemap entry {:#x}, {count} pages, is malformed", entry.vaddr));
        let length = count.checked_mul(PAGE).filter(|&n| n != 0).ok_or_else(wrong)?;
        let end = entry.vaddr.checked_add(length).ok_or_else(wrong)?;
        if entry.vaddr < behind || !entry.vaddr.is_multiple_of(PAGE) {
            return Err(wrong());
        }
        let known = flag::PRESENT | flag::PARENT | flag::LAZY;
        let place = match flags & (flag::PRESENT | flag::PARENT) {
            _ if flags & !known != 0 => return Err(wrong()),
            flag::PRESENT => Place::Here(offset),
            flag::PARENT => Place::Parent,
            _ => return Err(wrong()),
        };
        if let Place::Here(_) = place {
            offset = offset.checked_add(length).ok_or_else(wrong)?;
        }
        behind = end;
        runs.push((entry.vaddr..end, place));
    }
    Ok((runs, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A set of images with one pagemap, and pages of as many bytes as it needs.
    fn set(dir: &std::path::Path, entries: &[PagemapEntry], parent: Option<&str>) -> File {
        let images = ImageDir::create(dir).unwrap();
        let file = create(&images, &of_task(1), 7, entries, false).unwrap();
        file.set_len(runs(entries).unwrap().1).unwrap();
        if let Some(parent) = parent {
            images.link_parent(std::path::Path::new(parent)).unwrap();
        }
        images.publish(false).unwrap();
        file
    }

    #[test]
    fn a_pagemap_comes_back_with_positions() {
        let dir = tempfile::tempdir().unwrap();
        let entries = [present(&(0x1000..0x4000), true), present(&(0xc000..0xd000), false)];
        let file = set(dir.path(), &entries, None);
        let images = ImageDir::open(dir.path()).unwrap();
        let run = |range, offset| Run { range, file: 0, offset };
        let pages = open(&images, "pagemap-1.img").unwrap();
        assert_eq!(pages.runs, [run(0x1000..0x4000, 0), run(0xc000..0xd000, 0x3000)]);
        file.set_len(4 * 4096 - 1).unwrap();
        let error = open(&images, "pagemap-1.img").unwrap_err().to_string();
        assert!(error.contains("pages-7.img") && error.contains("16384"), "{error}");
    }

    #[test]
    fn pages_are_found_in_earlier_sets() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        set(&path("a"), &[present(&(0x1000..0x9000), false)], None);
        let second = [in_parent(&(0x1000..0x3000), true), present(&(0x3000..0x4000), false)];
        set(&path("b"), &second, Some("../a"));
        let third = [present(&(0x1000..0x2000), false), in_parent(&(0x2000..0x4000), false)];
        set(&path("c"), &third, Some("../b"));
        let run = |range, file, offset| Run { range, file, offset };
        let pages = open(&ImageDir::open(path("c")).unwrap(), "pagemap-1.img").unwrap();
        assert_eq!(
            pages.runs,
            [run(0x1000..0x2000, 0, 0), run(0x2000..0x3000, 2, 0x1000), run(0x3000..0x4000, 1, 0)]
        );
        assert_eq!(pages.files.len(), 3);
        assert_eq!(
            known(&ImageDir::open(path("b")).unwrap(), "pagemap-1.img").unwrap(),
            [0x1000..0x3000, 0x3000..0x4000]
        );
        assert_eq!(known(&ImageDir::open(path("b")).unwrap(), "pagemap-2.img").unwrap(), []);
    }

    #[test]
    fn broken_chains_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let fails =
            |name: &str| open(&ImageDir::open(path(name)).unwrap(), "pagemap-1.img").unwrap_err().to_string();
        let wanted = [in_parent(&(0x1000..0x3000), false)];
        set(&path("less"), &[present(&(0x1000..0x2000), false)], None);
        set(&path("gap"), &wanted, Some("../less"));
        assert!(fails("gap").contains("lacks"), "{}", fails("gap"));
        set(&path("none"), &wanted, None);
        assert!(fails("none").contains("parent"), "{}", fails("none"));
        set(&path("itself"), &wanted, Some("."));
        assert!(fails("itself").contains("too many"), "{}", fails("itself"));
        set(&path("far"), &wanted, Some("/etc"));
        assert!(fails("far").contains("absolute"), "{}", fails("far"));
    }

    #[test]
    fn old_entries_are_understood() {
        let old = |in_parent| PagemapEntry {
            vaddr: 0x1000,
            compat_nr_pages: 2,
            in_parent,
            flags: None,
            nr_pages: None,
        };
        let read = |e| runs(&[e]).unwrap().0.remove(0);
        assert_eq!(read(old(None)), (0x1000..0x3000, Place::Here(0)));
        assert_eq!(read(old(Some(true))), (0x1000..0x3000, Place::Parent));
    }

    #[test]
    fn malformed_entries_are_refused() {
        let good = present(&(0x1000..0x3000), false);
        let bad = [
            vec![good.clone(), good.clone()],
            vec![PagemapEntry { vaddr: 0x1001, ..good.clone() }],
            vec![PagemapEntry { nr_pages: Some(0), ..good.clone() }],
            vec![PagemapEntry { nr_pages: Some(u64::MAX / 4096), ..good.clone() }],
            vec![PagemapEntry { nr_pages: Some(u64::MAX), ..good.clone() }],
            vec![PagemapEntry { flags: Some(flag::LAZY), ..good.clone() }],
            vec![PagemapEntry { flags: Some(flag::PRESENT | 64), ..good.clone() }],
        ];
        for entries in bad {
            assert!(runs(&entries).is_err(), "{entries:?}");
        }
    }
}
