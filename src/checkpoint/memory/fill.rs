//! Filling the mappings of a new task with the pages of the images, from outside.
//!
//! ```text
//!   pages-7.img  ██████████   pread, pieces of 1 MiB, two threads
//!                 │      │
//!    UFFDIO_COPY  │      │  write to /proc/PID/mem
//!                 ▼      ▼
//!   anonymous memory    private pages over a file, and where userfaultfd cannot be had
//! ```
//!
//! Neither way asks for PROT_WRITE. UFFDIO_COPY puts whole pages in place without a fault, a zeroing or a lock on the
//! address space for each, and is several times faster.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{VmaEntry, vma as status};
use crate::checkpoint::memory::copy::{self, Memory};
use crate::checkpoint::memory::lazy::Lazy;
use crate::checkpoint::memory::pagemap::{Pages, Run};
use crate::checkpoint::memory::pages::{PAGE, Pagemap};
use crate::checkpoint::memory::vmas;
use crate::sys::userfaultfd;

/// Where the pages of a range go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// By UFFDIO_COPY.
    Copy,
    /// By `/proc/PID/mem`.
    Write,
    /// By UFFDIO_COPY, when the program already runs.
    Later,
    /// Nowhere: the kernel's own vdso is there already.
    Skip,
}

/// The address ranges of a task that pages may go to.
#[derive(Debug)]
pub struct Goals(Vec<(Range<u64>, Way)>);

impl Goals {
    /// From the mappings of an image, which are in order. `lazy`: what can be filled later is.
    pub fn new(entries: &[VmaEntry], lazy: bool) -> Self {
        let goal = |entry: &VmaEntry| {
            // A child's memory would be filled with what it is not to inherit.
            let wiped = entry.madv.unwrap_or(0) & 1 << libc::MADV_WIPEONFORK != 0;
            let way = if entry.status & status::VDSO != 0 {
                Way::Skip
            } else if lazy && vmas::may_be_lazy(entry) && !wiped {
                Way::Later
            } else if lazy || vmas::huge(entry).is_some() {
                Way::Write
            } else if entry.status & status::ANON_PRIVATE != 0 {
                Way::Copy
            } else {
                Way::Write
            };
            (entry.start..entry.end, way)
        };
        Self(entries.iter().filter(|e| vmas::has_private_pages(e)).map(goal).collect())
    }

    /// Cuts a range at the borders of mappings. None: a page lies in no mapping that could have it.
    fn cut(&self, range: &Range<u64>) -> Option<Vec<(Range<u64>, Way)>> {
        let first = self.0.partition_point(|(goal, _)| goal.end <= range.start);
        let mut parts = Vec::new();
        let mut at = range.start;
        for (goal, way) in &self.0[first..] {
            if at == range.end || goal.start > at {
                break;
            }
            let end = goal.end.min(range.end);
            parts.push((at..end, *way));
            at = end;
        }
        (at == range.end).then_some(parts)
    }

    /// Every page must have a mapping to go to.
    fn check(&self, pages: &Pages) -> Result<()> {
        match pages.runs.iter().find(|run| self.cut(&run.range).is_none()) {
            None => Ok(()),
            Some(run) => {
                let range = vmas::Range(run.range.start, run.range.end);
                Err(Error::new(format!("the image has pages {range} outside every mapping of their kind")))
            }
        }
    }

    /// The ranges for which a userfaultfd is wanted.
    fn copied(&self) -> impl Iterator<Item = &Range<u64>> {
        self.0.iter().filter(|(_, way)| *way == Way::Copy).map(|(range, _)| range)
    }

    /// The parts of the images that are filled in one of these ways.
    fn parts(&self, pages: &Pages, ways: &[Way]) -> Vec<Run> {
        let mut parts = Vec::new();
        for run in &pages.runs {
            for (range, way) in self.cut(&run.range).unwrap_or_default() {
                if ways.contains(&way) {
                    let offset = run.offset + (range.start - run.range.start);
                    parts.push(Run { range, file: run.file, offset });
                }
            }
        }
        parts
    }
}

