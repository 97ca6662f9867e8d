//! TCP, UDP, ping (ICMP) and raw sockets, over IPv4 and IPv6.
//!
//! ```text
//!   TCP        listening               bound again, with its backlog
//!              closed, maybe bound     made, bound
//!              any other state         a connection: files/tcp
//!   the others unconnected, connected  bound, connected; what waits in the queue is lost, as it may be on the wire
//! ```
//!
//! What a socket is, it tells itself: getsockopt(2), getsockname(2), TCP_INFO.

use std::collections::btree_map::Entry;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use nix::errno::Errno;

mod make;
mod md5;
pub(in crate::checkpoint::files) mod raw;
mod shut;

pub use make::open;
pub use md5::{Key, Keys};
pub use shut::Shut;

use crate::checkpoint::context::{Dump, Options};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::tcp::state;
use crate::checkpoint::files::{address, inside, options, sockopts, tcp};
use crate::checkpoint::image::{FdTypes, FileEntry, InetSkEntry, IpOptsEntry, SkShutdown, TcpOptsEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{self, get_bytes, get_int};

use crate::checkpoint::files::tcp::state::{CLOSE, ESTABLISHED, LISTEN};

const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;
const UDPLITE: i32 = libc::IPPROTO_UDPLITE;
const ICMP: i32 = libc::IPPROTO_ICMP;
const ICMPV6: i32 = libc::IPPROTO_ICMPV6;
const IPV6_FREEBIND: i32 = 78;
/// The peer's address, of a socket that is not connected yet too.
const SO_PEERNAME: i32 = 28;

/// SO_DOMAIN, where it is a socket.
pub fn family(live: &Live) -> Option<i32> {
    if live.format() != libc::S_IFSOCK {
        return None;
    }
    get_int(&live.file, libc::SOL_SOCKET, libc::SO_DOMAIN).ok()
}

/// A socket of the internet families.
pub fn is(live: &Live) -> bool {
    matches!(family(live), Some(libc::AF_INET | libc::AF_INET6))
}

/// A TCP connection.
pub fn is_connection(live: &Live) -> bool {
    is(live) && see(&live.file).is_ok_and(|seen| seen.connection().is_some())
}

/// TCP, and no raw socket that sees its packets.
fn is_tcp(kind: i32, protocol: i32) -> bool {
    kind == libc::SOCK_STREAM && protocol == TCP
}

/// What has to be known of a socket before anything else.
pub struct Seen {
    family: i32,
    kind: i32,
    protocol: i32,
    state: u32,
    backlog: u32,
    /// Connections that have not been accepted.
    waiting: u32,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
}

impl Seen {
    /// The two ends of a TCP connection.
    pub fn connection(&self) -> Option<(SocketAddr, SocketAddr)> {
        let is = is_tcp(self.kind, self.protocol) && state::is_connection(self.state);
        self.local.zip(self.remote).filter(|_| is)
    }
}

/// Looks at an IP socket.
pub fn see(fd: &OwnedFd) -> Result<Seen> {
    let what = "cannot look at a socket";
    let option = |name| {
        get_int(fd, libc::SOL_SOCKET, name)
            .during(what, || format!("getsockopt(_, SOL_SOCKET, {name}, _, _)"))
    };
    let (family, kind, protocol) =
        (option(libc::SO_DOMAIN)?, option(libc::SO_TYPE)?, option(libc::SO_PROTOCOL)?);
    let local = sockopt::name(fd).during(what, || "getsockname(_, _, _)".into())?;
    let remote = match sockopt::peer(fd) {
        Ok(bytes) => address::parse(&bytes),
        Err(Errno::ENOTCONN) => None,
        Err(errno) => return Err(Error::new(what).call("getpeername(_, _, _)", errno)),
    };
    let local = address::parse(&local).filter(|a| a.port() != 0 || !a.ip().is_unspecified());
    let mut seen = Seen { family, kind, protocol, state: CLOSE, backlog: 0, waiting: 0, local, remote };
    if is_tcp(kind, protocol) {
        let (info, _) = get_bytes::<32>(fd, libc::SOL_TCP, libc::TCP_INFO)
            .during(what, || "getsockopt(_, SOL_TCP, TCP_INFO, _, _)".into())?;
        let word = |at: usize| info.iter().skip(at).take(4).rev().fold(0u32, |n, b| n << 8 | u32::from(*b));
        seen.state = u32::from(info[0]);
        if seen.state == LISTEN {
            (seen.waiting, seen.backlog) = (word(24), word(28));
        }
        if seen.state == state::SYN_SENT {
            // The kernel wants room for exactly this family's address.
            let call = || "getsockopt(_, SOL_SOCKET, SO_PEERNAME, _, _)".to_owned();
            let peer = match family {
                libc::AF_INET6 => get_bytes::<28>(fd, libc::SOL_SOCKET, SO_PEERNAME).map(|p| p.0.to_vec()),
                _ => get_bytes::<16>(fd, libc::SOL_SOCKET, SO_PEERNAME).map(|p| p.0.to_vec()),
            };
            let peer = peer.during(what, call)?;
            seen.remote = address::parse(&peer);
        }
    } else if seen.remote.is_some() {
        seen.state = ESTABLISHED;
    }
    Ok(seen)
}

/// Refuses connections that are not to be kept, and sockets of other protocols.
pub fn check(live: &Live, options: &Options) -> Result<()> {
    let seen = see(&live.file)?;
    let fine = supported(&seen, options)
        .and_then(|()| raw::holds_nothing(&live.file, &seen))
        .and_then(|()| raw::routes_nothing(live.pid, &seen));
    let keep = options.tcp_established && !options.tcp_close && seen.connection().is_some();
    fine.and_then(|()| sockopts::filter(&live.file).map(drop))
        .and_then(|()| check_tcp(&live.file, &seen))
        .and_then(|()| if keep { tcp::check(&live.file) } else { Ok(()) })
        .map_err(|e| live.name(e))
}

fn supported(seen: &Seen, options: &Options) -> Result<()> {
    let end = |a: &Option<SocketAddr>| a.map_or_else(|| "?".into(), |a| a.to_string());
    match (seen.kind, seen.protocol, seen.state) {
        (libc::SOCK_STREAM, TCP, LISTEN) if seen.waiting > 0 && !options.tcp_skip_in_flight => {
            let what = match seen.waiting {
                1 => "a TCP connection to {} has not been accepted".to_owned(),
                n => format!("{n} TCP connections to {{}} have not been accepted"),
            };
            Err(Error::new(what.replace("{}", &end(&seen.local))).remedy(
                "such connections cannot be kept: try again when they are accepted, or drop them with --tcp-skip-in-flight",
            )
            .passing())
        }
        (libc::SOCK_STREAM, TCP, CLOSE | LISTEN)
        | (libc::SOCK_DGRAM, UDP | UDPLITE | ICMP | ICMPV6, _)
        | (libc::SOCK_RAW, ..) => Ok(()),
        (libc::SOCK_STREAM, TCP, state)
            if state::is_connection(state) && (options.tcp_established || options.tcp_close) =>
        {
            Ok(())
        }
        (libc::SOCK_STREAM, TCP, state) if state::is_connection(state) => Err(Error::new(format!(
            "there is a TCP connection from {} to {}",
            end(&seen.local),
            end(&seen.remote)
        ))
        .remedy("keep it with --tcp-established, or have it closed with --tcp-close")),
        (libc::SOCK_STREAM, TCP, state) => Err(Error::new(format!(
            "a TCP connection from {} to {} is in state {state}, in which it cannot be checkpointed",
            end(&seen.local),
            end(&seen.remote)
        ))
        .remedy("try again")
        .passing()),
        (kind, protocol, _) => Err(Error::new(format!(
            "an IP socket of type {kind} and protocol {protocol} cannot be checkpointed"
        ))
        .remedy("only TCP, UDP, ICMP and raw sockets are supported; let the program close it, or stop it")),
    }
}

/// Records a socket.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let mut seen = see(&live.file)?;
    supported(&seen, dump.options)?;
    raw::holds_nothing(&live.file, &seen)?;
    let (network, inhabitant) = dump.spaces.of_socket(dump.source.init, &live.file)?;
    if seen.kind == libc::SOCK_RAW || matches!(seen.protocol, ICMP | ICMPV6) {
        if let Some(peer) = raw::peer(inhabitant, &seen, live.stat.st_ino)? {
            (seen.remote, seen.state) = (Some(peer), ESTABLISHED);
        }
    }
    let mut entry = entry(&live.file, &seen)?;
    entry.id = id;
    entry.ino = live.stat.st_ino as u32;
    entry.flags = live.info.flags;
    entry.fown = live.fown(&dump.files.pids)?;
    entry.ns_id = network;
    if let Some(SocketAddr::V6(a)) =
        seen.local.filter(|a| matches!(a, SocketAddr::V6(a) if a.scope_id() != 0))
    {
        let index = a.scope_id();
        let name = inside::in_network(inhabitant, || {
            nix::net::if_::if_indextoname(index)
                .during("cannot name a network device", || format!("if_indextoname({index})"))
        })?;
        entry.ifname =
            Some(name.into_string().map_err(|_| Error::new("a network device's name is not valid UTF-8"))?);
    }
    entry.shutdown = shut_down(dump, live, &seen)?;
    if let Some(ends) = seen.connection() {
        entry.state = tcp::dump(dump, live, ends)?.unwrap_or(entry.state);
    }
    // To make a ping socket, one must be of the groups that may.
    let ping = seen.kind == libc::SOCK_DGRAM && matches!(seen.protocol, ICMP | ICMPV6);
    let key = [seen.family, seen.kind, if ping { UDP } else { seen.protocol }];
    let keys = keys(dump, live, &seen)?;
    // One that has ended has still what it had come to.
    let ended = is_tcp(seen.kind, seen.protocol) && seen.state == CLOSE && entry.shutdown.is_some();
    options::dump(dump, key, ended || seen.connection().is_some(), keys, live, id)?;
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Inetsk as i32,
        id,
        isk: Some(entry),
        ..FileEntry::default()
    });
    Ok(())
}

