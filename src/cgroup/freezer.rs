//! Stopping and continuing every process of a container at once.
//!
//! v1 has a state that is written and read back: while new processes keep appearing it can stay FREEZING, and is then
//! written again. v2 says in `cgroup.events` when all have stopped, which poll(2) waits for.

use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::file::{is_missing, read, write};
use super::{Cgroup, pids};
use crate::sys::{Context, Error, Result};

/// How long a freeze may take. A process in uninterruptible sleep cannot be frozen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Stops all processes of the subtree. On failure the group is left thawed.
pub(super) fn freeze(cgroup: &Cgroup) -> Result<()> {
    if cgroup.is_unified() {
        let dir = cgroup.unified_dir()?;
        write(dir, "cgroup.freeze", "1").context(|| "freezer not supported")?;
        wait_frozen(dir).inspect_err(|_| drop(write(dir, "cgroup.freeze", "0")))
    } else {
        let dir = v1_dir(cgroup)?;
        freeze_v1(dir).inspect_err(|_| drop(write(dir, "freezer.state", "THAWED")))
    }
}

/// Continues all processes.
pub(super) fn thaw(cgroup: &Cgroup) -> Result<()> {
    if cgroup.is_unified() {
        write(cgroup.unified_dir()?, "cgroup.freeze", "0")
    } else {
        write(v1_dir(cgroup)?, "freezer.state", "THAWED")
    }
}

/// Continues all processes, also those of groups inside that are frozen themselves: a frozen one of v1 does not die.
pub(super) fn thaw_all(cgroup: &Cgroup) -> Result<()> {
    if is_frozen(cgroup)? {
        thaw(cgroup)?;
    }
    for dir in frozen_inside(cgroup)? {
        match switch(&dir, false) {
            Err(e) if !is_missing(&e) => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// True if the group itself is frozen or freezing; not if only one above it is, as that is none of the container's.
pub(super) fn is_frozen(cgroup: &Cgroup) -> Result<bool> {
    let (dir, file) = if cgroup.is_unified() {
        (cgroup.unified_dir()?, "cgroup.freeze")
    } else {
        match cgroup.paths().get("freezer") {
            Some(dir) => (dir.as_path(), "freezer.self_freezing"),
            None => return Ok(false),
        }
    };
    match read(dir, file) {
        Ok(text) => Ok(text.trim() == "1"),
        Err(e) if is_missing(&e) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The groups below that are frozen themselves.
pub(super) fn frozen_inside(cgroup: &Cgroup) -> Result<Vec<PathBuf>> {
    let (top, file) = match cgroup.paths().get("freezer") {
        Some(dir) => (dir.as_path(), "freezer.self_freezing"),
        None if cgroup.is_unified() => (cgroup.unified_dir()?, "cgroup.freeze"),
        None => return Ok(Vec::new()),
    };
    let mut all = pids::inside(top)?;
    // One that is removed meanwhile is not frozen.
    all.retain(|dir| read(dir, file).is_ok_and(|text| text.trim() == "1"));
    Ok(all)
}

/// Freezes or thaws one group.
pub(super) fn switch(dir: &Path, frozen: bool) -> Result<()> {
    let unified = !dir.join("freezer.state").exists();
    match (unified, frozen) {
        (true, false) => write(dir, "cgroup.freeze", "0"),
        (true, true) => write(dir, "cgroup.freeze", "1").and_then(|()| wait_frozen(dir)),
        (false, false) => write(dir, "freezer.state", "THAWED"),
        (false, true) => freeze_v1(dir),
    }
}

fn v1_dir(cgroup: &Cgroup) -> Result<&Path> {
    let missing = || Error::new("cannot toggle freezer: cgroups not configured for container");
    cgroup.paths().get("freezer").map(std::path::PathBuf::as_path).ok_or_else(missing)
}

fn freeze_v1(dir: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut tries = 0u32;
    loop {
        tries += 1;
        if tries.is_multiple_of(50) {
            // A thaw in between lets processes that are being made get past the point where they are missed. There is
            // no event to wait for.
            write(dir, "freezer.state", "THAWED")?;
            std::thread::sleep(Duration::from_millis(10));
        }
        write(dir, "freezer.state", "FROZEN")?;
        match read(dir, "freezer.state")?.trim() {
            "FROZEN" => return Ok(()),
            "FREEZING" if Instant::now() < deadline => std::thread::yield_now(),
            "FREEZING" => return Err(Error::new("unable to freeze")),
            state => return Err(Error::new(format!("unexpected state {state} while freezing"))),
        }
    }
}

fn wait_frozen(dir: &Path) -> Result<()> {
    wait_for_event(dir, "frozen 1", PATIENCE).and_then(|there| {
        if there { Ok(()) } else { Err(Error::new("timeout reached waiting for the cgroup to freeze")) }
    })
}

/// Waits until a line appears in `cgroup.events`; false if it does not in time.
pub(super) fn wait_for_event(dir: &Path, line: &str, patience: Duration) -> Result<bool> {
    let deadline = Instant::now() + patience;
    let path = dir.join("cgroup.events");
    let call = || format!("read {}", path.display());
    let mut file = std::fs::File::open(&path).context(|| format!("open {}", path.display()))?;
    loop {
        let mut text = String::new();
        file.rewind().context(call)?;
        file.read_to_string(&mut text).context(call)?;
        if text.lines().any(|l| l == line) {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e).context(|| "poll cgroup.events"),
        }
    }
}
