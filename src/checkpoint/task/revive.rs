//! Making the processes of the images again, out of the stub that waits as the container's first one.
//!
//! ```text
//!   stub ──> tree: clone3(set_tid), setsid, setpgid; helpers exit ──> descriptors, memory (the rooms' own)
//!        ──> per process, children before parents:
//!              threads; actions, limits, timers
//!              zombies die; what their death has sent to the parent is taken away
//!              queued signals; seccomp; credentials         (see `credentials` for that order)
//!              masks; a stopped process is stopped
//!        ──> ready() ──> detach
//! ```
//!
//! Children come before parents, because what a child does while it is made (die as a zombie, stop) sends its parent
//! SIGCHLD, which the parent throws away before its own queue is restored.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::process::{self, ALIVE, DEAD, STOPPED};
use super::status::Status;
use super::tree::Step;
use super::{cookies, credentials, limits, modes, placement, scheduling, seccomp, signals, timers};
use crate::checkpoint::arch::{compat, features, record};
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::Context;
use crate::checkpoint::image::{
    CoreEntry, PstreeEntry, TaskCoreEntry, TaskExtra, ThreadCoreEntry, ThreadExtra,
};
use crate::checkpoint::namespaces::nested::birth::Births;
use crate::checkpoint::namespaces::nested::pids::{self, Pids};
use crate::checkpoint::namespaces::nested::user_of;
use crate::checkpoint::remote::{Batch, CloneArgs, Conduit, Dispatch, Exit, Final, Injection, Stop, Thread};
use crate::checkpoint::task::labels::Label;
use crate::checkpoint::{Error, Result};
use crate::sys;

const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_NAME: u64 = 15;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
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

/// What the images and the destination say of tasks, looked at before anything is made.
pub struct Revival<'a> {
    restore: &'a Restore<'a>,
    steps: Vec<Step>,
    pids: Pids,
    births: Births,
    policy: credentials::Policy,
    label: Option<Label>,
    filters: seccomp::Policy,
    extra: TaskExtra,
    /// Where a thread's own is in it.
    extras: BTreeMap<u32, usize>,
    runtimes_filter: bool,
}

/// Numbers of descriptors by which processes enter the namespaces that they enter last.
#[derive(Debug, Default)]
pub struct Doors {
    /// User namespaces, by process.
    pub users: BTreeMap<i32, i32>,
    /// Where the children of threads are born, by thread. None: in a namespace that is new.
    pub children: BTreeMap<i32, Option<i32>>,
    /// The attributes of their own threads, by process.
    pub attributes: BTreeMap<i32, i32>,
}

/// When others have something to do with a process, while the tree is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It has come to lead a session, and has no children yet.
    Leads,
    /// It is about to fork this child.
    Forks(i32),
    /// It has forked it.
    Forked(i32),
    /// It has been forked.
    Born,
}

impl<'a> Revival<'a> {
    /// Checks the images against each other and against config.json.
    pub fn plan(restore: &'a Restore<'a>, filters: seccomp::Policy) -> Result<Self> {
        let model = restore.model;
        let (steps, pids) = (process::plan(model)?, Pids::of(model)?);
        let births = Births::of(model, &steps, &pids)?;
        births.check(model)?;
        let policy = credentials::Policy::of(&restore.target.spec);
        let label = Label::of(&restore.target.spec);
        let extra = process::extra(model)?;
        let extras = extra.threads.iter().enumerate().map(|(at, thread)| (thread.tid, at)).collect();
        let runtimes_filter = extra.bottom_filter_is_runtimes.unwrap_or(true);
        let revival =
            Self { restore, steps, pids, births, policy, label, filters, extra, extras, runtimes_filter };
        for entry in &model.pstree {
            let tc = revival.tc(entry)?;
            match tc.task_state {
                DEAD => continue,
                ALIVE | STOPPED => {}
                other => {
                    return Err(Error::new(format!("the image has unknown state {other}")).pid(vpid(entry)));
                }
            }
            for vtid in &entry.threads {
                let core = revival.core(*vtid)?;
                revival.chain(core)?;
            }
        }
        Ok(revival)
    }

