//! One process: what its threads share, apart from memory, descriptors and files; and the dump of all of them.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;

use super::status::{self, IdMap, Stat, Status};
use super::threads::{self, Captured};
use super::{cookies, freeze, limits, modes, seccomp, sharing, signals, timers, tree};
use crate::checkpoint::arch::{compat, features};
use crate::checkpoint::context::{Dump, LiveTask};
use crate::checkpoint::image::{
    ChildEnd, CoreEntry, Machine, PstreeEntry, TaskCoreEntry, TaskExtra, TaskRlimitsEntry, ThreadExtra,
};
use crate::checkpoint::memory::mm;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::nested::pids::Pids;
use crate::checkpoint::remote::{Batch, Call, Injection, Out, Results};
use crate::checkpoint::{Error, Result};

/// Runs.
pub const ALIVE: u32 = 1;
/// Has exited and waits to be waited for.
pub const DEAD: u32 = 2;
/// Stopped by a signal.
pub const STOPPED: u32 = 3;
/// The name of this room's extension in stasis.img.
pub const EXTENSION: &str = "task";

const PR_GET_DUMPABLE: u64 = 3;
const PR_GET_CHILD_SUBREAPER: u64 = 37;
const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;

/// What has been read of the stopped container before any batch ran in it.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Threads by process, leaders first.
    threads: BTreeMap<i32, Vec<Captured>>,
    filters: seccomp::Filters,
}

/// Reads every thread by ptrace.
pub fn capture(tasks: &[LiveTask]) -> Result<Snapshot> {
    let depth = tasks.first().map_or(Ok(0), |init| status::depth(init.pid))?;
    let mut snapshot = Snapshot::default();
    for task in tasks {
        let (mut all, compat) = (Vec::new(), compat::runs_in(task.pid));
        for thread in &task.threads {
            all.push(threads::capture(task, thread, (depth, compat), &mut snapshot.filters)?);
        }
        snapshot.threads.insert(task.pid, all);
    }
    Ok(snapshot)
}

/// Fills pstree, cores, ids, seccomp and the extension, and leaves an injection in every leader for the other rooms.
pub fn dump(dump: &mut Dump<'_>, mut snapshot: Snapshot) -> Result<()> {
    let mut extra = TaskExtra::default();
    let (ids, mut groups) = (sharing::ids(dump)?, cookies::Groups::default());
    let depth = status::depth(dump.source.init)?;
    let inside: BTreeMap<i32, i32> = dump.tasks.iter().map(|task| (task.pid, task.vpid)).collect();
    let mut memories = BTreeSet::new();
    for i in 0..dump.tasks.len() {
        let task = &mut dump.tasks[i];
        let mut captured = snapshot.threads.remove(&task.pid).unwrap_or_default();
        for (thread, captured) in task.threads.iter().zip(&mut captured) {
            captured.extra.cookie = groups.of(thread.tid())?;
        }
        let vpid = task.vpid;
        let entry = tree_entry(task, &captured, depth, &inside);
        dump.model.pstree.push(entry);
        if task.zombie {
            dump.model.cores.insert(vpid.cast_unsigned(), zombie(task)?);
            continue;
        }
        let tenant = ids.get(&vpid.cast_unsigned()).is_some_and(|ids| !memories.insert(ids.vm_id));
        for (vtid, core, more) in alive(dump.source.init, task, captured, tenant).map_err(|e| e.pid(vpid))? {
            dump.model.cores.insert(vtid.cast_unsigned(), core);
            extra.threads.push(more);
        }
    }
    extra.unseen_stops = unseen_stops(dump)?;
    extra.ends = ends(dump)?;
    dump.model.ids = ids;
    sharing::record(&mut dump.model)?;
    dump.model.seccomp = snapshot.filters.finish();
    let has_runtimes = dump.source.spec.linux().as_ref().is_some_and(|l| l.seccomp().is_some());
    extra.bottom_filter_is_runtimes = Some(has_runtimes);
    set_extra(&mut dump.model, &extra);
    Ok(())
}

/// The signals that are not SIGCHLD with which processes tell their parents of their ends: clone(2).
fn ends(dump: &Dump<'_>) -> Result<Vec<ChildEnd>> {
    const SIGCHLD: i64 = libc::SIGCHLD as i64;
    let mut ends = Vec::new();
    // The first one tells somebody outside.
    for task in dump.tasks.iter().skip(1) {
        let signal = Stat::of(task.pid).map_err(|e| e.pid(task.vpid))?.field(38);
        if let (true, Ok(signal)) = (signal != SIGCHLD, u32::try_from(signal)) {
            ends.push(ChildEnd { pid: task.vpid.cast_unsigned(), signal });
        }
    }
    Ok(ends)
}

