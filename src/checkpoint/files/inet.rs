//! TCP and UDP sockets, over IPv4 and IPv6.
//!
//! ```text
//!   TCP  listening               bound again, with its backlog
//!        closed, maybe bound     made, bound
//!        any other state         refused: a connection
//!   UDP  unconnected, connected  bound, connected; what waits in its queue is lost, as it may be on the wire
//! ```
//!
//! What a socket is, it tells itself: getsockopt(2), getsockname(2), TCP_INFO.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::socket::{Backlog, Shutdown, listen, shutdown};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{address, external, inside, options, sockopts};
use crate::checkpoint::image::{FdTypes, FileEntry, InetSkEntry, IpOptsEntry, SkShutdown, TcpOptsEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{self, get_bytes, get_int, set_int};

/// States, as the kernel and the images number them.
const ESTABLISHED: u32 = 1;
const CLOSE: u32 = 7;
/// Waiting for connections.
pub const LISTEN: u32 = 10;

const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;
const UDPLITE: i32 = libc::IPPROTO_UDPLITE;
const IPV6_FREEBIND: i32 = 78;

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

/// What has to be known of a socket before anything else.
struct Seen {
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

fn see(fd: &OwnedFd) -> Result<Seen> {
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
    if kind == libc::SOCK_STREAM && protocol == TCP {
        let (info, _) = get_bytes::<32>(fd, libc::SOL_TCP, libc::TCP_INFO)
            .during(what, || "getsockopt(_, SOL_TCP, TCP_INFO, _, _)".into())?;
        let word = |at: usize| info.iter().skip(at).take(4).rev().fold(0u32, |n, b| n << 8 | u32::from(*b));
        seen.state = u32::from(info[0]);
        if seen.state == LISTEN {
            (seen.waiting, seen.backlog) = (word(24), word(28));
        }
    } else if seen.remote.is_some() {
        seen.state = ESTABLISHED;
    }
    Ok(seen)
}

/// Refuses connections, and sockets that are neither TCP nor UDP.
pub fn check(live: &Live) -> Result<()> {
    supported(&see(&live.file)?).map_err(|e| live.name(e))
}

fn supported(seen: &Seen) -> Result<()> {
    let end = |a: &Option<SocketAddr>| a.map_or_else(|| "?".into(), |a| a.to_string());
    match (seen.kind, seen.protocol, seen.state) {
        (libc::SOCK_STREAM, TCP, LISTEN) if seen.waiting > 0 => Err(Error::new(format!(
            "{} TCP connections to {} have not been accepted",
            seen.waiting,
            end(&seen.local)
        ))
        .remedy("TCP connections cannot be checkpointed yet; try again when they are accepted and closed")),
        (libc::SOCK_STREAM, TCP, CLOSE | LISTEN) | (libc::SOCK_DGRAM, UDP | UDPLITE, _) => Ok(()),
        (libc::SOCK_STREAM, TCP, _) => Err(Error::new(format!(
            "a TCP connection from {} to {} cannot be checkpointed yet",
            end(&seen.local),
            end(&seen.remote)
        ))
        .remedy("close it first")),
        (libc::SOCK_RAW, ..) => Err(Error::new("a raw IP socket cannot be checkpointed")
            .remedy("let the program close it, or stop it")),
        (kind, protocol, _) => Err(Error::new(format!(
            "an IP socket of type {kind} and protocol {protocol} cannot be checkpointed"
        ))
        .remedy("only TCP and UDP are supported; let the program close it, or stop it")),
    }
}

/// Records a socket.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let seen = see(&live.file)?;
    supported(&seen)?;
    let mut entry = entry(&live.file, &seen)?;
    entry.id = id;
    entry.ino = live.stat.st_ino as u32;
    entry.flags = live.info.flags;
    entry.fown = live.fown(&dump.files.pids)?;
    entry.ns_id = dump.model.ids.values().find_map(|ids| ids.net_ns_id);
    if let Some(SocketAddr::V6(a)) =
        seen.local.filter(|a| matches!(a, SocketAddr::V6(a) if a.scope_id() != 0))
    {
        let index = a.scope_id();
        let name = inside::in_network(dump.source.init, || {
            nix::net::if_::if_indextoname(index)
                .during("cannot name a network device", || format!("if_indextoname({index})"))
        })?;
        entry.ifname =
            Some(name.into_string().map_err(|_| Error::new("a network device's name is not valid UTF-8"))?);
    }
    if seen.kind == libc::SOCK_DGRAM && options::is_shut(&live.file) {
        entry.shutdown = Some(SkShutdown::Read as i32);
    }
    options::dump(dump, [seen.family, seen.kind, seen.protocol], live, id)?;
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Inetsk as i32,
        id,
        isk: Some(entry),
        ..FileEntry::default()
    });
    Ok(())
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
            ..IpOptsEntry::default()
        }
    } else {
        IpOptsEntry {
            freebind: set(flag(libc::SOL_IP, libc::IP_FREEBIND)),
            pktinfo: set(flag(libc::SOL_IP, libc::IP_PKTINFO)),
            tos: number(libc::SOL_IP, libc::IP_TOS),
            ttl: number(libc::SOL_IP, libc::IP_TTL),
            ..IpOptsEntry::default()
        }
    };
    let tcp = |name| number(libc::SOL_TCP, name);
    let tcp_opts = (seen.protocol == TCP).then(|| TcpOptsEntry {
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

/// Makes all sockets in the container's network namespace.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let entries: Vec<&InetSkEntry> = opener.of(FdTypes::Inetsk).filter_map(|e| e.isk.as_ref()).collect();
    if entries.is_empty() {
        return Ok(());
    }
    let more = options::read(opener.restore.model)?;
    let made = inside::inside(opener.restore.target, || {
        entries
            .iter()
            .map(|e| make(e, more.get(&e.id)).map_err(|err| named(err, e)))
            .collect::<Result<Vec<OwnedFd>>>()
    })?;
    for (entry, file) in entries.iter().zip(made) {
        opener.put_owned(entry.id, file, &entry.fown, entry.flags);
    }
    Ok(())
}

/// The address goes where a file's path would.
fn named(e: Error, entry: &InetSkEntry) -> Error {
    match address::from_words(&entry.src_addr, entry.src_port, 0) {
        Some(a) => e.path(a.to_string()),
        None => e,
    }
}

fn make(e: &InetSkEntry, more: Option<&options::More>) -> Result<OwnedFd> {
    let (family, kind, protocol) = (e.family.cast_signed(), e.r#type.cast_signed(), e.proto.cast_signed());
    let v6 = match family {
        libc::AF_INET => false,
        libc::AF_INET6 => true,
        other => return Err(Error::new(format!("the images hold an IP socket of family {other}"))),
    };
    supported(&Seen {
        family,
        kind,
        protocol,
        state: e.state,
        backlog: 0,
        waiting: 0,
        local: None,
        remote: None,
    })
    .map_err(|e| e.remedy("take the checkpoint without connections"))?;
    let what = "cannot make a socket";
    let fd = crate::sys::socket::socket(family, kind, protocol)
        .during(what, || format!("socket({family}, {kind}, {protocol})"))?;
    sockopts::restore_early(&fd, &e.opts)?;
    let set = |level, name, value: i32| {
        set_int(&fd, level, name, value).during(what, || format!("setsockopt(_, {level}, {name}, {value})"))
    };
    if let (true, Some(only)) = (v6, e.v6only) {
        set(libc::SOL_IPV6, libc::IPV6_V6ONLY, i32::from(only))?;
    }
    let ip = e.ip_opts.clone().unwrap_or_default();
    if ip.freebind == Some(true) {
        if v6 { set(libc::SOL_IPV6, IPV6_FREEBIND, 1)? } else { set(libc::SOL_IP, libc::IP_FREEBIND, 1)? }
    }
    if ip.pktinfo == Some(true) {
        if v6 {
            set(libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, 1)?
        } else {
            set(libc::SOL_IP, libc::IP_PKTINFO, 1)?
        }
    }
    for (name, value) in [(libc::IP_TOS, ip.tos), (libc::IP_TTL, ip.ttl)] {
        if let (false, Some(value)) = (v6, value) {
            set(libc::SOL_IP, name, value.cast_signed())?;
        }
    }
    let tcp = e.tcp_opts.clone().unwrap_or_default();
    let flag = |v: Option<bool>| v.filter(|v| *v).map(|_| 1);
    let number = |v: Option<u32>| v.map(u32::cast_signed);
    let tcp = [
        (libc::TCP_CORK, flag(tcp.cork)),
        (libc::TCP_NODELAY, flag(tcp.nodelay)),
        (libc::TCP_KEEPCNT, number(tcp.keepcnt)),
        (libc::TCP_KEEPIDLE, number(tcp.keepidle)),
        (libc::TCP_KEEPINTVL, number(tcp.keepintvl)),
    ];
    for (name, value) in tcp {
        if let (TCP, Some(value)) = (protocol, value) {
            set(libc::SOL_TCP, name, value)?;
        }
    }
    if let Some(more) = more {
        options::restore(&fd, more)?;
    }
    place(&fd, e)?;
    sockopts::restore(&fd, &e.opts, family)?;
    external::set_flags(&fd, e.flags)?;
    Ok(fd)
}

/// Binds, connects, listens.
fn place(fd: &OwnedFd, e: &InetSkEntry) -> Result<()> {
    let what = "cannot put a socket in its place";
    let scope = match &e.ifname {
        Some(name) => nix::net::if_::if_nametoindex(name.as_str())
            .during(what, || format!("if_nametoindex({name:?})"))
            .map_err(|e| e.remedy("the network namespace lacks a device that the socket is bound to"))?,
        None => 0,
    };
    if let Some(local) = address::from_words(&e.src_addr, e.src_port, scope) {
        if e.src_port != 0 || !local.ip().is_unspecified() {
            sockopt::bind(fd, &address::bytes(&local)).during(what, || format!("bind(_, {local})")).map_err(
                |e| match e.errno() {
                    Some(Errno::EADDRNOTAVAIL) => {
                        e.remedy("the network namespace needs this address, as it had at the checkpoint")
                    }
                    Some(Errno::EADDRINUSE) => {
                        e.remedy("another program uses this address and port; stop it first")
                    }
                    _ => e,
                },
            )?;
        }
    }
    if e.state == LISTEN {
        let backlog =
            Backlog::new(e.backlog.min(i32::MAX.cast_unsigned()).cast_signed()).unwrap_or(Backlog::MAXCONN);
        listen(fd, backlog).during(what, || format!("listen(_, {})", e.backlog))?;
    }
    if e.proto.cast_signed() != TCP && e.dst_port != 0 {
        if let Some(remote) = address::from_words(&e.dst_addr, e.dst_port, scope) {
            sockopt::connect(fd, &address::bytes(&remote))
                .during(what, || format!("connect(_, {remote})"))?;
        }
        let how = match e.shutdown.and_then(|s| SkShutdown::try_from(s).ok()) {
            Some(SkShutdown::Read) => Some(Shutdown::Read),
            Some(SkShutdown::Write) => Some(Shutdown::Write),
            Some(SkShutdown::Both) => Some(Shutdown::Both),
            _ => None,
        };
        if let Some(how) = how {
            use std::os::fd::AsRawFd;
            shutdown(fd.as_raw_fd(), how).during(what, || format!("shutdown(_, {how:?})"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    fn again(fd: &OwnedFd) -> (InetSkEntry, InetSkEntry) {
        let seen = see(fd).unwrap();
        supported(&seen).unwrap();
        let was = entry(fd, &seen).unwrap();
        // The address is still taken by the first one.
        let free = InetSkEntry { src_port: 0, ..was.clone() };
        let made = make(&free, None).unwrap();
        let is = entry(&made, &see(&made).unwrap()).unwrap();
        (was, is)
    }

    #[test]
    fn a_listener_comes_back() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let fd = OwnedFd::from(listener);
            listen(&fd, Backlog::new(77).unwrap()).unwrap();
            set_int(&fd, libc::SOL_TCP, libc::TCP_NODELAY, 1).unwrap();
            let (was, mut is) = again(&fd);
            assert_eq!((was.state, was.backlog), (LISTEN, 77));
            assert_ne!(is.src_port, 0);
            is.src_port = was.src_port;
            assert_eq!(was, is);
        }
    }

    #[test]
    fn a_port_is_bound_again_when_it_is_free() {
        let fd = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let was = entry(&fd, &see(&fd).unwrap()).unwrap();
        let e = make(&was, None).unwrap_err();
        assert!(e.to_string().contains("another program uses"), "{e}");
        drop(fd);
        let made = make(&was, None).unwrap();
        assert_eq!(entry(&made, &see(&made).unwrap()).unwrap(), was);
    }

    #[test]
    fn connected_datagrams() {
        let to = UdpSocket::bind("127.0.0.1:0").unwrap();
        let from = UdpSocket::bind("127.0.0.1:0").unwrap();
        from.connect(to.local_addr().unwrap()).unwrap();
        let (was, is) = again(&from.into());
        assert_eq!((was.state, is.dst_port), (ESTABLISHED, was.dst_port));
        let (was, _) = again(&to.into());
        assert_eq!((was.state, was.dst_port), (CLOSE, 0));
    }

    #[test]
    fn connections_are_refused_by_address() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let live = Live::own(OwnedFd::from(stream), 4).unwrap();
        let e = check(&live).unwrap_err().to_string();
        assert!(e.contains("TCP connection from 127.0.0.1:") && e.contains("process 4"), "{e}");
        let e = check(&Live::own(listener.into(), 4).unwrap()).unwrap_err().to_string();
        assert!(e.contains("have not been accepted"), "{e}");
    }

    #[test]
    fn a_socket_that_was_never_bound() {
        let fd = crate::sys::socket::socket(libc::AF_INET, libc::SOCK_STREAM, TCP).unwrap();
        let (was, is) = again(&fd);
        assert_eq!(was, is);
        assert_eq!((was.state, was.src_port), (CLOSE, 0));
    }
}
