//! The last stage of a process: its threads, what they share, and its end or its stop.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::thread::mask;
use super::{Doors, PR_SET_CHILD_SUBREAPER, PR_SET_NAME, Revival, named, vpid};
use crate::checkpoint::arch::features;
use crate::checkpoint::context::NewTask;
use crate::checkpoint::error::Context;
use crate::checkpoint::image::{PstreeEntry, TaskCoreEntry};
use crate::checkpoint::namespaces::nested::{pids, user_of};
use crate::checkpoint::remote::{Batch, CloneArgs, Exit, Injection, Stop, Thread};
use crate::checkpoint::task::process::STOPPED;
use crate::checkpoint::task::status::Status;
use crate::checkpoint::task::{limits, modes, placement, signals, timers};
use crate::checkpoint::{Error, Result};

/// What threads share.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM) as u64;
/// Threads that a process makes without a stop of its own in between, but for those that their births are.
const AT_ONCE: usize = 128;
/// How long a thread may take to stop.
const PATIENCE: Duration = Duration::from_secs(10);

impl Revival<'_> {
    pub(super) fn process(
        &self,
        entry: &PstreeEntry,
        tc: &TaskCoreEntry,
        task: NewTask,
        made: &mut Vec<Thread>,
        doors: &Doors,
    ) -> Result<()> {
        let user = doors.users.get(&task.vpid).copied();
        let attributes = doors.attributes.get(&task.vpid).copied();
        let NewTask { pid, mut injection, .. } = task;
        made.push(injection.thread().clone());
        // While there is one thread: the kernel looks at the signal stacks of all.
        self.ask_for_features(entry, &mut injection)?;
        if let Some(door) = user {
            self.enter_user(entry, &mut injection, door)?;
        } else if self.births.get(vpid(entry)).is_some() {
            let mut batch = Batch::new();
            self.births.take_ids(self.restore.model, vpid(entry), vpid(entry), &mut batch)?;
            injection.run(&batch)?;
        }
        let inside = user_of(self.restore.model, entry.pid).is_some();
        let alone = entry.threads.len() == 1;
        if let (Some(label), Some(door), false) = (&self.label, attributes, alone) {
            label.restore_before_threads(&mut injection, door)?;
        }
        let mut threads: Vec<(u32, Injection)> = Vec::new();
        let others: Vec<u32> = entry.threads.iter().copied().filter(|vtid| *vtid != entry.pid).collect();
        for some in others.chunks(AT_ONCE).filter(|_| !inside) {
            threads.extend(some.iter().copied().zip(self.make_threads(
                &mut injection,
                entry.pid,
                some,
                made,
            )?));
        }
        for vtid in others.iter().filter(|_| inside) {
            let thread = self.make_thread_by_turn(&mut injection, *vtid)?;
            made.push(thread.thread().clone());
            threads.push((*vtid, thread));
        }
        threads.push((entry.pid, injection));
        for (vtid, injection) in &mut threads {
            if let Some(door) = doors.children.get(&vtid.cast_signed()) {
                pids::enter(injection, *door).map_err(|e| named(e, *vtid))?;
            }
        }
        let Some((_, leader)) = threads.last_mut() else { return Ok(()) };

        let mut batch = Batch::new();
        batch.about("cannot restore the process's state");
        let personality = u64::from(tc.personality);
        batch.call(libc::SYS_personality, &[personality.into()]);
        let subreaper = u64::from(tc.child_subreaper.unwrap_or(false));
        batch.call(libc::SYS_prctl, &[PR_SET_CHILD_SUBREAPER.into(), subreaper.into()]);
        for command in
            (0..32).map(|bit| 1_u32 << bit).filter(|c| tc.membarrier_registration_mask.unwrap_or(0) & c != 0)
        {
            batch.call(libc::SYS_membarrier, &[command.into(), 0.into(), 0.into()]);
        }
        leader.run(&batch)?;
        signals::restore_actions(leader, &tc.sigactions)?;
        if let Some(rlimits) = &tc.rlimits {
            limits::restore(leader, &rlimits.rlimits)?;
        }
        limits::restore_files(pid, tc);
        if let Some(extra) = self.extra(entry.pid) {
            placement::restore(leader, &extra.placement)?;
            if let Some(filter) = extra.core_filter {
                modes::restore_core_filter(pid, filter)?;
            }
        }
        let expired = self.expired(entry, tc);
        if let Some(all) = &tc.timers {
            timers::restore_posix(leader, all, &expired)?;
            let mut batch = Batch::new();
            timers::restore_interval(&mut batch, all);
            if !batch.is_empty() {
                leader.run(&batch)?;
            }
        }
        let stopped = self.restore.model.pstree.iter().filter(|e| e.ppid == entry.pid);
        let stopped = stopped.filter(|e| self.tc(e).is_ok_and(|tc| tc.task_state == STOPPED));
        // Those that the parent has not asked about yet it hears of again.
        let stopped = stopped.filter(|e| !self.extra.unseen_stops.contains(&e.pid)).map(vpid);
        let stopped = stopped.filter_map(|child| self.pids.seen(child, self.pids.space(vpid(entry))));
        let dead = self.restore.model.pstree.iter().filter(|e| e.ppid == entry.pid);
        let ends = dead.map(|e| self.end(vpid(e))).filter(|end| (1..=64).contains(end));
        let told = ends.fold(1 << (libc::SIGCHLD - 1), |told, end| told | 1_u64 << (end - 1));
        forget_children(leader, &stopped.collect::<Vec<_>>(), told)?;
        for (vtid, injection) in &mut threads {
            self.thread((entry, tc, &expired), *vtid, injection, attributes).map_err(|e| named(e, *vtid))?;
        }
        let mut left = Vec::new();
        let last = threads.len() - 1;
        // The owner of the memory comes after its tenants.
        let owns = !self.tenants.contains_key(&entry.pid);
        for (i, (vtid, injection)) in threads.into_iter().enumerate() {
            let thread = self.leave(vtid, injection, owns && i == last).map_err(|e| named(e, vtid))?;
            left.push((thread, mask(self.core(vtid)?)));
        }
        if tc.task_state == STOPPED {
            stop(pid, &left, tc)?;
        }
        Ok(())
    }

    /// Takes the ids that the container knows a process by, and goes into its user namespace: nobody who has threads can.
    fn enter_user(&self, entry: &PstreeEntry, injection: &mut Injection, door: i32) -> Result<()> {
        let mut batch = Batch::new();
        self.births.take_ids(self.restore.model, vpid(entry), vpid(entry), &mut batch)?;
        batch.about("cannot put the process into its user namespace");
        batch.call(libc::SYS_setns, &[door.into(), libc::CLONE_NEWUSER.into()]);
        batch.call(libc::SYS_close, &[door.into()]);
        injection.run(&batch).map(drop)
    }

    /// Makes a thread where clone3(2) may not be told its id: it gets the next one, and that is set before.
    fn make_thread_by_turn(&self, leader: &mut Injection, vtid: u32) -> Result<Injection> {
        self.pids.next_is(self.restore, vtid.cast_signed())?;
        let args = CloneArgs { flags: THREAD, ..CloneArgs::default() };
        let (thread, injection) = leader.clone_child(&args).map_err(|e| named(e, vtid))?;
        let got = Status::of_thread(thread.tid(), thread.tid())?.ns_tid;
        let wanted = self.pids.set_tid(vtid.cast_signed(), 0);
        if !got.iter().rev().zip(&wanted).all(|(got, wanted)| got == wanted) {
            return Err(named(Error::new(format!("the thread was made as {got:?}")), vtid));
        }
        Ok(injection)
    }

    /// Makes some threads of a process. `made` also gets those that were made before a failure.
    fn make_threads(
        &self,
        leader: &mut Injection,
        pid: u32,
        vtids: &[u32],
        made: &mut Vec<Thread>,
    ) -> Result<Vec<Injection>> {
        let space = self.pids.space(pid.cast_signed());
        let args = |vtid: &u32| {
            let set_tid = self.pids.set_tid(vtid.cast_signed(), space);
            CloneArgs { flags: THREAD, set_tid, ..CloneArgs::default() }
        };
        leader.clone_children(&vtids.iter().map(args).collect::<Vec<_>>(), made)
    }

    /// Asks for the parts of the processor's state that the process had asked for.
    fn ask_for_features(&self, entry: &PstreeEntry, injection: &mut Injection) -> Result<()> {
        let had = self.extra(entry.pid).and_then(|extra| extra.features).unwrap_or(0);
        features::request(injection, had)
    }
}

