//! The memory of a new task: its own taken away, that of the images put in its place.
//!
//! ```text
//!   unmap everything but the window ──> PR_SET_MM_MAP (the executable is unmapped: it may be replaced)
//!     ──> the plan's first steps ──> pages ──> the plan's last steps
//! ```
//!
//! Private pages that a parent and its children shared copy-on-write become pages of each of them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;

use crate::checkpoint::arch;
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::MmEntry;
use crate::checkpoint::memory::fill::{self, Goals};
use crate::checkpoint::memory::lazy::{self, Lazy};
use crate::checkpoint::memory::lock::{self, OnFault};
use crate::checkpoint::memory::pagemap::{self, Pages};
use crate::checkpoint::memory::plan::{self, Plan, Source, Step};
use crate::checkpoint::memory::shmem::Shared;
use crate::checkpoint::memory::vdso::Vdso;
use crate::checkpoint::memory::{maps, mm};
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::{Arg, Batch, Conduit, Injection};
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

/// Replaces the memory of a task whose injection has settled.
pub fn restore<'a>(
    restore: &Restore<'_>,
    task: &mut NewTask,
    files: OpenFile<'a>,
    shared: &'a Shared,
    conduit: &Conduit,
    lazy: &mut Lazy,
) -> Result<()> {
    let vpid = task.vpid;
    replace(restore, task, files, shared, conduit, lazy).map_err(|e| e.pid(vpid))
}

fn replace<'a>(
    restore: &Restore<'_>,
    task: &mut NewTask,
    files: OpenFile<'a>,
    shared: &'a Shared,
    conduit: &Conduit,
    lazy: &mut Lazy,
) -> Result<()> {
    let vpid = task.vpid.cast_unsigned();
    let mm = restore.model.mm.get(&vpid);
    let mm = mm.ok_or_else(|| Error::new("the images have no memory for the process"))?;
    let pages = pagemap::open(restore.images, &pagemap::of_task(vpid))?;
    let (start, end) = task.injection.footprint();
    let plan = plan::plan(&mm.vmas, &(start..end), |id| segment_size(restore.model, id))?;
    Vdso::own()?.check(&plan, vdso_code(&plan, &pages)?.as_deref())?;
    clear(task, start..end)?;
    let uffd = map(task, mm, &plan, files, shared, conduit)?;
    let later = if restore.options.lazy { lazy::userfaultfd(task, conduit)? } else { None };
    let goals = Goals::new(&mm.vmas, later.is_some());
    match later {
        Some(later) => fill::fill_later(task.pid, later, pages, &goals, lazy)?,
        None => fill::fill(task.pid, uffd.as_ref(), &pages, &goals)?,
    }
    drop(uffd);
    finish(&mut task.injection, mm, &plan, &lock::of(restore.model, vpid)?)
}

fn segment_size(model: &Model, id: u64) -> Option<u64> {
    let mut segments = model.ipcns.values().flat_map(|ns| &ns.shm);
    segments.find(|(shm, _)| u64::from(shm.desc.id) == id).map(|(shm, _)| shm.size)
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

/// Unmaps everything but the window, after what the kernel writes to by itself has been taken out of its hands.
fn clear(task: &mut NewTask, window: Range<u64>) -> Result<()> {
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
    let mut gap: Option<Range<u64>> = None;
    for mapping in maps::read(task.pid)? {
        let special = mapping.end > plan::TASK_SIZE && mapping.name() == b"[vsyscall]";
        if special || (window.start <= mapping.start && mapping.end <= window.end) {
            continue;
        }
        match &mut gap {
            Some(gap)
                if gap.end <= mapping.start && !(gap.end <= window.start && window.end <= mapping.start) =>
            {
                gap.end = mapping.end;
            }
            other => {
                unmap(&mut batch, other.replace(mapping.start..mapping.end));
            }
        }
    }
    unmap(&mut batch, gap);
    task.injection.run(&batch).map(drop)
}

fn unmap(batch: &mut Batch, range: Option<Range<u64>>) {
    if let Some(range) = range {
        batch.call(libc::SYS_munmap, &[range.start.into(), (range.end - range.start).into()]);
    }
}

/// Carries out the first steps, and brings back a userfaultfd of the task's memory where the kernel gives one.
fn map<'a>(
    task: &mut NewTask,
    mm: &MmEntry,
    plan: &Plan,
    files: OpenFile<'a>,
    shared: &'a Shared,
    conduit: &Conduit,
) -> Result<Option<OwnedFd>> {
    let sources = Sources::open(plan, mm, files, shared)?;
    let mut batch = Batch::new();
    let numbers = sources.send(task, conduit)?;
    let exe = numbers.get(&Source::File(mm.exe_file_id, EXECUTABLE)).copied();
    mm::restore(&mut batch, mm, exe.unwrap_or(-1));
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
                other => *numbers.get(other).ok_or_else(|| Error::new("a mapped file was not passed"))?,
            };
            batch.about("cannot map the memory of the images");
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
        Step::Unmap(range) => unmap(batch, Some(range.clone())),
        Step::Protect(range, prot) => {
            batch.about("cannot protect the memory of the images");
            batch.call(libc::SYS_mprotect, &[range.start.into(), len(range), (*prot).into()]);
        }
        Step::Advise(range, advice) => {
            batch.about("cannot give advice about the memory of the images");
            batch.call(libc::SYS_madvise, &[range.start.into(), len(range), (*advice).into()]);
        }
        // Only the finish has any.
        Step::Lock(range, prot) => lock::lock(batch, range, *prot, &OnFault::new()),
        Step::Vdso(start) => {
            batch.about("cannot map the vdso");
            arch::map_vdso(batch, *start);
        }
    }
    Ok(())
}

