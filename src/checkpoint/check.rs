//! What this kernel and this container allow, asked before anything is frozen.
//!
//! Every room has a `check` that only looks: through `/proc`, at a container that goes on running. All findings are
//! collected, so that the operator sees the whole list at once. What changes between this look and the freeze is seen
//! again by the dump itself, which refuses in the same words.
//!
//! A program may close, rename or end anything between two steps of a look, and what was half gone looks as if it could
//! not be kept. So a finding counts only when it is there again whenever the container is looked at.

use std::collections::BTreeSet;

use nix::errno::Errno;

use crate::checkpoint::arch::compat;
use crate::checkpoint::context::{Options, Source};
use crate::checkpoint::memory::look::Looks;
use crate::checkpoint::task::freeze::children;
use crate::checkpoint::task::status::{self, Status};
use crate::checkpoint::task::{keys, sessions};
use crate::checkpoint::{Error, Freezer, Result, files, memory, namespaces, pieces};

/// So often is a container looked at in which something is found.
const LOOKS: usize = 3;

/// Everything that keeps this container from being dumped; empty when it can be. `watched`: its writes are noted by the
/// caller. What was seen of its mappings is added to `looks`.
pub fn check(
    options: &Options,
    source: &Source,
    freezer: &dyn Freezer,
    watched: bool,
    looks: &mut Looks,
) -> Vec<Error> {
    let mut look = || look(options, source, freezer, watched, looks);
    let mut found = look();
    for _ in 1..LOOKS {
        if found.is_empty() {
            break;
        }
        let again: BTreeSet<String> = look().iter().map(ToString::to_string).collect();
        found.retain(|error| again.contains(&error.to_string()));
    }
    found
}

fn look(
    options: &Options,
    source: &Source,
    freezer: &dyn Freezer,
    watched: bool,
    looks: &mut Looks,
) -> Vec<Error> {
    let pids = match processes(freezer) {
        Ok(pids) => pids,
        Err(error) => return vec![error],
    };
    if !pids.contains(&source.init) {
        return vec![Error::new("the container's first process does not run")];
    }
    let pids = if options.drop_exec { with_descendants(BTreeSet::from([source.init])) } else { pids };
    let depth = status::depth(source.init).unwrap_or(0);
    let look_at = |pid: &i32| {
        // What has ended meanwhile is no finding.
        let status = Status::of(*pid).ok()?;
        let vpid = status.pid_at(depth).unwrap_or(*pid);
        let outcome = process(options, (*pid, vpid), &status, &pids, source.init);
        let mappings = (status.state != 'Z').then(|| {
            let watched = watched || memory::track::is_ours(source.state_dir.as_deref(), *pid);
            memory::layout::refusals(*pid, watched).unwrap_or_default()
        });
        Some((*pid, vpid, status, outcome.err(), mappings))
    };
    let all: Vec<i32> = pids.iter().copied().collect();
    let seen = match pieces::all(&all, look_at) {
        Ok(seen) => seen,
        Err(error) => return vec![error],
    };
    let mut found = Vec::new();
    let (mut tasks, mut running) = (Vec::new(), Vec::new());
    for (pid, vpid, status, error, mappings) in seen.into_iter().flatten() {
        found.extend(error.map(|e| e.pid(vpid)));
        let Some((refusals, flagged)) = mappings else { continue };
        tasks.push((pid, vpid));
        found.extend(refusals.into_iter().map(|e| e.pid(vpid)));
        looks.add(pid, flagged);
        running.push((pid, vpid, status));
    }
    found.extend(memory::aio::refusals(&tasks, looks));
    found.extend(keys::check(source).err());
    // Whoever is frozen does not answer.
    if !freezer.is_frozen().unwrap_or(true) {
        found.extend(keys::check_threads(&running));
    }
    let live: Vec<i32> = tasks.iter().map(|(pid, _)| *pid).collect();
    std::thread::scope(|scope| {
        let look = || namespaces::check(options, source, &live);
        let spaces = std::thread::Builder::new().spawn_scoped(scope, look);
        found.extend(files::check(options, source, &tasks));
        let lost = || vec![Error::new("a thread that looked at the namespaces has failed")];
        found.extend(match spaces {
            Ok(spaces) => spaces.join().unwrap_or_else(|_| lost()),
            Err(_) => look(),
        });
    });
    // What was found at a process that has ended meanwhile keeps nobody from anything.
    let ended = |vpid: i32| {
        let task = tasks.iter().find(|(_, inside)| *inside == vpid);
        task.is_some_and(|(pid, _)| Status::of(*pid).map_or(true, |status| matches!(status.state, 'Z' | 'X')))
    };
    // One that is exiting has lost its descriptors while its state is still that of a living one.
    found.retain(|e| e.errno() != Some(Errno::ESRCH) && !e.fields().pid.is_some_and(ended));
    found
}

/// The processes of the subtree, and their children, which may be zombies or in another group.
fn processes(freezer: &dyn Freezer) -> Result<BTreeSet<i32>> {
    Ok(with_descendants(freezer.pids()?.into_iter().collect()))
}

fn with_descendants(mut all: BTreeSet<i32>) -> BTreeSet<i32> {
    let mut new: Vec<i32> = all.iter().copied().collect();
    while let Some(pid) = new.pop() {
        new.extend(children(pid).into_iter().filter(|child| all.insert(*child)));
    }
    all
}

fn process(
    options: &Options,
    (pid, vpid): (i32, i32),
    status: &Status,
    all: &BTreeSet<i32>,
    init: i32,
) -> Result<()> {
    if status.tracer != 0 {
        return Err(Error::new(format!("the process is traced by process {} of this host", status.tracer))
            .remedy("end the debugger"));
    }
    if status.state == 'Z' && status::threads(pid).is_ok_and(|threads| threads.len() > 1) {
        return Err(Error::new("the process's first thread has exited while others go on")
            .remedy("such a process cannot be dumped; let it end its threads, or exit"));
    }
    if pid != init && !all.contains(&status.ppid) {
        match options.keep_exec {
            true => sessions::check(status, status::depth(init)?)?,
            false => return Err(sessions::refusal(vpid)),
        }
    }
    compat::check(pid)?;
    if status.shadow_stack {
        return Err(Error::new("the process has a shadow stack, which cannot be dumped yet")
            .remedy("start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off"));
    }
    Ok(())
}
