//! The kinds of namespaces, and the ids that images call them by.
//!
//! ```text
//!   root_ids in inventory.img    1 ... 8     the namespaces of whoever made the images
//!   ids-N.img                    1 ... 8     where a process is in the same one: nothing to save
//!                               11 ... 18    where the container has its own
//!                               21 ...       what it has made itself: see `nested`
//! ```

use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, readlinkat};
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::TaskKobjIdsEntry;
use crate::checkpoint::model::Model;

/// A kind of namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum Kind {
    /// Process ids.
    Pid = 1,
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host and domain name.
    Uts,
    /// Mounts.
    Mnt,
    /// User and group ids.
    User,
    /// Roots of control groups.
    Cgroup,
    /// Clocks.
    Time,
}

/// What is added to the id of a kind when the container has its own.
const OWN: u32 = 10;

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Pid, Self::Net, Self::Ipc, Self::Uts, Self::Mnt, Self::User, Self::Cgroup, Self::Time];

    /// Its name in /proc/PID/ns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pid => "pid",
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Mnt => "mnt",
            Self::User => "user",
            Self::Cgroup => "cgroup",
            Self::Time => "time",
        }
    }

    /// Its name in messages.
    pub fn title(self) -> &'static str {
        match self {
            Self::Net => "network",
            Self::Mnt => "mount",
            other => other.name(),
        }
    }

    /// Its flag for setns(2).
    pub fn flag(self) -> CloneFlags {
        match self {
            Self::Pid => CloneFlags::CLONE_NEWPID,
            Self::Net => CloneFlags::CLONE_NEWNET,
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
            Self::Mnt => CloneFlags::CLONE_NEWNS,
            Self::User => CloneFlags::CLONE_NEWUSER,
            Self::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            Self::Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
        }
    }

    /// The id that images call it by: of the container's own, or of the one it shares with us.
    pub fn id(self, own: bool) -> u32 {
        self as u32 + if own { OWN } else { 0 }
    }

    /// Where a record of ids keeps it.
    pub fn field(self, ids: &mut TaskKobjIdsEntry) -> &mut Option<u32> {
        match self {
            Self::Pid => &mut ids.pid_ns_id,
            Self::Net => &mut ids.net_ns_id,
            Self::Ipc => &mut ids.ipc_ns_id,
            Self::Uts => &mut ids.uts_ns_id,
            Self::Mnt => &mut ids.mnt_ns_id,
            Self::User => &mut ids.user_ns_id,
            Self::Cgroup => &mut ids.cgroup_ns_id,
            Self::Time => &mut ids.time_ns_id,
        }
    }

    /// The id that images call init's by.
    pub fn inits(self, model: &Model) -> u32 {
        let init = model.pstree.first().and_then(|init| model.ids.get(&init.pid));
        init.and_then(|ids| self.get(ids)).unwrap_or(0)
    }

    /// What a record of ids has.
    pub fn get(self, ids: &TaskKobjIdsEntry) -> Option<u32> {
        *self.field(&mut ids.clone())
    }

    /// The one with that flag.
    pub fn with_flag(flag: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.flag().bits() == flag)
    }

    /// What the kernel calls the namespace of a process (`self` for ours); none where the kernel has no such kind.
    pub fn of(self, pid: &str) -> Result<Option<PathBuf>> {
        link(pid, self.name())
    }

    /// Whether the container has its own, and not the one that we are in.
    pub fn private(self, pid: i32) -> Result<bool> {
        Ok(self.of(&pid.to_string())? != self.of("self")?)
    }

    /// The path by which config.json joins an existing one.
    pub fn joined(self, spec: &Spec) -> Option<PathBuf> {
        let kind = match self {
            Self::Pid => LinuxNamespaceType::Pid,
            Self::Net => LinuxNamespaceType::Network,
            Self::Ipc => LinuxNamespaceType::Ipc,
            Self::Uts => LinuxNamespaceType::Uts,
            Self::Mnt => LinuxNamespaceType::Mount,
            Self::User => LinuxNamespaceType::User,
            Self::Cgroup => LinuxNamespaceType::Cgroup,
            Self::Time => LinuxNamespaceType::Time,
        };
        let all = spec.linux().as_ref()?.namespaces().as_ref()?;
        all.iter().find(|n| n.typ() == kind).and_then(|n| n.path().clone())
    }

    /// Whether its contents are the container's: it has its own, and made it.
    pub fn owned(self, pid: i32, spec: &Spec) -> Result<bool> {
        Ok(self.private(pid)? && self.joined(spec).is_none())
    }
}

/// Several links in /proc/PID/ns, which is looked up once.
pub fn links<const N: usize>(pid: &str, names: [&str; N]) -> Result<[Option<PathBuf>; N]> {
    let path = format!("/proc/{pid}/ns");
    let dir = open(path.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .during("cannot look at the namespaces", || format!("open({path:?}, O_PATH|O_DIRECTORY)"))?;
    let mut found = [const { None }; N];
    for (found, name) in found.iter_mut().zip(names) {
        *found = match readlinkat(&dir, name) {
            // Of a process that has ended, or a kind that the kernel does not have.
            Err(Errno::ENOENT) => link(pid, name)?,
            link => Some(
                link.during("cannot look at the namespaces", || format!("readlinkat({path:?}, {name:?})"))?
                    .into(),
            ),
        };
    }
    Ok(found)
}

/// A link in /proc/PID/ns; none where the kernel has no such kind.
pub fn link(pid: &str, name: &str) -> Result<Option<PathBuf>> {
    let path = format!("/proc/{pid}/ns/{name}");
    match std::fs::read_link(&path) {
        Err(e)
            if e.kind() == std::io::ErrorKind::NotFound && std::path::Path::new("/proc/self/ns").exists() =>
        {
            // The process must still be there, or this would pass for a kernel without the kind.
            std::fs::metadata(format!("/proc/{pid}/ns"))
                .during("cannot look at the namespaces", || format!("stat(\"/proc/{pid}/ns\")"))?;
            Ok(None)
        }
        found => found.map(Some).during("cannot look at the namespaces", || format!("readlink({path:?})")),
    }
}