/// The stopped processes of which the parents have not been told yet, or have not asked.
fn unseen_stops(dump: &mut Dump<'_>) -> Result<Vec<u32>> {
    /// Where `si_pid` stands in a siginfo.
    const SI_PID: usize = 16;
    let is_stopped = |task: &&LiveTask| {
        let core = dump.model.cores.get(&task.vpid.cast_unsigned());
        core.and_then(|core| core.tc.as_ref()).is_some_and(|tc| tc.task_state == STOPPED)
    };
    let stopped: Vec<(u32, Status)> = dump
        .tasks
        .iter()
        .filter(is_stopped)
        .map(|task| (task.vpid.cast_unsigned(), task.status.clone()))
        .collect();
    let mut unseen = Vec::new();
    for (vpid, status) in stopped {
        let Some(parent) = dump.tasks.iter_mut().find(|task| task.pid == status.ppid) else { continue };
        // As the parent calls it.
        let child = status.pid_at(parent.status.ns_pid.len().saturating_sub(1));
        let (Some(child), Some(injection)) = (child, &mut parent.injection) else { continue };
        let mut batch = Batch::new();
        batch.about("cannot ask whether a stop was seen");
        let info = batch.out(128);
        let flags = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
        let args = [libc::P_PID.into(), child.into(), info.arg(), flags.into(), 0.into()];
        let call = batch.call(libc::SYS_waitid, &args);
        batch.tolerate(call);
        let results = injection.run(&batch)?;
        if results.ret(call) == 0 && results.u32(info, SI_PID) != 0 {
            unseen.push(vpid);
        }
    }
    Ok(unseen)
}

/// Whether the first process wants a signal when its parent, who is outside, ends.
pub fn asks_for_parents_death(model: &Model) -> bool {
    let threads = model.pstree.first().into_iter().flat_map(|init| &init.threads);
    let cores = threads.filter_map(|tid| model.cores.get(tid)?.thread_core.as_ref());
    cores.into_iter().any(|thread| thread.pdeath_sig.unwrap_or(0) != 0)
}

/// What CRIU's records have no place for.
pub fn extra(model: &Model) -> Result<TaskExtra> {
    match model.extension_data(EXTENSION) {
        None => Ok(TaskExtra::default()),
        Some(data) => TaskExtra::decode(data)
            .map_err(|e| Error::new(format!("the extension {EXTENSION} of stasis.img cannot be read: {e}"))),
    }
}

/// Puts in its place what has been changed of it.
pub fn set_extra(model: &mut Model, extra: &TaskExtra) {
    model.set_extension_data(EXTENSION, extra.encode_to_vec());
}

/// How the tree of the images would be made.
pub fn plan(model: &Model) -> Result<Vec<tree::Step>> {
    let (pstree, ids) = (&model.pstree, &model.ids);
    let node = |e: &PstreeEntry| tree::Node {
        pid: e.pid.cast_signed(),
        ppid: e.ppid.cast_signed(),
        sid: e.sid.cast_signed(),
        pgid: e.pgid.cast_signed(),
    };
    let nodes: Vec<tree::Node> = pstree.iter().map(node).collect();
    let taken = pstree.iter().flat_map(|e| e.threads.iter().map(|t| t.cast_signed())).collect();
    let steps = tree::plan(&nodes, &taken, &Pids::of(model)?)?;
    sharing::check(nodes.first().map_or(0, |root| root.pid), &steps, ids)?;
    Ok(steps)
}

/// `inside`: what the container's processes are called there.
fn tree_entry(
    task: &LiveTask,
    captured: &[Captured],
    depth: usize,
    inside: &BTreeMap<i32, i32>,
) -> PstreeEntry {
    let status = &task.status;
    // A parent outside of the container's namespace is not there for it.
    let ppid = if task.vpid == 1 { 0 } else { parent(status, depth, inside) };
    let own = |ids: &[i32]| ids.get(depth).copied().unwrap_or(0).cast_unsigned();
    let mut threads: Vec<u32> = captured.iter().map(|c| c.vtid.cast_unsigned()).collect();
    if threads.is_empty() {
        threads.push(task.vpid.cast_unsigned());
    }
    PstreeEntry {
        pid: task.vpid.cast_unsigned(),
        ppid,
        pgid: own(&status.ns_pgid),
        sid: own(&status.ns_sid),
        threads,
    }
}

fn parent(status: &Status, depth: usize, inside: &BTreeMap<i32, i32>) -> u32 {
    let other = || Status::of(status.ppid).ok().and_then(|p| p.pid_at(depth));
    inside.get(&status.ppid).copied().or_else(other).unwrap_or(0).cast_unsigned()
}

