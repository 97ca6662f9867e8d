//! The memory of a new task: its own taken away, that of the images put in its place.
//!
//! ```text
//!   unmap everything but the window ──> PR_SET_MM_MAP (the executable is unmapped: it may be replaced)
//!     ──> the plan's first steps ──> pages ──> the plan's last steps
//! ```
//!
//! A process whose children have memory of it is filled before it forks them (see `inherit`), and so is one whose
//! children run on its memory (see `sharing`).

use std::collections::BTreeMap;
use std::iter::once;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::checkpoint::arch::{self, record};
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::files::uring;
use crate::checkpoint::image::MmEntry;
use crate::checkpoint::memory::choose;
use crate::checkpoint::memory::fill::{self, Goals};
use crate::checkpoint::memory::inherit;
use crate::checkpoint::memory::lazy::{self, Lazy};
use crate::checkpoint::memory::lock::{self, OnFault};
use crate::checkpoint::memory::marks::Marks;
use crate::checkpoint::memory::pagemap::{self, Pages};
use crate::checkpoint::memory::plan::{self, Plan, Source, Step};
use crate::checkpoint::memory::shmem::Shared;
use crate::checkpoint::memory::sources::{EXECUTABLE, Sources};
use crate::checkpoint::memory::vdso::{self, Fit, Vdso};
use crate::checkpoint::memory::{aio, bridge, maps, marks, mm};
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::{Arg, Batch, Conduit, Injection};
use crate::checkpoint::task::{frames, sharing};
use crate::sys::{pidfd, userfaultfd};

const RSEQ_FLAG_UNREGISTER: i32 = 1;
/// Size of `struct robust_list_head`.
const ROBUST_LIST_HEAD: i32 = 24;
const USERFAULTFD_FLAGS: i32 = libc::O_CLOEXEC | userfaultfd::UFFD_USER_MODE_ONLY;

/// Gives the file of an id of the model.
pub type OpenFile<'f> = &'f dyn Fn(u32) -> Result<BorrowedFd<'f>>;

/// An address at which no task of the model has a mapping for `size` bytes.
pub fn free_window(model: &Model, size: u64) -> Result<u64> {
    plan::free_window(model.mm.values().flat_map(|mm| &mm.vmas), size)
}

/// The memory of all tasks, as far as it is in place.
pub struct Memories<'a> {
    restore: &'a Restore<'a>,
    shared: Shared,
    lazy: Lazy,
    /// Who has memory of whom.
    heirs: BTreeMap<i32, i32>,
    /// Who runs on whose memory.
    tenants: BTreeMap<u32, u32>,
    /// The processes that have been filled, with what is left to do.
    filled: BTreeMap<i32, Plan>,
    /// What handlers of signals return to, as this processor takes it.
    mends: frames::Mends,
}

impl<'a> Memories<'a> {
    /// Opens the shared memory. `forks`: which process forks which.
    pub fn open(restore: &'a Restore<'a>, forks: impl Iterator<Item = (i32, i32)>) -> Result<Self> {
        aio::check(restore.model, restore.options.lazy)?;
        let shared = Shared::open(restore.model, restore.images)?;
        let mends = frames::mends(restore.model, restore.images, restore.options)?;
        // Who is filled later has nothing to pass on yet.
        let heirs = if restore.options.lazy { BTreeMap::new() } else { inherit::heirs(restore.model, forks) };
        let tenants = sharing::tenants(restore.model);
        Ok(Self { restore, shared, lazy: Lazy::default(), heirs, tenants, filled: BTreeMap::new(), mends })
    }

    /// Whose memory a process runs on.
    fn owner(&self, vpid: i32) -> i32 {
        self.tenants.get(&vpid.cast_unsigned()).map_or(vpid, |owner| owner.cast_signed())
    }

