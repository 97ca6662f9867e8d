//! Stopping every thread of a container, and letting it go on.
//!
//! ```text
//!   ┌─> for every process of the subtree, every thread:  SEIZE, INTERRUPT
//!   │   wait for each thread's stop: before any instruction of the program
//!   └── until a pass finds none that is new: whoever could make one stands still
//!       after some passes in vain: freeze, seize, thaw
//! ```
//!
//! A thread in the middle of fork(2) stops only when the child is there, so a pass that follows the stops sees it. One
//! that ends between being listed and being seized may have left a child that the list did not have yet: it counts as
//! new, too. The freezer is for those that fork faster than they are found, and for containers that arrive paused: v1 gives no ptrace
//! stop to a frozen thread, v2 runs no batch in one, so it is thawed when all have been interrupted. In v1 even SEIZE
//! hangs on a frozen thread that a signal had stopped: that one runs nothing after the thaw, and is seized then. Groups
//! that the container has frozen itself are thawed with it, and frozen again before it goes on.
//!
//! The parent of a vfork(2) sleeps until its child has exec'ed or exited, and stops for nobody: the child is let run
//! up to that point; of several parents of each other, first the last one's. Zombies are in no cgroup's list: they are found as children of those that live.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::status::{self, Status};
use crate::checkpoint::context::LiveTask;
use crate::checkpoint::error::Context;
use crate::checkpoint::memory::mm::Answers;
use crate::checkpoint::remote::{Stop, Thread};
use crate::checkpoint::{Error, Result};
use crate::sys;
use crate::sys::procfs::read_text;

/// The container's freezer: `cgroup/` implements it for v1, v2 and for hosts without one.
pub trait Freezer {
    /// Stops the whole subtree and waits until it is stopped.
    fn freeze(&mut self) -> Result<()>;
    /// Lets it go on. Nested groups that were frozen on their own stay so.
    fn thaw(&mut self) -> Result<()>;
    /// Whether the container is frozen now, by whomever: `pause`, or its owner.
    fn is_frozen(&self) -> Result<bool>;
    /// Every process of the subtree, as pids of this host.
    fn pids(&self) -> Result<Vec<i32>>;
    /// Groups inside that the container has frozen itself.
    fn frozen_inside(&self) -> Result<Vec<PathBuf>> {
        Ok(Vec::new())
    }
    /// Freezes or thaws such a group.
    fn switch_inside(&mut self, _group: &Path, _frozen: bool) -> Result<()> {
        Ok(())
    }
}

/// What was frozen before a dump, which thaws it behind ptrace's back.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ice {
    /// The whole container was.
    #[serde(rename = "paused")]
    pub whole: bool,
    /// Groups inside were.
    #[serde(default)]
    pub inside: Vec<PathBuf>,
}

impl Ice {
    /// What is frozen now.
    pub fn of(freezer: &dyn Freezer) -> Result<Self> {
        Ok(Self { whole: freezer.is_frozen()?, inside: freezer.frozen_inside()? })
    }

    /// Whether anything was.
    pub fn any(&self) -> bool {
        self.whole || !self.inside.is_empty()
    }

    /// Lets everything go on.
    fn thaw(&self, freezer: &mut dyn Freezer) -> Result<()> {
        let result = freezer.thaw();
        self.inside.iter().fold(result, |result, group| result.and(freezer.switch_inside(group, false)))
    }

    /// Freezes again what was frozen.
    pub fn freeze(&self, freezer: &mut dyn Freezer) -> Result<()> {
        let result = if self.whole { freezer.freeze() } else { Ok(()) };
        self.inside.iter().fold(result, |result, group| result.and(freezer.switch_inside(group, true)))
    }
}

/// How long all threads together may take to stop.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long killed threads may take to end.
const ENDING: Duration = Duration::from_secs(60);
/// After this long a thread is looked at closely.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long a child of vfork(2) may take to exec or exit.
const VFORK: Duration = Duration::from_secs(2);
/// A program that still has new processes after so many passes needs the freezer.
const PASSES: usize = 4;
/// So often may a thread be none to be seized before it is given up.
const DENIALS: usize = 3;