/// The records of a process and its threads. Leaves the leader's injection in `task`. `tenant`: it runs on the memory of
/// one that has an injection already.
fn alive(
    init: i32,
    task: &mut LiveTask,
    mut captured: Vec<Captured>,
    tenant: bool,
) -> Result<Vec<(i32, CoreEntry, ThreadExtra)>> {
    // As the container knows them: a user namespace that it has made may have no names for them.
    let (users, groups) = (IdMap::users(init)?, IdMap::groups(init)?);
    let pairs: Vec<(i32, i32)> = task.threads.iter().zip(&captured).map(|(t, c)| (t.tid(), c.own)).collect();
    let leader = captured.first().ok_or_else(|| Error::new("the process has no thread"))?;
    let thread_core = leader.core.thread_core.clone().unwrap_or_default();
    let mut tc = TaskCoreEntry {
        task_state: ALIVE,
        personality: personality(task.pid)?,
        blk_sigset: thread_core.blk_sigset.unwrap_or(0),
        comm: thread_core.comm.unwrap_or_default(),
        signals_s: Some(signals::queue(&task.threads[0].pending(true)?, leader.status.shared_pending)),
        ..TaskCoreEntry::default()
    };
    if let Some(signal) = stopped_by(task)? {
        tc.task_state = STOPPED;
        tc.stop_signo = Some(signal);
    }
    limits::dump(task.pid, &mut tc)?;

    let mut injection =
        Injection::start_known(&task.threads[0], &captured[0].status.facts(), captured[0].processor)?;
    if tenant {
        injection.move_out()?;
    }
    let mut batch = Batch::new();
    let asked =
        (Ask::new(&mut batch, task.pid, &pairs)?, threads::Ask::new(&mut batch), mm::Ask::new(&mut batch));
    let results = injection.run(&batch)?;
    asked.0.answer(&results, &mut tc);
    task.space = asked.2.answer(&results);
    if captured[0].is_compat() {
        signals::make_compat(&mut tc.sigactions);
    }
    asked.1.answer(&results, &mut injection, (&users, &groups), &mut captured[0])?;
    captured[0].core.tc = Some(tc);
    let features = features::on_request(results.u64(asked.0.features, 0));
    captured[0].extra.core_filter = modes::core_filter(task.pid)?;
    captured[0].extra.features = features;
    if task.threads.len() > 1 {
        let mut others: Vec<_> = task.threads.iter().zip(&mut captured).skip(1).collect();
        // Following them to another processor costs more than all that is asked of a thread.
        others.sort_by_key(|(_, captured)| captured.processor);
        let mut batch = Batch::new();
        let asked = threads::Ask::new(&mut batch);
        let mut beside = injection.lend()?;
        for (thread, captured) in others {
            let mut injection = beside.start(thread, &captured.status.facts(), captured.processor)?;
            let results = injection.run(&batch)?;
            asked.answer(&results, &mut injection, (&users, &groups), captured)?;
            injection.finish()?;
        }
    }
    task.injection = Some(injection);
    Ok(captured.into_iter().map(|c| (c.vtid, c.core, c.extra)).collect())
}

/// What only the process can tell.
struct Ask {
    actions: signals::AskActions,
    timers: timers::Ask,
    limits: limits::Ask,
    subreaper: Out,
    membarrier: Call,
    features: Out,
}

impl Ask {
    fn new(batch: &mut Batch, pid: i32, threads: &[(i32, i32)]) -> Result<Self> {
        batch.about("cannot read the process's state");
        let subreaper = batch.out(4);
        batch.call(libc::SYS_prctl, &[PR_GET_CHILD_SUBREAPER.into(), subreaper.arg()]);
        let membarrier =
            batch.call(libc::SYS_membarrier, &[MEMBARRIER_GET_REGISTRATIONS.into(), 0.into(), 0.into()]);
        batch.tolerate(membarrier);
        let features = features::ask(batch);
        Ok(Self {
            actions: signals::AskActions::new(batch),
            timers: timers::Ask::new(batch, pid, threads)?,
            limits: limits::Ask::new(batch),
            subreaper,
            membarrier,
            features,
        })
    }

    fn answer(&self, results: &Results, tc: &mut TaskCoreEntry) {
        tc.sigactions = self.actions.answers(results);
        tc.timers = Some(self.timers.answer(results));
        tc.rlimits = Some(TaskRlimitsEntry { rlimits: self.limits.answer(results) });
        tc.child_subreaper = Some(results.u32(self.subreaper, 0) != 0);
        tc.membarrier_registration_mask =
            u32::try_from(results.ret(self.membarrier)).ok().filter(|mask| *mask != 0);
    }
}

/// Whether this process may be looked at, 0 to 2: prctl(2). Memory's record keeps it.
pub fn dumpable(injection: &mut Injection) -> Result<i32> {
    let value = injection.syscall(libc::SYS_prctl, &[PR_GET_DUMPABLE.into()])?;
    Ok(i32::try_from(value).unwrap_or(0))
}

fn zombie(task: &LiveTask) -> Result<CoreEntry> {
    let tc = TaskCoreEntry {
        task_state: DEAD,
        // Field 52 is the exit code as wait(2) gives it.
        exit_code: u32::try_from(Stat::of(task.pid)?.field(52)).unwrap_or(0),
        comm: status::named(task.pid, task.pid)?.0,
        ..TaskCoreEntry::default()
    };
    Ok(CoreEntry { mtype: Machine::X8664.into(), tc: Some(tc), ..CoreEntry::default() })
}

fn personality(pid: i32) -> Result<u32> {
    let text = status::read(format!("/proc/{pid}/personality"))?;
    u32::from_str_radix(text.trim(), 16).map_err(|_| Error::new("/proc/PID/personality cannot be understood"))
}

/// The signal that has stopped the process, if one has.
fn stopped_by(task: &LiveTask) -> Result<Option<u32>> {
    Ok(freeze::group_stop(&task.threads[0])?.map(i32::cast_unsigned))
}
