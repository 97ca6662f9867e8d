//! Descriptors, one file a kind.
//!
//! ```text
//!   dump                                            restore
//!   /proc/PID/fd ─ live.rs ─> Live                  files.img ─ opener.rs ─> every open file, in this process
//!        │ share.rs: seen before? (kcmp)                 │ the kinds below make them
//!        ▼                                               ▼
//!   the first of KINDS that says `is`               install.rs: SCM_RIGHTS, dup3 into each task
//!        │                                               ▼
//!        ▼                                          finish.rs: epoll targets, owners, terminals
//!   FileEntry, FdinfoEntry, contents
//! ```
//!
//! A kind is a file here and a line in `KINDS`. Its file holds the record it uses, how a live one is read, what it
//! refuses, how it is made again, and its tests. Two descriptors with one open file description get one entry, in one
//! process or in several.

pub mod address;
mod bpfmap;
mod changed;
mod check;
mod device;
mod diag;
mod dump;
mod epoll;
mod eventfd;
mod external;
mod fanotify;
mod fdinfo;
mod fifo;
mod finish;
mod ghost;
mod inet;
mod inotify;
mod inside;
mod install;
mod late;
mod live;
mod locks;
mod memfd;
mod moves;
mod mqueue;
mod multicast;
mod netlink;
mod opener;
mod options;
mod owner;
mod packet;
mod pidfd;
pub mod pipe;
mod registry;
mod regular;
mod share;
mod signalfd;
mod sockopts;
mod space;
mod tcp;
mod timerfd;
mod tty;
mod tun;
pub mod unix;
pub mod uring;
mod watched;

pub use changed::record as record_times;
pub use check::check;
pub use dump::{before, dump};
pub use fanotify::EXTENSION as FILESYSTEM_MARKS;
pub use opener::Files;
pub use options::transparent_sockets;
pub use registry::Registry;
pub use regular::register_path;
pub use tcp::{
    abandon_connections, accept, heal_network, lock_network, lock_restored, lock_table, unlock_network,
    unlock_restored,
};
pub use tty::EXTENSION as EXEC_TERMINALS;
pub use tun::complete as complete_tunnels;

use std::cell::RefCell;
use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::checkpoint::Result;
use crate::checkpoint::context::{Dump, Options, Source};
use crate::checkpoint::image::FdTypes;
use live::{Live, Pids};
use opener::Opener;

/// A kind of open file.
struct Kind {
    /// What it is called in messages.
    name: &'static str,
    /// Its number in the images.
    r#type: FdTypes,
    /// Is this one?
    is: fn(&Live) -> bool,
    /// Refuses one that could not be put back; looks only.
    check: fn(&Live, &Surroundings<'_>) -> Result<()>,
    /// Records one under this id.
    dump: fn(&mut Dump<'_>, &Live, u32) -> Result<()>,
    /// Makes all of the images' in this process.
    open: fn(&mut Opener<'_, '_>) -> Result<()>,
}

/// The container that a descriptor is looked at in.
struct Surroundings<'a> {
    /// What was asked of the dump.
    options: &'a Options,
    /// Its root directory; that of the mount namespace that the file was opened in.
    root: &'a OwnedFd,
    /// It is the container's own, and not a mount namespace that the container has made.
    own: bool,
    /// The container.
    source: Option<&'a Source>,
    /// Its first process, as a pid of this host.
    init: i32,
    /// What its processes are called inside.
    pids: &'a Pids,
    /// Files that have been found by their names: nobody inside can change that while the container stands still, and what
    /// changes during an earlier look is seen then.
    named: Option<&'a Named>,
}

/// Files by device, inode, mount and name.
type Named = RefCell<HashSet<(u64, u64, i32, PathBuf)>>;

impl<'a> Surroundings<'a> {
    /// This machine in the place of a container, its processes being called `pids`.
    #[cfg(test)]
    fn here(root: &'a OwnedFd, pids: &'a Pids) -> Self {
        static OPTIONS: std::sync::LazyLock<Options> = std::sync::LazyLock::new(Options::default);
        let init = std::process::id().cast_signed();
        Self { options: &OPTIONS, root, own: true, source: None, init, pids, named: None }
    }

