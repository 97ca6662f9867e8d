//! The processes of a control group, and its end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;

use super::Cgroup;
use super::file::{is_missing, read, write};
use super::freezer::wait_for_event;
use crate::sys::procfs::read_text;
use crate::sys::{Context, Error, Result};

/// How long the last processes of a group may take to go away.
const PATIENCE: Duration = Duration::from_secs(10);

/// Puts a process into the group.
pub(super) fn enter(dir: &Path, pid: i32) -> Result<()> {
    let mut tries = 0;
    loop {
        match write(dir, "cgroup.procs", &pid.to_string()) {
            // A process that is just being made.
            Err(e) if e.errno() == Some(Errno::EINVAL) && tries < 5 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(30));
            }
            other => return other.context(|| format!("failed to write {pid}")),
        }
    }
}

/// The processes of one directory: of a threaded one, those that have threads in it.
pub(super) fn of(dir: &Path) -> Result<Vec<i32>> {
    let (text, threads) = match read(dir, "cgroup.procs") {
        Err(e) if e.errno() == Some(Errno::ENOTSUP) => (read(dir, "cgroup.threads")?, true),
        other => (other?, false),
    };
    let id = |l: &str| {
        l.parse().map_err(|_| Error::new(format!("{} lists {l:?}", dir.join("cgroup.procs").display())))
    };
    let mut all = text.lines().map(id).collect::<Result<Vec<i32>>>()?;
    if threads {
        all = all.into_iter().filter_map(process_of).collect();
        all.sort_unstable();
        all.dedup();
    }
    Ok(all)
}

/// The process of a thread; none when it has ended.
fn process_of(tid: i32) -> Option<i32> {
    let status = read_text(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

/// The directories inside, deepest first, without the directory itself.
pub(super) fn inside(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(all),
        other => other.context(|| format!("open {}", dir.display()))?,
    };
    for entry in entries {
        let entry = entry.context(|| format!("read {}", dir.display()))?;
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            all.extend(inside(&entry.path())?);
            all.push(entry.path());
        }
    }
    Ok(all)
}

/// The processes of a directory and all inside it.
pub(super) fn below(dir: &Path) -> Result<Vec<i32>> {
    let mut all = of(dir)?;
    for sub in inside(dir)? {
        match of(&sub) {
            Ok(pids) => all.extend(pids),
            // Removed meanwhile.
            Err(e) if is_missing(&e) => {}
            Err(e) => return Err(e),
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Sends a signal to all. SIGKILL goes through cgroup.kill where there is one; else the group is frozen, so that no
/// process escapes by forking, signalled, and thawed.
pub(super) fn kill(cgroup: &Cgroup, signal: i32) -> Result<()> {
    let sigkill = signal == Signal::SIGKILL as i32;
    if sigkill && let Some(dir) = cgroup.paths().get("") {
        match write(dir, "cgroup.kill", "1") {
            Err(e) if is_missing(&e) => {}
            Err(e) => return Err(e),
            // In hybrid mode the v2 tree may have failed to take the processes.
            Ok(()) if cgroup.is_unified() => return Ok(()),
            Ok(()) => {}
        }
    }
    let was_frozen = cgroup.is_frozen().unwrap_or(false);
    // Without a freezer the loop below still catches up.
    let frozen = cgroup.freeze().is_ok();
    let result = signal_all(cgroup, signal);
    if sigkill && cgroup.has_freezer() {
        cgroup.thaw_all()?;
    } else if frozen && !was_frozen {
        cgroup.thaw()?;
    }
    result?;
    // Without the freezer, what has been forked meanwhile.
    let mut rounds = 0;
    while sigkill && !frozen && rounds < 100 && !cgroup.all_pids().unwrap_or_default().is_empty() {
        signal_all(cgroup, signal)?;
        rounds += 1;
    }
    Ok(())
}

fn signal_all(cgroup: &Cgroup, signal: i32) -> Result<()> {
    let pids = match cgroup.all_pids() {
        Err(e) if is_missing(&e) => return Ok(()),
        other => other?,
    };
    let signal = Signal::try_from(signal).map_err(|_| Error::new(format!("invalid signal {signal}")))?;
    for pid in pids {
        match send(Pid::from_raw(pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(e).context(|| format!("kill({pid}, {signal})")),
        }
    }
    Ok(())
}

/// Removes all directories, inner ones first.
pub(super) fn delete(cgroup: &Cgroup) -> Result<()> {
    let mut failed = None;
    for dir in cgroup.paths().values() {
        if let Err(e) = remove(dir) {
            failed.get_or_insert(e);
        }
    }
    failed.map_or(Ok(()), Err)
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir(dir) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(_) => {}
    }
    for sub in inside(dir)? {
        remove_empty(&sub)?;
    }
    remove_empty(dir)
}

/// rmdir(2), waiting for processes that are already dying. v2 tells when the last is gone; for v1 there is nothing to
/// wait for, so the pauses grow.
fn remove_empty(dir: &Path) -> Result<()> {
    let mut pause = Duration::from_millis(1);
    loop {
        let e = match std::fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) => e,
        };
        match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT) => return Ok(()),
            Some(Errno::EINTR) => continue,
            Some(Errno::EBUSY) if pause < PATIENCE / 8 => {}
            _ => return Err(e).context(|| format!("rmdir {}", dir.display())),
        }
        if dir.join("cgroup.events").exists() {
            wait_for_event(dir, "populated 0", pause)?;
        } else {
            std::thread::sleep(pause);
        }
        pause *= 2;
    }
}