fn finish(injection: &mut Injection, mm: &MmEntry, plan: &Plan, on_fault: &OnFault) -> Result<()> {
    let mut batch = Batch::new();
    for one in &plan.finish {
        match one {
            Step::Lock(range, prot) => lock::lock(&mut batch, range, *prot, on_fault),
            other => step(&mut batch, other, &BTreeMap::new())?,
        }
    }
    mm::restore_thp(&mut batch, mm);
    if batch.is_empty() {
        return Ok(());
    }
    injection.run(&batch).map(drop)
}

/// How the executable is asked for: in no mode that a mapping has.
const EXECUTABLE: u32 = u32::MAX;

/// The descriptors that a plan's mappings need, opened as they were.
struct Sources<'a>(BTreeMap<Source, Held<'a>>);

enum Held<'a> {
    Borrowed(BorrowedFd<'a>),
    Own(OwnedFd),
}

impl Held<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Borrowed(fd) => *fd,
            Self::Own(fd) => fd.as_fd(),
        }
    }
}

impl<'a> Sources<'a> {
    fn open(plan: &Plan, mm: &MmEntry, files: OpenFile<'a>, shared: &'a Shared) -> Result<Self> {
        let mut held = BTreeMap::new();
        held.insert(
            Source::File(mm.exe_file_id, EXECUTABLE),
            reopened(files(mm.exe_file_id)?, libc::O_RDONLY.cast_unsigned())?,
        );
        for step in &plan.map {
            let Step::Map { source, .. } = step else { continue };
            if held.contains_key(source) {
                continue;
            }
            let file = match *source {
                Source::Nothing => continue,
                Source::File(id, access) => reopened(files(id)?, access)?,
                Source::Shared(id) => Held::Borrowed(
                    shared.get(id).ok_or_else(|| Error::new(format!("there is no shared memory {id}")))?,
                ),
            };
            held.insert(*source, file);
        }
        Ok(Self(held))
    }

    /// Passes them to the task; their numbers there.
    fn send(&self, task: &mut NewTask, conduit: &Conduit) -> Result<BTreeMap<Source, i32>> {
        let fds: Vec<BorrowedFd<'_>> = self.0.values().map(Held::as_fd).collect();
        let numbers = conduit.send(&mut task.injection, &fds)?;
        Ok(self.0.keys().copied().zip(numbers).collect())
    }
}

/// The file itself when it is open in this mode, else opened again. The mode decides what mprotect(2) may later do.
fn reopened(file: BorrowedFd<'_>, access: u32) -> Result<Held<'_>> {
    let flags = fcntl(file, FcntlArg::F_GETFL)
        .during("cannot look at a mapped file", || format!("fcntl({}, F_GETFL)", file.as_raw_fd()))?;
    let wanted = OFlag::from_bits_truncate(access.cast_signed()) & OFlag::O_ACCMODE;
    let flags = OFlag::from_bits_truncate(flags);
    if flags & OFlag::O_ACCMODE == wanted && !flags.contains(OFlag::O_PATH) {
        return Ok(Held::Borrowed(file));
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    open(path.as_str(), wanted | OFlag::O_CLOEXEC, Mode::empty())
        .during("cannot open a mapped file again", || format!("open({path:?}, {wanted:?})"))
        .map(Held::Own)
}
