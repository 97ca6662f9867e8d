//! The control group as the checkpoint engine sees it: something that freezes.
//!
//! A host without a freezer freezes nothing, and the engine makes up for it: it seizes until a pass finds no new task.

use std::path::{Path, PathBuf};

use super::{Cgroup, freezer};
use crate::checkpoint::{Error, Freezer, Result};
use crate::sys;

fn error(e: sys::Error) -> Error {
    Error::new(e.to_string())
}

impl Freezer for Cgroup {
    fn freeze(&mut self) -> Result<()> {
        if !self.has_freezer() {
            return Ok(());
        }
        Self::freeze(self).map_err(|e| {
            error(e).remedy(
                "a process that waits for a disk or a network file system cannot be frozen: try again",
            )
        })
    }

    fn thaw(&mut self) -> Result<()> {
        if self.has_freezer() { Self::thaw(self).map_err(error) } else { Ok(()) }
    }

    fn is_frozen(&self) -> Result<bool> {
        Self::is_frozen(self).map_err(error)
    }

    fn pids(&self) -> Result<Vec<i32>> {
        self.all_pids().map_err(error)
    }

    fn frozen_inside(&self) -> Result<Vec<PathBuf>> {
        freezer::frozen_inside(self).map_err(error)
    }

    fn switch_inside(&mut self, group: &Path, frozen: bool) -> Result<()> {
        freezer::switch(group, frozen).map_err(error)
    }
}
