//! A snapshot of the memory of processes that go on: a fork of each, which never runs the program.
//!
//! ```text
//!   process (stopped)  ──clone(CLONE_FS|CLONE_FILES, no exit signal)──>  copy (stopped, killed with this process)
//!        │                                                                 │ close_range(0, ~0, CLOSE_RANGE_UNSHARE)
//!      runs on                                                             │ its memory is read and written out
//!        │ stopped for a moment: wait4(copy, __WALL)  <────── killed ──────┘
//! ```
//!
//! The kernel copies page tables, not pages, so the process stands still for a fraction of the time that copying its
//! memory takes. The copy holds no descriptor: the ends of pipes and locks of files go when the program lets them go.
//! It counts against the limits of processes and memory; where there is no room for it there is no snapshot.
//!
//! A copy dies with the command that made it, but nobody waits for it then: the next command does, see [`bury`].

use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::checkpoint::context::LiveTask;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{ImageDir, MappingPolicy};
use crate::checkpoint::memory::capture::Capture;
use crate::checkpoint::remote::{Batch, CloneArgs, Exit, Injection, Thread};
use crate::checkpoint::task::status::{self, Stat};
use crate::checkpoint::task::{freeze, placement};
use crate::sys;
use crate::sys::procfs::read_text;

/// Below this size copying the memory takes less time than what surrounds a snapshot.
const WORTH: u64 = 4 << 20;
/// A snapshot costs time for all of the memory, copying only for what an earlier set lacks: it pays from this part on.
const PART: u64 = 32;
const CLOSE_RANGE_UNSHARE: u32 = 2;
/// How long the parent of a copy may take to stop, to wait for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a killed copy may take to end, in milliseconds.
const DYING: u16 = 1000;
/// Fields of `/proc/PID/stat`.
const FLAGS: usize = 9;
const START_TIME: usize = 22;
const EXIT_SIGNAL: usize = 38;
const EXIT_CODE: usize = 52;
const KILLED: i64 = libc::SIGKILL as i64;

/// A copy of a process.
#[derive(Debug)]
pub struct Copy {
    thread: Thread,
    injection: Injection,
}

/// Where a copy stands in the tree of processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Its parent, as a pid of this host.
    parent: i32,
    /// Itself, as its parent knows it.
    pid: i32,
}

impl Capture {
    /// Makes a copy of each task, of which the pages are read from now on: the tasks may run before they are written.
    ///
    /// False: there are no copies, because the memory is small or there is no room. The pages must then be written
    /// first. Nothing may keep the tasks from running until [`Self::end`].
    pub fn snapshot(&mut self, tasks: &mut [LiveTask], images: &ImageDir) -> Result<bool> {
        let spared: u64 = self.tasks.iter().map(|pages| pages.inherited()).sum();
        let size: u64 = self.tasks.iter().map(|pages| pages.size()).sum();
        if spared < WORTH.max(size / PART) {
            return Ok(false);
        }
        let Err(error) = self.copy_all(tasks, images) else { return Ok(true) };
        // No copy stays behind, whatever failed first.
        let ended = self.end_in(tasks);
        let no_room = [Errno::EAGAIN, Errno::ENOMEM, Errno::ENOSYS].map(Some);
        if no_room.contains(&error.errno()) { ended.map(|()| false) } else { Err(error) }
    }

    fn copy_all(&mut self, tasks: &mut [LiveTask], images: &ImageDir) -> Result<()> {
        for pages in &mut self.tasks {
            let Some(task) = tasks.iter_mut().find(|task| task.pid == pages.pid) else { continue };
            let vpid = task.vpid;
            let injection =
                task.injection.as_mut().ok_or_else(|| Error::new("the task cannot be asked").pid(vpid))?;
            let flags = (libc::CLONE_FS | libc::CLONE_FILES) as u64;
            let (thread, injection) = injection
                .clone_child(&CloneArgs { flags, ..CloneArgs::default() })
                .map_err(|e| e.pid(vpid))?;
            pages.source = thread.tid();
            self.copies.push(Copy { thread, injection });
            let close = |copy: &mut Copy| copy.close_descriptors();
            self.copies.last_mut().map_or(Ok(()), close).map_err(|e| e.pid(vpid))?;
            pages.write_own(images).map_err(|e| e.pid(vpid))?;
            pages.ask(task.injection.as_mut()).map_err(|e| e.pid(vpid))?;
        }
        Ok(())
    }

    /// Ends the copies, and has the running tasks, stopped for a moment, wait for them.
    pub fn end(&mut self) -> Result<()> {
        self.end_with(reap_in_passing)
    }

    /// As [`Self::end`], while the tasks are stopped and driven.
    fn end_in(&mut self, tasks: &mut [LiveTask]) -> Result<()> {
        for pages in &mut self.tasks {
            pages.source = pages.pid;
        }
        self.end_with(|copy| {
            let Some(place) = place(copy)? else { return Ok(()) };
            let parent = tasks.iter_mut().find(|task| task.pid == place.parent);
            let injection = parent.and_then(|task| task.injection.as_mut());
            reap(injection.ok_or_else(|| Error::new("the parent of a copy cannot be asked"))?, place.pid)
        })
    }

    /// Every copy is ended, even when the end of another fails.
    fn end_with(&mut self, mut reap: impl FnMut(i32) -> Result<()>) -> Result<()> {
        let end = |copy: Copy| {
            let tid = copy.thread.tid();
            copy.injection.exit_child(Exit::Code(0))?;
            reap(tid)
        };
        let results: Vec<_> = std::mem::take(&mut self.copies).into_iter().map(end).collect();
        results.into_iter().collect()
    }
}

impl Copy {
    /// Its id on this host.
    pub(super) fn tid(&self) -> i32 {
        self.thread.tid()
    }

