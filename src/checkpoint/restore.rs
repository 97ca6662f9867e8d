//! The order of a restore.
//!
//! ```text
//!  images --read, validate--> model --plan--> steps
//!  stub of init, waiting in its namespaces (made by `container/` from *this* bundle's config.json)
//!     | seize, settle outside every mapping of the images
//!     v
//!  namespaces' contents -> open files -> tree (clone3 set_tid, setsid, setpgid) -> descriptors -> memory -> threads
//!     -> signals, seccomp, credentials, ... -> ready() -> registers, masks -> detach
//! ```
//!
//! Until `ready()` has returned, a failure kills everything that was made; the images are only read.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::checkpoint::arch::compat;
use crate::checkpoint::context::{NewTask, Options, Restore, Target};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::Files;
use crate::checkpoint::image::{ImageDir, VmaEntry};
use crate::checkpoint::memory::Memories;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::mount;
use crate::checkpoint::namespaces::nested::{self, Made, pids};
use crate::checkpoint::namespaces::net::Hold;
use crate::checkpoint::namespaces::user::Owners;
use crate::checkpoint::remote::{Conduit, Injection, Stop, Thread};
use crate::checkpoint::report::{self, Log, Phases, RestoreReport};
use crate::checkpoint::task::labels::Label;
use crate::checkpoint::task::privileges::Unprivileged;
use crate::checkpoint::task::revive::{Doors, Moment, Revival};
use crate::checkpoint::task::{freeze, limits, policy, seccomp, status};
use crate::checkpoint::{Error, Result, memory, namespaces};
use crate::sys;

/// How long the stub may take to stop.
const PATIENCE: Duration = Duration::from_secs(10);

/// Fills the container that `target` describes from the images. `ready` is called once everything is in place and
/// before any restored instruction runs: the caller writes state.json and the pid file there; its error fails the restore.
pub fn restore(
    options: &Options,
    target: &Target,
    model: &Model,
    images: &ImageDir,
    ready: &mut dyn FnMut() -> Result<()>,
) -> Result<RestoreReport> {
    let mut log = Log::open(options, "restore.log");
    log.line(format_args!("restore of container {} from {}", target.id, images.path().display()));
    let (mut tree, mut threads, mut network) = (BTreeMap::new(), Vec::new(), Hold::default());
    // Each process is held by a few; the hooks that come later are not to have more.
    let _room = sys::fd::Room::make();
    let admitted = policy::admit(model, &target.spec, options.clamp).and_then(|model| {
        let owners = Owners::of(&model, target.init)?;
        Ok((mount::late::in_order(owners.apply(model)?)?, owners))
    });
    let result = admitted.and_then(|(model, owners)| {
        let restore = Restore { options, target, model: &model, images, owners, made: Made::default() };
        run(&restore, &mut tree, &mut threads, &mut network, ready)
    });
    match &result {
        Ok(report) => {
            report.warnings.iter().for_each(|text| log.line(format_args!("Warning: {text}")));
            log.line(format_args!("done: {}", report.phases));
            report.write_stats(options);
        }
        Err(error) => {
            log.error(error);
            kill(target, tree, threads);
            network.release();
        }
    }
    result
}