impl Revival<'_> {
    /// The timers of a process that have expired while their signals wait.
    fn expired(&self, entry: &PstreeEntry, tc: &TaskCoreEntry) -> BTreeSet<u32> {
        let of_thread = |vtid: &u32| self.core(*vtid).ok()?.thread_core.as_ref()?.signals_p.as_ref();
        let queues = entry.threads.iter().filter_map(of_thread).chain(&tc.signals_s);
        let waiting = queues.flat_map(signals::timers).collect();
        tc.timers.as_ref().map(|all| timers::expired(all, &waiting)).unwrap_or_default()
    }
}

/// Throws away what children which died or stopped have sent (`told`, a set of signals), and the report that they have
/// stopped: a shell has had it.
fn forget_children(injection: &mut Injection, stopped: &[i32], told: u64) -> Result<()> {
    let mut batch = Batch::new();
    for child in stopped {
        let flags = libc::WSTOPPED | libc::WNOHANG;
        let wait = batch
            .call(libc::SYS_waitid, &[libc::P_PID.into(), (*child).into(), 0.into(), flags.into(), 0.into()]);
        batch.tolerate(wait);
    }
    loop {
        let set = batch.words(&[told]);
        let now = batch.words(&[0, 0]);
        let call = batch.call(libc::SYS_rt_sigtimedwait, &[set, 0.into(), now, 8.into()]);
        batch.tolerate(call);
        match injection.run(&batch)?.result(call) {
            // Of one above SIGRTMIN there is one for each child.
            Ok(_) => batch = Batch::new(),
            Err(Errno::EAGAIN) => return Ok(()),
            Err(errno) => {
                return Err(Error::new("cannot take away a signal").call("rt_sigtimedwait({SIGCHLD})", errno));
            }
        }
    }
}

