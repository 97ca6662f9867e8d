//! The memory of live tasks, into the model and the images.
//!
//! ```text
//!   while stopped   layout ──> model.mm        page map ──> what to save        shared memory ──> images
//!   later, or now   private pages ──> pagemap-N.img, pages-N.img
//! ```
//!
//! The second half may read a snapshot instead of the task, which then runs again already.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::checkpoint::context::{Dump, LiveTask};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{ImageDir, MmEntry, PagemapEntry, VmaEntry, vma as status};
use crate::checkpoint::memory::pages::Pagemap;
use crate::checkpoint::memory::vdso::Vdso;
use crate::checkpoint::memory::vmas::{self, Backing, Vma};
use crate::checkpoint::memory::{copy, layout, mm, pagemap, shmem};

/// Gives a file that is mapped or executed its id in the model: descriptor, path, how it was opened.
pub type Register<'r> = &'r mut dyn FnMut(&mut Dump<'_>, OwnedFd, &Path, u32) -> Result<u32>;

/// What is still to be written: the private pages.
#[derive(Debug, Default)]
pub struct Capture {
    tasks: Vec<TaskPages>,
}

/// The private pages of one task.
#[derive(Debug)]
struct TaskPages {
    vpid: u32,
    pages_id: u32,
    /// Whose memory has them.
    source: i32,
    ranges: Vec<Range<u64>>,
    entries: Vec<PagemapEntry>,
    vdso: Option<Range<u64>>,
}

/// Captures everything but the private pages. The tasks are stopped.
pub fn capture(dump: &mut Dump<'_>, register: Register<'_>) -> Result<Capture> {
    let mut capture = Capture::default();
    let mut shared = BTreeMap::new();
    for index in 0..dump.tasks.len() {
        let Some(task) = dump.tasks.get(index).filter(|task| !task.zombie) else { continue };
        let vpid = task.vpid;
        let pages = task_memory(dump, index, register, &mut shared).map_err(|e| e.pid(vpid))?;
        capture.tasks.push(pages);
    }
    Ok(capture)
}

fn task_memory(
    dump: &mut Dump<'_>,
    index: usize,
    register: Register<'_>,
    shared: &mut BTreeMap<u64, u64>,
) -> Result<TaskPages> {
    let task = dump.tasks.get_mut(index).ok_or_else(|| Error::new("there is no such task"))?;
    let (pid, vpid) = (task.pid, task.vpid.cast_unsigned());
    let (mut mm, mut found) = live(task)?;
    let (exe, link) = layout::executable(pid)?;
    mm.exe_file_id = register(dump, exe, &link, 0)?;
    assign(dump, pid, &mut found, register, shared)?;

    let mut map = Pagemap::open(pid)?;
    let pages_id = dump.new_id();
    let pages = private_pages(&mut map, vpid, pages_id, pid, &found)?;
    mm.vmas = found.into_iter().map(|vma| vma.entry).collect();
    guards(&mut map, &mut mm.vmas)?;
    dump.model.mm.insert(vpid, mm);
    Ok(pages)
}

fn live(task: &mut LiveTask) -> Result<(MmEntry, Vec<Vma>)> {
    let injection = task.injection.as_mut().ok_or_else(|| Error::new("the task cannot be asked"))?;
    let mm = mm::capture(task.pid, injection)?;
    // Asked now: the first batch has mapped it.
    let (start, end) = injection.footprint();
    let hidden: Vec<_> = (start < end).then_some(start..end).into_iter().collect();
    Ok((mm, layout::read(task.pid, &hidden)?))
}

/// Gives each mapping with a file or with shared memory its `shmid`, and writes shared memory seen for the first time.
fn assign(
    dump: &mut Dump<'_>,
    pid: i32,
    found: &mut [Vma],
    register: Register<'_>,
    shared: &mut BTreeMap<u64, u64>,
) -> Result<()> {
    // One file is mapped in several parts, most often next to each other.
    let mut known = BTreeMap::new();
    for vma in found {
        match vma.backing {
            Backing::Process | Backing::SystemV(_) => {}
            Backing::File => {
                let access = vma.entry.fdflags.unwrap_or(0);
                let key = (vma.mapping.device, vma.mapping.inode, vma.mapping.name.clone(), access);
                let id = match known.get(&key) {
                    Some(&id) => id,
                    None => {
                        let (file, link) = layout::named(pid, vma)?;
                        let id = register(dump, file, &link, access)?;
                        known.insert(key, id);
                        id
                    }
                };
                vma.entry.shmid = id.into();
            }
            Backing::Shared => {
                let memory = layout::shared(pid, vma)?;
                let inode = memory
                    .metadata()
                    .during("cannot look at shared memory", || "fstat(memory)".into())?
                    .ino();
                vma.entry.shmid = match shared.get(&inode) {
                    Some(&id) => id,
                    None => {
                        let id = shmem::OWN_ID | u64::from(dump.new_id());
                        shmem::write(dump.images, id, dump.new_id(), &memory)?;
                        shared.insert(inode, id);
                        id
                    }
                };
            }
        }
    }
    Ok(())
}

/// Finds the pages to be saved of all mappings.
fn private_pages(
    map: &mut Pagemap,
    vpid: u32,
    pages_id: u32,
    source: i32,
    found: &[Vma],
) -> Result<TaskPages> {
    let mut pages = TaskPages { vpid, pages_id, source, ranges: Vec::new(), entries: Vec::new(), vdso: None };
    for entry in found.iter().map(|vma| &vma.entry).filter(|entry| vmas::has_private_pages(entry)) {
        let whole = entry.start..entry.end;
        let ranges = if entry.status & status::VDSO != 0 {
            // Needed by whoever restores it under another kernel.
            pages.vdso = Some(whole.clone());
            vec![whole]
        } else {
            map.saved(whole)?
        };
        let lazy = vmas::may_be_lazy(entry);
        pages.entries.extend(ranges.iter().map(|range| pagemap::present(range, lazy)));
        pages.ranges.extend(ranges);
    }
    Ok(pages)
}

/// Appends an entry for each range of guard pages.
fn guards(map: &mut Pagemap, entries: &mut Vec<VmaEntry>) -> Result<()> {
    let mut found = Vec::new();
    for entry in entries.iter().filter(|e| e.status & status::REGULAR != 0) {
        if entry.status & (status::VDSO | status::VVAR) == 0 {
            found.extend(map.guards(entry.start..entry.end)?);
        }
    }
    entries.extend(found.into_iter().map(|range| VmaEntry {
        start: range.start,
        end: range.end,
        status: status::GUARD,
        fd: -1,
        ..VmaEntry::default()
    }));
    Ok(())
}

impl Capture {
    /// Writes the private pages.
    pub fn write(self, images: &ImageDir) -> Result<()> {
        let vdso = Vdso::own()?;
        for task in self.tasks {
            task.write(images, &vdso).map_err(|e| e.pid(task.vpid.cast_signed()))?;
        }
        Ok(())
    }
}

impl TaskPages {
    fn write(&self, images: &ImageDir, vdso: &Vdso) -> Result<()> {
        let name = pagemap::of_task(self.vpid);
        let file = pagemap::create(images, &name, self.pages_id, &self.entries)?;
        copy::to_file(self.source, &self.ranges, &file)?;
        // The task's own copy has the traces of injections in its tail.
        let Some(own) = self.vdso.as_ref().filter(|r| r.end - r.start == vdso.code().len() as u64) else {
            return Ok(());
        };
        let before = self.ranges.iter().take_while(|range| range.start < own.start);
        let offset = before.map(|range| range.end - range.start).sum();
        file.write_all_at(vdso.code(), offset)
            .during("cannot write the pages", || format!("pwrite(pages, {}, {offset})", vdso.code().len()))
    }
}
