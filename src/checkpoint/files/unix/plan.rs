//! What is to be made, in which order, worked out before anything is.
//!
//! ```text
//!   what it is                               step
//!   two ends without names, datagram pairs   Pair       socketpair(2)
//!   one end, the other is gone               Orphan     the same; the far end is closed at last
//!   two ends, one accepted from a listener   Accepted   a passing listener of that name; connect(2), accept(2)
//!   anything else; a pair's names            Bound      socket(2), bind(2), listen(2), as far as it has these
//!   a connection that waits                  Knock      connect(2)
//!   (queues are filled)
//!   datagrams to a name                      Direct     connect(2): a connected socket takes no other's datagrams
//!   datagrams out of the container           Leave      connect(2) to the name in the container's root
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::more::More;
use super::place::{is_path, named};
use super::{ESTABLISHED, LISTEN, USK_EXTERN};
use crate::checkpoint::image::UnixSkEntry;
use crate::checkpoint::{Error, Result};

/// One step. Numbers are ids of sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Two ends at once.
    Pair(u32, u32),
    /// An end without another.
    Orphan(u32),
    /// An end that a listener accepted, and the one that connected, if it is still there.
    Accepted(u32, Option<u32>),
    /// A socket of its own, or the name of one that was made before.
    Bound(u32),
    /// A client at a listener.
    Knock(u32, u32),
    /// A datagram socket at another one.
    Direct(u32, u32),
    /// A datagram socket at one that stayed outside.
    Leave(u32, u32),
}

impl Step {
    /// The socket that it is about, or the first of them.
    pub fn id(self) -> u32 {
        match self {
            Self::Pair(id, _)
            | Self::Orphan(id)
            | Self::Accepted(id, _)
            | Self::Bound(id)
            | Self::Knock(id, _)
            | Self::Direct(id, _)
            | Self::Leave(id, _) => id,
        }
    }
}

/// The sockets of the images.
pub struct Sockets<'a> {
    /// In the images' order.
    pub all: Vec<&'a UnixSkEntry>,
    /// By id.
    pub by_id: BTreeMap<u32, &'a UnixSkEntry>,
    /// By inode.
    pub by_inode: BTreeMap<u32, &'a UnixSkEntry>,
    /// What else is known of them.
    pub more: BTreeMap<u32, More>,
}