    /// Fills a process that is about to fork `child`, if the child has memory of it, or runs on it.
    pub fn bequeath(
        &mut self,
        task: &mut NewTask,
        child: i32,
        files: OpenFile<'_>,
        conduit: &Conduit,
    ) -> Result<()> {
        let owner = self.owner(task.vpid);
        // With `--lazy` nobody is filled while the tree grows.
        let shares = self.owner(child) == owner && !self.restore.options.lazy;
        if (shares || self.heirs.get(&child) == Some(&owner)) && !self.filled.contains_key(&owner) {
            self.fill(task, files, conduit)
        } else {
            Ok(())
        }
    }

    /// Replaces the memory of a task whose injection has settled.
    pub fn restore(&mut self, task: &mut NewTask, files: OpenFile<'_>, conduit: &Conduit) -> Result<()> {
        if self.owner(task.vpid) != task.vpid {
            return Ok(());
        }
        if !self.filled.contains_key(&task.vpid) {
            self.fill(task, files, conduit)?;
        }
        let Some(plan) = self.filled.remove(&task.vpid) else { return Ok(()) };
        self.finish(task, &plan).map_err(|e| e.pid(task.vpid))
    }

    /// Starts what fills the memory later.
    pub fn start(self) -> Result<lazy::Hold> {
        let images = self.restore.options.record_touched.then(|| self.restore.images.directory());
        self.lazy.start(self.restore.target, images)
    }

    fn fill(&mut self, task: &mut NewTask, files: OpenFile<'_>, conduit: &Conduit) -> Result<()> {
        if self.owner(task.vpid) != task.vpid {
            return Err(Error::new("the process would take another one's memory away").pid(task.vpid));
        }
        let plan = self.replace(task, files, conduit).map_err(|e| e.pid(task.vpid))?;
        self.filled.insert(task.vpid, plan);
        Ok(())
    }

    fn mm(&self, vpid: i32) -> Result<&'a MmEntry> {
        let mm = self.restore.model.mm.get(&vpid.cast_unsigned());
        mm.ok_or_else(|| Error::new("the images have no memory for the process"))
    }

    fn replace(&mut self, task: &mut NewTask, files: OpenFile<'_>, conduit: &Conduit) -> Result<Plan> {
        let mm = self.mm(task.vpid)?;
        let images = |pid: i32| pagemap::open(self.restore.images, &pagemap::of_task(pid.cast_unsigned()));
        let mut pages = images(task.vpid)?;
        let (start, end) = task.injection.footprint();
        let model = self.restore.model;
        let mut plan = plan::plan(&mm.vmas, &(start..end), |id| segment_size(model, id))?;
        plan.postpone(&uring::of_task(model, task.vpid)?);
        let compat = model.is_compat(task.vpid.cast_unsigned());
        let (mut bridged, mut old) = (None, None);
        if compat {
            plan.narrow();
            old = vdso_code(&plan, &pages)?;
        } else {
            bridged = bridge(model, task.vpid, mm, &mut plan, &(start..end), &pages)?;
        }
        let parent = self.heirs.get(&task.vpid).copied();
        let kept = match parent {
            Some(parent) => inherit::kept(self.mm(parent)?, mm),
            None => Vec::new(),
        };
        plan.keep(&kept);
        let stay = kept.iter().map(|kept| kept.range.clone()).chain(once(start..end)).collect();
        clear(task, stay)?;
        let own_exe = parent.is_none();
        let marks = marks::of(model, task.vpid.cast_unsigned())?;
        let uffd = map(task, (mm, own_exe, &marks), &plan, files, &self.shared, conduit)?;
        if let Some((at, code)) = bridged {
            task.injection.write_mem(at, &code)?;
        }
        if let (true, Some(range)) = (compat, &plan.vdso) {
            vdso::compare(task.pid, range, old.as_deref())?;
        }
        if let Some(parent) = parent {
            let difference = inherit::compare(pages, &images(parent)?, &kept)?;
            take_away(task, &difference.gone)?;
            pages = difference.pages;
        }
        let later = if self.restore.options.lazy { lazy::userfaultfd(task, conduit)? } else { None };
        let goals = Goals::new(&mm.vmas, later.is_some());
        match later {
            Some(later) => {
                fill::fill_later((task.pid, task.vpid), later, pages, &goals, &mut self.lazy)?;
            }
            None => fill::fill(task.pid, uffd.as_ref(), &pages, &goals)?,
        }
        Ok(plan)
    }

    fn finish(&self, task: &mut NewTask, plan: &Plan) -> Result<()> {
        let (mm, vpid) = (self.mm(task.vpid)?, task.vpid.cast_unsigned());
        finish(&mut task.injection, self.restore.model, (vpid, mm), plan)?;
        let mends = self.mends.iter().filter(|(pid, _)| self.owner(**pid) == task.vpid);
        for (at, bytes) in mends.flat_map(|(_, mends)| mends) {
            task.injection.write_mem(*at, bytes)?;
        }
        aio::polls(task, self.restore.model)?;
        let marks = marks::of(self.restore.model, vpid)?;
        marks::restore(&mut task.injection, &marks, &mm.vmas, self.heirs.contains_key(&task.vpid))
    }
}

