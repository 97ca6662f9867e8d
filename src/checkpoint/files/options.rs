//! Options of IP sockets that CRIU's record has no place for, kept in the extension `inet`.
//!
//! ```text
//!   a socket of the container  ─┐
//!                               ├─ what differs ──> extension: (level, option, value)
//!   a new one of the same kind ─┘
//! ```
//!
//! CRIU restores without it, less exactly. So are the multicast groups that a socket has joined.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use libc::{SOL_IP, SOL_IPV6, SOL_SOCKET, SOL_TCP, SOL_UDP};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::inet::{Key, raw};
use crate::checkpoint::files::inside;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::multicast::{self, Membership};
use crate::checkpoint::files::sockopts;
use crate::checkpoint::model::Model;
use crate::checkpoint::{Error, Result};
use crate::sys::socket::socket;
use crate::sys::sockopt::{get_bytes, get_int, query, set_bytes, set_int};

/// What a TCP connection has come to by itself, or would be made otherwise by.
#[rustfmt::skip]
const NOT_OF_CONNECTIONS: &[(i32, &[i32])] = &[
    // MAXSEG, WINDOW_CLAMP, FASTOPEN, FASTOPEN_CONNECT
    (SOL_TCP, &[2, 10, 23, 30]),
    // MULTICAST_TTL; MULTICAST_IF, MULTICAST_HOPS
    (SOL_IP, &[33]), (SOL_IPV6, &[17, 18]),
];

const SOL_RAW: i32 = 255;
const SOL_UDPLITE: i32 = libc::IPPROTO_UDPLITE;

/// Name of the extension in stasis.img.
pub const EXTENSION: &str = "inet";

/// Options that are a number and can be set to what they are read as, by the kernel's names in the order of its headers.
#[rustfmt::skip]
const OPTIONS: &[(i32, &[i32])] = &[
    // TIMESTAMP, TIMESTAMPNS, RXQ_OVFL, PEEK_OFF, SELECT_ERR_QUEUE, BUSY_POLL, ZEROCOPY, PREFER_BUSY_POLL
    (SOL_SOCKET, &[29, 35, 40, 42, 45, 46, 60, 69]),
    // MAXSEG, SYNCNT, LINGER2, DEFER_ACCEPT, WINDOW_CLAMP, THIN_LINEAR_TIMEOUTS, USER_TIMEOUT, FASTOPEN, NOTSENT_LOWAT,
    // SAVE_SYN, FASTOPEN_CONNECT, FASTOPEN_NO_COOKIE, INQ, TX_DELAY
    (SOL_TCP, &[2, 7, 8, 9, 10, 16, 18, 23, 25, 27, 30, 34, 36, 37]),
    // CORK, ENCAP, NO_CHECK6_TX, NO_CHECK6_RX, SEGMENT, GRO
    (SOL_UDP, &[1, 100, 101, 102, 103, 104]),
    // SEND_CSCOV, RECV_CSCOV
    (SOL_UDPLITE, &[10, 11]),
    // TOS and TTL (of IPv6 sockets, which speak IPv4 too), RECVOPTS, RETOPTS, MTU_DISCOVER, RECVERR, RECVTTL, RECVTOS,
    // PASSSEC, TRANSPARENT, RECVORIGDSTADDR, MINTTL, CHECKSUM, BIND_ADDRESS_NO_PORT, RECVFRAGSIZE, RECVERR_RFC4884,
    // MULTICAST_IF, MULTICAST_TTL, MULTICAST_LOOP, MULTICAST_ALL, UNICAST_IF, LOCAL_PORT_RANGE
    (SOL_IP, &[1, 2, 6, 7, 10, 11, 12, 13, 18, 19, 20, 21, 23, 24, 25, 26, 32, 33, 34, 49, 50, 51]),
    // CHECKSUM, of IPv6
    (SOL_RAW, &[7]),
    // UNICAST_HOPS, MULTICAST_IF, MULTICAST_HOPS, MULTICAST_LOOP, MTU_DISCOVER, RECVERR, MULTICAST_ALL,
    // RECVERR_RFC4884, FLOWINFO_SEND, RECVHOPLIMIT, RECVHOPOPTS, RECVRTHDR, RECVDSTOPTS, DONTFRAG, RECVTCLASS, TCLASS,
    // AUTOFLOWLABEL, ADDR_PREFERENCES, MINHOPCOUNT, RECVORIGDSTADDR, TRANSPARENT, UNICAST_IF, RECVFRAGSIZE
    (SOL_IPV6, &[16, 17, 18, 19, 23, 25, 29, 31, 33, 51, 53, 56, 58, 62, 66, 67, 70, 72, 73, 74, 75, 76, 77]),
];

