//! Contents of memory that processes share: anonymous, memfd, System V.
//!
//! All three are files of the kernel's own tmpfs. Their pages are found with `SEEK_DATA` and moved with pread and
//! pwrite, so it does not matter who has them mapped, or whether anybody does. Those of huge pages are files of hugetlbfs,
//! which tells of no holes and knows no pwrite: there pages of nothing but zeros are left out (see `sys/hugetlb.rs`).

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{ImageDir, vma as status};
use crate::checkpoint::memory::copy;
use crate::checkpoint::memory::pagemap;
use crate::checkpoint::memory::pages::PAGE;
use crate::checkpoint::memory::vmas;
use crate::checkpoint::model::Model;
use crate::sys::hugetlb::{self, Target};
use crate::sys::memory::shared_anonymous;

/// Ids of shared memory without a number of its own have this bit, which System V ids never have: both name
/// pagemap-shmem-N.img.
pub const OWN_ID: u64 = 1 << 31;

/// Writes the pages of shared memory to pagemap-shmem-ID.img and pages-N.img.
pub fn write(images: &ImageDir, id: u64, pages_id: u32, memory: &File) -> Result<()> {
    let ranges = data(memory)?;
    let entries: Vec<_> = ranges.iter().map(|range| pagemap::present(range, false)).collect();
    let pages = pagemap::create(images, &pagemap::of_shared(id), pages_id, &entries, true)?;
    copy::each(&copy::pieces(copy::place(ranges, 0)), |piece, buffer| {
        read_ranges(memory, &piece.ranges, buffer)?;
        pages
            .write_all_at(buffer, piece.offset)
            .during("cannot write the pages", || format!("pwrite(pages, {}, {})", buffer.len(), piece.offset))
    })
}

/// Puts the pages of pagemap-shmem-ID.img into shared memory that is large enough.
pub fn fill(images: &ImageDir, id: u64, memory: &File) -> Result<()> {
    let name = pagemap::of_shared(id);
    let at = |e: Error| e.path(images.path().join(&name));
    let size = memory.metadata().during("cannot look at shared memory", || "fstat(memory)".into())?.len();
    let pages = pagemap::open(images, &name)?;
    let target = Target::new(memory).during("cannot look at shared memory", || "fstatfs(memory)".into())?;
    for run in &pages.runs {
        let file = pages.files.get(run.file).ok_or_else(|| at(Error::new("the pages are nowhere")))?;
        let offset = run.offset;
        if run.range.end > size.next_multiple_of(PAGE) {
            return Err(at(Error::new(format!("the pages go beyond the {size} bytes of shared memory"))));
        }
        let run = run.range.start..run.range.end.min(size);
        let from = offset..offset + (run.end - run.start);
        copy::each(&copy::pieces([(from, run.start)]), |piece, buffer| {
            read_ranges(file, &piece.ranges, buffer).map_err(at)?;
            let len = buffer.len();
            match target.is_huge() {
                false => {
                    target.write_all_at(buffer, piece.offset).during("cannot fill shared memory", || {
                        format!("pwrite(memory, {len}, {})", piece.offset)
                    })
                }
                true => target
                    .write_all_at(buffer, piece.offset)
                    .during("cannot fill shared memory of huge pages", || {
                        format!("fallocate(memory, FALLOC_FL_KEEP_SIZE, {}, {len})", piece.offset)
                    })
                    .map_err(|e| e.remedy("vm.nr_hugepages must leave as many as the images have")),
            }
        })?;
    }
    Ok(())
}

/// Reads ranges of a file; what lies behind its end is zero.
fn read_ranges(file: &File, ranges: &[Range<u64>], mut buffer: &mut [u8]) -> Result<()> {
    for range in ranges {
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX).min(buffer.len());
        let (part, rest) = buffer.split_at_mut(len);
        let mut done = 0;
        while done < len {
            let at = range.start + done as u64;
            match file.read_at(&mut part[done..], at) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => Err(e).during("cannot read pages", || format!("pread(_, {}, {at})", len - done))?,
            }
        }
        part[done..].fill(0);
        buffer = rest;
    }
    Ok(())
}

/// The parts of a file that are not holes, in whole pages.
fn data(file: &File) -> Result<Vec<Range<u64>>> {
    let huge =
        hugetlb::page_size(file).during("cannot look at shared memory", || "fstatfs(memory)".into())?;
    if let Some(page) = huge {
        return huge_data(file, page);
    }
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(file, at, Whence::SeekData)? {
        let end = seek(file, start, Whence::SeekHole)?.unwrap_or(start);
        let page = start / PAGE * PAGE..end.next_multiple_of(PAGE);
        if page.end <= at {
            break;
        }
        at = page.end;
        found.push(page);
    }
    Ok(found)
}

/// The pages of a file of hugetlbfs that hold something.
fn huge_data(file: &File, page: u64) -> Result<Vec<Range<u64>>> {
    const SECTOR: u64 = 512;
    let stat = file.metadata().during("cannot look at shared memory", || "fstat(memory)".into())?;
    let (size, there) = (stat.size(), stat.blocks().saturating_mul(SECTOR));
    let mut found: Vec<Range<u64>> = Vec::new();
    if there == 0 {
        return Ok(found);
    }
    if there >= size {
        found.push(0..size);
        return Ok(found);
    }
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < size {
        let end = size.min(at + page);
        let mut empty = true;
        let mut from = at;
        while empty && from < end {
            let part = from..end.min(from + buffer.len() as u64);
            let len = usize::try_from(part.end - part.start).unwrap_or(usize::MAX).min(buffer.len());
            read_ranges(file, std::slice::from_ref(&part), &mut buffer[..len])?;
            empty = buffer[..len].iter().all(|byte| *byte == 0);
            from = part.end;
        }
        match found.last_mut() {
            _ if empty => {}
            Some(last) if last.end == at => last.end = end,
            _ => found.push(at..end),
        }
        at = end;
    }
    Ok(found)
}

