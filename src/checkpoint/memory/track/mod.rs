//! Which pages are written between one set of images and the next: pre-copy.
//!
//! ```text
//!   pre-dump 1    every page is protected, then copied while the program runs     a/pagemap: PRESENT
//!        │        the program writes: the kernel takes the protection from the page, nobody waits
//!   pre-dump 2    what has been written is protected again and copied             b/pagemap: PRESENT, PARENT   b/parent -> ../a
//!        │
//!   dump          what has been written is saved while the program stands still   c/pagemap: PRESENT, PARENT   c/parent -> ../b
//! ```
//!
//! | how             | since | what has to live on between the commands                             |
//! |-----------------|-------|----------------------------------------------------------------------|
//! | userfaultfd of `WP_ASYNC`, `PAGEMAP_SCAN` | 6.7 | the userfaultfd: in a keeper process                 |
//! | soft-dirty bits | where compiled in | nothing                                                  |
//! | not at all      |       | every set has all pages, and is right all the same                    |
//!
//! The protection is lost with mremap, exec, fork and new mappings: what has none counts as written. A record in the
//! state directory says to which set the protection belongs; it is removed before anything is protected again, so that
//! whoever dies in the middle leaves no record, and the next set has all pages.
//!
//! Not all of it is lost with mremap. A mapping that is moved next to others of the same userfaultfd becomes one with
//! them, and the kernel takes the whole from the userfaultfd, but the marks only from the pages that moved:
//!
//! ```text
//!   mapping      [ A ][ B ][ C ]    watched          [ A ]     [ C ]    B is moved away      [  A  B  C  ]    and back
//!   marks          #    #    #      protected          #         #                             #     .    #   nobody watches
//!   write to A                                                                                 #              not noted!
//! ```
//!
//! Watched again, A would look as if nobody had written to it. So a mapping comes to be watched only while its process
//! stands still, and what is found marked before is unmarked after.

mod keeper;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::checkpoint::context::LiveTask;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::VmaEntry;
use crate::checkpoint::memory::pages::{Marks, PAGE, Pagemap};
use crate::checkpoint::memory::vmas;
use crate::checkpoint::remote::{Batch, Injection};
use crate::checkpoint::task::status::Stat;
use crate::sys::memory::Anonymous;
use crate::sys::{pidfd, userfaultfd};

use self::keeper::Keeper;

const NAME: &str = "tracking.json";
const USERFAULTFD_FLAGS: i32 = libc::O_CLOEXEC | userfaultfd::UFFD_USER_MODE_ONLY;
const FEATURES: u64 = userfaultfd::FEATURE_WP_ASYNC | userfaultfd::FEATURE_WP_UNPOPULATED;
/// Bit of an entry of /proc/PID/pagemap.
const SOFT_DIRTY: u64 = 1 << 55;

/// How writes are noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum How {
    Protection,
    SoftDirty,
    Nothing,
}

/// The record between two commands.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The set of images to which the marks belong: `dump_criu_run_id` of its inventory.
    run: String,
    how: How,
    keeper: Option<Keeper>,
    tasks: Vec<Kept>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    pid: i32,
    start: i64,
    /// Number of the userfaultfd in the keeper.
    uffd: Option<i32>,
}

/// A process whose writes are noted.
#[derive(Debug)]
struct Watched {
    start: i64,
    uffd: Option<OwnedFd>,
}

/// The noting of writes, as long as this value or its keeper lives.
#[derive(Debug)]
pub struct Tracking {
    run: String,
    how: How,
    tasks: BTreeMap<i32, Watched>,
    keeper: Option<Keeper>,
}

impl Tracking {
    /// Begins to note writes, in the best way that this kernel has.
    pub fn begin() -> Self {
        Self { run: String::new(), how: best(), tasks: BTreeMap::new(), keeper: None }
    }

    /// What an earlier command has left of it; the keeper, if one is needed, still lives.
    pub fn find(state_dir: &Path) -> Option<Self> {
        let record = read(state_dir)?;
        let mut tasks = BTreeMap::new();
        let handle = match &record.keeper {
            Some(keeper) => Some(keeper.handle()?),
            None => None,
        };
        for kept in &record.tasks {
            if start_time(kept.pid) != Some(kept.start) {
                continue;
            }
            let uffd = match (kept.uffd, &handle) {
                (Some(number), Some(handle)) => Some(pidfd::getfd(handle.as_fd(), number).ok()?),
                _ => None,
            };
            tasks.insert(kept.pid, Watched { start: kept.start, uffd });
        }
        Some(Self { run: record.run, how: record.how, tasks, keeper: record.keeper })
    }