/// Options of several bytes: IP_OPTIONS; IPV6_HOPOPTS, IPV6_RTHDRDSTOPTS, IPV6_RTHDR, IPV6_DSTOPTS.
const BYTES: [(i32, i32); 5] = [(SOL_IP, 4), (SOL_IPV6, 54), (SOL_IPV6, 55), (SOL_IPV6, 57), (SOL_IPV6, 59)];
/// More than the longest of them.
const BYTES_MAX: usize = 2048;

/// What is known of a socket beside its record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct More {
    /// The socket.
    pub id: u32,
    /// Level, option, value.
    pub options: Vec<(i32, i32, i32)>,
    /// TCP_CONGESTION.
    pub congestion: Option<String>,
    /// Multicast groups.
    pub groups: Vec<Membership>,
    /// SO_LOCK_FILTER.
    pub locked: bool,
    /// Level, option, bytes.
    pub bytes: Vec<(i32, i32, Vec<u8>)>,
    /// IP_ROUTER_ALERT.
    pub router_alert: bool,
    /// TCP-MD5.
    pub keys: Vec<Key>,
}

/// What a socket's options are. None for those that it does not have.
pub type Values = Vec<((i32, i32), Option<i32>)>;

/// Reads all options of a socket.
fn values(fd: &OwnedFd) -> Values {
    let all = OPTIONS.iter().flat_map(|(level, names)| names.iter().map(move |name| (*level, *name)));
    all.map(|(level, name)| ((level, name), get_int(fd, level, name).ok())).collect()
}

/// Options of several bytes that have any.
fn bytes(fd: &OwnedFd) -> Vec<(i32, i32, Vec<u8>)> {
    let read = |(level, name)| {
        let mut value = vec![0; BYTES_MAX];
        let length = query(fd, level, name, &mut value).ok().filter(|length| *length > 0)?;
        value.truncate(length);
        Some((level, name, value))
    };
    BYTES.into_iter().filter_map(read).collect()
}

/// The name of the algorithm that watches a connection's congestion.
fn congestion(fd: &OwnedFd) -> Option<String> {
    let (bytes, length) = get_bytes::<16>(fd, SOL_TCP, libc::TCP_CONGESTION).ok()?;
    let name: Vec<u8> = bytes.into_iter().take(length).take_while(|b| *b != 0).collect();
    String::from_utf8(name).ok()
}

/// Records what a new socket of the container, of this family, type and protocol, does not have set.
pub fn dump(
    dump: &mut Dump<'_>,
    key: [i32; 3],
    connected: bool,
    keys: Vec<Key>,
    live: &Live,
    id: u32,
) -> Result<()> {
    if !dump.files.fresh.contains_key(&key) {
        let [family, kind, protocol] = key;
        let fresh = inside::in_network(dump.source.init, || {
            let fd = socket(family, kind, protocol)
                .during("cannot make a socket", || format!("socket({family}, {kind}, {protocol})"))?;
            Ok((values(&fd), congestion(&fd)))
        })?;
        dump.files.fresh.insert(key, fresh);
    }
    let (init, (_, inhabitant)) = (dump.source.init, dump.spaces.of_socket(dump.source.init, &live.file)?);
    let mut inner = Vec::new();
    let groups = if inhabitant == init {
        dump.files.groups.get_or_insert_with(|| multicast::groups(init))
    } else {
        inner.extend(multicast::groups(inhabitant));
        &mut inner
    };
    let groups = multicast::of(&live.file, key[0] == libc::AF_INET6, groups)?;
    if let Some(fresh) = dump.files.fresh.get(&key) {
        let locked = sockopts::is_locked(&live.file);
        let router_alert = raw::has_router_alert(&live.file, key[0], key[1]).map_err(|e| live.name(e))?;
        let different = different(&live.file, id, fresh);
        let mut more = More { groups, keys, locked, router_alert, ..different };
        if connected {
            let not = |level, name| {
                NOT_OF_CONNECTIONS.iter().any(|(l, names)| *l == level && names.contains(&name))
            };
            more.options.retain(|&(level, name, _)| !not(level, name));
        }
        dump.files.inet.extend((more != More { id, ..More::default() }).then_some(more));
    }
    Ok(())
}

/// What differs from a new socket, whose options are `fresh`.
fn different(fd: &OwnedFd, id: u32, fresh: &(Values, Option<String>)) -> More {
    let bytes = bytes(fd);
    // They shorten the segments of a TCP socket that has no connection yet, as if somebody had set their size.
    let by_itself = |option| !bytes.is_empty() && option == (SOL_TCP, libc::TCP_MAXSEG);
    let options = values(fd)
        .into_iter()
        .zip(&fresh.0)
        .filter(|(own, fresh)| own.1 != fresh.1 && !by_itself(own.0))
        .filter_map(|(((level, name), value), _)| Some((level, name, value?)))
        .collect();
    let congestion = congestion(fd).filter(|c| Some(c) != fresh.1.as_ref());
    More { id, options, congestion, bytes, ..More::default() }
}

