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

use std::fs::File;
use std::ops::Range;

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{ImageDir, Kind, PagemapEntry, PagemapHead, pagemap as flag};
use crate::checkpoint::memory::pages::PAGE;

/// Where the pages of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In pages-N.img, from this byte on.
    Here(u64),
    /// In the set that the link `parent` points to.
    Parent,
}

/// Pages next to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Their addresses, or their positions within shared memory.
    pub range: Range<u64>,
    /// Where they are.
    pub place: Place,
}

/// A pagemap that was read.
#[derive(Debug)]
pub struct Pages {
    /// In ascending order.
    pub runs: Vec<Run>,
    /// pages-N.img.
    pub file: File,
}

/// Name of the pagemap of a process's private memory.
pub fn of_task(vpid: u32) -> String {
    format!("pagemap-{vpid}.img")
}

/// Name of the pagemap of shared memory.
pub fn of_shared(id: u64) -> String {
    format!("pagemap-shmem-{id}.img")
}

fn pages_name(id: u32) -> String {
    format!("pages-{id}.img")
}

/// The entry for pages that are present; `lazy` if they may be filled later.
pub fn present(range: &Range<u64>, lazy: bool) -> PagemapEntry {
    PagemapEntry {
        vaddr: range.start,
        compat_nr_pages: 0,
        in_parent: None,
        flags: Some(flag::PRESENT | if lazy { flag::LAZY } else { 0 }),
        nr_pages: Some((range.end - range.start) / PAGE),
    }
}

/// Writes a pagemap, and creates the file for the pages it tells of.
pub fn create(images: &ImageDir, name: &str, pages_id: u32, entries: &[PagemapEntry]) -> Result<File> {
    let mut writer = images.writer(Kind::Pagemap, name)?;
    writer.record(&PagemapHead { pages_id })?;
    entries.iter().try_for_each(|entry| writer.record(entry))?;
    writer.finish()?;
    images.raw_create(&pages_name(pages_id))
}

/// Reads a pagemap and opens its pages. Order, alignment and size are checked: the images are hostile input.
pub fn open(images: &ImageDir, name: &str) -> Result<Pages> {
    let mut reader = images.reader(Kind::Pagemap, name)?;
    let at = |e: Error| e.path(images.path().join(name));
    let head: PagemapHead = reader.record()?.ok_or_else(|| at(Error::new("the pagemap is empty")))?;
    let entries: Vec<PagemapEntry> = reader.records()?;
    let (runs, total) = runs(&entries).map_err(at)?;
    let file = images.raw_open(&pages_name(head.pages_id))?;
    let size = file.metadata().map_or(0, |m| m.len());
    if size < total {
        return Err(Error::new(format!("the image has {size} bytes of pages, {total} are needed"))
            .path(images.path().join(pages_name(head.pages_id))));
    }
    Ok(Pages { runs, file })
}

/// Positions of the entries' pages, and how long their file is.
fn runs(entries: &[PagemapEntry]) -> Result<(Vec<Run>, u64)> {
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
        runs.push(Run { range: entry.vaddr..end, place });
    }
    Ok((runs, offset))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_pagemap_comes_back_with_positions() {
        let dir = tempfile::tempdir().unwrap();
        let images = ImageDir::create(dir.path()).unwrap();
        let parent = PagemapEntry { flags: Some(flag::PARENT), ..present(&(0x9000..0xb000), false) };
        let entries = [present(&(0x1000..0x4000), true), parent, present(&(0xc000..0xd000), false)];
        let file = create(&images, &of_task(1), 7, &entries).unwrap();
        file.write_all_at(&[1; 4 * 4096], 0).unwrap();
        let pages = open(&images, "pagemap-1.img").unwrap();
        let expected = [
            Run { range: 0x1000..0x4000, place: Place::Here(0) },
            Run { range: 0x9000..0xb000, place: Place::Parent },
            Run { range: 0xc000..0xd000, place: Place::Here(0x3000) },
        ];
        assert_eq!(pages.runs, expected);
        file.set_len(4 * 4096 - 1).unwrap();
        let error = open(&images, "pagemap-1.img").unwrap_err().to_string();
        assert!(error.contains("pages-7.img") && error.contains("16384"), "{error}");
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
        assert_eq!(read(old(None)), Run { range: 0x1000..0x3000, place: Place::Here(0) });
        assert_eq!(read(old(Some(true))), Run { range: 0x1000..0x3000, place: Place::Parent });
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