/// The keys with which it signs.
fn keys(dump: &mut Dump<'_>, live: &Live, seen: &Seen) -> Result<Vec<Key>> {
    if !is_tcp(seen.kind, seen.protocol) || seen.state == CLOSE {
        return Ok(Vec::new());
    }
    let listed = match dump.files.keys.entry(seen.family) {
        Entry::Occupied(listed) => listed.into_mut(),
        Entry::Vacant(place) => {
            let mut all = md5::read(dump.source.init, seen.family)?;
            for pid in dump.spaces.in_networks() {
                all.extend(md5::read(pid, seen.family)?);
            }
            place.insert(all)
        }
    };
    Ok(listed.get(&(live.stat.st_ino as u32)).cloned().unwrap_or_default())
}

/// Refuses what is left of a connection that has ended, and signatures that have state.
fn check_tcp(file: &OwnedFd, seen: &Seen) -> Result<()> {
    if !is_tcp(seen.kind, seen.protocol) {
        return Ok(());
    }
    match crate::sys::ioctl::readable(file) {
        Ok(left) if left > 0 && seen.state == CLOSE => {
            return Err(Error::new(format!(
                "a TCP connection has ended, and {left} bytes of it were not read"
            ))
            .remedy("try again when the program has read them")
            .passing());
        }
        _ => {}
    }
    md5::refuse_ao(file)
}