fn run(
    restore: &Restore<'_>,
    tree: &mut BTreeMap<i32, NewTask>,
    threads: &mut Vec<Thread>,
    network: &mut Hold,
    ready: &mut dyn FnMut() -> Result<()>,
) -> Result<RestoreReport> {
    let mut phases = Phases::start();
    let model = restore.model;
    let revival = Revival::plan(restore, filters(restore.target)?)?;
    phases.end("plan");
    let target = restore.target;
    let mut stub = settle(restore, target.init, &target.init_pidfd)?;
    let mut warnings = namespaces::restore(restore)?;
    let highest = model.fdinfo.values().flatten().map(|fd| fd.fd).max().unwrap_or(2);
    let number = limits::make_room(&mut stub.injection, highest.into(), u64::from(highest) + ROOM)?;
    let number = i32::try_from(number).map_err(|_| Error::new("a descriptor is too large"))?;
    let conduit = Conduit::open(&mut stub.injection, number)?;
    nested::make(restore, &mut stub, &conduit)?;
    warnings.extend(namespaces::net::restore(restore, network)?);
    for entrant in &target.entrants {
        let mut task = settle(restore, entrant.pid, &entrant.pidfd)?;
        limits::make_room(&mut task.injection, highest.into(), u64::from(highest) + ROOM)?;
        conduit.extend(&stub.injection, &mut task.injection)?;
        tree.insert(task.vpid, task);
    }
    phases.end("namespaces");
    let sockets = revival.label().map(Label::of_sockets).transpose()?.flatten();
    let mut files = namespaces::user::as_root_of(restore.target, || {
        let unprivileged = Unprivileged::as_in(&restore.target.spec)?;
        Files::open(restore).map_err(|e| unprivileged.explain(e))
    })?;
    drop(sockets);
    phases.end("files");

    let mut memories = Memories::open(restore, revival.forks())?;
    revival.grow(stub, tree, &conduit, &mut |task, moment| match moment {
        Moment::Leads => files.take_terminal(task, &conduit),
        Moment::Forks(child) => {
            pids::leave_for(restore, revival.pids(), task, child, &conduit)?;
            memories.bequeath(task, child, &|id| files.vma_file(id), &conduit)
        }
        Moment::Forked(child) => pids::give_back(revival.pids(), task, child, &conduit),
        Moment::Born => pids::arrive(restore, revival.pids(), task),
    })?;
    namespaces::place(restore, tree, &conduit)?;
    nested::make_late(restore)?;
    nested::enter(restore, tree, &conduit)?;
    phases.end("tree");

    let live: Vec<i32> =
        model.mm.keys().map(|pid| pid.cast_signed()).filter(|pid| tree.contains_key(pid)).collect();
    let pids = tree.iter().map(|(vpid, task)| (*vpid, task.pid)).collect();
    files.open_late(&pids)?;
    for pid in &live {
        if let Some(task) = tree.get_mut(pid) {
            files.install(task, &conduit)?;
        }
    }
    phases.end("descriptors");
    for pid in &live {
        if let Some(task) = tree.get_mut(pid) {
            memories.restore(task, &|id| files.vma_file(id), &conduit)?;
        }
    }
    let mut hold = memories.start()?;
    phases.end("memory");
    for pid in &live {
        if let Some(task) = tree.get_mut(pid) {
            files.finish(task, &conduit)?;
            namespaces::ipc::restore_undo(task, model).map_err(|e| e.pid(task.vpid))?;
        }
    }
    let users = nested::hand(restore, tree, &conduit)?;
    let children = pids::hand(restore, revival.pids(), tree, &conduit)?;
    let attributes = match revival.label() {
        Some(_) => Label::hand(tree, &live, &conduit)?,
        None => BTreeMap::new(),
    };
    let mut closed = BTreeSet::new();
    for pid in &live {
        let table = model.ids.get(&pid.cast_unsigned()).map_or(0, |ids| ids.files_id);
        if let Some(task) = tree.get_mut(pid).filter(|_| table == 0 || closed.insert(table)) {
            conduit.close(&mut task.injection)?;
        }
    }
    files.set_owners(&pids)?;
    revival.finish(tree, threads, &Doors { users, children, attributes })?;
    namespaces::finish(restore, threads)?;
    hold.begun();
    phases.end("tasks");
    warnings.extend(files.hand_terminals()?);
    ready()?;
    files.resume_connections()?;
    let count = threads.len();
    freeze::let_go(std::mem::take(threads))?;
    files.hang_up_terminals();
    drop(hold);
    phases.end("resume");
    let pages_restored = report::pages(restore.images.path());
    let tasks = model.pstree.len();
    warnings.extend(memory::marks::lost(model, sys::prctl::can_name_memory())?);
    let init = restore.target.init;
    Ok(RestoreReport { phases, tasks, threads: count, init, pages_restored, warnings })
}