fn seek(file: &File, from: u64, whence: Whence) -> Result<Option<u64>> {
    let offset = i64::try_from(from).map_err(|_| Error::new("shared memory is too large"))?;
    match lseek(file, offset, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        found => found
            .during("cannot find the pages of shared memory", || format!("lseek(memory, {from}, {whence:?})"))
            .map(|found| u64::try_from(found).ok()),
    }
}

/// Anonymous memory that tasks being restored share, each piece made and filled once in this process.
#[derive(Debug, Default)]
pub struct Shared(BTreeMap<u64, File>);

impl Shared {
    /// Makes everything that the mappings of the model name.
    pub fn open(model: &Model, images: &ImageDir) -> Result<Self> {
        let mut made = BTreeMap::new();
        for (id, Need { size, huge, page }) in needs(model) {
            let pages = pagemap::open(images, &pagemap::of_shared(id))?;
            let size = pages.runs.last().map_or(size, |run| size.max(run.range.end));
            let size = size.checked_next_multiple_of(page).and_then(|size| usize::try_from(size).ok());
            let size = size
                .and_then(NonZeroUsize::new)
                .ok_or_else(|| Error::new(format!("shared memory {id} has an impossible size")))?;
            let memory = shared_anonymous(size, huge).during("cannot make shared memory", || {
                let kind = if huge == 0 { "" } else { "|MAP_HUGETLB" };
                format!("mmap(NULL, {size}, MAP_SHARED|MAP_ANONYMOUS{kind})")
            })?;
            let memory = File::from(memory);
            fill(images, id, &memory)?;
            made.insert(id, memory);
        }
        Ok(Self(made))
    }

    /// A descriptor to map it by.
    pub fn get(&self, id: u64) -> Option<BorrowedFd<'_>> {
        self.0.get(&id).map(AsFd::as_fd)
    }
}

/// What a piece of shared anonymous memory has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Need {
    size: u64,
    /// `MAP_HUGETLB` and the size of its pages, or 0.
    huge: i32,
    /// The size of its pages.
    page: u64,
}

/// What shared anonymous memory the mappings need.
fn needs(model: &Model) -> BTreeMap<u64, Need> {
    let mut needs = BTreeMap::new();
    for vma in model.mm.values().flat_map(|mm| &mm.vmas) {
        if vma.status & (status::ANON_SHARED | status::SYSVIPC) == status::ANON_SHARED {
            let end = vma.pgoff.saturating_add(vma.end.saturating_sub(vma.start));
            let (huge, page) = vmas::huge(vma).map_or((0, PAGE), |page| (vma.flags & vmas::HUGE, page));
            let need = Need { size: end, huge: huge.cast_signed(), page };
            let need = needs.entry(vma.shmid).or_insert(need);
            need.size = end.max(need.size);
        }
    }
    needs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::{MmEntry, VmaEntry};

    fn memory(size: usize) -> File {
        shared_anonymous(NonZeroUsize::new(size).unwrap(), 0).unwrap().into()
    }

    #[test]
    fn shared_memory_comes_back_with_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let images = ImageDir::create(dir.path()).unwrap();
        let before = memory(64 << 12);
        before.write_all_at(&[7; 9000], 3 << 12).unwrap();
        before.write_all_at(b"end", (63 << 12) + 4000).unwrap();
        write(&images, 5, 1, &before).unwrap();
        let after = memory(64 << 12);
        fill(&images, 5, &after).unwrap();
        assert_eq!(data(&before).unwrap(), data(&after).unwrap());
        let (mut a, mut b) = (vec![0; 64 << 12], vec![1; 64 << 12]);
        before.read_exact_at(&mut a, 0).unwrap();
        after.read_exact_at(&mut b, 0).unwrap();
        assert!(a == b);
        let small = fill(&images, 5, &memory(2 << 12)).unwrap_err().to_string();
        assert!(small.contains("beyond") && small.contains("pagemap-shmem-5.img"), "{small}");
    }

    #[test]
    fn a_model_makes_each_piece_once_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let images = ImageDir::create(dir.path()).unwrap();
        let before = memory(8 << 12);
        before.write_all_at(b"here", 7 << 12).unwrap();
        write(&images, OWN_ID | 3, 1, &before).unwrap();
        let vma = |start, pgoff| VmaEntry {
            start,
            end: start + 0x2000,
            pgoff,
            shmid: OWN_ID | 3,
            status: status::REGULAR | status::ANON_SHARED,
            ..VmaEntry::default()
        };
        let mut model = Model::default();
        model.mm.insert(1, MmEntry { vmas: vec![vma(0x1000, 0), vma(0x8000, 0x1000)], ..MmEntry::default() });
        model.mm.insert(2, MmEntry { vmas: vec![vma(0x1000, 0x4000)], ..MmEntry::default() });
        let need = Need { size: 0x6000, huge: 0, page: PAGE };
        assert_eq!(needs(&model), BTreeMap::from([(OWN_ID | 3, need)]));
        let shared = Shared::open(&model, &images).unwrap();
        let file = File::from(shared.get(OWN_ID | 3).unwrap().try_clone_to_owned().unwrap());
        let mut back = [0; 4];
        file.read_exact_at(&mut back, 7 << 12).unwrap();
        assert_eq!(&back, b"here");
        assert!(shared.get(3).is_none());
    }
}
