//! How far a fill has come, as a file in the state directory: `fill.json`.
//!
//! It is there while memory is being filled, and stays when that has failed: `state` says why the container is gone.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::task::status::Stat;
use crate::sys::pidfd;

const NAME: &str = "fill.json";

/// What the file says.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Status {
    /// Who watches over the fill; with its start time, so that another process with the same number is not taken for it.
    pub pid: i32,
    /// In clock ticks since boot.
    pub start: i64,
    /// Bytes to fill at first.
    pub total: u64,
    /// Bytes still to be filled.
    pub left: u64,
    /// Why the fill has failed, and the container was killed.
    pub failed: Option<String>,
}

impl Status {
    /// As it stands in a state directory.
    pub fn read(state_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(state_dir.join(NAME)).ok()?).ok()
    }

    /// Replaces the file. A state directory that is gone belonged to a container that is gone.
    pub fn write(&self, state_dir: &Path) {
        let new = state_dir.join(".fill.json.new");
        if let Ok(text) = serde_json::to_string(self) {
            let _ = fs::write(&new, text).and_then(|()| fs::rename(&new, state_dir.join(NAME)));
        }
    }

    /// In words.
    pub fn describe(&self) -> String {
        match &self.failed {
            Some(why) => format!("failed, and the container was killed: {why}"),
            None if !self.is_going_on() => "interrupted, and the container was killed".to_owned(),
            None => {
                let done = self.total.saturating_sub(self.left);
                format!("{} of {} MiB", done >> 20, self.total >> 20)
            }
        }
    }

    fn is_going_on(&self) -> bool {
        start_time(self.pid) == Some(self.start)
    }
}

/// Nothing is left to be filled.
pub fn remove(state_dir: &Path) {
    let _ = fs::remove_file(state_dir.join(NAME));
}

/// Waits until no memory is being filled any more.
pub fn wait(state_dir: &Path) -> Result<()> {
    let Some(status) = Status::read(state_dir).filter(|status| status.failed.is_none()) else {
        return Ok(());
    };
    let Ok(handle) = pidfd::open(status.pid, 0) else { return Ok(()) };
    if !status.is_going_on() {
        return Ok(());
    }
    loop {
        match poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            done => {
                done.during("cannot wait for the memory to be filled", || "poll(pidfd)".into())?;
                break;
            }
        }
    }
    match Status::read(state_dir).and_then(|status| status.failed) {
        None => Ok(()),
        Some(why) => Err(Error::new(format!("the memory could not be filled: {why}"))),
    }
}

/// When a process started.
pub fn start_time(pid: i32) -> Option<i64> {
    Stat::of(pid).ok().map(|stat| stat.field(22))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fill_is_told_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let pid = std::process::id().cast_signed();
        let start = start_time(pid).unwrap();
        let mut status = Status { pid, start, total: 10 << 20, left: 4 << 20, failed: None };
        status.write(dir.path());
        assert_eq!(Status::read(dir.path()), Some(status.clone()));
        assert_eq!(status.describe(), "6 of 10 MiB");
        status.start += 1;
        assert!(status.describe().contains("killed"));
        status.failed = Some("no disk".to_owned());
        assert!(status.describe().contains("no disk"));
        remove(dir.path());
        assert_eq!(Status::read(dir.path()), None);
        wait(dir.path()).unwrap();
    }
}