/// Takes pages away that the parent has and the process has not.
fn take_away(task: &mut NewTask, gone: &[Range<u64>]) -> Result<()> {
    let mut batch = Batch::new();
    batch.about("cannot take away the parent's pages");
    for range in gone {
        let args = [range.start.into(), (range.end - range.start).into(), libc::MADV_DONTNEED.into()];
        batch.call(libc::SYS_madvise, &args);
    }
    if batch.is_empty() { Ok(()) } else { task.injection.run(&batch).map(drop) }
}

fn segment_size(model: &Model, id: u64) -> Option<u64> {
    let mut segments = model.ipcns.values().flat_map(|ns| &ns.shm);
    segments.find(|(shm, _)| u64::from(shm.desc.id) == id).map(|(shm, _)| shm.size)
}

/// Where the code of another kernel's vdso goes, and what it becomes; None if the image has this kernel's.
fn bridge(
    model: &Model,
    vpid: i32,
    mm: &MmEntry,
    plan: &mut Plan,
    window: &Range<u64>,
    pages: &Pages,
) -> Result<Option<(u64, Vec<u8>)>> {
    let (own, code) = (Vdso::own()?, vdso_code(plan, pages)?);
    let (Fit::Bridge, Some(code), Some(range)) = (own.fit(plan, code.as_deref())?, code, plan.vdso.clone())
    else {
        return Ok(None);
    };
    let own_entry = model.pstree.iter().filter(|entry| entry.pid == vpid.cast_unsigned());
    for tid in own_entry.flat_map(|entry| &entry.threads) {
        let info = model.cores.get(tid).and_then(|core| core.thread_info.as_ref());
        if info.is_some_and(|info| range.contains(&record::ip(info))) {
            return Err(Error::new(format!(
                "the process uses the vdso of another kernel, and thread {tid} was inside it"
            ))
            .remedy("restore it under the kernel it was checkpointed under, or checkpoint it again"));
        }
    }
    let at = plan::free_behind(range.end, &mm.vmas, window, own.size())?;
    let built = bridge::build(&code, own.code(), at + own.data())?;
    plan.bridge(at);
    Ok(Some((range.start, built)))
}

/// What the image has for the code of the vdso.
fn vdso_code(plan: &Plan, pages: &Pages) -> Result<Option<Vec<u8>>> {
    let Some(vdso) = &plan.vdso else { return Ok(None) };
    let Some(run) = pages.runs.iter().find(|r| r.range.start <= vdso.start && vdso.end <= r.range.end) else {
        return Ok(None);
    };
    let size = usize::try_from(vdso.end - vdso.start).ok().filter(|&size| size <= 1 << 20);
    let mut code = vec![0; size.ok_or_else(|| Error::new("the vdso of the image is too large"))?];
    let at = run.offset + (vdso.start - run.range.start);
    let file = pages.files.get(run.file).ok_or_else(|| Error::new("the vdso of the image is nowhere"))?;
    file.read_exact_at(&mut code, at).during("cannot read the vdso", || format!("pread(pages, _, {at})"))?;
    Ok(Some(code))
}