/// The directions in which it is shut down.
fn shut_down(dump: &mut Dump<'_>, live: &Live, seen: &Seen) -> Result<Option<i32>> {
    if seen.kind == libc::SOCK_DGRAM {
        let of = (seen.family, seen.protocol);
        let listed = match dump.files.shut.entry(of) {
            Entry::Occupied(listed) => listed.into_mut(),
            Entry::Vacant(place) => {
                let mut all = shut::read(dump.source.init, of.0, of.1)?;
                for pid in dump.spaces.in_networks() {
                    all.extend(shut::read(pid, of.0, of.1)?);
                }
                place.insert(all)
            }
        };
        // In the image's numbers, which are the kernel's.
        if let Some(how) = listed.get(&(live.stat.st_ino as u32)) {
            return Ok(Some(i32::from(*how)).filter(|how| *how != 0));
        }
    }
    // A stream that the peer has ended reads as shut, too.
    let ends = !is_tcp(seen.kind, seen.protocol) || !state::has_received_fin(seen.state);
    if is_tcp(seen.kind, seen.protocol) && seen.state == CLOSE {
        return Ok(options::has_ended(&live.file).then_some(SkShutdown::Both as i32));
    }
    let shut = ends && seen.state != LISTEN && options::is_shut(&live.file);
    Ok(shut.then_some(SkShutdown::Read as i32))
}

