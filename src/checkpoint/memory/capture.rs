//! Private pages between the moment they were found and the moment they are written.
//!
//! ```text
//!   stopped   TaskPages::find ──> [snapshot: a copy of each process]
//!   either    write ──> pagemap-N.img, pages-N.img
//!   at last   end: the copies are gone
//! ```

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::checkpoint::context::LiveTask;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{ImageDir, MappingPolicy, PagemapEntry, VmaEntry, vma as status};
use crate::checkpoint::memory::aio;
use crate::checkpoint::memory::copy::{self, Disk, Memory, Placed, Sharing};
use crate::checkpoint::memory::look::Looks;
use crate::checkpoint::memory::pagemap;
use crate::checkpoint::memory::pages::{self, Area, Found, Marks, Pagemap};
use crate::checkpoint::memory::snapshot::Copy;
use crate::checkpoint::memory::vdso::Vdso;
use crate::checkpoint::memory::vmas;
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::Injection;
use crate::checkpoint::task::placement;
use crate::sys::fcntl::set_aside;

/// Of the advice that an image keeps.
const DONTFORK: u64 = 1 << libc::MADV_DONTFORK;
/// From so many processes on two threads write their pages.
const MANY: usize = 8;
/// More bytes than this are not kept in memory while everything stands still.
const LARGE: u64 = 64 << 20;

/// What is still to be written: the private pages of all tasks.
#[derive(Debug, Default)]
pub struct Capture {
    pub(super) tasks: Vec<TaskPages>,
    pub(super) copies: Vec<Copy>,
}

/// The private pages of one task.
#[derive(Debug)]
pub struct TaskPages {
    pub(super) pid: i32,
    pub(super) vpid: u32,
    pages_id: u32,
    /// Whose memory has the pages: the task's, or that of a copy of it.
    pub(super) source: i32,
    entries: Vec<PagemapEntry>,
    /// Bytes that an earlier set has.
    kept: u64,
    /// What a copy of the process has too.
    inherited: Vec<Placed>,
    /// What only the process itself has.
    own: Vec<Placed>,
    /// What it has may be shared copy-on-write with another process.
    pub(super) related: bool,
    /// What the kernel has.
    vdso: Option<Placed>,
    /// Ranges that `MADV_GUARD_INSTALL` made inaccessible.
    pub(super) guards: Vec<Range<u64>>,
    /// The file, once there is one.
    file: Option<File>,
    /// Mappings that have not been asked for their NUMA policies yet.
    pub(super) unasked: Vec<Range<u64>>,
    /// The same, of which a copy of the process does not know, or not for sure: it lacks them, or they are shared.
    pub(super) unasked_own: Vec<Range<u64>>,
    /// What the others have said.
    pub(super) policies: Vec<MappingPolicy>,
}