/// A process that had exited exits again, and waits for its parent.
pub(super) fn die(task: NewTask, tc: &TaskCoreEntry) -> Result<()> {
    let mut injection = task.injection;
    let mut batch = Batch::new();
    let name = batch.string(&tc.comm);
    batch.call(libc::SYS_prctl, &[PR_SET_NAME.into(), name]);
    injection.run(&batch)?;
    let code = tc.exit_code.cast_signed();
    injection.exit_child(match code & 0x7f {
        0 => Exit::Code(code >> 8 & 0xff),
        signal => Exit::Signal(signal),
    })
}

/// Stops the process by job control, before it runs an instruction of its program. Its leader is the last.
fn stop(pid: i32, threads: &[(Thread, u64)], tc: &TaskCoreEntry) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let signal = match tc.stop_signo.unwrap_or(0).cast_signed() {
        signal @ (libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU) => signal,
        _ => libc::SIGSTOP,
    };
    // Nothing may be delivered now but SIGSTOP, which cannot be blocked, and the signal that takes its place.
    for (thread, _) in threads {
        thread.set_sigmask(!(1 << (signal - 1)))?;
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGSTOP)
        .during("cannot stop the process", || format!("kill({pid}, SIGSTOP)"))?;
    // The leader takes the signal, the others find the process stopped when they go on.
    for (thread, _) in threads.iter().rev() {
        thread.cont(0)?;
        loop {
            match thread.wait_stop(deadline)? {
                Stop::Group(_) => break,
                Stop::Signal(libc::SIGSTOP) => thread.cont(signal)?,
                Stop::Exited(status) => {
                    return Err(Error::new(format!("the stopped process died ({status:#x})")));
                }
                _ => thread.cont(0)?,
            }
        }
    }
    threads.iter().try_for_each(|(thread, mask)| thread.set_sigmask(*mask))
}
