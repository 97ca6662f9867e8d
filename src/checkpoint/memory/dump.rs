//! The memory of live tasks, into the model and the images.
//!
//! ```text
//!   while stopped   layout ──> model.mm        page map ──> what to save        shared memory ──> images
//!   later, or now   private pages ──> pagemap-N.img, pages-N.img   (`capture`)
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::checkpoint::context::{Dump, LiveTask};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{VmaEntry, vma as status};
pub use crate::checkpoint::memory::capture::Capture;
use crate::checkpoint::memory::capture::{Earlier, TaskPages};
use crate::checkpoint::memory::pages::Pagemap;
use crate::checkpoint::memory::parent::Parent;
use crate::checkpoint::memory::vmas::{Backing, Vma};
use crate::checkpoint::memory::{aio, inherit, layout, lock, marks, mm, pagemap, shmem, track};
use crate::checkpoint::remote::Injection;
use crate::checkpoint::task::sharing;

/// Gives a file that is mapped or executed its id in the model: descriptor, path, how it was opened.
pub type Register<'r> = &'r mut dyn FnMut(&mut Dump<'_>, OwnedFd, &Path, u32) -> Result<u32>;

/// Captures everything but the private pages. The tasks are stopped.
pub fn capture(dump: &mut Dump<'_>, register: Register<'_>) -> Result<Capture> {
    let mut capture = Capture::default();
    let mut shared = BTreeMap::new();
    let tenants = sharing::tenants(&dump.model);
    for index in 0..dump.tasks.len() {
        let Some(task) = dump.tasks.get(index).filter(|task| !task.zombie) else { continue };
        let vpid = task.vpid;
        if tenants.contains_key(&vpid.cast_unsigned()) {
            continue;
        }
        let pages = task_memory(dump, index, register, &mut shared).map_err(|e| e.pid(vpid))?;
        capture.tasks.push(pages);
    }
    let relatives = inherit::relatives(&dump.model.mm);
    for pages in &mut capture.tasks {
        pages.related = relatives.contains(&pages.vpid);
    }
    for (tenant, owner) in tenants {
        let mm = dump.model.mm.get(&owner).cloned();
        let mm = mm.ok_or_else(|| Error::new("the memory that the process shares was not read"))?;
        dump.model.mm.insert(tenant, mm);
        pagemap::create(dump.images, &pagemap::of_task(tenant), dump.new_id(), &[], false)?;
    }
    Ok(capture)
}

/// What injections have put into the memory of a task: its own, and those of others that run on it.
fn hidden(dump: &Dump<'_>, index: usize) -> Vec<Range<u64>> {
    let memory = |task: &LiveTask| dump.model.ids.get(&task.vpid.cast_unsigned()).map(|ids| ids.vm_id);
    let own = dump.tasks.get(index).and_then(memory);
    let is_here = |at: usize, task: &LiveTask| at == index || own.is_some() && memory(task) == own;
    let here = dump.tasks.iter().enumerate().filter(|(at, task)| is_here(*at, task));
    let footprints = here.filter_map(|(_, task)| task.injection.as_ref()).flat_map(Injection::footprints);
    let mut all: Vec<_> = footprints.filter(|(start, end)| start < end).collect();
    all.sort_unstable();
    let mut joined: Vec<Range<u64>> = Vec::new();
    for (start, end) in all {
        match joined.last_mut() {
            // The kernel has made one mapping of them.
            Some(last) if last.end == start => last.end = end,
            _ => joined.push(start..end),
        }
    }
    joined
}

fn task_memory(
    dump: &mut Dump<'_>,
    index: usize,
    register: Register<'_>,
    shared: &mut BTreeMap<u64, u64>,
) -> Result<TaskPages> {
    let task = dump.tasks.get(index).ok_or_else(|| Error::new("there is no such task"))?;
    let (pid, vpid, locked) = (task.pid, task.vpid.cast_unsigned(), task.status.locked != Some(0));
    let mut mm = mm::capture(pid, &task.space)?;
    // Asked now: the first batch has mapped it.
    let hidden = hidden(dump, index);
    let noted = dump.parent.as_ref().is_some_and(Parent::is_known);
    let watched = noted || track::is_ours(dump.source.state_dir.as_deref(), pid);
    let (mut found, ours) = layout::read(pid, &hidden, watched, locked, &mut dump.looks)?;
    let future = lock::future(ours);
    let (exe, link) = layout::executable(pid)?;
    mm.exe_file_id = register(dump, exe, &link, 0)?;
    assign(dump, pid, &mut found, register, shared)?;

    let mut map = Pagemap::open(pid)?;
    let direct = found.iter().any(|vma| matches!(vma.backing, Backing::Ring | Backing::Aio));
    let earlier = match dump.parent.as_mut() {
        // A disk writes into memory when nobody has noted a write for some time.
        Some(parent) if !direct => parent.of_task(pid, vpid),
        _ => Earlier::NONE,
    };
    let mappings = found.iter().map(|vma| &vma.entry);
    let mut pages = TaskPages::find(&mut map, (pid, vpid), dump.new_id(), mappings, &earlier)?;
    pages.ask_later(found.iter().map(|vma| &vma.entry));
    let on_fault = found.iter().filter(|vma| vma.lock_on_fault).map(|vma| vma.entry.start).collect();
    lock::record(dump, vpid, on_fault)?;
    lock::record_future(dump, vpid, future)?;
    marks::record(dump, index, &found)?;
    mm.vmas = found.into_iter().map(|vma| vma.entry).collect();
    mm.vmas.extend(pages.guards.iter().map(guard));
    aio::record(&mut mm);
    dump.model.mm.insert(vpid, mm);
    Ok(pages)
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
            Backing::Process | Backing::SystemV(_) | Backing::Aio => {}
            Backing::Ring => {
                let ring = dump.files.ring(vma.mapping.inode).ok_or_else(|| {
                    Error::new("an io_uring is mapped of which no process has a descriptor")
                        .remedy("let the program keep the descriptor of the ring")
                })?;
                vma.entry.shmid = ring.into();
            }
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

/// The entry for guard pages.
fn guard(range: &Range<u64>) -> VmaEntry {
    let Range { start, end } = *range;
    VmaEntry { start, end, status: status::GUARD, fd: -1, ..VmaEntry::default() }
}