impl TaskPages {
    /// Finds the pages to be saved of all mappings, which are in ascending order. Those that an earlier set has as they
    /// are now stay there.
    pub(crate) fn find<'a>(
        map: &mut Pagemap,
        (pid, vpid): (i32, u32),
        pages_id: u32,
        mappings: impl Iterator<Item = &'a VmaEntry>,
        earlier: &Earlier,
    ) -> Result<Self> {
        let mut pages = Self {
            pid,
            vpid,
            pages_id,
            source: pid,
            entries: Vec::new(),
            kept: 0,
            inherited: Vec::new(),
            own: Vec::new(),
            related: false,
            vdso: None,
            guards: Vec::new(),
            file: None,
            unasked: Vec::new(),
            unasked_own: Vec::new(),
            policies: Vec::new(),
        };
        let is_vdso = |mapping: &VmaEntry| mapping.status & status::VDSO != 0;
        let is_whole = |mapping: &&VmaEntry| is_vdso(mapping) || aio::is(mapping);
        let kept = |mapping: &&VmaEntry| vmas::may_have_guards(mapping) || aio::is(mapping);
        let mappings: Vec<&VmaEntry> = mappings.filter(kept).collect();
        let mut offset = 0;
        for part in mappings.split_inclusive(is_whole) {
            let before = part.iter().take_while(|mapping| !is_whole(mapping));
            let area = |mapping: &&VmaEntry| Area {
                range: mapping.start..mapping.end,
                anonymous: mapping.status & status::ANON_PRIVATE != 0,
            };
            let areas: Vec<Area> = before.map(area).collect();
            map.survey(
                &areas,
                earlier.marks,
                &earlier.known,
                &mut |index, range, what| match part.get(index) {
                    Some(_) if what == Found::Guard => pages.guards.push(range),
                    Some(mapping) if vmas::has_private_pages(mapping) => {
                        pages.add(mapping, &range, what == Found::Clean, earlier, &mut offset);
                    }
                    _ => {}
                },
            )?;
            // All of the vdso: whoever restores it under another kernel needs it. All of a ring: its pages are no
            // ordinary ones, and a copy of the process has none that change.
            if let Some(whole) = part.last().filter(|mapping| is_whole(mapping)) {
                let range = whole.start..whole.end;
                pages.entries.push(pagemap::present(&range, false));
                if is_vdso(whole) {
                    pages.vdso = Some((range, offset));
                } else {
                    pages.own.push((range, offset));
                }
                offset += whole.end - whole.start;
            }
        }
        Ok(pages)
    }

    /// Adds pages of a mapping, those that an earlier set has apart from the others.
    fn add(
        &mut self,
        mapping: &VmaEntry,
        range: &Range<u64>,
        clean: bool,
        earlier: &Earlier,
        offset: &mut u64,
    ) {
        let lazy = vmas::may_be_lazy(mapping);
        // The kernel takes huge pages away from a copy when it runs out of them.
        let stays = mapping.madv.unwrap_or(0) & (DONTFORK | 1 << libc::MADV_WIPEONFORK) != 0
            || vmas::huge(mapping).is_some();
        for (range, kept) in earlier.divide(range, clean) {
            let len = range.end - range.start;
            if kept {
                self.kept += len;
                self.entries.push(pagemap::in_parent(&range, lazy));
                continue;
            }
            self.entries.push(pagemap::present(&range, lazy));
            let to = if stays { &mut self.own } else { &mut self.inherited };
            to.push((range, *offset));
            *offset += len;
        }
    }

    /// Bytes that a copy of the process would spare it.
    pub(super) fn inherited(&self) -> u64 {
        self.inherited.iter().map(|(range, _)| range.end - range.start).sum()
    }

    /// Bytes that it has, wherever they are saved.
    pub(super) fn size(&self) -> u64 {
        self.kept + self.bytes()
    }

    /// Remembers to ask for the policies of these mappings.
    pub(super) fn ask_later<'a>(&mut self, mappings: impl Iterator<Item = &'a VmaEntry>) {
        for mapping in mappings {
            let shared = mapping.flags & libc::MAP_SHARED.cast_unsigned() != 0;
            let own = shared || mapping.madv.unwrap_or(0) & DONTFORK != 0;
            let list = if own { &mut self.unasked_own } else { &mut self.unasked };
            list.push(mapping.start..mapping.end);
        }
    }

    /// Asks for the policies of mappings that the process has alone; and of all others, unless a copy of it is there to be
    /// asked when it runs again.
    pub(super) fn ask(&mut self, injection: Option<&mut Injection>) -> Result<()> {
        let injection = injection.ok_or_else(|| Error::new("the task cannot be asked"))?;
        let mut mappings = std::mem::take(&mut self.unasked_own);
        if self.source == self.pid {
            mappings.append(&mut self.unasked);
        }
        self.policies.append(&mut placement::ask(&mappings, injection)?);
        Ok(())
    }

    /// Writes what no copy of the process has.
    pub(super) fn write_own(&mut self, images: &ImageDir) -> Result<()> {
        if self.own.is_empty() { Ok(()) } else { self.begin(images) }
    }

    fn begin(&mut self, images: &ImageDir) -> Result<()> {
        let file = self.create(images)?;
        // The process may have ended since a copy of it was made: nobody else has its own pages, if there are any.
        if !self.own.is_empty() {
            copy::to_file(self.pid, Sharing::Own, std::mem::take(&mut self.own), &file, Disk::Later)?;
        }
        self.file = Some(file);
        Ok(())
    }

    fn create(&self, images: &ImageDir) -> Result<File> {
        let name = pagemap::of_task(self.vpid);
        let bytes = self.bytes();
        let file = pagemap::create(images, &name, self.pages_id, &self.entries, bytes > LARGE)?;
        if bytes > LARGE {
            set_aside(&file, bytes);
        }
        Ok(file)
    }

    fn write(&mut self, images: &ImageDir, vdso: &Vdso, disk: Disk) -> Result<()> {
        if self.file.is_none() {
            self.begin(images)?;
        }
        let Some(file) = &self.file else { return Ok(()) };
        let own = self.source == self.pid && !self.related;
        let sharing = if own { Sharing::Own } else { Sharing::Shared };
        copy::to_file(self.source, sharing, std::mem::take(&mut self.inherited), file, disk)?;
        let Some((range, offset)) = self.vdso.take() else { return Ok(()) };
        write_vdso(self.source, range, offset, vdso, file)
    }
}

