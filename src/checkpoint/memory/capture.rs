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

use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::{ImageDir, PagemapEntry, VmaEntry, vma as status};
use crate::checkpoint::memory::copy::{self, Placed, Sharing};
use crate::checkpoint::memory::pagemap;
use crate::checkpoint::memory::pages::Pagemap;
use crate::checkpoint::memory::snapshot::Copy;
use crate::checkpoint::memory::vdso::Vdso;
use crate::checkpoint::memory::vmas;

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
    /// What a copy of the process has too.
    inherited: Vec<Placed>,
    /// What only the process itself has.
    own: Vec<Placed>,
    /// What the kernel has.
    vdso: Option<Placed>,
    /// The file, once there is one.
    file: Option<File>,
}

impl TaskPages {
    /// Finds the pages to be saved of all mappings, which are in ascending order.
    pub(super) fn find<'a>(
        map: &mut Pagemap,
        (pid, vpid): (i32, u32),
        pages_id: u32,
        mappings: impl Iterator<Item = &'a VmaEntry>,
    ) -> Result<Self> {
        let mut pages = Self {
            pid,
            vpid,
            pages_id,
            source: pid,
            entries: Vec::new(),
            inherited: Vec::new(),
            own: Vec::new(),
            vdso: None,
            file: None,
        };
        let mut offset = 0;
        for mapping in mappings.filter(|mapping| vmas::has_private_pages(mapping)) {
            let whole = mapping.start..mapping.end;
            let lazy = vmas::may_be_lazy(mapping);
            let advice = mapping.madv.unwrap_or(0);
            let stays = 1 << libc::MADV_DONTFORK | 1 << libc::MADV_WIPEONFORK;
            let vdso = mapping.status & status::VDSO != 0;
            // All of the vdso: whoever restores it under another kernel needs it.
            let found = if vdso { vec![whole] } else { map.saved(whole)? };
            for range in found {
                let len = range.end - range.start;
                pages.entries.push(pagemap::present(&range, lazy));
                match () {
                    () if vdso => pages.vdso = Some((range, offset)),
                    () if advice & stays != 0 => pages.own.push((range, offset)),
                    () => pages.inherited.push((range, offset)),
                }
                offset += len;
            }
        }
        Ok(pages)
    }

    /// Bytes that a copy of the process would spare it.
    pub(super) fn inherited(&self) -> u64 {
        self.inherited.iter().map(|(range, _)| range.end - range.start).sum()
    }

    /// Writes what no copy of the process has.
    pub(super) fn write_own(&mut self, images: &ImageDir) -> Result<()> {
        let file = pagemap::create(images, &pagemap::of_task(self.vpid), self.pages_id, &self.entries)?;
        copy::to_file(self.pid, Sharing::Own, std::mem::take(&mut self.own), &file)?;
        self.file = Some(file);
        Ok(())
    }

    fn write(&mut self, images: &ImageDir, vdso: &Vdso) -> Result<()> {
        if self.file.is_none() {
            self.write_own(images)?;
        }
        let Some(file) = &self.file else { return Ok(()) };
        let sharing = if self.source == self.pid { Sharing::Own } else { Sharing::Shared };
        copy::to_file(self.source, sharing, std::mem::take(&mut self.inherited), file)?;
        let Some((range, offset)) = self.vdso.take() else { return Ok(()) };
        write_vdso(self.source, range, offset, vdso, file)
    }
}

/// Writes this process's own vdso, if it is the same: that of the task has traces of injections in its tail.
fn write_vdso(source: i32, range: Range<u64>, offset: u64, vdso: &Vdso, file: &File) -> Result<()> {
    if range.end - range.start != vdso.code().len() as u64 {
        return copy::to_file(source, Sharing::Own, [(range, offset)], file);
    }
    file.write_all_at(vdso.code(), offset)
        .during("cannot write the pages", || format!("pwrite(pages, {}, {offset})", vdso.code().len()))
}

impl Capture {
    /// Writes the pages: while the tasks are stopped, or when [`Self::snapshot`] has made copies of them.
    pub fn write(&mut self, images: &ImageDir) -> Result<()> {
        let vdso = Vdso::own()?;
        for task in &mut self.tasks {
            task.write(images, &vdso).map_err(|e| e.pid(task.vpid.cast_signed()))?;
        }
        Ok(())
    }
}
