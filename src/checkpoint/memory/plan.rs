//! What has to be done to an empty address space, as data: from the entries of an image to ordered steps.
//!
//! ```text
//!   MmEntry ──validate──> Plan { map:    Attach, Unmap, Map, Advise(huge pages), Vdso   then the pages are filled in
//!                                finish: Advise, Lock, Guard }
//! ```
//!
//! Every mapping but those of huge pages gets its last protection at once: pages are filled in by ways that do not ask for
//! PROT_WRITE. So no page is ever writable and executable unless it was, and memory-deny-write-execute has nothing to
//! object to.

mod validate;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{VmaEntry, vma as status};
use crate::checkpoint::memory::aio;
use crate::checkpoint::memory::inherit::Kept;
use crate::checkpoint::memory::pages::PAGE;
use crate::checkpoint::memory::vmas::{self, HUGE, MAP_DROPPABLE};

use validate::{check_range, malformed, validate};

/// End of the addresses that a program has without asking for more.
pub const TASK_SIZE: u64 = (1 << 47) - PAGE;
/// End of the addresses with five levels of page tables.
const TASK_SIZE_MAX: u64 = (1 << 56) - PAGE;
/// Space below a stack that the kernel wants free for it to grow: `stack_guard_gap`, 256 pages.
const STACK_GAP: u64 = 256 * PAGE;
const MADV_GUARD_INSTALL: u32 = 102;

const WRITE: u32 = libc::PROT_WRITE.cast_unsigned();

/// What is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Nothing: zero pages.
    Nothing,
    /// A file of the images, opened this way (`O_RDONLY`, `O_WRONLY`, `O_RDWR`).
    File(u32, u32),
    /// Shared anonymous memory.
    Shared(u64),
    /// What the task has open under this number.
    Descriptor(i32),
}

/// One thing to do in the task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// `mmap(start, len, prot, flags, source, offset)`
    Map {
        /// Where.
        range: Range<u64>,
        /// `PROT_*`
        prot: u32,
        /// `MAP_*`
        flags: u32,
        /// What.
        source: Source,
        /// From which byte of it on.
        offset: u64,
    },
    /// `shmat(segment, at, flags)`
    Attach {
        /// Its id.
        segment: u64,
        /// Where its first byte goes.
        at: u64,
        /// `SHM_RDONLY`, `SHM_EXEC`
        flags: i32,
    },
    /// `munmap`
    Unmap(Range<u64>),
    /// `mremap`, to a new end, in place
    Grow(Range<u64>, u64),
    /// `mprotect`
    Protect(Range<u64>, u32),
    /// `madvise`
    Advise(Range<u64>, u32),
    /// `mlock`
    Lock(Range<u64>, u32),
    /// `arch_prctl(ARCH_MAP_VDSO_64, start)`
    Vdso(u64),
    /// `arch_prctl(ARCH_MAP_VDSO_32, start)`, for a 32-bit program
    CompatVdso(u64),
    /// `io_setup`, in the place of memory that has the ring's image
    Ring(Range<u64>),
}

/// All steps for one address space.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Before the pages are filled in.
    pub map: Vec<Step>,
    /// Afterwards.
    pub finish: Vec<Step>,
    /// Where the image has the vdso's code, if it has.
    pub vdso: Option<Range<u64>>,
    /// Where the image has the vdso's data.
    pub vvar: Option<Range<u64>>,
}

impl Plan {
    /// Leaves what can only be mapped by way of the task's own descriptors for the end, when they are in place.
    pub fn postpone(&mut self, descriptors: &BTreeMap<u32, i32>) {
        let own = |step: &mut Step| match step {
            Step::Map { source: Source::File(id, _), .. } => descriptors.get(id).copied(),
            _ => None,
        };
        let mut late = Vec::new();
        self.map.retain_mut(|step| match own(step) {
            None => true,
            Some(fd) => {
                if let Step::Map { source, .. } = step {
                    *source = Source::Descriptor(fd);
                }
                late.push(step.clone());
                false
            }
        });
        late.append(&mut self.finish);
        self.finish = late;
    }

    /// Makes it the plan of a 32-bit program.
    pub fn narrow(&mut self) {
        for step in &mut self.map {
            if let Step::Vdso(start) = *step {
                *step = Step::CompatVdso(start);
            }
        }
    }

    /// Leaves alone what the task has already.
    pub fn keep(&mut self, kept: &[Kept]) {
        let find = |start: u64| kept.binary_search_by_key(&start, |kept| kept.range.start).ok();
        self.map.retain_mut(|step| {
            let Step::Map { range, .. } = step else { return true };
            let Some(kept) = find(range.start).and_then(|index| kept.get(index)) else { return true };
            *step = Step::Grow(kept.range.clone(), kept.end);
            kept.range.end < kept.end
        });
    }
}

