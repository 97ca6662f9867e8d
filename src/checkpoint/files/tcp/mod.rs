//! TCP connections that a container takes with it.
//!
//! ```text
//!   dump                                                     restore
//!   lock.rs      drop the packets of these connections        lock.rs      the same, before the network is attached
//!   capture.rs   repair on, numbers, queues, repair off       make.rs      repair on, numbers, queues, ends
//!      ... everything else of the dump ...                       ... everything else of the restore ...
//!   stop:   repair on, kill: the socket goes silently         unlock, repair off: the peer is asked for its window
//!   leave:  unlock                                               │
//!                                                                └─ the peer has seen a pause
//! ```
//!
//! A socket is in repair mode only while it is read: a program that went on with one in it, because Stasis was killed,
//! would be refused to read and write. The container is frozen meanwhile, so that it does not go on before the next
//! command has undone that. From then on the lock alone keeps the state as it was read. What a killed dump leaves (the
//! lock, one socket in repair mode, the freeze) is in the recovery record.
//!
//! A connection of two sockets in the container needs nothing of its own: both ends are read behind the lock, and what
//! was on its way is sent again.
//!
//! Not kept: data beyond a gap in what was received (the peer sends it again), the window clamp and user-set MSS of a
//! connection, statistics, keys of TCP-MD5 and TCP-AO. Refused: urgent data not read yet, a ULP such as kernel TLS.

mod capture;
pub mod lock;
pub mod make;
mod nftables;
mod repair;
mod segment;
pub mod state;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};

use crate::checkpoint::context::{Dump, NetworkLock, Options};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::address;
use crate::checkpoint::files::inet::{self, Seen};
use crate::checkpoint::files::live::{Live, descriptors};
use crate::checkpoint::files::opener::Files;
use crate::checkpoint::model::{Model, TcpStream};
use crate::checkpoint::recovery::{Network, Record};
use crate::checkpoint::{Error, Freezer, Result};
use crate::sys::pidfd;
use crate::sys::sockopt::get_bytes;
use lock::Lock;

/// What inventory.img calls nftables.
const METHOD_NFTABLES: u32 = 1;
const METHOD_SKIP: u32 = 2;

/// The connections of a dump under way.
#[derive(Debug, Default)]
pub struct Held {
    lock: Option<Lock>,
    id: Option<String>,
    /// What was read, by inode.
    read: BTreeMap<u64, (u32, TcpStream)>,
    /// Those that were read.
    sockets: Vec<OwnedFd>,
}

/// Refuses what of a connection cannot be read.
pub fn check(fd: &OwnedFd) -> Result<()> {
    let (name, length) = get_bytes::<16>(fd, libc::SOL_TCP, libc::TCP_ULP).unwrap_or(([0; 16], 0));
    let name: Vec<u8> = name.into_iter().take(length).take_while(|b| *b != 0).collect();
    if !name.is_empty() {
        let name = String::from_utf8_lossy(&name).into_owned();
        return Err(Error::new(format!(
            "a TCP connection has the kernel speak {name}, which cannot be checkpointed"
        ))
        .remedy("have the program do that itself, or have connections closed with --tcp-close"));
    }
    let mut asked = [PollFd::new(fd.as_fd(), PollFlags::POLLPRI)];
    if poll(&mut asked, PollTimeout::ZERO).is_ok_and(|n| n > 0)
        && asked[0].revents().is_some_and(|r| r.contains(PollFlags::POLLPRI))
    {
        return Err(Error::new(
            "a TCP connection has urgent data that was not read, which cannot be checkpointed",
        )
        .remedy("try again when it is read")
        .passing());
    }
    Ok(())
}

/// Whether connections are kept, rather than refused or closed.
fn keeps(options: &Options) -> bool {
    options.tcp_established && !options.tcp_close
}