/// Unmaps everything but what stays, after what the kernel writes to by itself has been taken out of its hands.
fn clear(task: &mut NewTask, mut stay: Vec<Range<u64>>) -> Result<()> {
    stay.sort_unstable_by_key(|range| range.start);
    let mut batch = Batch::new();
    if let Some(rseq) = task.injection.thread().rseq()? {
        batch.about("cannot unregister restartable sequences");
        let args = [rseq.addr.into(), rseq.len.into(), RSEQ_FLAG_UNREGISTER.into(), rseq.sig.into()];
        batch.call(libc::SYS_rseq, &args);
    }
    batch.about("cannot release the addresses that the kernel writes to");
    batch.call(libc::SYS_set_robust_list, &[0.into(), ROBUST_LIST_HEAD.into()]);
    batch.call(libc::SYS_set_tid_address, &[0.into()]);
    batch.about("cannot unmap the memory of the new process");
    let mut mapped = maps::read(task.pid)?;
    mapped.retain(|m| m.end <= plan::TASK_SIZE || m.name() != b"[vsyscall]");
    let (mut at, end) = (0, mapped.last().map_or(0, |m| m.end));
    for range in stay.into_iter().chain(once(end..end)) {
        // One call takes everything that lies between two ranges.
        let first = mapped.partition_point(|m| m.end <= at);
        let after = mapped.partition_point(|m| m.start < range.start);
        if let Some((first, last)) = mapped.get(first..after).and_then(|m| m.first().zip(m.last())) {
            let gap = first.start.max(at)..last.end.min(range.start);
            if gap.start < gap.end {
                unmap(&mut batch, gap);
            }
        }
        at = at.max(range.end);
    }
    task.injection.run(&batch).map(drop)
}

fn unmap(batch: &mut Batch, range: Range<u64>) {
    batch.call(libc::SYS_munmap, &[range.start.into(), (range.end - range.start).into()]);
}

/// Carries out the first steps, and brings back a userfaultfd of the task's memory where the kernel gives one. `exe`:
/// whether the executable is not the one that the process has.
fn map(
    task: &mut NewTask,
    (mm, exe, marks): (&MmEntry, bool, &Marks),
    plan: &Plan,
    files: OpenFile<'_>,
    shared: &Shared,
    conduit: &Conduit,
) -> Result<Option<OwnedFd>> {
    let mut sources = Sources::open(plan, files, shared)?;
    if exe {
        sources.add_executable(mm.exe_file_id, files)?;
    }
    let mut batch = Batch::new();
    let numbers = sources.send(task, conduit)?;
    let exe = numbers.get(&Source::File(mm.exe_file_id, EXECUTABLE)).copied();
    mm::restore(&mut batch, mm, exe.unwrap_or(-1));
    marks::reserve(&mut batch, marks, &mm.vmas);
    for one in &plan.map {
        step(&mut batch, one, &numbers)?;
    }
    batch.about("cannot close the mapped files");
    for number in numbers.values() {
        batch.call(libc::SYS_close, &[(*number).into()]);
    }
    let uffd = batch.call(libc::SYS_userfaultfd, &[USERFAULTFD_FLAGS.into()]);
    let uffd = batch.tolerate(uffd);
    let results = task.injection.run(&batch)?;
    match results.result(uffd) {
        Ok(number) => take(task, i32::try_from(number).unwrap_or(-1)).map(Some),
        // Not compiled in, or forbidden: there is another way to fill the memory.
        Err(Errno::ENOSYS | Errno::EPERM | Errno::EINVAL) => Ok(None),
        Err(errno) => {
            Err(Error::new("cannot prepare to fill the memory").call("userfaultfd(O_CLOEXEC)", errno))
        }
    }
}

