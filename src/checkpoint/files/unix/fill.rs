//! Sending what waited once more.
//!
//! ```text
//!   connections        the other end sends, or the far end that is closed afterwards
//!   datagram pairs     the other end
//!   other datagrams    the socket that had sent it, if the images have it: a receiver sees its address
//!                      else one like it, which takes its address and goes
//! ```

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, UnixCredentials, sendmsg};

use super::make::{Made, like};
use super::more::{Credentials, Sender};
use super::names::Names;
use super::place::named;
use super::plan::Sockets;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::sockopts;
use crate::checkpoint::image::{SkPacketEntry, UnixSkEntry};
use crate::checkpoint::{Error, Result};

const WHAT: &str = "cannot fill a socket's queue";

/// Fills all queues. `files` are the open files of other kinds.
pub fn fill(
    queues: &[(SkPacketEntry, Vec<u8>)],
    sockets: &Sockets<'_>,
    made: &Made,
    files: &BTreeMap<u32, OwnedFd>,
    names: &mut Names<'_>,
) -> Result<()> {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    let mut lenders = BTreeMap::new();
    for (packet, bytes) in queues {
        let Some(e) = sockets.by_id.get(&packet.id_for) else {
            return Err(Error::new(format!("the images hold a packet for socket {}", packet.id_for)));
        };
        let rights = packet.scm.iter().flat_map(|scm| &scm.rights).map(|id| {
            let file = made.fds.get(id).or_else(|| files.get(id));
            file.map(AsRawFd::as_raw_fd)
                .ok_or_else(|| Error::new(format!("the images lack file {id}, which is on its way")))
        });
        let rights: Vec<RawFd> = rights.collect::<Result<_>>()?;
        let count = counts.entry(e.id).or_default();
        let senders = sockets.more(e.id).map_or(&[][..], |more| &more.senders);
        let sender = senders.get(*count).cloned().unwrap_or_default();
        *count += 1;
        send(e, bytes, &rights, &sender, sockets, made, names, &mut lenders)
            .map_err(|err| named(err, &e.name))?;
    }
    Ok(())
}

/// Sends one packet to a socket.
#[allow(clippy::too_many_arguments)]
fn send(
    e: &UnixSkEntry,
    bytes: &[u8],
    rights: &[RawFd],
    sender: &Sender,
    sockets: &Sockets<'_>,
    made: &Made,
    names: &mut Names<'_>,
    lenders: &mut BTreeMap<Vec<u8>, OwnedFd>,
) -> Result<()> {
    let other = made.far.get(&e.id).or_else(|| {
        let peer = sockets.peer(e).filter(|peer| peer.peer == e.ino && !made.reach.contains_key(&e.id))?;
        made.fds.get(&peer.id)
    });
    if let Some(other) = other {
        return transmit(other, None, bytes, rights, sender.credentials);
    }
    if e.r#type.cast_signed() != libc::SOCK_DGRAM {
        return Err(Error::new("the images hold data for a unix socket that is not connected"));
    }
    let from = match author(e, sender, sockets).and_then(|id| made.fds.get(&id)) {
        Some(from) => from,
        None => match lenders.entry(sender.address.clone()) {
            std::collections::btree_map::Entry::Occupied(there) => there.into_mut(),
            std::collections::btree_map::Entry::Vacant(free) => {
                let lender = like(e)?;
                if !sender.address.is_empty() {
                    names.bind_unseen(&lender, &sender.address)?;
                }
                free.insert(lender)
            }
        },
    };
    let address = names.address(made.reach(e.id)?)?;
    transmit(from, Some(&address), bytes, rights, sender.credentials)
}

/// The socket of the images that must have sent a datagram to this one.
fn author(e: &UnixSkEntry, sender: &Sender, sockets: &Sockets<'_>) -> Option<u32> {
    let alike = |s: &&&UnixSkEntry| s.r#type == e.r#type && s.uflags == 0 && s.name == sender.address;
    let connected = sockets.all.iter().filter(alike).find(|s| s.peer == e.ino);
    let found = connected.or_else(|| sockets.all.iter().filter(alike).find(|s| !s.name.is_empty()));
    found.map(|s| s.id)
}

/// Puts one packet into a queue, through a socket that is connected to it or to its address.
fn transmit(
    from: &OwnedFd,
    to: Option<&[u8]>,
    bytes: &[u8],
    rights: &[RawFd],
    credentials: Option<Credentials>,
) -> Result<()> {
    let call = || format!("sendmsg(_, {} bytes, {} descriptors)", bytes.len(), rights.len());
    // The pid must be somebody's: ours, which is nobody's inside.
    let credentials = credentials.map(|c| {
        let pid = std::process::id().cast_signed();
        UnixCredentials::from(libc::ucred { pid, uid: c.uid, gid: c.gid })
    });
    let mut control = Vec::new();
    if !rights.is_empty() {
        control.push(ControlMessage::ScmRights(rights));
    }
    if let Some(credentials) = &credentials {
        control.push(ControlMessage::ScmCredentials(credentials));
    }
    let to = match to.map(|name| (name.split_first(), name)) {
        Some((Some((0, name)), _)) => Some(UnixAddr::new_abstract(name)),
        Some((_, path)) => Some(UnixAddr::new(super::place::path(path))),
        None => None,
    };
    let to = to.transpose().during(WHAT, call)?;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sockopts::open_buffers(from)?;
    let sent = sendmsg(from.as_raw_fd(), &[IoSlice::new(bytes)], &control, flags, to.as_ref());
    let sent = sent.during(WHAT, call).map_err(|e| match e.errno() {
        Some(Errno::EAGAIN) => e.remedy("the queue is longer than net.unix.max_dgram_qlen allows here"),
        _ => e,
    })?;
    if sent == bytes.len() { Ok(()) } else { Err(Error::new(WHAT).call(call(), Errno::ENOBUFS)) }
}