/// All processes of a container, stopped.
#[derive(Debug)]
pub struct Stood {
    /// Init, and every process after its parent.
    pub tasks: Vec<LiveTask>,
    /// Those that exec has started, and their descendants: each after its parent, too.
    pub strangers: Vec<LiveTask>,
}

/// Stops all threads of the container, of which the freezer holds `ice`; `init` is its first process. On an error
/// everything that was stopped goes on.
pub fn stop(freezer: &mut dyn Freezer, init: i32, ice: &Ice) -> Result<Stood> {
    let mut found = Found { depth: status::depth(init)?, ..Found::default() };
    let stopped = found.all(freezer, ice);
    if stopped.is_err() {
        // While what has been found is still held.
        let _ = ice.freeze(freezer);
    }
    stopped?;
    found.collect(init)
}

#[derive(Default)]
struct Found {
    /// How deep the container's pid namespace lies below ours.
    depth: usize,
    /// Process, thread, seizure.
    threads: BTreeMap<i32, (i32, Thread)>,
    processes: BTreeSet<i32>,
    /// Children of all of them, as the last pass has found them.
    children: BTreeSet<i32>,
    /// Threads that stand still.
    stopped: BTreeSet<i32>,
    /// Threads that had ended when their turn came, and wait to be reaped.
    ended: BTreeSet<i32>,
    /// How often a thread could not be seized that nobody seems to trace.
    denied: BTreeMap<i32, usize>,
}