fn take(task: &mut NewTask, number: i32) -> Result<OwnedFd> {
    let taken = pidfd::getfd(task.pidfd.as_fd(), number)
        .during("cannot prepare to fill the memory", || format!("pidfd_getfd(pidfd, {number}, 0)"));
    task.injection.syscall(libc::SYS_close, &[number.into()])?;
    taken
}

fn step(batch: &mut Batch, step: &Step, numbers: &BTreeMap<Source, i32>) -> Result<()> {
    let len = |range: &Range<u64>| Arg::from(range.end - range.start);
    match step {
        Step::Map { range, prot, flags, source, offset } => {
            let fd = match source {
                Source::Nothing => -1,
                // Mapped in the end, another way.
                Source::Descriptor(_) => return Err(Error::new("a mapping is made too early")),
                other => *numbers.get(other).ok_or_else(|| Error::new("a mapped file was not passed"))?,
            };
            batch.about(match flags & libc::MAP_HUGETLB.cast_unsigned() {
                0 => "cannot map the memory of the images",
                _ => "cannot map huge pages, of which vm.nr_hugepages must leave as many as the images have",
            });
            let args = [
                range.start.into(),
                len(range),
                (*prot).into(),
                (*flags).into(),
                fd.into(),
                (*offset).into(),
            ];
            let call = batch.call(libc::SYS_mmap, &args);
            batch.expect(call, range.start);
        }
        Step::Attach { segment, at, flags } => {
            batch.about("cannot attach a shared memory segment");
            let call = batch.call(libc::SYS_shmat, &[(*segment).into(), (*at).into(), (*flags).into()]);
            batch.expect(call, *at);
        }
        Step::Unmap(range) => unmap(batch, range.clone()),
        Step::Grow(range, end) => {
            batch.about("cannot grow the memory that a child has inherited");
            let size = Arg::from(end - range.start);
            let call = batch.call(libc::SYS_mremap, &[range.start.into(), len(range), size, 0.into()]);
            batch.expect(call, range.start);
        }
        Step::Protect(range, prot) => {
            batch.about("cannot protect the memory of the images");
            batch.call(libc::SYS_mprotect, &[range.start.into(), len(range), (*prot).into()]);
        }
        Step::Advise(range, advice) => {
            batch.about("cannot give advice about the memory of the images");
            batch.call(libc::SYS_madvise, &[range.start.into(), len(range), (*advice).into()]);
        }
        // Only the finish has any.
        Step::Ring(_) => return Err(Error::new("a ring of Linux AIO is made too early")),
        Step::Lock(range, prot) => lock::lock(batch, range, *prot, &OnFault::new()),
        Step::Vdso(start) => {
            batch.about("cannot map the vdso");
            arch::map_vdso(batch, *start);
        }
        Step::CompatVdso(start) => {
            batch.about("cannot map the vdso of 32-bit programs, which this kernel may not run");
            arch::map_compat_vdso(batch, *start);
        }
    }
    Ok(())
}

fn finish(injection: &mut Injection, model: &Model, (vpid, mm): (u32, &MmEntry), plan: &Plan) -> Result<()> {
    let (on_fault, mut batch) = (lock::of(model, vpid)?, Batch::new());
    for one in &plan.finish {
        match one {
            Step::Map { range, prot, source: Source::Descriptor(fd), offset, .. } => {
                choose::map(injection, range, *prot, *fd, *offset)?;
            }
            Step::Ring(range) => aio::restore(injection, range.start, range.end - range.start)?,
            Step::Lock(range, prot) => lock::lock(&mut batch, range, *prot, &on_fault),
            other => step(&mut batch, other, &BTreeMap::new())?,
        }
    }
    mm::restore_thp(&mut batch, mm);
    lock::lock_future(&mut batch, model, vpid)?;
    if batch.is_empty() {
        return Ok(());
    }
    injection.run(&batch).map(drop)
}
