//! Making the unix sockets of the images again.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{Backlog, Shutdown, SockFlag, accept4, listen, shutdown};

use super::{ESTABLISHED, LISTEN, queue};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{external, inside, sockopts};
use crate::checkpoint::image::{FdTypes, SkShutdown, UnixSkEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::{socket, sockopt};

const WHAT: &str = "cannot make a unix socket";

type Sockets = BTreeMap<u32, OwnedFd>;

/// Makes all sockets, in the container's network namespace and root, and fills their queues.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let entries: Vec<&UnixSkEntry> = opener.of(FdTypes::Unixsk).filter_map(|e| e.usk.as_ref()).collect();
    if entries.is_empty() {
        return Ok(());
    }
    let by_inode: BTreeMap<u32, &UnixSkEntry> = entries.iter().map(|e| (e.ino, *e)).collect();
    for e in &entries {
        if e.uflags != 0 || (e.peer != 0 && !by_inode.contains_key(&e.peer)) {
            return Err(named(
                Error::new("the images hold a unix socket with a peer outside the container"),
                e,
            )
            .remedy("take the checkpoint without it"));
        }
    }
    let (made, far) = inside::inside(opener.restore.target, || {
        let mut made = Sockets::new();
        let mut far = Sockets::new();
        for e in &entries {
            connected(e, &by_inode, &mut made, &mut far).map_err(|err| named(err, e))?;
        }
        for e in &entries {
            bound(e, &mut made).map_err(|err| named(err, e))?;
        }
        for e in &entries {
            directed(e, &by_inode, &made).map_err(|err| named(err, e))?;
        }
        Ok((made, far))
    })?;
    fill(opener, &entries, &made, &far)?;
    drop(far);
    for e in entries {
        let Some(fd) = made.get(&e.id) else { continue };
        finish(e, fd).map_err(|err| named(err, e))?;
    }
    let mut made = made;
    for e in opener.of(FdTypes::Unixsk).filter_map(|e| e.usk.as_ref()) {
        if let Some(fd) = made.remove(&e.id) {
            opener.put_owned(e.id, fd, &e.fown, e.flags);
        }
    }
    Ok(())
}

/// The name goes where a file's path would.
fn named(error: Error, e: &UnixSkEntry) -> Error {
    match e.name.split(|b| *b == 0).find(|part| !part.is_empty()) {
        Some(name) => error.path(String::from_utf8_lossy(name).as_ref()),
        None => error,
    }
}

/// An address for bind(2) and connect(2).
fn address(name: &[u8]) -> Vec<u8> {
    let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(name);
    bytes
}

fn is_path(name: &[u8]) -> bool {
    name.first().is_some_and(|b| *b != 0)
}

/// Both ends of a connection, or one whose other end is gone.
fn connected(
    e: &UnixSkEntry,
    by_inode: &BTreeMap<u32, &UnixSkEntry>,
    made: &mut Sockets,
    far: &mut Sockets,
) -> Result<()> {
    let kind = e.r#type.cast_signed();
    if made.contains_key(&e.id) || e.state != ESTABLISHED {
        return Ok(());
    }
    let pair = || socket::unix_pair(kind).during(WHAT, || format!("socketpair(AF_UNIX, {kind}, 0)"));
    let peer = by_inode.get(&e.peer).filter(|p| p.peer == e.ino);
    let Some(peer) = peer else {
        if kind == libc::SOCK_DGRAM && e.peer != 0 {
            // Connected one way, to a name.
            return Ok(());
        }
        let (near, other) = pair()?;
        made.insert(e.id, near);
        far.insert(e.id, other);
        return Ok(());
    };
    if kind == libc::SOCK_DGRAM || (e.name.is_empty() && peer.name.is_empty()) {
        let (a, b) = pair()?;
        made.insert(e.id, a);
        made.insert(peer.id, b);
        return Ok(());
    }
    // The accepted end has the name of its listener, which it can get in no other way.
    let (accepted, client) = if e.name.is_empty() { (peer, &e) } else { (&e, peer) };
    let listener = make_socket(kind)?;
    bind(&listener, accepted)?;
    listen(&listener, Backlog::new(1).unwrap_or(Backlog::MAXCONN)).during(WHAT, || "listen(_, 1)".into())?;
    let dialler = make_socket(kind)?;
    sockopt::connect(&dialler, &address(&accepted.name))
        .during(WHAT, || format!("connect(_, {:?})", String::from_utf8_lossy(&accepted.name)))?;
    let taken = accept4(&listener, SockFlag::SOCK_CLOEXEC).during(WHAT, || "accept(_)".into())?;
    made.insert(accepted.id, taken);
    made.insert(client.id, dialler);
    remove(accepted)
}