    /// The NUMA policies of mappings, which are those of the process.
    pub(super) fn ask(&mut self, mappings: &[Range<u64>]) -> Result<Vec<MappingPolicy>> {
        placement::ask(mappings, &mut self.injection)
    }

    fn close_descriptors(&mut self) -> Result<()> {
        let mut batch = Batch::new();
        batch.about("cannot take the descriptors from a copy of the process");
        batch.call(libc::SYS_close_range, &[0.into(), u32::MAX.into(), CLOSE_RANGE_UNSHARE.into()]);
        self.injection.run(&batch).map(drop)
    }
}

/// Waits for the copies that a command has left which was killed. It had started at `since`; `pids` are the processes of
/// the container.
pub fn bury(pids: &[i32], since: i64) -> Result<()> {
    let mut result = Ok(());
    for pid in pids {
        for child in freeze::children(*pid) {
            if was_copy(child, since) {
                result = result.and(reap_in_passing(child));
            }
        }
    }
    result
}

/// Whether a dead process was a copy: a child whose end tells its parent nothing, that was killed, or left by the stub.
/// One that is dying is waited for.
fn was_copy(pid: i32, since: i64) -> bool {
    let is_copy = || {
        let stat = Stat::of(pid).ok()?;
        let silent = stat.field(EXIT_SIGNAL) == 0 && stat.field(START_TIME) >= since;
        silent.then(|| matches!(stat.field(EXIT_CODE), 0 | KILLED))
    };
    if is_copy().is_none() {
        return false;
    }
    let Ok(pidfd) = sys::pidfd::open(pid, 0) else { return false };
    let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let ended = poll(&mut polled, DYING).is_ok_and(|n| n == 1);
    ended && is_copy() == Some(true)
}

/// Has the parent of a copy that has ended wait for it: a running task, stopped for a moment. A parent that ends meanwhile
/// leaves the copy to another one.
pub(crate) fn reap_in_passing(copy: i32) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Some(place) = place(copy)? else { return Ok(()) };
        // Any of its threads may wait, the first may have ended.
        let thread =
            status::threads(place.parent).ok().and_then(|all| all.into_iter().find(|tid| !has_ended(*tid)));
        let reaped = match thread {
            Some(tid) => visit(tid, place.pid, deadline),
            None => Err(Error::new("the parent of a copy of a process has ended")),
        };
        if reaped.is_ok() || Instant::now() > deadline || thread.is_some_and(|tid| !has_ended(tid)) {
            return reaped;
        }
        std::thread::yield_now();
    }
}

/// Whether a thread is dead, or on its way.
fn has_ended(tid: i32) -> bool {
    const PF_EXITING: i64 = 4;
    Stat::of(tid).map_or(true, |stat| stat.field(FLAGS) & PF_EXITING != 0)
}

/// Has a running thread, stopped for a moment, wait for `pid`.
fn visit(tid: i32, pid: i32, deadline: Instant) -> Result<()> {
    let thread = Thread::seize(tid)?;
    thread.stop(deadline)?;
    let mut injection = Injection::start(&thread)?;
    let reaped = reap(&mut injection, pid);
    injection.finish()?;
    thread.detach()?;
    reaped
}

/// Waits for a copy in its parent. The parent may have waited for it by itself, in a strange way.
fn reap(injection: &mut Injection, pid: i32) -> Result<()> {
    let mut batch = Batch::new();
    batch.about("cannot wait for a copy of the process");
    let options = libc::__WALL | libc::WNOHANG;
    let call = batch.call(libc::SYS_wait4, &[pid.into(), 0.into(), options.into(), 0.into()]);
    let call = batch.tolerate(call);
    match injection.run(&batch)?.result(call) {
        Ok(reaped) if reaped == i64::from(pid) => Ok(()),
        Err(Errno::ECHILD) => Ok(()),
        other => Err(Error::new(format!("a copy of the process is left behind: wait4 gave {other:?}"))),
    }
}

/// Finds the parent of a copy: the process itself, or whoever got its children when it ended. None: it has been waited for.
fn place(tid: i32) -> Result<Option<Place>> {
    let status = |pid: i32| {
        let path = format!("/proc/{pid}/status");
        let text = read_text(&path);
        match text {
            Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            text => text.during("cannot find the parent of a copy", || format!("read({path:?})")).map(Some),
        }
    };
    let (of_copy, parent, of_parent) = loop {
        let Some(of_copy) = status(tid)? else { return Ok(None) };
        let parent = field(&of_copy, "PPid").next();
        let parent = parent.ok_or_else(|| Error::new("a copy of the process has no parent"))?;
        // Where that one is gone, the copy has got another one.
        if let Some(of_parent) = status(parent)? {
            break (of_copy, parent, of_parent);
        }
    };
    // Both lists begin with the pid of the same, outermost namespace.
    let depth = field(&of_parent, "NSpid").count();
    let pid = field(&of_copy, "NSpid").nth(depth.saturating_sub(1));
    let pid = pid.ok_or_else(|| Error::new("the parent of a copy cannot see it"))?;
    Ok(Some(Place { parent, pid }))
}

/// The numbers of a line of `/proc/PID/status`.
fn field<'a>(status: &'a str, name: &str) -> impl Iterator<Item = i32> + use<'a> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().split_whitespace().filter_map(|word| word.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_status_line() {
        let status = "Name:\ta\nPPid:\t12\nNSpid:\t900\t12\t1\nNSpgid:\t1\n";
        assert_eq!(field(status, "NSpid").collect::<Vec<_>>(), [900, 12, 1]);
        assert_eq!(field(status, "PPid").next(), Some(12));
        assert_eq!(field(status, "Pid").count(), 0);
    }
}
