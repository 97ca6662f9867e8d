//! The life of a container: its state on disk, and what each command does to it.
//!
//! ```text
//!            create               start                (exits)
//!   (none) ─────────> created ──────────> running ───────────────> stopped ──> delete
//!                        │       pause ┌────┘  └── checkpoint ──> (none, images)
//!                        │             v                              │
//!                        │           paused ── resume ──> running <───┘ restore
//! ```
//!
//! Status is never stored: it follows from what the kernel says of init, the freezer and the exec fifo.

pub mod checkpoint;
pub mod clock;
pub mod create;
mod criu_config;
pub mod debug;
pub mod error;
pub mod events;
pub mod exec;
pub mod foreground;
pub mod hooks;
pub mod launch;
pub mod list;
mod listener;
pub mod net_devices;
pub mod notify;
pub mod pause;
pub mod proc;
pub mod signal;
pub mod start;
pub mod state;
pub mod stdio;
pub mod store;
pub mod update;

use std::fs;

use crate::checkpoint::recovery;
use oci_spec::runtime::Spec;

pub use crate::cgroup::Cgroup;
pub use error::{Error, Result};
use hooks::{HookState, Point};
pub use state::State;
pub use store::{Dir, Lock, Store};

/// The version of the OCI runtime specification that we implement.
pub const OCI_VERSION: &str = "1.3.0";

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Everything is there but the program.
    Created,
    /// The program runs.
    Running,
    /// It is frozen.
    Paused,
    /// Init has exited.
    Stopped,
}

impl Status {
    /// The specification's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A container that exists.
#[derive(Debug)]
pub struct Container {
    /// Where it is kept.
    pub dir: Dir,
    /// What is kept of it.
    pub state: State,
}

impl Container {
    /// Finds a container. What a killed checkpoint has left is undone, unless another command is about to do that.
    pub fn load(store: &Store, id: &str) -> Result<Self> {
        let dir = store.dir(id)?;
        let state = dir.load()?;
        let container = Self { dir, state };
        if recovery::is_recorded(container.dir.path()) {
            // Whoever has the lock is a checkpoint, or will heal by itself; what cannot be healed can still be looked at.
            if let Ok(Some(_lock)) = container.dir.try_lock() {
                let _ = container.heal();
            }
        }
        Ok(container)
    }

    /// Finds a container and the right to change it. What a killed checkpoint has left is undone.
    pub fn load_locked(store: &Store, id: &str) -> Result<(Self, Lock)> {
        let dir = store.dir(id)?;
        let lock = dir.lock()?;
        let state = dir.load()?;
        let container = Self { dir, state };
        container.heal()?;
        Ok((container, lock))
    }

    /// True while init, the very process and not one that got its pid later, has not exited.
    pub fn has_init(&self) -> bool {
        self.init().is_some()
    }

    fn init(&self) -> Option<proc::Stat> {
        let pid = self.state.init_process_pid;
        let stat = proc::Stat::of(pid).filter(|_| pid > 0)?;
        let same = stat.start == self.state.init_process_start || self.has_been_restored(pid);
        (same && stat.alive()).then_some(stat)
    }

    /// A container that was checkpointed together with us, from outside of both, has started another time. Who is the
    /// first process of a pid namespace, and in the container's control group, has come there as its first process only.
    fn has_been_restored(&self, pid: i32) -> bool {
        proc::is_first_of_its_namespace(pid) && self.cgroup().all_pids().is_ok_and(|pids| pids.contains(&pid))
    }

    /// What it is doing now.
    pub fn status(&self) -> Result<Status> {
        let Some(init) = self.init() else { return Ok(Status::Stopped) };
        if self.cgroup().is_frozen()? {
            return Ok(Status::Paused);
        }
        // A `start` that was killed has left the fifo, though init went on.
        Ok(if self.dir.exec_fifo().exists() && !init.execed { Status::Created } else { Status::Running })
    }

    /// Its control groups.
    pub fn cgroup(&self) -> Cgroup {
        let cgroup = Cgroup::load(self.state.cgroup_paths.clone());
        if self.state.config.systemd_cgroup { cgroup.by_systemd() } else { cgroup }
    }

    /// Pids of all its processes, on this host.
    pub fn processes(&self) -> Result<Vec<i32>> {
        match self.cgroup().all_pids() {
            // The groups go when the last process does, if somebody else removes them.
            Err(e) if e.errno() == Some(nix::errno::Errno::ENOENT) && !self.has_init() => Ok(vec![]),
            pids => pids.map_err(|e| e.context("unable to get all container pids").into()),
        }
    }

    /// config.json as it was when the container was created.
    pub fn spec(&self) -> Result<Spec> {
        let path = self.dir.join("config.json");
        let read = || -> Result<Spec, String> {
            let text = fs::read(&path).map_err(|e| e.to_string())?;
            serde_json::from_slice(&text).map_err(|e| e.to_string())
        };
        read().map_err(|e| Error::new(format!("{}: {e}", path.display())))
    }

    /// Runs the hooks of one point outside the container.
    pub fn run_hooks(&self, spec: &Spec, point: Point, status: &'static str) -> Result<()> {
        if hooks::any(spec, &[point]) {
            hooks::run(spec, point, &HookState::of(&self.state, status), &[])?;
        }
        Ok(())
    }
}