    fn core(&self, vtid: u32) -> Result<&'a CoreEntry> {
        let core = self.restore.model.cores.get(&vtid);
        core.ok_or_else(|| Error::new(format!("the images have no core-{vtid}.img")))
    }
    fn tc(&self, entry: &PstreeEntry) -> Result<&'a TaskCoreEntry> {
        let tc = self.core(entry.pid)?.tc.as_ref();
        tc.ok_or_else(|| Error::new(format!("core-{}.img is not that of a process", entry.pid)))
    }
    fn extra(&self, vtid: u32) -> Option<&ThreadExtra> {
        self.extras.get(&vtid).and_then(|at| self.extra.threads.get(*at))
    }
    fn chain(&self, core: &CoreEntry) -> Result<Vec<seccomp::Program>> {
        let image = self.restore.model.seccomp.as_ref();
        let thread = core.thread_core.as_ref();
        seccomp::chain(
            image,
            thread.unwrap_or(&ThreadCoreEntry::default()),
            self.runtimes_filter,
            &self.filters,
        )
    }

    /// What every thread is put under.
    pub fn label(&self) -> Option<&Label> {
        self.label.as_ref()
    }

    /// What processes are called in the pid namespaces that the container has made.
    pub fn pids(&self) -> &Pids {
        &self.pids
    }

    /// Which process forks which.
    pub fn forks(&self) -> impl Iterator<Item = (i32, i32)> {
        self.steps.iter().filter_map(|step| match *step {
            Step::Fork { by, pid, .. } => Some((by, pid)),
            _ => None,
        })
    }

    /// Makes the tree out of `stub`. What was made is in the result even when something failed, to be killed. Others
    /// have something to do at certain moments.
    pub fn grow(
        &self,
        stub: NewTask,
        tree: &mut BTreeMap<i32, NewTask>,
        conduit: &Conduit,
        meanwhile: &mut dyn FnMut(&mut NewTask, Moment) -> Result<()>,
    ) -> Result<()> {
        let root = stub.vpid;
        tree.insert(root, stub);
        let first = self.restore.model.pstree.first().map_or(0, vpid);
        if first != root {
            return Err(Error::new(format!(
                "the images' first process is {first}, the container's is {root}"
            ))
            .remedy("restore into a container with a pid namespace of its own"));
        }
        self.lead_session(tree)?;
        meanwhile(get(tree, root)?, Moment::Leads)?;
        for step in &self.steps {
            if let Step::Fork { by, pid, .. } = *step {
                meanwhile(get(tree, by)?, Moment::Forks(pid))?;
            }
            self.step(*step, tree, conduit)?;
            if let Step::Fork { by, pid, .. } = *step {
                meanwhile(get(tree, by)?, Moment::Forked(pid))?;
                meanwhile(get(tree, pid)?, Moment::Born)?;
            }
            if let Step::Setsid { pid } = *step {
                meanwhile(get(tree, pid)?, Moment::Leads)?;
            }
        }
        Ok(())
    }

    fn lead_session(&self, tree: &mut BTreeMap<i32, NewTask>) -> Result<()> {
        let Some(root) = self.restore.model.pstree.first() else { return Ok(()) };
        let task = get(tree, vpid(root))?;
        if root.sid == root.pid
            && task.injection.syscall(libc::SYS_getsid, &[0.into()])? != i64::from(root.pid)
        {
            task.injection.syscall(libc::SYS_setsid, &[])?;
        }
        Ok(())
    }

    fn step(&self, step: Step, tree: &mut BTreeMap<i32, NewTask>, conduit: &Conduit) -> Result<()> {
        match step {
            Step::Enter { pid } => _ = get(tree, pid)?,
            Step::Fork { by, pid, helper } => {
                let mut flags = self.shared(by, pid);
                if self.pids.made_by(pid).is_some() {
                    flags |= u64::from(libc::CLONE_NEWPID.unsigned_abs());
                }
                let set_tid = self.pids.set_tid(pid, self.pids.space(by));
                let exit_signal = if helper { 0 } else { libc::SIGCHLD };
                let args = CloneArgs { flags, exit_signal, set_tid, ..CloneArgs::default() };
                let parent = get(tree, by)?;
                let (thread, injection) = match self.births.get(pid) {
                    None => parent.injection.clone_child(&args),
                    Some(_) => self.births.fork(self.restore, &self.pids, parent, pid, args, conduit),
                }
                .map_err(|e| e.pid(pid))?;
                let host = thread.tid();
                let pidfd = sys::pidfd::open(host, 0)
                    .during("cannot hold the new process", || format!("pidfd_open({host}, 0)"))?;
                tree.insert(pid, NewTask { pid: host, vpid: pid, pidfd, injection });
            }
            Step::Setsid { pid } => call(tree, pid, libc::SYS_setsid, [0; 2])?,
            Step::Setpgid { pid, pgid } => {
                let group = self.pids.seen(pgid, self.pids.space(pid)).unwrap_or(pgid);
                call(tree, pid, libc::SYS_setpgid, [0, group])?;
            }
            Step::Subreaper { pid } => {
                let set = [PR_SET_CHILD_SUBREAPER.into(), 1.into()];
                get(tree, pid)?.injection.syscall(libc::SYS_prctl, &set).map_err(|e| e.pid(pid))?;
            }
            Step::Exit { pid, by } => {
                let helper = tree.remove(&pid).ok_or_else(|| Error::new("a helper is gone").pid(pid))?;
                helper.injection.exit_child(Exit::Code(0))?;
                let seen = self.pids.seen(pid, self.pids.space(by)).unwrap_or(pid);
                let wait = [seen.into(), 0.into(), libc::__WALL.into(), 0.into()];
                get(tree, by)?.injection.syscall(libc::SYS_wait4, &wait).map_err(|e| e.pid(by))?;
            }
        }
        Ok(())
    }

    /// CLONE_FILES and CLONE_FS for processes that share with their parent.
    fn shared(&self, parent: i32, child: i32) -> u64 {
        let ids = |pid: i32| self.restore.model.ids.get(&pid.cast_unsigned());
        let (Some(parent), Some(child)) = (ids(parent), ids(child)) else { return 0 };
        let flag = |same: bool, flag: i32| if same { u64::from(flag.unsigned_abs()) } else { 0 };
        flag(parent.files_id == child.files_id, libc::CLONE_FILES)
            | flag(parent.fs_id == child.fs_id, libc::CLONE_FS)
    }

    /// The last stage of every process, children before parents. `threads` gets all threads, to be detached, and also
    /// holds those made before a failure.
    /// `doors` are descriptors of the namespaces that they are still to enter.
    pub fn finish(
        &self,
        tree: &mut BTreeMap<i32, NewTask>,
        threads: &mut Vec<Thread>,
        doors: &Doors,
    ) -> Result<()> {
        for entry in self.restore.model.pstree.iter().rev() {
            let pid = vpid(entry);
            let task = tree.remove(&pid).ok_or_else(|| Error::new("the process is gone").pid(pid))?;
            let tc = self.tc(entry)?;
            if tc.task_state == DEAD {
                die(task, tc).map_err(|e| e.pid(pid))?;
            } else {
                self.process(entry, tc, task, threads, doors).map_err(|e| e.pid(pid))?;
            }
        }
        cookies::restore(&self.extra, self.restore.target.init, threads)
    }

    fn process(
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
        if let Some(all) = &tc.timers {
            timers::restore_posix(leader, all)?;
            let mut batch = Batch::new();
            timers::restore_interval(&mut batch, all);
            if !batch.is_empty() {
                leader.run(&batch)?;
            }
        }
        let stopped = self.restore.model.pstree.iter().filter(|e| e.ppid == entry.pid);
        let stopped = stopped.filter(|e| self.tc(e).is_ok_and(|tc| tc.task_state == STOPPED)).map(vpid);
        let stopped = stopped.filter_map(|child| self.pids.seen(child, self.pids.space(vpid(entry))));
        forget_children(leader, &stopped.collect::<Vec<_>>())?;
        for (vtid, injection) in &mut threads {
            self.thread(entry, tc, *vtid, injection, attributes).map_err(|e| named(e, *vtid))?;
        }
        let mut left = Vec::new();
        let last = threads.len() - 1;
        for (i, (vtid, injection)) in threads.into_iter().enumerate() {
            let thread = self.leave(vtid, injection, i == last).map_err(|e| named(e, vtid))?;
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

    /// What a thread sets by itself, credentials last.
    fn thread(
        &self,
        entry: &PstreeEntry,
        tc: &TaskCoreEntry,
        vtid: u32,
        injection: &mut Injection,
        attributes: Option<i32>,
    ) -> Result<()> {
        let core = self.core(vtid)?;
        let empty = ThreadCoreEntry::default();
        let thread = core.thread_core.as_ref().unwrap_or(&empty);
        let (pid, tid) = (self.pids.own(vpid(entry)), self.pids.own(vtid.cast_signed()));
        let compat = core.thread_info.as_ref().filter(|info| compat::is_compat(info));
        if let Some(info) = compat {
            compat::restore_segments(injection.thread().tid(), &info.tls)?;
            compat::set_robust_list(injection, thread.futex_rla, thread.futex_rla_len)?;
        }

        let mut batch = Batch::new();
        scheduling::restore(&mut batch, thread, self.extra(vtid));
        batch.about("cannot restore the thread's state");
        let clear = core.thread_info.as_ref().map_or(0, |i| i.clear_tid_addr);
        batch.call(libc::SYS_set_tid_address, &[clear.into()]);
        if thread.futex_rla_len != 0 && compat.is_none() {
            batch.call(libc::SYS_set_robust_list, &[thread.futex_rla.into(), thread.futex_rla_len.into()]);
        }
        if let Some(stack) = &thread.sas {
            signals::restore_stack(&mut batch, stack);
        }
        if let Some(rseq) = thread.rseq_entry.as_ref().filter(|r| r.rseq_abi_pointer != 0) {
            let args =
                [rseq.rseq_abi_pointer.into(), rseq.rseq_abi_size.into(), 0.into(), rseq.signature.into()];
            batch.call(libc::SYS_rseq, &args);
        }
        let name = thread.comm.as_deref().filter(|_| vtid != entry.pid).unwrap_or(&tc.comm);
        let name = batch.string(name.as_bytes());
        batch.call(libc::SYS_prctl, &[PR_SET_NAME.into(), name]);

        batch.about("cannot queue the signals again");
        if vtid == entry.pid {
            if let Some(queue) = &tc.signals_s {
                signals::restore_queue(&mut batch, queue, pid, None)?;
            }
        }
        if let Some(queue) = &thread.signals_p {
            signals::restore_queue(&mut batch, queue, pid, Some(tid))?;
        }
        let strict = thread.seccomp_mode == Some(1);
        seccomp::restore(&mut batch, &self.chain(core)?, strict)?;
        if let Some(creds) = &thread.creds {
            let inside = user_of(self.restore.model, entry.pid).is_some();
            credentials::restore(&mut batch, creds, &self.policy, inside)?;
        }
        batch.about("cannot restore the thread's state");
        batch.call(libc::SYS_prctl, &[PR_SET_PDEATHSIG.into(), thread.pdeath_sig.unwrap_or(0).into()]);
        if let Some(extra) = self.extra(vtid) {
            modes::restore(&mut batch, &extra.modes, vtid == entry.pid)?;
        }
        batch.about("cannot restore the thread's state");
        if vtid == entry.pid {
            // 2 is what a change of credentials leaves; it cannot be asked for.
            let dumpable = self.restore.model.mm.get(&entry.pid).and_then(|mm| mm.dumpable).unwrap_or(1);
            batch.call(libc::SYS_prctl, &[PR_SET_DUMPABLE.into(), u64::from(dumpable == 1).into()]);
        }
        if let (Some(label), Some(door)) = (&self.label, attributes) {
            let own = injection.thread().tid();
            label.restore_in_thread(&mut batch, door, own, entry.threads.len() == 1);
            label.restore_next(&mut batch, door, own, (thread.creds.as_ref(), self.extra(vtid)));
            if vtid == entry.pid {
                batch.call(libc::SYS_close, &[door.into()]);
            }
        }
        injection.run(&batch).map(|_| ())
    }

    /// Puts the thread where it was.
    fn leave(&self, vtid: u32, mut injection: Injection, last: bool) -> Result<Thread> {
        let core = self.core(vtid)?;
        let info = core.thread_info.as_ref().ok_or_else(|| Error::new("the image has no registers"))?;
        let thread = injection.thread().clone();
        let extra = self.extra(vtid).map_or(&[][..], |e| &e.xstate);
        features::make_room(&mut injection, extra)?;
        thread.set_xstate(&record::restore_extended(info, extra, &thread.xstate()?)?)?;
        let regs = record::restore_general(info, &thread.regs()?)?;
        injection.leave(&Final { regs, sigmask: mask(core), unmap_window: last })?;
        // The last thing: no batch gets through it.
        if let Some(d) = self.extra(vtid).and_then(|extra| extra.dispatch.as_ref()) {
            thread.set_dispatch(Some(Dispatch { selector: d.selector, range: (d.offset, d.length) }))?;
        }
        Ok(thread)
    }
}

/// Blocked signals of a thread.
fn mask(core: &CoreEntry) -> u64 {
    let own = core.thread_core.as_ref().and_then(|t| t.blk_sigset);
    own.or(core.tc.as_ref().map(|tc| tc.blk_sigset)).unwrap_or(0)
}

fn vpid(entry: &PstreeEntry) -> i32 {
    entry.pid.cast_signed()
}

fn named(error: Error, vtid: u32) -> Error {
    error.pid(vtid.cast_signed())
}

fn get(tree: &mut BTreeMap<i32, NewTask>, pid: i32) -> Result<&mut NewTask> {
    tree.get_mut(&pid).ok_or_else(|| Error::new("the process does not exist yet").pid(pid))
}

fn call(tree: &mut BTreeMap<i32, NewTask>, pid: i32, nr: libc::c_long, args: [i32; 2]) -> Result<()> {
    get(tree, pid)?.injection.syscall(nr, &args.map(Into::into)).map(|_| ()).map_err(|e| e.pid(pid))
}

/// Throws away the SIGCHLD that children which died or stopped have sent, and the report that they have stopped: a
/// shell has had it.
fn forget_children(injection: &mut Injection, stopped: &[i32]) -> Result<()> {
    let mut batch = Batch::new();
    for child in stopped {
        let flags = libc::WSTOPPED | libc::WNOHANG;
        let wait = batch
            .call(libc::SYS_waitid, &[libc::P_PID.into(), (*child).into(), 0.into(), flags.into(), 0.into()]);
        batch.tolerate(wait);
    }
    let set = batch.words(&[1 << (libc::SIGCHLD - 1)]);
    let now = batch.words(&[0, 0]);
    let call = batch.call(libc::SYS_rt_sigtimedwait, &[set, 0.into(), now, 8.into()]);
    batch.tolerate(call);
    match injection.run(&batch)?.result(call) {
        Ok(_) | Err(Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(Error::new("cannot take away a signal").call("rt_sigtimedwait({SIGCHLD})", errno)),
    }
}

/// A process that had exited exits again, and waits for its parent.
fn die(task: NewTask, tc: &TaskCoreEntry) -> Result<()> {
    let mut injection = task.injection;
    let mut batch = Batch::new();
    let name = batch.string(tc.comm.as_bytes());
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