fn make_socket(kind: i32) -> Result<OwnedFd> {
    socket::socket(libc::AF_UNIX, kind, 0).during(WHAT, || format!("socket(AF_UNIX, {kind}, 0)"))
}

/// Everything that is bound in its own right: listeners, datagrams, and clients that bound themselves.
fn bound(e: &UnixSkEntry, made: &mut Sockets) -> Result<()> {
    let fd = match made.get(&e.id) {
        Some(fd) => fd,
        None => made.entry(e.id).or_insert(make_socket(e.r#type.cast_signed())?),
    };
    let has = sockopt::name(fd).is_ok_and(|n| n.len() > 2);
    if !e.name.is_empty() && !has {
        bind(fd, e)?;
        if e.deleted == Some(true) {
            remove(e)?;
        } else if let (true, Some(perms)) = (is_path(&e.name), &e.file_perms) {
            let path = path(e);
            let owner = (Some(perms.uid.into()), Some(perms.gid.into()));
            nix::unistd::chown(path.as_path(), owner.0, owner.1)
                .during(WHAT, || format!("chown({path:?}, {}, {})", perms.uid, perms.gid))?;
            let mode = nix::sys::stat::Mode::from_bits_truncate(perms.mode & 0o7777);
            let at = nix::fcntl::AT_FDCWD;
            nix::sys::stat::fchmodat(at, path.as_path(), mode, nix::sys::stat::FchmodatFlags::FollowSymlink)
                .during(WHAT, || format!("chmod({path:?}, {mode:?})"))?;
        }
    }
    if e.state == LISTEN {
        let backlog = i32::try_from(e.backlog).unwrap_or(i32::MAX);
        let backlog = Backlog::new(backlog).unwrap_or(Backlog::MAXCONN);
        listen(fd, backlog).during(WHAT, || format!("listen(_, {})", e.backlog))?;
    }
    Ok(())
}

/// The path as the thread that works inside can use it.
fn path(e: &UnixSkEntry) -> std::path::PathBuf {
    let text = e.name.split(|b| *b == 0).next().unwrap_or_default();
    let path = Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(text));
    Path::new(e.name_dir.as_deref().unwrap_or("/")).join(path)
}

fn bind(fd: &OwnedFd, e: &UnixSkEntry) -> Result<()> {
    if is_path(&e.name) {
        let dir = e.name_dir.as_deref().unwrap_or("/");
        nix::unistd::chdir(dir).during(WHAT, || format!("chdir({dir:?})"))?;
        // Its file outlived the checkpointed process.
        remove(e)?;
    }
    let text = String::from_utf8_lossy(&e.name).into_owned();
    sockopt::bind(fd, &address(&e.name)).during(WHAT, || format!("bind(_, {text:?})")).map_err(
        |err| match err.errno() {
            Some(Errno::EADDRINUSE) => err.remedy("another program uses this name; stop it first"),
            Some(Errno::ENOENT) => err.remedy("the new root file system needs its directory"),
            _ => err,
        },
    )
}

/// Removes the file of a socket, and nothing but a socket.
fn remove(e: &UnixSkEntry) -> Result<()> {
    if !is_path(&e.name) {
        return Ok(());
    }
    let path = path(e);
    match std::fs::symlink_metadata(&path) {
        Ok(meta) if std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
            std::fs::remove_file(&path).during(WHAT, || format!("unlink({path:?})"))
        }
        _ => Ok(()),
    }
}