impl Found {
    /// Passes until nothing is new.
    fn all(&mut self, freezer: &mut dyn Freezer, ice: &Ice) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        if ice.any() {
            if !ice.whole {
                freezer.freeze()?;
            }
            self.frozen(freezer, ice, deadline)?;
        }
        for pass in 1.. {
            let new = self.pass(freezer, false)?;
            self.wait(deadline)?;
            if new == 0 {
                break;
            }
            if Instant::now() > deadline {
                return Err(Error::new("the container makes new processes faster than they can be stopped"));
            }
            if pass % PASSES == 0 {
                freezer.freeze()?;
                self.frozen(freezer, ice, deadline)?;
            }
        }
        Ok(())
    }

    /// Seizes everything in the frozen container, and thaws it.
    fn frozen(&mut self, freezer: &mut dyn Freezer, ice: &Ice, deadline: Instant) -> Result<()> {
        let seized = loop {
            match self.pass(freezer, true) {
                Ok(0) => break Ok(()),
                Ok(_) if Instant::now() > deadline => {
                    break Err(Error::new("the control group has processes that this one does not see"));
                }
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        };
        // Whatever was found: nobody else would thaw it. The caller freezes again what arrived frozen.
        ice.thaw(freezer)?;
        seized
    }

    /// Seizes all threads that are new, and counts them and those that have just ended.
    fn pass(&mut self, freezer: &dyn Freezer, frozen: bool) -> Result<usize> {
        let mut new = 0;
        let listed: BTreeSet<i32> = freezer.pids()?.into_iter().collect();
        for &pid in &listed {
            new += self.process(pid, frozen)?;
        }
        if new > 0 {
            // There will be another pass, and the children of who runs now are of no use to that.
            return Ok(new);
        }
        // Those that have left the container's cgroup are its processes still.
        self.children = self.threads.iter().flat_map(|(tid, (pid, _))| children_of(*pid, *tid)).collect();
        for child in self.children.difference(&listed).copied().collect::<Vec<_>>() {
            new += self.process(child, frozen)?;
        }
        Ok(new)
    }

    /// Seizes the threads of `pid` that are new. What counts is every thread that may have made others since the list
    /// was read: those that are new, and those that are gone, once each.
    fn process(&mut self, pid: i32, frozen: bool) -> Result<usize> {
        let Ok(tids) = status::threads(pid) else { return Ok(1) };
        let mut new = 0;
        for tid in tids {
            if self.threads.contains_key(&tid) || frozen && is_stopped(tid) {
                continue;
            }
            if tid != pid && status::is_kernels(pid, tid) {
                continue;
            }
            match Thread::seize(tid) {
                Ok(thread) => {
                    thread.interrupt()?;
                    self.threads.insert(tid, (pid, thread));
                    self.processes.insert(pid);
                    new += 1;
                }
                Err(error) if error.errno() == Some(Errno::ESRCH) => new += 1,
                // A zombie cannot be seized; nor can what a debugger holds.
                Err(error) => match Status::of_thread(pid, tid) {
                    Ok(status) if !matches!(status.state, 'Z' | 'X') => {
                        let times = self.denied.entry(tid).or_default();
                        *times += 1;
                        // Its tracer may just have ended, or itself.
                        if status.tracer != 0 || *times > DENIALS {
                            return Err(explain(error, self.inner(pid), &status));
                        }
                        new += 1;
                    }
                    Ok(_) => new += usize::from(self.ended.insert(tid)),
                    Err(_) => new += 1,
                },
            }
        }
        Ok(new)
    }

    /// Waits until all stand still.
    fn wait(&mut self, deadline: Instant) -> Result<()> {
        let mut late = Vec::new();
        for (tid, (_, thread)) in &self.threads {
            if self.stopped.contains(tid) || thread.is_gone() {
                continue;
            }
            match thread.wait_quiet(deadline.min(Instant::now() + PATIENCE)) {
                Ok(Stop::Exited(_)) => {}
                Ok(_) => _ = self.stopped.insert(*tid),
                Err(error) if error.errno() == Some(Errno::ETIMEDOUT) => late.push(*tid),
                Err(error) => return Err(error),
            }
        }
        while !late.is_empty() {
            let mut still = Vec::new();
            for tid in late {
                let Some((pid, thread)) = self.threads.get(&tid).cloned() else { continue };
                self.release_vfork(pid, tid, deadline)?;
                match thread.wait_quiet(deadline.min(Instant::now() + PATIENCE)) {
                    Ok(Stop::Exited(_)) => {}
                    Ok(_) => _ = self.stopped.insert(tid),
                    Err(error) if error.errno() == Some(Errno::ETIMEDOUT) && Instant::now() < deadline => {
                        still.push(tid);
                    }
                    Err(error) => {
                        return Err(error
                            .pid(self.inner(pid))
                            .remedy("try again when the process is not waiting in the kernel"));
                    }
                }
            }
            late = still;
        }
        Ok(())
    }

    /// If a thread of `parent` waits for a child, lets that child run until it has exec'ed or exited. Others may run on the
    /// same memory for as long as they like.
    fn release_vfork(&mut self, parent: i32, tid: i32, deadline: Instant) -> Result<()> {
        let deadline = deadline.min(Instant::now() + VFORK);
        let shares =
            |child: i32| sys::kcmp::kcmp(parent, child, sys::kcmp::What::Vm).is_ok_and(Ordering::is_eq);
        let Some(on_its_memory) = waits_for_child(parent, tid) else { return Ok(()) };
        let own = children_of(parent, tid);
        // It has made none since.
        let waited = own.into_iter().rfind(|child| shares(*child) == on_its_memory);
        let seized = waited.and_then(|child| Some((child, self.threads.get(&child)?.1.clone())));
        if let Some((child, thread)) = seized.filter(|(child, _)| self.stopped.contains(child)) {
            let options = thread.options();
            thread.set_options(options | libc::PTRACE_O_TRACEEXEC | libc::PTRACE_O_TRACEEXIT)?;
            thread.cont(0)?;
            loop {
                match thread.wait_stop(deadline)? {
                    Stop::Exited(_) => {
                        self.stopped.remove(&child);
                        break;
                    }
                    Stop::Event(libc::PTRACE_EVENT_EXEC, _) => {
                        thread.set_options(options)?;
                        thread.interrupt()?;
                        thread.cont(0)?;
                        thread.wait_quiet(deadline)?;
                        break;
                    }
                    Stop::Signal(signal) => thread.cont(signal)?,
                    _ => thread.cont(0)?,
                }
            }
        }
        Ok(())
    }

    /// The stopped threads as processes, init first, parents before children, zombies among them.
    fn collect(self, init: i32) -> Result<Stood> {
        let mut tasks: BTreeMap<i32, LiveTask> = BTreeMap::new();
        for pid in &self.processes {
            let mut threads: Vec<(i32, Thread)> = self
                .threads
                .iter()
                .filter(|(tid, (of, _))| of == pid && self.stopped.contains(tid))
                .map(|(tid, (_, thread))| (*tid, thread.clone()))
                .collect();
            if threads.is_empty() {
                continue;
            }
            threads.sort_by_key(|(tid, _)| (tid != pid, *tid));
            if threads[0].0 != *pid {
                return Err(Error::new("the process's first thread has exited while others go on")
                    .pid(self.inner(*pid))
                    .remedy("such a process cannot be dumped; let it end its threads, or exit"));
            }
            tasks.insert(*pid, self.live(*pid, threads.into_iter().map(|(_, thread)| thread).collect())?);
        }
        for &pid in &self.children {
            if !tasks.contains_key(&pid) {
                match Status::of(pid) {
                    Ok(status) if status.state == 'Z' => _ = tasks.insert(pid, self.live(pid, Vec::new())?),
                    Ok(_) => {
                        return Err(
                            Error::new("a process appeared while all were stopped").pid(self.inner(pid))
                        );
                    }
                    Err(_) => {}
                }
            }
        }
        order(init, tasks)
    }

    fn live(&self, pid: i32, threads: Vec<Thread>) -> Result<LiveTask> {
        let pidfd =
            sys::pidfd::open(pid, 0).during("cannot hold the process", || format!("pidfd_open({pid}, 0)"))?;
        let status = Status::of(pid)?;
        let vpid = status.pid_at(self.depth).unwrap_or(pid);
        Ok(LiveTask {
            pid,
            vpid,
            pidfd,
            status,
            zombie: threads.is_empty(),
            threads,
            injection: None,
            space: Answers::default(),
        })
    }

    /// The process's id in the container; its id here when it is gone.
    fn inner(&self, pid: i32) -> i32 {
        Status::of(pid).ok().and_then(|s| s.pid_at(self.depth)).unwrap_or(pid)
    }
}