/// Locks the network for all connections of the container, which stands still.
pub fn lock_network(dump: &mut Dump<'_>, record: &mut Record, freezer: &mut dyn Freezer) -> Result<()> {
    if !keeps(dump.options) {
        return Ok(());
    }
    let (mut ways, mut reuse, mut sockets) = (Vec::new(), Vec::new(), BTreeMap::new());
    for task in dump.tasks.iter().filter(|t| !t.zombie) {
        for fd in descriptors(task.pid).map_err(|e| e.pid(task.vpid))? {
            let Some((file, seen)) = connection(task.pid, task.pidfd.as_fd(), fd) else { continue };
            ways.extend(seen.connection());
            let stat =
                nix::sys::stat::fstat(&file).during("cannot stat the descriptor", || "fstat(_)".into())?;
            reuse.push((stat.st_ino, repair::reuse(&file)?));
            sockets.insert(stat.st_ino, (file, task.vpid, fd));
        }
    }
    let id = lock::new_id()?;
    let pid = dump.source.init;
    record.network(Network { id: id.clone(), pid, reuse })?;
    dump.files.tcp.id = Some(id.clone());
    if dump.options.network_lock == NetworkLock::Nftables {
        dump.files.tcp.lock.insert(Lock::new(id, pid)).add(&ways)?;
    }
    if sockets.is_empty() {
        return Ok(());
    }
    freezer.freeze()?;
    let read = sockets.into_iter().try_for_each(|(inode, (file, vpid, fd))| {
        let named = |e: Error| e.pid(vpid).fd(fd);
        check(&file).map_err(named)?;
        dump.files.tcp.read.insert(inode, capture::capture(&file).map_err(named)?);
        dump.files.tcp.sockets.push(file);
        Ok(())
    });
    freezer.thaw().and(read)
}

/// The connection behind a descriptor, if it is one.
fn connection(pid: i32, handle: std::os::fd::BorrowedFd<'_>, fd: i32) -> Option<(OwnedFd, Seen)> {
    let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    link.to_str().filter(|l| l.starts_with("socket:["))?;
    let file = pidfd::getfd(handle, fd).ok()?;
    let seen = inet::see(&file).ok()?;
    seen.connection().is_some().then_some((file, seen))
}

/// Records a connection. The state it is in; None if it is not to be kept.
pub fn dump(dump: &mut Dump<'_>, live: &Live, ends: (SocketAddr, SocketAddr)) -> Result<Option<u32>> {
    if !keeps(dump.options) {
        return Ok(None);
    }
    let (state, stream) = match dump.files.tcp.read.remove(&live.stat.st_ino) {
        Some(read) => read,
        // One that is on its way in a unix socket.
        None => {
            check(&live.file)?;
            if let Some(lock) = &mut dump.files.tcp.lock {
                lock.add(&[ends])?;
            }
            let file = live
                .file
                .try_clone()
                .during("cannot hold a TCP connection", || "fcntl(_, F_DUPFD_CLOEXEC, 0)".into())?;
            dump.files.tcp.sockets.push(file);
            capture::capture(&live.file)?
        }
    };
    dump.model.tcp_streams.insert(live.stat.st_ino as u32, stream);
    Ok(Some(state))
}

/// Tells in the inventory what was done.
pub fn describe(dump: &mut Dump<'_>) {
    let inventory = &mut dump.model.inventory;
    if dump.options.tcp_close {
        inventory.tcp_close = Some(true);
    }
    if let Some(id) = &dump.files.tcp.id {
        inventory.dump_criu_run_id = Some(id.clone());
        inventory.network_lock_method = Some(match dump.options.network_lock {
            NetworkLock::Nftables => METHOD_NFTABLES,
            NetworkLock::Skip => METHOD_SKIP,
        });
    }
}

/// The table of nftables that the network lock of this dump is.
pub fn lock_table(dump: &Dump<'_>) -> Option<String> {
    dump.files.tcp.id.as_deref().map(lock::table)
}

/// Unlocks the network: the container goes on. Nothing where it is not locked.
pub fn unlock_network(dump: &mut Dump<'_>) -> Result<()> {
    dump.files.tcp.sockets.clear();
    dump.files.tcp.lock.take().map_or(Ok(()), Lock::remove)
}