/// Writes this process's own vdso, if it is the same: that of the task has traces of injections in its tail.
fn write_vdso(source: i32, range: Range<u64>, offset: u64, vdso: &Vdso, file: &File) -> Result<()> {
    if range.end - range.start != vdso.code().len() as u64 || !vdso.is_that_of(source, range.start) {
        return copy::to_file(source, Sharing::Own, [(range, offset)], file, Disk::Later);
    }
    file.write_all_at(vdso.code(), offset)
        .during("cannot write the pages", || format!("pwrite(pages, {}, {offset})", vdso.code().len()))
}

impl TaskPages {
    /// Writes the pages of a process that runs: what it unmaps meanwhile is not missed by whoever builds on this set,
    /// because it has been written or is gone then. A process that has ended is left out.
    pub(crate) fn write_running(mut self, images: &ImageDir, disk: Disk) -> Result<()> {
        if Memory::of_running(self.pid)?.is_none() {
            return Ok(());
        }
        let file = self.create(images)?;
        for placed in [std::mem::take(&mut self.own), std::mem::take(&mut self.inherited)] {
            copy::from_running(self.pid, placed, &file, disk)?;
        }
        copy::from_running(self.pid, self.vdso.take(), &file, disk)
    }

    /// Writes the pagemap, and leaves the pages to whoever reads them, in order, while the process runs.
    pub(crate) fn stream(self, images: &ImageDir) -> Result<Stream> {
        pagemap::write(images, &pagemap::of_task(self.vpid), self.pages_id, &self.entries)?;
        let mut pages: Vec<Placed> = self.own.into_iter().chain(self.inherited).chain(self.vdso).collect();
        pages.sort_unstable_by_key(|(_, offset)| *offset);
        Ok(Stream { name: pagemap::pages_name(self.pages_id), pid: self.pid, pages })
    }

    /// The process, by its pid inside.
    pub(crate) fn vpid(&self) -> u32 {
        self.vpid
    }

    /// The pages that this set has, or an earlier one, in ascending order.
    pub(crate) fn known(&self) -> Vec<Range<u64>> {
        let range =
            |entry: &PagemapEntry| entry.vaddr..entry.vaddr + entry.nr_pages.unwrap_or(0) * pages::PAGE;
        self.entries.iter().map(range).collect()
    }

    /// Bytes that are to be written.
    pub(crate) fn bytes(&self) -> u64 {
        let all = self.inherited.iter().chain(&self.own).chain(&self.vdso);
        all.map(|(range, _)| range.end - range.start).sum()
    }
}

/// The pages of a process that runs, in the order of their image.
#[derive(Debug)]
pub struct Stream {
    /// Of the image.
    pub name: String,
    /// The process.
    pub pid: i32,
    /// Where each range of its memory goes.
    pub pages: Vec<Placed>,
}

/// What an earlier set has of a process, and how it is known what has been written since.
#[derive(Debug)]
pub struct Earlier {
    /// How writes have been noted.
    pub marks: Marks,
    /// The pages that it has, in ascending order.
    pub known: Vec<Range<u64>>,
}