/// Whether job control has stopped the thread; its state shows D while it is frozen.
fn is_stopped(tid: i32) -> bool {
    read_text(format!("/proc/{tid}/wchan")).is_ok_and(|wchan| wchan == "do_signal_stop")
}

/// Kills stopped processes, and waits until every thread is gone. One that has no processor to end on for so long is not
/// waited for any more: it is killed all the same, and the images are complete.
pub fn kill(tasks: Vec<LiveTask>) -> Result<()> {
    let deadline = Instant::now() + ENDING;
    for task in &tasks {
        match sys::pidfd::send_signal(task.pidfd.as_fd(), libc::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => {
                return Err(Error::new("cannot end the dumped process")
                    .call("pidfd_send_signal(pidfd, SIGKILL)", errno)
                    .pid(task.vpid));
            }
        }
    }
    let mut threads: Vec<Thread> = Vec::new();
    for task in tasks.into_iter().rev() {
        drop(task.injection);
        threads.extend(task.threads.into_iter().rev());
    }
    match reap(threads, deadline) {
        Err(e) if e.errno() == Some(Errno::ETIMEDOUT) => Ok(()),
        reaped => reaped,
    }
}

/// Lets stopped threads go on. One that was let go first may have ended others meanwhile, by exit(2) of its process or a
/// signal: these are waited for.
pub fn let_go(threads: Vec<Thread>) -> Result<()> {
    let mut ended = Vec::new();
    let mut result = Ok(());
    for thread in threads {
        match thread.clone().detach() {
            Err(e) if e.errno() == Some(Errno::ESRCH) => ended.push(thread),
            other => result = result.and(other),
        }
    }
    result.and(reap(ended, Instant::now() + DEADLINE))
}

