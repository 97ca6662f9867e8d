//! Control groups that a new process is born into, or enters by itself.
//!
//! ```text
//!   who moves whom                       what the kernel waits for
//!   one process writes another's pid     an RCU grace period, 5 to 12 ms: no process may fork or exit meanwhile
//!   v1: a thread writes 0 to `tasks`     nothing: only the writer moves
//!   v2: clone3(CLONE_INTO_CGROUP)        nothing: it has never been elsewhere
//! ```
//!
//! So the command opens the doors, and the new process goes through them before it does anything else.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::{Cgroup, file, is_needless};
use crate::sys::{Context, Result};

/// Open descriptors of all groups of a container.
#[derive(Debug)]
pub struct Doors {
    /// Directory in the v2 tree.
    unified: Option<OwnedFd>,
    /// `tasks` of each v1 group.
    tasks: Vec<Door>,
}

#[derive(Debug)]
struct Door {
    file: OwnedFd,
    path: PathBuf,
    needless: bool,
}

impl Cgroup {
    /// Opens the groups, if they can be entered this way. [`Cgroup::add`] does it in any case, and says what is wrong.
    pub fn doors(&self) -> Option<Doors> {
        if self.unit.is_some() {
            return None;
        }
        let (mut unified, mut tasks) = (None, vec![]);
        for (controller, dir) in &self.paths {
            if controller.is_empty() {
                let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
                unified = open(dir, flags, Mode::empty()).ok();
                continue;
            }
            let needless = is_needless(controller);
            match file::open_file(dir, "tasks", OFlag::O_WRONLY) {
                Ok(file) => tasks.push(Door { file: file.into(), path: dir.join("tasks"), needless }),
                Err(_) if needless => {}
                Err(_) => return None,
            }
        }
        // In a frozen group the process stands still at once, and is to be in the others by then.
        tasks.sort_by_key(|door| door.path.iter().any(|part| part == "freezer"));
        Some(Doors { unified, tasks })
    }

    /// Does what is left to do for a process that has been made with [`Doors`]: `born` says that it was born in the v2
    /// tree.
    pub fn add_rest(&self, pid: i32, born: bool) -> Result<()> {
        match self.paths.get("") {
            Some(dir) if !born => {
                let result = super::pids::enter(dir, pid);
                if self.is_unified() { result } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }
}

impl Doors {
    /// What clone3(2) gets.
    pub fn unified(&self) -> Option<RawFd> {
        self.unified.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Moves this process, which must have a single thread, into the v1 groups.
    pub fn enter(&self) -> Result<()> {
        for door in &self.tasks {
            match nix::unistd::write(&door.file, b"0") {
                Err(errno) if !door.needless => {
                    return Err(errno).context(|| {
                        format!(
                            "unable to apply cgroup configuration: failed to write 0: write {}",
                            door.path.display()
                        )
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }
}