/// Numbers above those of the images that a task may need while it is put together.
const ROOM: u64 = 300;

/// The filter that config.json puts under every process.
fn filters(target: &Target) -> Result<seccomp::Policy> {
    let Some(config) = target.spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) else {
        return Ok(Vec::new());
    };
    let program = crate::init::seccomp::compile(config).map_err(|e| Error::new(e.to_string()))?;
    if program.has_listener() {
        return Err(Error::new(
            "config.json has a seccomp filter with a listener, which a restored process cannot have",
        ));
    }
    let instruction = |f: &libc::sock_filter| {
        let mut raw = [0; 8];
        raw[..2].copy_from_slice(&f.code.to_ne_bytes());
        (raw[2], raw[3]) = (f.jt, f.jf);
        raw[4..].copy_from_slice(&f.k.to_ne_bytes());
        raw
    };
    let code: Vec<u8> = program.filters.iter().flat_map(instruction).collect();
    Ok(if code.is_empty() { Vec::new() } else { vec![seccomp::Program { code, flags: program.flags }] })
}

/// Stops a stub that `container/` has made, and settles in it.
fn settle(restore: &Restore<'_>, pid: i32, pidfd: &OwnedFd) -> Result<NewTask> {
    let thread = Thread::seize(pid)?;
    if let Stop::Exited(status) = thread.stop(Instant::now() + PATIENCE)? {
        return Err(Error::new(format!(
            "a new process of the container has ended (wait status {status:#x})"
        )));
    }
    let mut injection = Injection::start(&thread)?;
    injection.settle(window(restore, pid)?)?;
    // The stub's own descriptors, its end of the conversation with `container/` among them, are nobody's any more.
    injection.syscall(libc::SYS_close_range, &[0u64.into(), u64::from(u32::MAX).into(), 0u64.into()])?;
    let vpid = status::Status::of(pid)?.ns_pid.last().copied().unwrap_or(pid);
    let pidfd = pidfd.try_clone().during("cannot hold the new process", || "fcntl(pidfd, F_DUPFD)".into())?;
    Ok(NewTask { pid, vpid, pidfd, injection })
}

/// An address that neither the tasks of the images nor the stub use.
fn window(restore: &Restore<'_>, pid: i32) -> Result<u64> {
    let own = memory::maps::read(pid)?;
    let own: Vec<VmaEntry> =
        own.iter().map(|m| VmaEntry { start: m.start, end: m.end, ..VmaEntry::default() }).collect();
    let theirs = restore.model.mm.values().flat_map(|mm| &mm.vmas);
    let at = memory::plan::free_window(theirs.chain(&own), Injection::FOOTPRINT)?;
    let compat = restore.model.mm.keys().any(|pid| restore.model.is_compat(*pid));
    if compat && at + Injection::FOOTPRINT > compat::ADDRESSES {
        return Err(Error::new(
            "a 32-bit program leaves no room in its addresses for the code that restores it",
        ));
    }
    Ok(at)
}

/// Ends everything that was made. In a pid namespace init's end is everybody's; it ends when all others have been waited
/// for, and the threads that we trace are ours to wait for. None is let go before it has been killed.
fn kill(target: &Target, tree: BTreeMap<i32, NewTask>, mut threads: Vec<Thread>) {
    let _ = sys::pidfd::send_signal(target.init_pidfd.as_fd(), libc::SIGKILL);
    for task in tree.values() {
        let _ = sys::pidfd::send_signal(task.pidfd.as_fd(), libc::SIGKILL);
    }
    threads.extend(tree.into_values().map(|task| task.injection.into_thread()));
    let _ = freeze::reap(threads, Instant::now() + PATIENCE);
}
