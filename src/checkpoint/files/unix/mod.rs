//! Unix sockets: stream, datagram and sequenced packets.
//!
//! ```text
//!   what it is                    how it is made again                                        (make.rs)
//!   listening                     socket, bind, listen
//!   one of a connected pair       socketpair; with the name of a listener that accepted it:
//!                                 a passing listener of that name, connect, accept
//!   connected, the peer is gone   socketpair, the far end closed once its queue is filled
//!   datagrams, one way            socket, bind, connect to the name
//!   unconnected                   socket, bind
//! ```
//!
//! A path belongs to the container's root (or, when it is relative, to the directory that `name_dir` says). The peer's
//! credentials (SO_PEERCRED) become those of the restore: root, and a pid that the container doesn't see.

mod make;
mod queue;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub use make::open;

use crate::checkpoint::context::{Dump, Options};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::diag::{Diag, UnixSocket};
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::{inet, sockopts};
use crate::checkpoint::image::{FdTypes, FileEntry, FilePermsEntry, SkShutdown, UnixSkEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::resolve;
use crate::sys::sockopt::{self, get_int};

/// States, as the kernel and the images number them.
const ESTABLISHED: u32 = 1;
const LISTEN: u32 = 10;

/// A unix socket.
pub fn is(live: &Live) -> bool {
    inet::family(live) == Some(libc::AF_UNIX)
}

/// The inode that names a socket, as sock_diag and the images have it.
pub fn inode(live: &Live) -> u32 {
    live.stat.st_ino as u32
}

/// Refuses what can't be put back: connections that wait or lead out. `known` are the container's own sockets.
pub fn check(live: &Live, diag: &Diag, known: &BTreeSet<u32>, options: &Options) -> Result<()> {
    let Some(seen) = diag.unix.get(&inode(live)) else {
        return Err(live
            .name(Error::new("a unix socket belongs to another network namespace than the container's"))
            .remedy("let the program close it, or stop it"));
    };
    supported(seen, known, options).map_err(|e| live.name(e))?;
    placed(live, seen).map(drop).map_err(|e| live.name(e))
}

fn supported(seen: &UnixSocket, known: &BTreeSet<u32>, options: &Options) -> Result<()> {
    if !seen.waiting.is_empty() {
        return Err(Error::new(format!(
            "{} connections to a unix socket have not been accepted",
            seen.waiting.len()
        ))
        .remedy("try again once the program has accepted them"));
    }
    if seen.peer != 0 && !known.contains(&seen.peer) {
        let e = Error::new(format!(
            "a unix socket is connected to a peer outside the container (socket:[{}])",
            seen.peer
        ));
        return Err(if options.ext_unix_sk {
            e.remedy("such a connection cannot be kept yet, even with --ext-unix-sk; close it first")
        } else {
            e.remedy("close it first")
        });
    }
    Ok(())
}

/// Where a socket is bound.
struct Place {
    /// As bind(2) takes it: a path that ends in a nul byte, or a nul byte and an abstract name.
    name: Vec<u8>,
    /// Directory that a relative path counts from.
    dir: Option<PathBuf>,
    /// Mode and owner of its file; none when that has been removed.
    perms: Option<FilePermsEntry>,
    /// The file has been removed.
    deleted: bool,
}

/// Looks up the file of a bound socket.
fn placed(live: &Live, seen: &UnixSocket) -> Result<Place> {
    let what = "cannot read a socket's name";
    let bytes = sockopt::name(&live.file).during(what, || "getsockname(_, _, _)".into())?;
    let name = bytes.get(2..).unwrap_or_default().to_vec();
    let mut place = Place { name, dir: None, perms: None, deleted: false };
    let Some((ino, _)) = seen.file else { return Ok(place) };
    let text = place.name.split(|b| *b == 0).next().unwrap_or_default();
    let path = Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(text));
    let root_path = format!("/proc/{}/root", live.pid);
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_DIRECTORY;
    let root = nix::fcntl::open(root_path.as_str(), flags, nix::sys::stat::Mode::empty())
        .during(what, || format!("open({root_path:?}, O_PATH)"))?;
    let full = if path.is_absolute() {
        path.to_owned()
    } else {
        let link = format!("/proc/{}/cwd", live.pid);
        let dir = std::fs::read_link(&link).during(what, || format!("readlink({link:?})"))?;
        let full = dir.join(path);
        place.dir = Some(dir);
        full
    };
    let name = full.to_str().ok_or_else(|| Error::new("a socket's path is not valid UTF-8"))?;
    // The device sock_diag gives has another encoding; the inode alone tells a file that took the name since.
    match resolve::open_in_root(&root, name, nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_NOFOLLOW) {
        Ok(node) => {
            let stat = std::fs::File::from(node).metadata().during(what, || format!("fstat({name:?})"))?;
            if stat.ino() as u32 == ino {
                place.perms = Some(FilePermsEntry { mode: stat.mode(), uid: stat.uid(), gid: stat.gid() });
            } else {
                place.deleted = true;
            }
        }
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => place.deleted = true,
        Err(errno) => return Err(Error::new(what).call(format!("openat2(root, {name:?})"), errno)),
    }
    if place.deleted && place.dir.is_some() {
        return Err(Error::new(format!(
            "a socket is bound to the relative path {path:?}, which is not in its working directory any more"
        ))
        .remedy("let the program bind it to an absolute path"));
    }
    Ok(place)
}

/// Records a socket and what waits in its queue.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let diag = match dump.files.diag.take() {
        Some(diag) => diag,
        None => Diag::read(dump.source.init)?,
    };
    let seen = diag.unix.get(&inode(live)).cloned();
    dump.files.diag = Some(diag);
    let seen = seen.ok_or_else(|| Error::new("a unix socket is not in the container's network namespace"))?;
    if !seen.waiting.is_empty() {
        return Err(Error::new("a connection came to a unix socket just now").remedy("try again"));
    }
    let what = "cannot look at a socket";
    let kind = get_int(&live.file, libc::SOL_SOCKET, libc::SO_TYPE)
        .during(what, || "getsockopt(_, SOL_SOCKET, SO_TYPE, _, _)".into())?;
    let place = placed(live, &seen)?;
    queue::dump(dump, live, id, kind)?;
    let shutdown = match seen.shutdown & 3 {
        1 => Some(SkShutdown::Read),
        2 => Some(SkShutdown::Write),
        3 => Some(SkShutdown::Both),
        _ => None,
    };
    let entry = UnixSkEntry {
        id,
        ino: inode(live),
        r#type: kind.cast_unsigned(),
        state: seen.state,
        flags: live.info.flags,
        uflags: 0,
        backlog: if seen.state == LISTEN { seen.backlog } else { 0 },
        peer: seen.peer,
        fown: live.fown(&dump.files.pids)?,
        opts: sockopts::dump(&live.file, libc::AF_UNIX)?,
        name: place.name,
        shutdown: shutdown.map(|s| s as i32),
        file_perms: place.perms,
        name_dir: place.dir.map(|d| d.to_string_lossy().into_owned()),
        deleted: place.deleted.then_some(true),
        ns_id: dump.model.ids.values().find_map(|ids| ids.net_ns_id),
        mnt_id: None,
    };
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Unixsk as i32,
        id,
        usk: Some(entry),
        ..FileEntry::default()
    });
    Ok(())
}

/// Nothing to look at without the other sockets: [`check`] does.
pub fn later(_: &Live, _: &OwnedFd) -> Result<()> {
    Ok(())
}