/// Plans the mappings of one task. `window` is where the code that carries the plan out stands; `segment_size` gives
/// the size of a System V segment.
pub fn plan(
    entries: &[VmaEntry],
    window: &Range<u64>,
    segment_size: impl Fn(u64) -> Option<u64>,
) -> Result<Plan> {
    let mut plan = Plan::default();
    let guards = entries.iter().position(|e| e.status & status::GUARD != 0).unwrap_or(entries.len());
    let (mappings, guards) = entries.split_at(guards);
    let mut behind = 0;
    for entry in mappings {
        validate(entry, window)?;
        if entry.start < behind {
            return Err(malformed(entry, "it overlaps the one before"));
        }
        behind = entry.end;
    }
    attach(mappings, window, segment_size, &mut plan.map)?;
    for entry in mappings {
        mapping(entry, &mut plan)?;
    }
    for guard in guards {
        check_range(guard, window)?;
        let inside = |entry: &VmaEntry| entry.start < guard.end && guard.start < entry.end;
        if guard.status != status::GUARD || !mappings.iter().any(inside) {
            return Err(malformed(guard, "it is no guard of a mapping"));
        }
        plan.finish.push(Step::Advise(guard.start..guard.end, MADV_GUARD_INSTALL));
    }
    if let Some(start) = plan.vvar.iter().chain(&plan.vdso).map(|r| r.start).min() {
        plan.map.push(Step::Vdso(start));
    }
    Ok(plan)
}

impl Plan {
    /// Keeps the code of the image's vdso as memory of the process, and maps this kernel's at `at`.
    pub fn bridge(&mut self, at: u64) {
        self.map.retain(|step| !matches!(step, Step::Vdso(_)));
        if let Some(range) = self.vdso.clone() {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let prot = (libc::PROT_READ | libc::PROT_EXEC).cast_unsigned();
            let (flags, source) = (flags.cast_unsigned(), Source::Nothing);
            self.map.push(Step::Map { range, prot, flags, source, offset: 0 });
        }
        self.map.push(Step::Vdso(at));
    }
}

/// A range of `size` bytes that none of `entries` uses, behind `after` if there is one.
pub fn free_behind(after: u64, entries: &[VmaEntry], window: &Range<u64>, size: u64) -> Result<u64> {
    let at = after + PAGE;
    let is_free = |range: Range<u64>| {
        range.end <= TASK_SIZE
            && (range.end <= window.start || window.end <= range.start)
            && entries.iter().all(|e| e.end <= range.start || range.end <= e.start.saturating_sub(STACK_GAP))
    };
    if is_free(at..at.saturating_add(size)) {
        return Ok(at);
    }
    let taken = VmaEntry { start: window.start, end: window.end, ..VmaEntry::default() };
    free_window(entries.iter().chain([&taken]), size)
}

/// The steps for one entry, apart from System V segments, which [`attach`] has done.
fn mapping(entry: &VmaEntry, plan: &mut Plan) -> Result<()> {
    let range = entry.start..entry.end;
    let has = |bit: u32| entry.status & bit != 0;
    if has(status::VSYSCALL | status::UPROBES) {
        return Ok(());
    }
    if has(status::VDSO | status::VVAR) {
        let place = if has(status::VDSO) { &mut plan.vdso } else { &mut plan.vvar };
        if place.replace(range).is_some() {
            return Err(malformed(entry, "there is another vdso"));
        }
        return Ok(());
    }
    if aio::is(entry) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let (flags, source) = (flags.cast_unsigned(), Source::Nothing);
        plan.map.push(Step::Map { range: range.clone(), prot: entry.prot, flags, source, offset: 0 });
        plan.finish.push(Step::Ring(range.clone()));
    } else if has(status::SYSVIPC) {
        plan.map.push(Step::Protect(range.clone(), entry.prot));
    } else {
        let source = if has(status::ANON_SHARED) {
            Source::Shared(entry.shmid)
        } else if has(status::FILE_PRIVATE | status::FILE_SHARED) {
            let id = u32::try_from(entry.shmid).map_err(|_| malformed(entry, "its file has no such id"))?;
            Source::File(id, access(entry))
        } else {
            Source::Nothing
        };
        let kept = libc::MAP_SHARED | libc::MAP_PRIVATE | libc::MAP_GROWSDOWN | libc::MAP_NORESERVE;
        let mut flags = entry.flags & (kept.cast_unsigned() | MAP_DROPPABLE | HUGE);
        flags |= libc::MAP_FIXED_NOREPLACE.cast_unsigned();
        if source == Source::Nothing {
            flags |= libc::MAP_ANONYMOUS.cast_unsigned();
        }
        let offset = if source == Source::Nothing { 0 } else { entry.pgoff };
        let mut prot = entry.prot;
        // Nobody fills private huge pages that may not be written.
        if vmas::huge(entry).is_some() && has(status::ANON_PRIVATE) && prot & WRITE == 0 {
            prot |= WRITE;
            plan.finish.push(Step::Protect(range.clone(), entry.prot));
        }
        plan.map.push(Step::Map { range: range.clone(), prot, flags, source, offset });
    }
    advise(entry, plan)?;
    if entry.flags & libc::MAP_LOCKED.cast_unsigned() != 0 {
        plan.finish.push(Step::Lock(range, entry.prot));
    }
    Ok(())
}