impl Earlier {
    /// There is none.
    pub const NONE: Self = Self { marks: Marks::None, known: Vec::new() };

    /// Cuts a range into parts that the earlier set has, which are true, and parts to be written.
    fn divide(&self, saved: &Range<u64>, clean: bool) -> Vec<(Range<u64>, bool)> {
        let Range { start, end } = *saved;
        let mut parts = Vec::new();
        let mut at = start;
        let first = self.known.partition_point(|known| known.end <= start);
        for known in self.known[first..].iter().take_while(|known| clean && known.start < end) {
            if at < known.start {
                parts.push((at..known.start, false));
            }
            let from = at.max(known.start);
            at = known.end.min(end);
            parts.push((from..at, true));
        }
        if at < end {
            parts.push((at..end, false));
        }
        parts
    }
}

impl Capture {
    /// Whether what was taken for true of the mappings was so when the tasks stood still.
    pub fn hold(&self, looks: &Looks) -> bool {
        self.tasks.iter().all(|task| looks.hold(task.pid, task.source))
    }

    /// Asks the stopped tasks for the NUMA policies that nobody could be asked for later.
    pub fn ask(&mut self, tasks: &mut [LiveTask]) -> Result<()> {
        for pages in &mut self.tasks {
            let task = tasks.iter_mut().find(|task| task.pid == pages.pid);
            let injection = task.and_then(|task| task.injection.as_mut());
            pages.ask(injection).map_err(|e| e.pid(pages.vpid.cast_signed()))?;
        }
        Ok(())
    }

    /// Asks the copies for the others, and records all of them.
    pub fn record_policies(&mut self, model: &mut Model) -> Result<()> {
        for pages in &mut self.tasks {
            let at = |e: Error| e.pid(pages.vpid.cast_signed());
            let mappings = std::mem::take(&mut pages.unasked);
            if let Some(copy) = self.copies.iter_mut().find(|copy| copy.tid() == pages.source) {
                pages.policies.append(&mut copy.ask(&mappings).map_err(at)?);
            }
            placement::record(model, pages.vpid, std::mem::take(&mut pages.policies)).map_err(at)?;
        }
        Ok(())
    }

    /// Writes the pages: while the tasks are stopped, or when [`Self::snapshot`] has made copies of them.
    pub fn write(&mut self, images: &ImageDir, disk: Disk) -> Result<()> {
        let vdso = Vdso::own()?;
        let write = |tasks: &mut [TaskPages]| {
            let mut all = tasks.iter_mut();
            all.try_for_each(|task| {
                task.write(images, &vdso, disk).map_err(|e| e.pid(task.vpid.cast_signed()))
            })
        };
        let halves = self.tasks.len() / 2;
        if self.tasks.len() < MANY {
            return write(&mut self.tasks);
        }
        // Each makes two files, which takes longer than what is written to most of them.
        let (some, others) = self.tasks.split_at_mut(halves);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| write(others));
            let mine = write(some);
            let theirs =
                other.join().unwrap_or_else(|_| Err(Error::new("a thread that wrote pages has failed")));
            mine.and(theirs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_set_has_is_left_to_it() {
        let known = vec![0x2000..0x4000, 0x4000..0x5000, 0x8000..0x9000];
        let earlier = Earlier { marks: Marks::Protection, known };
        let divide = |range: Range<u64>, clean| earlier.divide(&range, clean);
        assert_eq!(divide(0x1000..0xa000, false), [(0x1000..0xa000, false)]);
        assert_eq!(
            divide(0x1000..0xa000, true),
            [
                (0x1000..0x2000, false),
                (0x2000..0x4000, true),
                (0x4000..0x5000, true),
                (0x5000..0x8000, false),
                (0x8000..0x9000, true),
                (0x9000..0xa000, false)
            ]
        );
        assert_eq!(divide(0x3000..0x4000, true), [(0x3000..0x4000, true)]);
        assert_eq!(divide(0x5000..0x8000, true), [(0x5000..0x8000, false)]);
        assert_eq!(Earlier::NONE.divide(&(0..0x1000), true), [(0..0x1000, false)]);
    }
}