    /// To which set of images the marks belong.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// How it is known what a process has written since then.
    pub fn marks(&self, pid: i32) -> Marks {
        let same = |watched: &Watched| start_time(pid) == Some(watched.start);
        match self.how {
            _ if !self.tasks.get(&pid).is_some_and(same) => Marks::None,
            How::Protection => Marks::Protection,
            How::SoftDirty => Marks::SoftDirty,
            How::Nothing => Marks::None,
        }
    }

    /// Whether there is a way to note writes.
    pub fn is_noting(&self) -> bool {
        self.how != How::Nothing
    }

    /// The marks are about to be taken away: nobody may believe the record any more.
    pub fn renew(&mut self, state_dir: Option<&Path>) -> Result<()> {
        if let Some(dir) = state_dir {
            end(dir)?;
        }
        self.keeper = None;
        Ok(())
    }

    /// Sees to it that writes of a stopped task into `mappings` are noted from the next scan on. Where that cannot be had
    /// they count as written.
    pub fn watch(&mut self, task: &LiveTask, injection: &mut Injection, mappings: &[VmaEntry]) -> Result<()> {
        let start = start_time(task.pid).unwrap_or(-1);
        self.tasks.retain(|pid, watched| *pid != task.pid || watched.start == start);
        let watched = self.tasks.entry(task.pid).or_insert(Watched { start, uffd: None });
        if self.how != How::Protection {
            return Ok(());
        }
        let ranges = ranges(mappings);
        let stale = Pagemap::open(task.pid)?.unwatched(&ranges, true)?;
        if let Some(uffd) = &watched.uffd {
            match register(uffd, &ranges) {
                Ok(()) => return unmark(uffd, &stale),
                // The program has called execve(2): another address space.
                Err(Errno::ENOMEM | Errno::ESRCH) => watched.uffd = None,
                other => return other.during("cannot note writes", || "ioctl(uffd, UFFDIO_REGISTER)".into()),
            }
        }
        let Some(uffd) = userfaultfd(task, injection)? else { return Ok(()) };
        register(&uffd, &ranges).during("cannot note writes", || "ioctl(uffd, UFFDIO_REGISTER)".into())?;
        unmark(&uffd, &stale)?;
        watched.uffd = Some(uffd);
        Ok(())
    }

    /// Whether writes of a process can be found, and noted again, while it runs.
    pub fn needs_no_stop(&self, pid: i32) -> bool {
        let watched = self.tasks.get(&pid).filter(|watched| start_time(pid) == Some(watched.start));
        self.how == How::Protection && watched.is_some_and(|watched| watched.uffd.is_some())
    }

    /// How the pages of a stopped task are to be scanned such that from then on writes to them are noted.
    pub fn scan(&self, pid: i32) -> Marks {
        match self.marks(pid) {
            Marks::Protection => Marks::ProtectionAgain,
            other => other,
        }
    }

    /// The pages of a stopped task have been scanned.
    pub fn scanned(&self, pid: i32) -> Result<()> {
        if self.how != How::SoftDirty {
            return Ok(());
        }
        let path = format!("/proc/{pid}/clear_refs");
        fs::write(&path, "4").during("cannot note writes", || format!("write({path:?}, \"4\")"))
    }

    /// The marks belong to this set of images from now on.
    pub fn belongs_to(&mut self, run: String) {
        self.run = run;
    }

    /// Goes on when this command has ended, until the container ends or [`end`] is called.
    pub fn keep(self, state_dir: &Path, init: i32) -> Result<()> {
        let uffds: Vec<&OwnedFd> = self.tasks.values().filter_map(|watched| watched.uffd.as_ref()).collect();
        let keeper = if uffds.is_empty() { None } else { Some(keeper::start(&uffds, init)?) };
        let record = Record {
            run: self.run,
            how: self.how,
            keeper,
            tasks: self
                .tasks
                .iter()
                .map(|(pid, watched)| Kept {
                    pid: *pid,
                    start: watched.start,
                    uffd: watched.uffd.as_ref().map(std::os::fd::AsRawFd::as_raw_fd),
                })
                .collect(),
        };
        let text =
            serde_json::to_string(&record).map_err(|e| Error::new(format!("cannot write a record: {e}")))?;
        let (path, new) = (state_dir.join(NAME), state_dir.join(".tracking.json.new"));
        let written = fs::write(&new, text).and_then(|()| fs::rename(&new, &path));
        if written.is_err() {
            if let Some(keeper) = &record.keeper {
                keeper.end();
            }
        }
        written.during("cannot write the record of noted writes", || format!("write({})", path.display()))
    }
}