/// How the file was opened. CRIU before 2.0 did not say: then as much as the mapping needs.
fn access(entry: &VmaEntry) -> u32 {
    let writes = entry.status & status::FILE_SHARED != 0 && entry.prot & 2 != 0;
    let guess = if writes { libc::O_RDWR } else { libc::O_RDONLY };
    entry.fdflags.map_or(guess.cast_unsigned(), |flags| flags & libc::O_ACCMODE.cast_unsigned())
}

fn advise(entry: &VmaEntry, plan: &mut Plan) -> Result<()> {
    let given = entry.madv.unwrap_or(0);
    let known = vmas::ADVICE.iter().fold(0, |bits, (_, advice)| bits | 1 << advice);
    if given & !known != 0 {
        return Err(malformed(entry, &format!("its advice is {given:#x}")));
    }
    for (_, advice) in vmas::ADVICE.iter().filter(|(_, advice)| given & 1 << advice != 0) {
        // The size of pages is decided when they are filled in.
        let huge = [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE].contains(&advice.cast_signed());
        let steps = if huge { &mut plan.map } else { &mut plan.finish };
        steps.push(Step::Advise(entry.start..entry.end, *advice));
    }
    Ok(())
}

/// Attaches each System V segment once for each place it begins at, and takes away what was unmapped of it since.
fn attach(
    mappings: &[VmaEntry],
    window: &Range<u64>,
    segment_size: impl Fn(u64) -> Option<u64>,
    steps: &mut Vec<Step>,
) -> Result<()> {
    let parts = || mappings.iter().filter(|e| e.status & status::SYSVIPC != 0);
    let mut done = Vec::new();
    for first in parts() {
        let base =
            first.start.checked_sub(first.pgoff).ok_or_else(|| malformed(first, "it begins below 0"))?;
        if done.contains(&(first.shmid, base)) {
            continue;
        }
        done.push((first.shmid, base));
        let size = segment_size(first.shmid)
            .ok_or_else(|| malformed(first, &format!("the images lack the segment {}", first.shmid)))?;
        let size = size.checked_next_multiple_of(vmas::huge(first).unwrap_or(PAGE));
        let end = size.and_then(|size| base.checked_add(size)).filter(|&end| end <= TASK_SIZE_MAX);
        let end = end.ok_or_else(|| malformed(first, "its segment is too large"))?;
        if base < window.end && window.start < end {
            return Err(malformed(first, "its segment overlaps the code that restores it"));
        }
        let own = |e: &&VmaEntry| e.shmid == first.shmid && e.start.checked_sub(e.pgoff) == Some(base);
        let writes = |e: &VmaEntry| e.fdflags.is_none_or(|flags| flags & 3 == libc::O_RDWR.cast_unsigned());
        let mut flags = if parts().filter(own).any(writes) { 0 } else { libc::SHM_RDONLY };
        if parts().filter(own).any(|e| e.prot & 4 != 0) {
            flags |= libc::SHM_EXEC;
        }
        steps.push(Step::Attach { segment: first.shmid, at: base, flags });
        let mut at = base;
        for part in parts().filter(own) {
            if part.end > end {
                return Err(malformed(part, "it is larger than its segment"));
            }
            if at < part.start {
                steps.push(Step::Unmap(at..part.start));
            }
            at = part.end;
        }
        if at < end {
            steps.push(Step::Unmap(at..end));
        }
    }
    Ok(())
}

/// The lowest range of `size` bytes that none of `entries` uses, and that is no stack's to grow into.
pub fn free_window<'a>(entries: impl Iterator<Item = &'a VmaEntry>, size: u64) -> Result<u64> {
    // mmap_min_addr may be as high as this, and below it a null pointer with an offset should fault.
    const LOWEST: u64 = 1 << 20;
    let mut used: Vec<Range<u64>> = entries
        .filter(|e| e.start < e.end)
        .map(|e| {
            // All of a System V segment is attached for a moment, before its missing parts are unmapped again.
            let before = if e.status & status::SYSVIPC != 0 { e.pgoff } else { 0 };
            e.start.saturating_sub(before.max(STACK_GAP))..e.end.saturating_add(STACK_GAP)
        })
        .collect();
    used.sort_unstable_by_key(|range| range.start);
    let mut at = LOWEST;
    for range in used {
        if range.start >= at.saturating_add(size) {
            break;
        }
        at = at.max(range.end);
    }
    if at.saturating_add(size) > TASK_SIZE {
        return Err(Error::new("the mappings of the images leave no room for the code that restores them"));
    }
    Ok(at)
}

#[cfg(test)]
mod tests;