    /// Those of a dump under way, for a file that was opened through a mount.
    fn of(dump: &'a Dump<'_>, mount: i32) -> Result<Self> {
        let nested = dump.files.trees.iter().find(|tree| tree.has(mount));
        Ok(Self {
            options: dump.options,
            root: match nested {
                Some(tree) => &tree.root,
                None => dump.files.root()?,
            },
            own: nested.is_none(),
            source: Some(dump.source),
            init: dump.source.init,
            pids: &dump.files.pids,
            named: Some(&dump.files.named),
        })
    }
}

/// Nothing to refuse.
fn fine(_: &Live, _: &Surroundings<'_>) -> Result<()> {
    Ok(())
}

/// The kinds, in the order in which a descriptor is asked, and in which files are made.
#[rustfmt::skip]
const KINDS: &[Kind] = &[
    Kind { name: "pipe", r#type: FdTypes::Pipe, is: pipe::is, check: fine, dump: pipe::dump, open: pipe::open },
    Kind { name: "memfd", r#type: FdTypes::Memfd, is: memfd::is, check: fine, dump: memfd::dump, open: memfd::open },
    Kind { name: "namespace", r#type: FdTypes::Ns, is: space::is, check: space::check, dump: space::dump, open: space::open },
    Kind { name: "fifo", r#type: FdTypes::Fifo, is: fifo::is, check: regular::check, dump: fifo::dump, open: fifo::open },
    Kind { name: "terminal", r#type: FdTypes::Tty, is: tty::is, check: |l, a| tty::later(l, a.root), dump: tty::dump, open: tty::open },
    Kind { name: "message queue", r#type: FdTypes::Reg, is: mqueue::is, check: mqueue::check, dump: mqueue::dump, open: |_| Ok(()) },
    Kind { name: "tun", r#type: FdTypes::Tunf, is: tun::is, check: tun::check, dump: tun::dump, open: tun::open },
    Kind { name: "file", r#type: FdTypes::Reg, is: regular::is, check: regular::check, dump: regular::dump, open: opener::open_regular },
    Kind { name: "eventfd", r#type: FdTypes::Eventfd, is: eventfd::is, check: fine, dump: eventfd::dump, open: eventfd::open },
    Kind { name: "timerfd", r#type: FdTypes::Timerfd, is: timerfd::is, check: fine, dump: timerfd::dump, open: timerfd::open },
    Kind { name: "signalfd", r#type: FdTypes::Signalfd, is: signalfd::is, check: fine, dump: signalfd::dump, open: signalfd::open },
    Kind { name: "epoll", r#type: FdTypes::Eventpoll, is: epoll::is, check: fine, dump: epoll::dump, open: epoll::open },
    Kind { name: "inotify", r#type: FdTypes::Inotify, is: inotify::is, check: fine, dump: inotify::dump, open: inotify::open },
    Kind { name: "fanotify", r#type: FdTypes::Fanotify, is: fanotify::is, check: fanotify::check, dump: fanotify::dump, open: fanotify::open },
    Kind { name: "BPF map", r#type: FdTypes::Bpfmap, is: bpfmap::is, check: |l, _| bpfmap::check(l), dump: bpfmap::dump, open: bpfmap::open },
    Kind { name: "pidfd", r#type: FdTypes::Pidfd, is: pidfd::is, check: pidfd::check, dump: pidfd::dump, open: pidfd::open },
    Kind { name: "IP socket", r#type: FdTypes::Inetsk, is: inet::is, check: |l, a| inet::check(l, a.options), dump: inet::dump, open: inet::open },
    Kind { name: "packet socket", r#type: FdTypes::Packetsk, is: packet::is, check: |l, a| packet::check(l, a.init), dump: packet::dump, open: packet::open },
    Kind { name: "netlink socket", r#type: FdTypes::Netlinksk, is: netlink::is, check: |l, _| netlink::check(l), dump: netlink::dump, open: netlink::open },
    Kind { name: "unix socket", r#type: FdTypes::Unixsk, is: unix::is, check: |l, a| unix::later(l, a.root), dump: unix::dump, open: unix::open },
    Kind { name: "io_uring", r#type: FdTypes::Ext, is: uring::is, check: uring::check, dump: uring::dump, open: uring::open },
    Kind { name: "external", r#type: FdTypes::Ext, is: |_| false, check: fine, dump: external::dump, open: external::open },
];