/// Has the connections end without a word when they are closed, which they are by whoever drops this.
#[must_use]
pub fn abandon_connections(dump: &mut Dump<'_>) -> Vec<OwnedFd> {
    let sockets = std::mem::take(&mut dump.files.tcp.sockets);
    // The lock holds what they might say otherwise.
    sockets.into_iter().inspect(|fd| _ = repair::on(fd)).collect()
}

/// Undoes what a killed dump has done to the network: `pids` are the processes of the container.
pub fn heal_network(network: &Network, pids: &[i32]) -> Result<()> {
    for &pid in pids {
        let Ok(handle) = pidfd::open(pid, 0) else { continue };
        for fd in descriptors(pid).unwrap_or_default() {
            let Some((file, _)) = connection(pid, handle.as_fd(), fd) else { continue };
            if !repair::is_on(&file) {
                continue;
            }
            repair::off(&file)?;
            let inode = nix::sys::stat::fstat(&file).map_or(0, |stat| stat.st_ino);
            if let Some((_, reuse)) = network.reuse.iter().find(|(ino, _)| *ino == inode) {
                repair::set_reuse(&file, *reuse)?;
            }
        }
    }
    lock::remove(&network.id, network.pid)
}

/// A socket whose connection is not kept: it reads as ended.
pub fn close(fd: &OwnedFd) -> Result<()> {
    use std::os::fd::AsRawFd;
    match shutdown(fd.as_raw_fd(), Shutdown::Both) {
        Ok(()) | Err(nix::errno::Errno::ENOTCONN) => Ok(()),
        Err(errno) => Err(Error::new("cannot close a TCP connection").call("shutdown(_, SHUT_RDWR)", errno)),
    }
}

/// The connections of the images, as ways of their packets in both directions.
fn ways(model: &Model) -> Vec<nftables::Way> {
    let sockets = model.files.iter().filter_map(|f| f.isk.as_ref());
    sockets
        .filter(|e| model.tcp_streams.contains_key(&e.ino))
        .filter_map(|e| {
            let local = address::from_words(&e.src_addr, e.src_port, 0)?;
            Some((local, address::from_words(&e.dst_addr, e.dst_port, 0)?))
        })
        .flat_map(|(a, b)| [(a, b), (b, a)])
        .collect()
}

/// Refuses images with connections that the caller has not asked for.
pub fn accept(model: &Model, options: &Options) -> Result<()> {
    let count = model.tcp_streams.len();
    if options.tcp_close {
        return Ok(());
    }
    if model.inventory.tcp_close == Some(true) {
        return Err(
            Error::new("the checkpoint was made with --tcp-close").remedy("restore it with --tcp-close")
        );
    }
    if count > 0 && !options.tcp_established {
        let noun = if count == 1 { "connection" } else { "connections" };
        return Err(Error::new(format!("the images hold {count} TCP {noun}"))
            .remedy("restore with --tcp-established, or have connections closed with --tcp-close"));
    }
    lock::id_of(model).map(drop)
}

/// The lock's name where the images have none.
const NAMELESS: &str = "restore";

/// Locks the network namespace of a new container's first process, before anything is attached to it. Says whether it
/// was not locked before.
pub fn lock_restored(model: &Model, options: &Options, pid: i32) -> Result<bool> {
    if options.tcp_close || model.tcp_streams.is_empty() || options.network_lock == NetworkLock::Skip {
        return Ok(false);
    }
    lock::set(lock::id_of(model)?.unwrap_or(NAMELESS), pid, &ways(model))
}

/// Unlocks it again.
pub fn unlock_restored(model: &Model, pid: i32) -> Result<()> {
    if model.tcp_streams.is_empty() {
        return Ok(());
    }
    lock::remove(lock::id_of(model)?.unwrap_or(NAMELESS), pid)
}

impl Files<'_> {
    /// Lets the connections go on: the last thing before the processes do.
    pub fn resume_connections(&self) -> Result<()> {
        unlock_restored(self.restore.model, self.restore.target.init)?;
        for (id, reuse) in &self.connections {
            if let Some(fd) = self.opened.get(id) {
                repair::finish(fd, *reuse)?;
            }
        }
        Ok(())
    }
}