impl<'a> Sockets<'a> {
    /// Refuses what can't be one.
    pub fn new(all: Vec<&'a UnixSkEntry>, more: BTreeMap<u32, More>) -> Result<Self> {
        let by_id = all.iter().map(|e| (e.id, *e)).collect();
        let mut by_inode = BTreeMap::new();
        for e in &all {
            let refuse =
                |what: &str| Err(named(Error::new(format!("the images hold a unix socket {what}")), &e.name));
            if by_inode.insert(e.ino, *e).is_some() {
                return refuse("whose inode another one has");
            }
            if !matches!(e.r#type.cast_signed(), libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_SEQPACKET)
            {
                return refuse(&format!("of type {}", e.r#type));
            }
            // sun_path, and a nul byte behind it.
            if e.name.len() > 109 {
                return refuse("with a name that is too long");
            }
            if e.uflags & !USK_EXTERN != 0 {
                return refuse(&format!("that only CRIU can make (flags {:#x})", e.uflags));
            }
        }
        Ok(Self { all, by_id, by_inode, more })
    }

    /// The other end, as the images have it.
    pub fn peer(&self, e: &UnixSkEntry) -> Option<&'a UnixSkEntry> {
        self.by_inode.get(&e.peer).copied().filter(|_| e.peer != 0)
    }

    /// What else is known of a socket.
    pub fn more(&self, id: u32) -> Option<&More> {
        self.more.get(&id)
    }
}

fn datagram(e: &UnixSkEntry) -> bool {
    e.r#type.cast_signed() == libc::SOCK_DGRAM
}

/// The steps before queues are filled, and those after.
pub fn plan(sockets: &Sockets<'_>, external: bool) -> Result<(Vec<Step>, Vec<Step>)> {
    let (mut first, mut bound, mut knocks, mut last) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut done = BTreeSet::new();
    let listening: BTreeSet<&[u8]> =
        sockets.all.iter().filter(|e| e.state == LISTEN).map(|e| e.name.as_slice()).collect();
    for &e in &sockets.all {
        if e.uflags & USK_EXTERN != 0 || done.contains(&e.id) {
            continue;
        }
        let peer = sockets.peer(e);
        if e.peer != 0 && peer.is_none() {
            return Err(
                Error::new("the images lack the peer of a unix socket").path(format!("socket {}", e.peer))
            );
        }
        let Some(peer) = peer else {
            match (e.state, datagram(e), e.name.is_empty()) {
                (ESTABLISHED, false, false) => first.push(Step::Accepted(e.id, None)),
                // The kernel calls datagram sockets established that others are connected to, which takes a name.
                (ESTABLISHED, true, false) if !sockets.more(e.id).is_some_and(|more| more.orphan) => {
                    bound.push(Step::Bound(e.id));
                }
                (ESTABLISHED, ..) => {
                    first.push(Step::Orphan(e.id));
                    bound.push(Step::Bound(e.id));
                }
                _ => bound.push(Step::Bound(e.id)),
            }
            continue;
        };
        let mutual = peer.peer == e.ino;
        if peer.r#type != e.r#type {
            return Err(named(Error::new("the images connect unix sockets of two types"), &e.name));
        }
        if peer.uflags & USK_EXTERN != 0 {
            leave(e, peer, external)?;
            bound.push(Step::Bound(e.id));
            last.push(Step::Leave(e.id, peer.id));
        } else if datagram(e) {
            let named_both = !e.name.is_empty() && !peer.name.is_empty();
            if mutual && e.id != peer.id && !named_both {
                first.push(Step::Pair(e.id, peer.id));
                bound.extend([Step::Bound(e.id), Step::Bound(peer.id)]);
                done.insert(peer.id);
            } else if peer.name.is_empty() {
                return Err(Error::new("the images connect a datagram socket to one without a name"));
            } else {
                bound.push(Step::Bound(e.id));
                last.push(Step::Direct(e.id, peer.id));
            }
        } else if peer.state == LISTEN {
            bound.push(Step::Bound(e.id));
            knocks.push((e, peer));
        } else if mutual && e.id != peer.id {
            done.insert(peer.id);
            first.push(both_ends(e, peer, &listening));
        } else {
            return Err(named(
                Error::new("the images connect a unix socket to one that is not connected to it"),
                &e.name,
            ));
        }
    }
    // Renamed files make room for those that took their names.
    bound.sort_by_key(|step| match step {
        Step::Bound(id) => sockets.more(*id).is_none_or(|more| more.file.is_none()),
        _ => true,
    });
    // In the order in which they came; without the extension, as they stand in the images.
    knocks.sort_by_key(|(client, listener)| {
        let order = sockets.more(listener.id).map_or(&[][..], |more| &more.waiting);
        (listener.id, order.iter().position(|inode| *inode == client.ino))
    });
    first.extend(bound);
    first.extend(knocks.into_iter().map(|(client, listener)| Step::Knock(client.id, listener.id)));
    Ok((first, last))
}

/// A connection: which end was accepted? It has its listener's name, and can get it in no other way.
fn both_ends(e: &UnixSkEntry, peer: &UnixSkEntry, listening: &BTreeSet<&[u8]>) -> Step {
    match (e.name.is_empty(), peer.name.is_empty()) {
        (true, true) => Step::Pair(e.id, peer.id),
        (false, true) => Step::Accepted(e.id, Some(peer.id)),
        (true, false) => Step::Accepted(peer.id, Some(e.id)),
        // A client that was bound. Where no listener is left, the two can't be told apart from within, either.
        (false, false) if listening.contains(peer.name.as_slice()) => Step::Accepted(peer.id, Some(e.id)),
        (false, false) => Step::Accepted(e.id, Some(peer.id)),
    }
}

fn leave(e: &UnixSkEntry, peer: &UnixSkEntry, external: bool) -> Result<()> {
    let refuse = |what: &str| Err(named(Error::new(what.to_owned()), &peer.name));
    if !external {
        return refuse("a unix socket is to be connected to one outside the container")
            .map_err(|e| e.remedy("use --ext-unix-sk to allow that"));
    }
    if !datagram(e) || peer.name.is_empty() || (is_path(&peer.name) && peer.name.first() != Some(&b'/')) {
        return refuse("a unix socket's peer outside the container cannot be found again");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: i32 = libc::SOCK_STREAM;
    const DGRAM: i32 = libc::SOCK_DGRAM;

    /// Its inode is 100 + its id.
    fn socket(id: u32, kind: i32, state: u32, peer: u32, name: &[u8]) -> UnixSkEntry {
        let peer = if peer == 0 { 0 } else { 100 + peer };
        let r#type = kind.cast_unsigned();
        UnixSkEntry { id, ino: 100 + id, r#type, state, peer, name: name.to_vec(), ..UnixSkEntry::default() }
    }

    fn steps(all: &[UnixSkEntry], more: Vec<More>) -> Result<(Vec<Step>, Vec<Step>)> {
        let more = more.into_iter().map(|m| (m.id, m)).collect();
        plan(&Sockets::new(all.iter().collect(), more)?, false)
    }

    #[test]
    fn pairs_and_orphans() {
        let all =
            [socket(1, STREAM, 1, 2, b""), socket(2, STREAM, 1, 1, b""), socket(3, DGRAM, 1, 0, b"\0l")];
        let (first, last) = steps(&all, vec![]).unwrap();
        assert_eq!(first, [Step::Pair(1, 2), Step::Bound(3)]);
        assert_eq!(last, []);
        let more = More { id: 3, orphan: true, ..More::default() };
        let (first, _) = steps(&all, vec![more]).unwrap();
        assert_eq!(first, [Step::Pair(1, 2), Step::Orphan(3), Step::Bound(3)]);
        // CRIU's images don't tell; but nobody can have connected to one without a name.
        let (first, _) = steps(&[socket(3, DGRAM, 1, 0, b"")], vec![]).unwrap();
        assert_eq!(first, [Step::Orphan(3), Step::Bound(3)]);
    }

    #[test]
    fn the_accepted_end_has_the_listeners_name() {
        let all = [
            socket(1, STREAM, 1, 2, b"client\0"),
            socket(2, STREAM, 1, 1, b"server\0"),
            socket(3, STREAM, 10, 0, b"server\0"),
            socket(4, STREAM, 1, 0, b"server\0"),
        ];
        let (first, _) = steps(&all, vec![]).unwrap();
        assert_eq!(first, [Step::Accepted(2, Some(1)), Step::Accepted(4, None), Step::Bound(3)]);
    }

    #[test]
    fn who_waits_keeps_the_order() {
        let all =
            [socket(1, STREAM, 1, 3, b""), socket(2, STREAM, 1, 3, b""), socket(3, STREAM, 10, 0, b"\0l")];
        let more = More { id: 3, waiting: vec![102, 101], ..More::default() };
        let (first, _) = steps(&all, vec![more]).unwrap();
        let made = [Step::Bound(1), Step::Bound(2), Step::Bound(3)];
        assert_eq!(first, [&made[..], &[Step::Knock(2, 3), Step::Knock(1, 3)]].concat());
    }

    #[test]
    fn datagrams_are_directed_at_last() {
        let all = [
            socket(1, DGRAM, 1, 2, b""),
            socket(2, DGRAM, 7, 0, b"/s\0"),
            socket(3, DGRAM, 1, 3, b"\0self"),
            socket(4, DGRAM, 1, 5, b"\0a"),
            socket(5, DGRAM, 1, 4, b"\0b"),
        ];
        let (first, last) = steps(&all, vec![]).unwrap();
        assert_eq!(first, (1..=5).map(Step::Bound).collect::<Vec<_>>());
        assert_eq!(last, [Step::Direct(1, 2), Step::Direct(3, 3), Step::Direct(4, 5), Step::Direct(5, 4)]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let refused = |all: &[UnixSkEntry], why: &str| {
            let e = steps(all, vec![]).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
        };
        refused(&[socket(1, STREAM, 1, 9, b"")], "lack the peer");
        refused(&[socket(1, STREAM, 1, 2, b""), socket(2, DGRAM, 1, 1, b"")], "two types");
        refused(&[socket(1, STREAM, 1, 1, b"")], "not connected to it");
        refused(&[socket(1, DGRAM, 1, 2, b""), socket(2, DGRAM, 7, 0, b"")], "without a name");
        refused(&[socket(1, 7, 1, 0, b"")], "of type 7");
        refused(&[socket(1, STREAM, 1, 0, &[1; 200])], "too long");
        let twin = UnixSkEntry { ino: 101, ..socket(2, STREAM, 1, 0, b"") };
        refused(&[socket(1, STREAM, 1, 0, b""), twin], "another one has");
        let outside = UnixSkEntry { uflags: USK_EXTERN, ..socket(2, DGRAM, 10, 0, b"/dev/log\0") };
        refused(&[socket(1, DGRAM, 1, 2, b""), outside], "--ext-unix-sk");
    }
}