/// Datagram sockets that send to one of a name.
fn directed(e: &UnixSkEntry, by_inode: &BTreeMap<u32, &UnixSkEntry>, made: &Sockets) -> Result<()> {
    let (Some(peer), Some(fd)) = (by_inode.get(&e.peer), made.get(&e.id)) else { return Ok(()) };
    if e.r#type.cast_signed() != libc::SOCK_DGRAM || peer.peer == e.ino {
        return Ok(());
    }
    if peer.name.is_empty() {
        return Err(Error::new("a datagram socket is connected to one without a name"));
    }
    if let Some(dir) = &peer.name_dir {
        nix::unistd::chdir(dir.as_str()).during(WHAT, || format!("chdir({dir:?})"))?;
    }
    sockopt::connect(fd, &address(&peer.name))
        .during(WHAT, || format!("connect(_, {:?})", String::from_utf8_lossy(&peer.name)))
}

/// Sends what waited, from whoever is at the other end.
fn fill(opener: &Opener<'_, '_>, entries: &[&UnixSkEntry], made: &Sockets, far: &Sockets) -> Result<()> {
    let by_id: BTreeMap<u32, &UnixSkEntry> = entries.iter().map(|e| (e.id, *e)).collect();
    let by_inode: BTreeMap<u32, u32> = entries.iter().map(|e| (e.ino, e.id)).collect();
    for (packet, bytes) in &opener.restore.model.sk_queues {
        let Some(e) = by_id.get(&packet.id_for) else {
            return Err(Error::new(format!("the images hold a packet for socket {}", packet.id_for)));
        };
        let mut rights: Vec<RawFd> = Vec::new();
        for id in packet.scm.iter().flat_map(|scm| &scm.rights) {
            let file = made.get(id).or_else(|| opener.files.opened.get(id));
            let file =
                file.ok_or_else(|| Error::new(format!("the images lack file {id}, which is on its way")))?;
            rights.push(file.as_raw_fd());
        }
        let lender;
        let from = match by_inode.get(&e.peer).and_then(|id| made.get(id)).or_else(|| far.get(&e.id)) {
            Some(from) => from,
            None => {
                lender = passing(e, made)?;
                &lender
            }
        };
        queue::fill(from, bytes, &rights).map_err(|err| named(err, e))?;
    }
    Ok(())
}

/// A sender for an unconnected datagram socket, whose real senders are not connected to it.
fn passing(e: &UnixSkEntry, made: &Sockets) -> Result<OwnedFd> {
    let sender = make_socket(e.r#type.cast_signed())?;
    let to = made.get(&e.id).ok_or_else(|| Error::new(WHAT))?;
    // By the descriptor: its path means nothing outside the container.
    let address = if is_path(&e.name) {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", to.as_fd().as_raw_fd()));
        return Err(named(
            Error::new(format!(
                "datagrams wait in a unix socket whose sender is not connected to it ({})",
                link.unwrap_or_default().display()
            )),
            e,
        )
        .remedy("take the checkpoint when the program has received them"));
    } else {
        address(&e.name)
    };
    sockopt::connect(&sender, &address).during(WHAT, || "connect(_)".into())?;
    Ok(sender)
}

/// What comes last: shut down directions, options, flags.
fn finish(e: &UnixSkEntry, fd: &OwnedFd) -> Result<()> {
    let how = match e.shutdown.and_then(|s| SkShutdown::try_from(s).ok()) {
        Some(SkShutdown::Read) => Some(Shutdown::Read),
        Some(SkShutdown::Write) => Some(Shutdown::Write),
        Some(SkShutdown::Both) => Some(Shutdown::Both),
        _ => None,
    };
    if let Some(how) = how {
        match shutdown(fd.as_raw_fd(), how) {
            // It was shut down from the other side, and that is gone.
            Ok(()) | Err(Errno::ENOTCONN) => {}
            Err(errno) => return Err(Error::new(WHAT).call(format!("shutdown(_, {how:?})"), errno)),
        }
    }
    sockopts::restore(fd, &e.opts, libc::AF_UNIX)?;
    external::set_flags(fd, e.flags)
}
