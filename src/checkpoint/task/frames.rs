//! Frames of signals in images of another processor.
//!
//! Registers are restored one by one, but what a handler has interrupted lies on the stack as the processor of the
//! checkpoint wrote it (`arch/x86_64/frames.rs`). Where that one keeps its registers as this one does, nothing is looked at.
//! Else the stacks of all threads are searched in the images, from the stack pointer upwards, and from frame to frame
//! where handlers have a stack of their own.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::checkpoint::arch::frames::{self, Misfit};
use crate::checkpoint::arch::record;
use crate::checkpoint::arch::xsave::{Layout, layout};
use crate::checkpoint::context::Options;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{ImageDir, vma as status};
use crate::checkpoint::memory::pagemap::{self, Pages};
use crate::checkpoint::model::Model;
use crate::checkpoint::task::sharing;

/// The name of this room's extension in stasis.img.
const EXTENSION: &str = "xsave";
/// No more of a stack than this is searched.
const DEEP: u64 = 16 << 20;
/// No more frames of one thread than these lead to other stacks.
const STACKS: usize = 1000;
/// Frames are no longer than this.
const LONG: u64 = 64 << 10;
/// Frames begin at multiples of it.
const ALIGNED: u64 = 64;

/// What has to be written over the pages of each process: addresses and bytes.
pub type Mends = BTreeMap<i32, Vec<(u64, Vec<u8>)>>;

/// Notes how this processor lays out what is in frames.
pub fn dump(model: &mut Model) -> Result<()> {
    model.set_extension(EXTENSION, &layout())
}

/// The frames that this processor would not take as they are; an error if they hold what it lacks.
pub fn mends(model: &Model, images: &ImageDir, options: &Options) -> Result<Mends> {
    mends_for(model, images, options, &layout())
}

fn mends_for(model: &Model, images: &ImageDir, options: &Options, here: &Layout) -> Result<Mends> {
    let was: Layout = model.extension(EXTENSION)?;
    let was = if was.is_empty() { here.clone() } else { was };
    let mut all = Mends::new();
    if was == *here && model.extension_data(EXTENSION).is_some() {
        return Ok(all);
    }
    let tenants = sharing::tenants(model);
    for entry in model.pstree.iter().filter(|entry| model.mm.contains_key(&entry.pid)) {
        let owner = tenants.get(&entry.pid).copied().unwrap_or(entry.pid);
        let pages = pagemap::open(images, &pagemap::of_task(owner))?;
        let mut mends = BTreeMap::new();
        for tid in &entry.threads {
            let Some(info) = model.cores.get(tid).and_then(|core| core.thread_info.as_ref()) else {
                continue;
            };
            for (at, mut area) in of_thread(model, entry.pid, record::sp(info), &pages)? {
                let misfit = |Misfit(missing)| {
                    Error::new(format!(
                        "a handler of a signal will return to registers that this machine lacks, or keeps where \
                         the stack has no room: {}",
                        record::names(missing)
                    ))
                    .pid(tid.cast_signed())
                    .remedy("restore on a machine with the same processor features, or leave them out with --cpu-cap none")
                };
                if frames::refit(&mut area, &was, here, options.any_processor).map_err(misfit)? {
                    mends.insert(at, area);
                }
            }
        }
        if !mends.is_empty() {
            all.insert(entry.pid.cast_signed(), mends.into_iter().collect());
        }
    }
    if options.lazy && !all.is_empty() {
        return Err(Error::new(
            "handlers of signals will return to registers that this processor keeps elsewhere",
        )
        .remedy("restore without --lazy"));
    }
    Ok(all)
}

/// The frames above the stack pointer of a thread, and above that of what they have interrupted.
fn of_thread(model: &Model, pid: u32, sp: u64, pages: &Pages) -> Result<Vec<(u64, Vec<u8>)>> {
    let Some(mm) = model.mm.get(&pid) else { return Ok(Vec::new()) };
    let (mut found, mut seen, mut stacks) = (Vec::new(), BTreeMap::new(), vec![sp]);
    for _ in 0..STACKS {
        let Some(sp) = stacks.pop() else { break };
        let mut near = mm.vmas.iter().filter(|vma| vma.status & status::GUARD == 0);
        let Some(vma) = near.find(|vma| vma.start <= sp && sp < vma.end) else { continue };
        let start = sp / ALIGNED * ALIGNED;
        // A frame of another stack may lead back to this one.
        let above = seen.insert(vma.start, start).unwrap_or(u64::MAX);
        if above <= start {
            seen.insert(vma.start, above);
            continue;
        }
        let range = start..vma.end.min(start.saturating_add(DEEP)).min(above.saturating_add(LONG));
        let memory = read(pages, &range)?;
        for frame in frames::find(&memory, range.start) {
            let area = memory.get(frame.offset..frame.offset + frame.len()).unwrap_or_default();
            found.push((range.start + frame.offset as u64, area.to_vec()));
            stacks.push(frame.stack);
        }
    }
    Ok(found)
}

/// Private memory in the images; what they lack is zero.
fn read(pages: &Pages, range: &Range<u64>) -> Result<Vec<u8>> {
    let place = |at: u64| usize::try_from(at - range.start).unwrap_or(usize::MAX);
    let mut memory = vec![0; place(range.end)];
    for run in pages.within(range) {
        let file = pages.files.get(run.file).ok_or_else(|| Error::new("the pages are nowhere"))?;
        let Some(part) = memory.get_mut(place(run.range.start)..place(run.range.end)) else { continue };
        let len = part.len();
        file.read_exact_at(part, run.offset)
            .during("cannot read the pages", || format!("pread(pages, {len}, {})", run.offset))?;
    }
    Ok(memory)
}