/// Sets them, on a socket that has no address yet. Only options of the table are.
pub fn restore(fd: &OwnedFd, more: &More) -> Result<()> {
    let what = "cannot set a socket's option";
    for &(level, name, value) in &more.options {
        if !OPTIONS.iter().any(|(l, names)| *l == level && names.contains(&name)) {
            return Err(Error::new(format!("the images set option {name} of level {level} of a socket")));
        }
        set_int(fd, level, name, value)
            .during(what, || format!("setsockopt(_, {level}, {name}, {value})"))?;
    }
    for (level, name, value) in &more.bytes {
        if !BYTES.contains(&(*level, *name)) {
            return Err(Error::new(format!("the images set option {name} of level {level} of a socket")));
        }
        set_bytes(fd, *level, *name, value)
            .during(what, || format!("setsockopt(_, {level}, {name}, {} bytes)", value.len()))?;
    }
    if more.router_alert {
        set_int(fd, SOL_IP, raw::IP_ROUTER_ALERT, 1)
            .during(what, || "setsockopt(_, SOL_IP, IP_ROUTER_ALERT, 1)".into())?;
    }
    if let Some(name) = &more.congestion {
        set_bytes(fd, SOL_TCP, libc::TCP_CONGESTION, name.as_bytes())
            .during(what, || format!("setsockopt(_, SOL_TCP, TCP_CONGESTION, {name:?})"))
            .map_err(|e| e.remedy("this kernel must have the algorithm, and allow it"))?;
    }
    multicast::join(fd, &more.groups)
}

/// Was it shut down for reading? What poll(2) tells; a shutdown for writing only it does not.
pub fn is_shut(fd: &OwnedFd) -> bool {
    let wanted = PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut asked = [PollFd::new(std::os::fd::AsFd::as_fd(fd), wanted)];
    let told = poll(&mut asked, PollTimeout::ZERO).is_ok_and(|n| n > 0);
    // What nix has no name for is POLLRDHUP.
    told && asked[0].revents().is_none_or(|r| r.contains(PollFlags::POLLHUP))
}

/// Is there nothing to receive any more? A TCP socket that never was connected hangs up all the same, but does not tell
/// of an end.
pub fn has_ended(fd: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(std::os::fd::AsFd::as_fd(fd), PollFlags::from_bits_retain(libc::POLLRDHUP))];
    // What nix has no name for is POLLRDHUP.
    poll(&mut asked, PollTimeout::ZERO).is_ok_and(|n| n > 0) && asked[0].revents().is_none()
}

/// The sockets of these images that may have addresses of others: IP_TRANSPARENT, IPV6_TRANSPARENT.
pub fn transparent_sockets(model: &Model) -> Result<BTreeSet<u32>> {
    let set = |more: &&More| {
        let named = |o: &(i32, i32, i32)| matches!((o.0, o.1), (SOL_IP, 19) | (SOL_IPV6, 75)) && o.2 != 0;
        more.options.iter().any(named)
    };
    Ok(read(model)?.values().filter(set).map(|more| more.id).collect())
}

/// The extension of these images, by id.
pub fn read(model: &Model) -> Result<BTreeMap<u32, More>> {
    let all: Vec<More> = model.extension(EXTENSION)?;
    Ok(all.into_iter().map(|more| (more.id, more)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_is_set_again_and_nothing_else() {
        let kinds = [(libc::AF_INET, libc::SOCK_STREAM), (libc::AF_INET6, libc::SOCK_DGRAM)];
        for (family, kind) in kinds {
            let Ok(fd) = socket(family, kind, 0) else { continue };
            let new = || socket(family, kind, 0).unwrap();
            let fresh = (values(&new()), congestion(&new()));
            assert_eq!(different(&fd, 1, &fresh), More { id: 1, ..More::default() });
            set_int(&fd, SOL_IP, libc::IP_RECVTTL, 1).unwrap();
            set_int(&fd, SOL_IP, libc::IP_MTU_DISCOVER, 3).unwrap();
            // Record the route, of one address.
            set_bytes(&fd, SOL_IP, 4, &[7, 7, 4, 0, 0, 0, 0, 0]).unwrap();
            let more = different(&fd, 7, &fresh);
            assert_eq!((more.options.len(), more.bytes.len()), (2, 1));
            let again = new();
            restore(&again, &more).unwrap();
            assert_eq!(different(&again, 7, &fresh), more);
        }
    }

    #[test]
    fn only_known_options_are_set() {
        let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap();
        let more = More { options: vec![(SOL_SOCKET, libc::SO_ATTACH_BPF, 3)], ..More::default() };
        assert!(restore(&fd, &more).unwrap_err().to_string().contains("images set option"));
    }
}