/// Ends what an earlier command has left: the record, then the keeper.
pub fn end(state_dir: &Path) -> Result<()> {
    let Some(record) = read(state_dir) else { return Ok(()) };
    let path = state_dir.join(NAME);
    fs::remove_file(&path)
        .during("cannot remove the record of noted writes", || format!("unlink({})", path.display()))?;
    if let Some(keeper) = &record.keeper {
        keeper.end();
    }
    Ok(())
}

/// Whether the write protection of a process is ours, rather than its own.
pub fn is_ours(state_dir: Option<&Path>, pid: i32) -> bool {
    let record = state_dir.and_then(read);
    record.is_some_and(|record| record.tasks.iter().any(|task| task.pid == pid && task.uffd.is_some()))
}

fn read(state_dir: &Path) -> Option<Record> {
    // Renamed into place when it was complete; what cannot be read is as good as none.
    serde_json::from_slice(&fs::read(state_dir.join(NAME)).ok()?).ok()
}

fn start_time(pid: i32) -> Option<i64> {
    Stat::of(pid).ok().map(|stat| stat.field(22))
}

/// The best way of this kernel to note writes.
fn best() -> How {
    let protects = userfaultfd::open(USERFAULTFD_FLAGS)
        .and_then(|uffd| userfaultfd::api(uffd.as_fd(), FEATURES))
        .is_ok();
    match () {
        () if protects => How::Protection,
        () if has_soft_dirty().unwrap_or(false) => How::SoftDirty,
        () => How::Nothing,
    }
}

/// A page that has just been written has the bit where the kernel knows of it.
fn has_soft_dirty() -> Option<bool> {
    use std::os::unix::fs::FileExt;
    let mut page = Anonymous::private(std::num::NonZeroUsize::new(PAGE as usize)?).ok()?;
    *page.as_mut_slice().first_mut()? = 1;
    let mut entry = [0; 8];
    fs::File::open("/proc/self/pagemap").ok()?.read_exact_at(&mut entry, page.address() / PAGE * 8).ok()?;
    Some(u64::from_ne_bytes(entry) & SOFT_DIRTY != 0)
}

/// Makes a userfaultfd of the task's memory; none where the task or the kernel has no room for one.
fn userfaultfd(task: &LiveTask, injection: &mut Injection) -> Result<Option<OwnedFd>> {
    let mut batch = Batch::new();
    let call = batch.call(libc::SYS_userfaultfd, &[USERFAULTFD_FLAGS.into()]);
    let call = batch.tolerate(call);
    let Ok(number) = injection.run(&batch)?.result(call) else { return Ok(None) };
    let number = i32::try_from(number).unwrap_or(-1);
    let taken = pidfd::getfd(task.pidfd.as_fd(), number)
        .during("cannot note writes", || format!("pidfd_getfd(pidfd, {number}, 0)"));
    injection.syscall(libc::SYS_close, &[number.into()])?;
    let uffd = taken?;
    userfaultfd::api(uffd.as_fd(), FEATURES)
        .during("cannot note writes", || format!("ioctl(uffd, UFFDIO_API, {FEATURES:#x})"))?;
    Ok(Some(uffd))
}

/// What can be watched, touching mappings joined.
pub fn ranges(mappings: &[VmaEntry]) -> Vec<std::ops::Range<u64>> {
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    for entry in mappings.iter().filter(|entry| vmas::may_be_watched(entry)) {
        match ranges.last_mut() {
            Some(last) if last.end == entry.start => last.end = entry.end,
            _ => ranges.push(entry.start..entry.end),
        }
    }
    ranges
}

/// Takes the marks from pages that nobody watched when they got them. What cannot be watched needs none.
fn unmark(uffd: &OwnedFd, stale: &[std::ops::Range<u64>]) -> Result<()> {
    for range in stale {
        match userfaultfd::unprotect(uffd.as_fd(), range.start, range.end - range.start) {
            Ok(()) | Err(Errno::ENOENT) => {}
            failed => failed.during("cannot note writes", || "ioctl(uffd, UFFDIO_WRITEPROTECT)".into())?,
        }
    }
    Ok(())
}

/// Registers ranges, again and again if need be: registering twice changes nothing.
fn register(uffd: &OwnedFd, ranges: &[std::ops::Range<u64>]) -> nix::Result<()> {
    for range in ranges {
        match userfaultfd::register_protected(uffd.as_fd(), range.start, range.end - range.start) {
            // One of its mappings cannot be watched. Its pages count as written.
            Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EBUSY) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