/// Fills a stopped task. `uffd` is a userfaultfd of its address space, if it could make one.
pub fn fill(pid: i32, uffd: Option<&OwnedFd>, pages: &Pages, goals: &Goals) -> Result<()> {
    goals.check(pages)?;
    if pages.runs.is_empty() {
        return Ok(());
    }
    let registered = match uffd {
        Some(uffd) => Some(Registered::new(uffd, goals)?),
        None => None,
    };
    let memory = Memory::open(pid, copy::Sharing::Own)?;
    for (file, placed) in pages.by_file() {
        copy::each(&copy::pieces(placed), |piece, buffer| {
            file.read_exact_at(buffer, piece.offset).during("cannot read the pages", || {
                format!("pread(pages, {}, {})", buffer.len(), piece.offset)
            })?;
            let mut rest: &[u8] = buffer;
            for (part, way) in piece.ranges.iter().filter_map(|range| goals.cut(range)).flatten() {
                let len = usize::try_from(part.end - part.start).unwrap_or(usize::MAX).min(rest.len());
                let (bytes, others) = rest.split_at(len);
                rest = others;
                match (way, &registered) {
                    (Way::Skip | Way::Later, _) => {}
                    (Way::Copy, Some(registered)) => registered.copy(&memory, part.start, bytes)?,
                    _ => memory.write(part.start, bytes)?,
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Fills what has to be there before the program runs; the rest is left to `lazy`. The task is stopped.
pub fn fill_later(
    (pid, vpid): (i32, i32),
    uffd: OwnedFd,
    pages: Pages,
    goals: &Goals,
    lazy: &mut Lazy,
) -> Result<()> {
    goals.check(&pages)?;
    let later = goals.parts(&pages, &[Way::Later]);
    let now = Pages { runs: goals.parts(&pages, &[Way::Copy, Way::Write]), files: pages.files };
    fill(pid, None, &now, goals)?;
    let mut map = Pagemap::open(pid)?;
    let memory = Memory::open(pid, copy::Sharing::Own)?;
    let mut left = Vec::with_capacity(later.len());
    let mut later = later.into_iter().peekable();
    for (goal, _) in goals.0.iter().filter(|(_, way)| *way == Way::Later) {
        if later.peek().is_none_or(|run| run.range.start >= goal.end) {
            continue;
        }
        let len = goal.end - goal.start;
        userfaultfd::register_missing(uffd.as_fd(), goal.start, len)
            .during("cannot prepare to fill the memory", || {
                format!("ioctl(uffd, UFFDIO_REGISTER, {{{:#x}, {len}}})", goal.start)
            })?;
        let there = map.present(goal.clone())?;
        while let Some(run) = later.next_if(|run| run.range.start < goal.end) {
            // Somebody may have looked at /proc/PID/cmdline before: what is there already is written over now.
            for (part, is_there) in run.divide(&there) {
                if is_there {
                    write_now(&memory, &part, &now.files)?;
                } else {
                    left.push(part);
                }
            }
        }
    }
    lazy.add(vpid, uffd, left.into_iter(), now.files);
    Ok(())
}

fn write_now(memory: &Memory, run: &Run, files: &[File]) -> Result<()> {
    let file = files.get(run.file).ok_or_else(|| Error::new("the pages are nowhere"))?;
    let mut bytes = vec![0; usize::try_from(run.range.end - run.range.start).unwrap_or(0)];
    file.read_exact_at(&mut bytes, run.offset)
        .during("cannot read the pages", || format!("pread(pages, {}, {})", bytes.len(), run.offset))?;
    memory.write(run.range.start, &bytes)
}

/// A userfaultfd with ranges registered, which are released when this is dropped.
struct Registered<'a> {
    uffd: &'a OwnedFd,
    ranges: Vec<Range<u64>>,
}

impl<'a> Registered<'a> {
    fn new(uffd: &'a OwnedFd, goals: &Goals) -> Result<Self> {
        userfaultfd::api(uffd.as_fd(), 0)
            .during("cannot prepare to fill the memory", || "ioctl(uffd, UFFDIO_API)".into())?;
        let mut registered = Self { uffd, ranges: Vec::new() };
        for range in goals.copied() {
            let len = range.end - range.start;
            userfaultfd::register_missing(uffd.as_fd(), range.start, len)
                .during("cannot prepare to fill the memory", || {
                    format!("ioctl(uffd, UFFDIO_REGISTER, {{{:#x}, {len}}})", range.start)
                })?;
            registered.ranges.push(range.clone());
        }
        Ok(registered)
    }

    /// A page that is there already, because somebody looked at /proc/PID/cmdline before the range was registered, is
    /// written over.
    fn copy(&self, memory: &Memory, start: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = start + done as u64;
            match userfaultfd::copy(self.uffd.as_fd(), at, &bytes[done..]) {
                Ok(copied) => done += copied,
                Err(Errno::EEXIST) => {
                    let page = bytes.len().min(done + PAGE as usize);
                    memory.write(at, &bytes[done..page])?;
                    done = page;
                }
                Err(errno) => {
                    let call = format!("ioctl(uffd, UFFDIO_COPY, {{{at:#x}, {}}})", bytes.len() - done);
                    return Err(Error::new("cannot fill the memory").call(call, errno));
                }
            }
        }
        Ok(())
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        for range in &self.ranges {
            match userfaultfd::unregister(self.uffd.as_fd(), range.start, range.end - range.start) {
                // The task has died, or the mapping is gone: nothing is registered any more.
                Ok(()) | Err(Errno::ESRCH | Errno::EINVAL) => {}
                // The kernel releases the rest when the last descriptor is closed.
                Err(_) => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::sys::memory::Anonymous;

    fn entry(start: u64, end: u64, status: u32) -> VmaEntry {
        VmaEntry { start, end, status: status | status::REGULAR, ..VmaEntry::default() }
    }

    #[test]
    fn ranges_are_cut_at_mappings() {
        let goals = Goals::new(
            &[
                entry(0x1000, 0x3000, status::ANON_PRIVATE),
                entry(0x3000, 0x5000, status::FILE_PRIVATE),
                entry(0x5000, 0x6000, status::FILE_SHARED),
                entry(0x8000, 0x9000, status::ANON_PRIVATE | status::VDSO),
            ],
            false,
        );
        let cut = |range| goals.cut(&range);
        assert_eq!(
            cut(0x2000..0x4000),
            Some(vec![(0x2000..0x3000, Way::Copy), (0x3000..0x4000, Way::Write)])
        );
        assert_eq!(cut(0x8000..0x9000), Some(vec![(0x8000..0x9000, Way::Skip)]));
        for outside in [0..0x2000, 0x4000..0x6000, 0x5000..0x6000, 0x6000..0x7000, 0x8000..0xa000] {
            assert_eq!(cut(outside.clone()), None, "{outside:x?}");
        }
    }

    #[test]
    fn pages_are_put_where_they_belong() {
        let mut memory = Anonymous::private(NonZeroUsize::new(8 << 12).unwrap()).unwrap();
        memory.as_mut_slice()[0] = 9;
        let base = memory.address();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[[1; 4096], [2; 4096], [3; 4096]].concat(), 0).unwrap();
        let run = |first: u64, last: u64| base + (first << 12)..base + (last << 12);
        let pages = Pages {
            runs: vec![
                Run { range: run(2, 4), file: 0, offset: 0 },
                Run { range: run(6, 7), file: 0, offset: 8192 },
            ],
            files: vec![file],
        };
        let goals = Goals::new(&[entry(base, base + (8 << 12), status::ANON_PRIVATE)], false);
        fill(std::process::id().cast_signed(), None, &pages, &goals).unwrap();
        let first: Vec<u8> = memory.as_slice().chunks(4096).map(|page| page[0]).collect();
        assert_eq!(first, [9, 0, 1, 2, 0, 0, 3, 0]);

        let outside = Goals::new(&[entry(base, base + (3 << 12), status::ANON_PRIVATE)], false);
        let error = fill(std::process::id().cast_signed(), None, &pages, &outside).unwrap_err().to_string();
        assert!(error.contains("outside"), "{error}");
    }

    #[test]
    fn a_page_that_somebody_touched_is_written_over() {
        let mut memory = Anonymous::private(NonZeroUsize::new(4 << 12).unwrap()).unwrap();
        memory.as_mut_slice()[2 << 12] = 9;
        let base = memory.address();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[[1; 4096], [2; 4096], [3; 4096], [4; 4096]].concat(), 0).unwrap();
        let run = Run { range: base..base + (4 << 12), file: 0, offset: 0 };
        let goals = Goals::new(&[entry(base, base + (4 << 12), status::ANON_PRIVATE)], false);
        let uffd = userfaultfd::open(libc::O_CLOEXEC | userfaultfd::UFFD_USER_MODE_ONLY).unwrap();
        let pid = std::process::id().cast_signed();
        fill(pid, Some(&uffd), &Pages { runs: vec![run], files: vec![file] }, &goals).unwrap();
        let first: Vec<u8> = memory.as_slice().chunks(4096).map(|page| page[0]).collect();
        assert_eq!(first, [1, 2, 3, 4]);
    }
}
