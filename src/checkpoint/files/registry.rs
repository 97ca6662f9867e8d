//! What the dump of descriptors remembers between them.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::{Live, Pids};
use crate::checkpoint::files::share::{Holder, Shared};
use crate::checkpoint::files::{inet, inotify, multicast, netlink, options, packet, tcp, tty, tun, unix};
use crate::checkpoint::namespaces::mount::nested::Tree;
use crate::checkpoint::{Error, Result};
use crate::sys::kcmp::{self, What};

/// A file opened by path: what makes two of them the same for a mapping.
pub type PathKey = (u64, u64, i32, u32, PathBuf);

/// What the dump of descriptors remembers between them.
#[derive(Debug, Default)]
pub struct Registry {
    /// What the descriptors of a process are called, as far as they have been listed and not been looked at.
    pub(super) names: BTreeMap<i32, Vec<(i32, OsString)>>,
    /// Open file descriptions seen so far.
    pub(super) shared: Shared,
    /// Files without a descriptor in the container, held open so that they can be compared.
    pub(super) held: Vec<OwnedFd>,
    /// Files that mappings, roots and executables use.
    pub(super) paths: HashMap<PathKey, u32>,
    /// When files were written last.
    pub(super) times: BTreeMap<u32, i64>,
    /// Unlinked files whose contents were saved: device and inode -> id of the ghost.
    pub(super) ghosts: BTreeMap<(u64, u64), u32>,
    /// Pipes and fifos whose contents were looked at, by inode.
    pub(super) pipes: BTreeSet<(u64, u64)>,
    /// Memfds by device and inode.
    pub(super) memfds: BTreeMap<(u64, u64), u32>,
    /// Rings of io_uring, by inode.
    pub(super) rings: BTreeMap<u64, u32>,
    /// Locks recorded: their file, and the table that owns them, 0 for those that belong to the file itself.
    pub(super) locks: BTreeSet<(u32, u32)>,
    /// Epoll descriptors whose targets are looked up when every file is known.
    pub(super) epolls: Vec<(usize, Holder)>,
    /// What was not read yet of inotify instances.
    pub(super) unread: Vec<inotify::Unread>,
    /// What IP sockets have beside their records.
    pub(super) inet: Vec<options::More>,
    /// Flags of netlink sockets.
    pub(super) netlink: Vec<netlink::Flags>,
    /// What packet sockets have beside their records.
    pub(super) packets: Vec<packet::More>,
    /// The ends of ptys.
    pub(super) terminals: BTreeMap<u32, tty::Ends>,
    /// Descriptors of tun devices.
    pub(super) tunnels: Vec<tun::Tunnel>,
    /// The keys of the TCP sockets of a family.
    pub(super) keys: BTreeMap<i32, inet::Keys>,
    /// TCP connections.
    pub(super) tcp: tcp::Held,
    /// The multicast groups of the container's network namespace, once they are asked for.
    pub(super) groups: Option<Vec<multicast::Group>>,
    /// The options of a new IP socket of some family, type and protocol.
    pub(super) fresh: BTreeMap<[i32; 3], (options::Values, Option<String>)>,
    /// Where the UDP sockets of a family and protocol are shut down.
    pub(super) shut: BTreeMap<(i32, i32), inet::Shut>,
    /// Unix sockets, whose peers are looked up when every socket is known.
    pub(super) unix: unix::Found,
    /// What the container's processes are called inside.
    pub(super) pids: Pids,
    /// Files that have been found by their names.
    pub(super) named: super::Named,
    /// Ids of the mounts of the container.
    pub(super) mounts: BTreeSet<i32>,
    /// The container's root directory.
    pub(super) root: Option<OwnedFd>,
    /// The mount namespaces that the container has made.
    pub(super) trees: Vec<Arc<Tree>>,
}

impl Registry {
    /// The ring with this inode.
    pub fn ring(&self, inode: u64) -> Option<u32> {
        self.rings.get(&inode).copied()
    }

    /// Descriptors of tun devices.
    pub fn tunnels(&self) -> &[tun::Tunnel] {
        &self.tunnels
    }

    /// The container's root directory.
    pub(super) fn root(&self) -> Result<&OwnedFd> {
        self.root.as_ref().ok_or_else(|| Error::new("the container's root directory is not open"))
    }
}

/// The order of two open file descriptions.
pub fn compare(a: Holder, b: Holder) -> Result<Ordering> {
    kcmp::kcmp(a.pid, b.pid, What::File(a.fd, b.fd))
        .during("cannot compare two descriptors", || {
            format!("kcmp({}, {}, KCMP_FILE, {}, {})", a.pid, b.pid, a.fd, b.fd)
        })
        .map_err(|e| e.remedy("the kernel must be built with CONFIG_KCMP"))
}

/// The id of the open file description behind a descriptor, and whether it is new.
pub fn classify(dump: &mut Dump<'_>, live: &Live) -> Result<(u32, bool)> {
    let mut shared = std::mem::take(&mut dump.files.shared);
    let answer = shared.classify(live.key(), live.holder(), || dump.new_id(), compare);
    dump.files.shared = shared;
    answer.map_err(|e| live.name(e))
}