/// Waits until every one of these killed threads is gone.
///
/// A leader's end is not reported before that of its threads, and init's, in whichever of its threads is the last to
/// leave, not before all others have been waited for: those that say nothing yet are asked again.
pub fn reap(mut left: Vec<Thread>, deadline: Instant) -> Result<()> {
    while !left.is_empty() {
        let mut waiting = Vec::new();
        for thread in left {
            loop {
                if thread.is_gone() {
                    break;
                }
                match thread.wait_stop(Instant::now() + SLICE) {
                    Ok(Stop::Exited(_)) => break,
                    Ok(_) => {}
                    Err(e) if e.errno() == Some(Errno::ETIMEDOUT) && Instant::now() < deadline => {
                        waiting.push(thread);
                        break;
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        left = waiting;
    }
    Ok(())
}

/// How long one thread's end is waited for before the next one's.
const SLICE: Duration = Duration::from_millis(1);

/// Init, then every process after its parent; and the others, in the same way.
fn order(init: i32, mut tasks: BTreeMap<i32, LiveTask>) -> Result<Stood> {
    let first = tasks.remove(&init).ok_or_else(|| Error::new("the container's first process has ended"))?;
    let mut parents: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for (pid, task) in &tasks {
        parents.entry(task.status.ppid).or_default().push(*pid);
    }
    let mut descend = |root: Vec<LiveTask>, tasks: &mut BTreeMap<i32, LiveTask>| {
        let (mut sorted, mut next) = (root, 0);
        while let Some(task) = sorted.get(next) {
            next += 1;
            for child in parents.remove(&task.pid).unwrap_or_default() {
                sorted.extend(tasks.remove(&child));
            }
        }
        sorted
    };
    let sorted = descend(vec![first], &mut tasks);
    let is_root = |task: &&LiveTask| !tasks.contains_key(&task.status.ppid);
    let roots: Vec<i32> = tasks.values().filter(is_root).map(|task| task.pid).collect();
    let roots = roots.into_iter().filter_map(|pid| tasks.remove(&pid)).collect();
    let strangers = descend(roots, &mut tasks);
    Ok(Stood { tasks: sorted, strangers })
}

/// The signal that has stopped the thread's process, if one has; the thread is in a stop of ours.
pub fn group_stop(thread: &Thread) -> Result<Option<i32>> {
    let info = match thread.siginfo() {
        Ok(info) => info,
        // In a group stop there may be none.
        Err(error) if error.errno() == Some(Errno::EINVAL) => return Ok(Some(libc::SIGSTOP)),
        Err(error) => return Err(error),
    };
    let word = |at: usize| i32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    let (signal, code) = (word(0), word(8));
    Ok((code >> 8 == libc::PTRACE_EVENT_STOP && signal != libc::SIGTRAP).then_some(signal))
}

/// Children of all threads of `pid`.
pub fn children(pid: i32) -> Vec<i32> {
    status::threads(pid).unwrap_or_default().into_iter().flat_map(|tid| children_of(pid, tid)).collect()
}

/// Those of one thread, in the order in which it has got them.
fn children_of(pid: i32, tid: i32) -> Vec<i32> {
    let list = read_text(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
    list.split_ascii_whitespace().filter_map(|n| n.parse().ok()).collect()
}

/// Whether a thread sleeps in a vfork(2), clone(2) or clone3(2) that ends when the child does, or its program; and whether
/// that runs on the thread's memory. proc(5), `/proc/pid/syscall`
fn waits_for_child(pid: i32, tid: i32) -> Option<bool> {
    const VFORK: u64 = libc::CLONE_VFORK as u64;
    const VM: u64 = libc::CLONE_VM as u64;
    // Of 32-bit programs: others do not sleep in removexattr(2) and getresgid(2), to which 64-bit ones give these numbers.
    const VFORK_32: i64 = 190;
    const CLONE_32: i64 = 120;
    // 56 0x4111 0x0 ...: number, arguments; `running` of one that does not sleep.
    let call = read_text(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default();
    let mut words = call.split_ascii_whitespace();
    let number = words.next().and_then(|n| n.parse().ok());
    let first = words.next().and_then(|a| u64::from_str_radix(a.trim_start_matches("0x"), 16).ok());
    let flags = match (number, first) {
        (Some(libc::SYS_vfork | VFORK_32), _) => VFORK | VM,
        (Some(libc::SYS_clone | CLONE_32), Some(flags)) => flags,
        (Some(libc::SYS_clone3), Some(args)) => {
            let mut flags = [0; 8];
            fs::File::open(format!("/proc/{pid}/mem"))
                .and_then(|mem| mem.read_exact_at(&mut flags, args))
                .ok()?;
            u64::from_ne_bytes(flags)
        }
        _ => return None,
    };
    (flags & VFORK != 0).then_some(flags & VM != 0)
}

fn explain(error: Error, vpid: i32, status: &Status) -> Error {
    let error = error.pid(vpid);
    match status.tracer {
        0 => error,
        tracer => error.remedy(format!("it is traced by process {tracer} of this host: end the debugger")),
    }
}