fn entry(fd: &OwnedFd, seen: &Seen) -> Result<InetSkEntry> {
    let v6 = seen.family == libc::AF_INET6;
    let flag = |level, name| get_int(fd, level, name).ok().map(|v| v != 0);
    let number = |level, name| get_int(fd, level, name).ok().map(i32::cast_unsigned);
    let set = |v: Option<bool>| v.filter(|v| *v);
    let ip_opts = if v6 {
        IpOptsEntry {
            freebind: set(flag(libc::SOL_IPV6, IPV6_FREEBIND)),
            pktinfo: set(flag(libc::SOL_IPV6, libc::IPV6_RECVPKTINFO)),
            raw: raw::options(fd, seen),
            ..IpOptsEntry::default()
        }
    } else {
        IpOptsEntry {
            freebind: set(flag(libc::SOL_IP, libc::IP_FREEBIND)),
            pktinfo: set(flag(libc::SOL_IP, libc::IP_PKTINFO)),
            tos: number(libc::SOL_IP, libc::IP_TOS),
            ttl: number(libc::SOL_IP, libc::IP_TTL),
            raw: raw::options(fd, seen),
        }
    };
    let tcp = |name| number(libc::SOL_TCP, name);
    let tcp_opts = is_tcp(seen.kind, seen.protocol).then(|| TcpOptsEntry {
        cork: flag(libc::SOL_TCP, libc::TCP_CORK),
        nodelay: flag(libc::SOL_TCP, libc::TCP_NODELAY),
        keepcnt: tcp(libc::TCP_KEEPCNT),
        keepidle: tcp(libc::TCP_KEEPIDLE),
        keepintvl: tcp(libc::TCP_KEEPINTVL),
    });
    let (src_addr, src_port) = address::words(seen.local, v6);
    let (dst_addr, dst_port) = address::words(seen.remote, v6);
    Ok(InetSkEntry {
        family: seen.family.cast_unsigned(),
        r#type: seen.kind.cast_unsigned(),
        proto: seen.protocol.cast_unsigned(),
        state: seen.state,
        src_port,
        dst_port,
        backlog: seen.backlog,
        src_addr,
        dst_addr,
        opts: sockopts::dump(fd, seen.family)?,
        v6only: if v6 { flag(libc::SOL_IPV6, libc::IPV6_V6ONLY) } else { None },
        ip_opts: Some(ip_opts),
        tcp_opts,
        ..InetSkEntry::default()
    })
}

#[cfg(test)]
mod tests;
