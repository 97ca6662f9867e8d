//! Processes and threads.

use std::collections::BTreeSet;

use crate::checkpoint::error::Result;
use crate::checkpoint::image::{
    CoreEntry, Machine, PstreeEntry, SignalQueueEntry, TaskCoreEntry, ThreadCoreEntry,
};
use crate::checkpoint::model::Model;
use crate::checkpoint::model::validate::{require, unique};
use crate::checkpoint::task::sessions;

/// The kernel's own limit of process ids.
const PID_MAX: u32 = 1 << 22;
/// Process states in [`TaskCoreEntry::task_state`].
const ALIVE: u32 = 1;
const DEAD: u32 = 2;
const STOPPED: u32 = 3;
const ZOMBIE: u32 = 6;
/// Most supplementary groups.
const GROUPS_MAX: usize = 65536;

pub(super) fn check(model: &Model) -> Result<()> {
    let image = "pstree.img";
    require(!model.pstree.is_empty(), image, || "there is no process".into())?;
    let pids = unique(model.pstree.iter().map(|p| p.pid), image, "process")?;
    let others = model.pstree.iter().flat_map(|p| p.threads.iter().copied().filter(|t| *t != p.pid));
    let threads = unique(others, image, "thread")?;
    require(pids.is_disjoint(&threads), image, || "a thread has the id of a process".into())?;
    let (mut before, sessions) = (BTreeSet::new(), sessions::of(model)?);
    for (index, process) in model.pstree.iter().enumerate() {
        let pid = process.pid;
        let ids = [pid, process.pgid, process.sid];
        let sane = pid != 0 && ids.iter().chain(&process.threads).all(|id| *id <= PID_MAX);
        require(sane, image, || format!("process {pid} has ids out of range"))?;
        let root = index == 0 || sessions.contains(&pid) && process.sid == pid;
        let parent = if root { process.ppid == 0 } else { before.contains(&process.ppid) };
        require(parent, image, || {
            format!("the parent {} of process {pid} does not come before it", process.ppid)
        })?;
        before.insert(pid);
        check_process(model, process)?;
    }
    Ok(())
}

fn check_process(model: &Model, process: &PstreeEntry) -> Result<()> {
    let pid = process.pid;
    let image = format!("core-{pid}.img");
    let core = model.cores.get(&pid);
    let Some((core, tc)) = core.and_then(|core| core.tc.as_ref().map(|tc| (core, tc))) else {
        return require(false, &image, || format!("process {pid} has no state"));
    };
    let known = [ALIVE, DEAD, STOPPED, ZOMBIE].contains(&tc.task_state);
    require(known, &image, || format!("process {pid} is in the state {}", tc.task_state))?;
    check_task(tc, &image)?;
    if !alive(tc) {
        return Ok(());
    }
    require(model.ids.contains_key(&pid), &format!("ids-{pid}.img"), || format!("process {pid} has no ids"))?;
    require(model.mm.contains_key(&pid), &format!("mm-{pid}.img"), || {
        format!("process {pid} has no memory")
    })?;
    require(model.fs.contains_key(&pid), &format!("fs-{pid}.img"), || {
        format!("process {pid} has no directories")
    })?;
    require(process.threads.contains(&pid), "pstree.img", || format!("process {pid} lacks its main thread"))?;
    check_thread(model, core, &image)?;
    for tid in process.threads.iter().filter(|tid| **tid != pid) {
        let image = format!("core-{tid}.img");
        match model.cores.get(tid) {
            Some(core) => check_thread(model, core, &image)?,
            None => require(false, &image, || format!("thread {tid} has no state"))?,
        }
    }
    Ok(())
}

/// Whether the process has threads, memory and descriptors.
pub(super) fn alive(tc: &TaskCoreEntry) -> bool {
    matches!(tc.task_state, ALIVE | STOPPED)
}

fn check_task(tc: &TaskCoreEntry, image: &str) -> Result<()> {
    require(tc.comm.len() < 16, image, || {
        format!("the name {:?} is too long", String::from_utf8_lossy(&tc.comm))
    })?;
    require(tc.sigactions.len() <= 62, image, || "there are more handlers than signals".into())?;
    let limits = tc.rlimits.as_ref().map_or(0, |r| r.rlimits.len());
    require(limits <= 32, image, || format!("there are {limits} resource limits"))?;
    check_queue(tc.signals_s.as_ref(), image)
}

fn check_queue(queue: Option<&SignalQueueEntry>, image: &str) -> Result<()> {
    let signals = queue.into_iter().flat_map(|q| &q.signals);
    require(signals.into_iter().all(|s| s.siginfo.len() == 128), image, || {
        "a signal is not of 128 bytes".into()
    })
}

fn check_thread(model: &Model, core: &CoreEntry, image: &str) -> Result<()> {
    let native = if cfg!(target_arch = "aarch64") { Machine::Aarch64 } else { Machine::X8664 };
    require(core.mtype() == native, image, || {
        format!("it was made on another architecture, {:?}", core.mtype())
    })?;
    require(core.thread_info.is_some(), image, || "it has no registers".into())?;
    match &core.thread_core {
        Some(thread) => check_core(model, thread, image),
        None => require(false, image, || "it has no thread".into()),
    }
}

fn check_core(model: &Model, thread: &ThreadCoreEntry, image: &str) -> Result<()> {
    check_queue(thread.signals_p.as_ref(), image)?;
    let name = thread.comm.as_deref().unwrap_or_default();
    require(name.len() < 16, image, || format!("the name {:?} is too long", String::from_utf8_lossy(name)))?;
    if let Some(creds) = &thread.creds {
        let sets = [&creds.cap_inh, &creds.cap_prm, &creds.cap_eff, &creds.cap_bnd, &creds.cap_amb];
        require(sets.iter().all(|set| set.len() <= 2), image, || "a capability set is too long".into())?;
        require(creds.groups.len() <= GROUPS_MAX, image, || "there are too many groups".into())?;
    }
    if let Some(index) = thread.seccomp_filter {
        let filters = model.seccomp.as_ref().map_or(0, |s| s.seccomp_filters.len());
        // CRIU sets the field without a filter too; it counts in filter mode only.
        let used = thread.seccomp_mode == Some(2);
        require(!used || (index as usize) < filters, image, || {
            format!("there is no seccomp filter {index}")
        })?;
    }
    if let (Some(set), Some(cgroup)) = (thread.cg_set, &model.cgroup) {
        let known = cgroup.sets.iter().any(|s| s.id == set);
        require(known, image, || format!("there is no control group set {set}"))?;
    }
    Ok(())
}
