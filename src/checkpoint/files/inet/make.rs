//! IP sockets out of their images.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{Backlog, Shutdown, listen, shutdown};

use super::{ICMP, ICMPV6, IPV6_FREEBIND, UDP, UDPLITE, is_tcp, md5, raw};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::tcp::state::{self, LISTEN};
use crate::checkpoint::files::{address, external, inside, options, sockopts, tcp};
use crate::checkpoint::image::{FdTypes, InetSkEntry, SkShutdown};
use crate::checkpoint::model::TcpStream;
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{self, set_int};

/// Makes all sockets in the container's network namespace.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let entries: Vec<&InetSkEntry> = opener.of(FdTypes::Inetsk).filter_map(|e| e.isk.as_ref()).collect();
    if entries.is_empty() {
        return Ok(());
    }
    // A port that connections use can be bound to only before them, or in their way.
    let (plain, connected): (Vec<_>, Vec<_>) = entries.into_iter().partition(|e| e.state == LISTEN);
    let entries: Vec<&InetSkEntry> = plain.into_iter().chain(connected).collect();
    let more = options::read(opener.restore.model)?;
    let close = opener.restore.options.tcp_close;
    let streams = if close { &BTreeMap::new() } else { &opener.restore.model.tcp_streams };
    let mut made = Vec::new();
    for (network, some) in opener.by_network(entries, |e| e.ns_id)? {
        let files = inside::inside(opener.restore.target, network, || {
            some.iter()
                .map(|e| make(e, more.get(&e.id), streams.get(&e.ino)).map_err(|err| named(err, e)))
                .collect::<Result<Vec<OwnedFd>>>()
        })?;
        made.extend(some.into_iter().zip(files));
    }
    for (entry, file) in made {
        if streams.contains_key(&entry.ino) {
            opener.files.connections.push((entry.id, entry.opts.reuseaddr == Some(true)));
        }
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

pub(super) fn make(
    e: &InetSkEntry,
    more: Option<&options::More>,
    stream: Option<&TcpStream>,
) -> Result<OwnedFd> {
    let (family, kind, protocol) = (e.family.cast_signed(), e.r#type.cast_signed(), e.proto.cast_signed());
    let v6 = match family {
        libc::AF_INET => false,
        libc::AF_INET6 => true,
        other => return Err(Error::new(format!("the images hold an IP socket of family {other}"))),
    };
    let (raw, tcp) = (kind == libc::SOCK_RAW, is_tcp(kind, protocol));
    let datagrams = kind == libc::SOCK_DGRAM && matches!(protocol, UDP | UDPLITE | ICMP | ICMPV6);
    if !raw && !tcp && !datagrams {
        return Err(Error::new(format!(
            "the images hold an IP socket of type {kind} and protocol {protocol}, which is not supported"
        )));
    }
    let what = "cannot make a socket";
    let fd = crate::sys::socket::socket(family, kind, protocol)
        .during(what, || format!("socket({family}, {kind}, {protocol})"))
        .map_err(|e| match (e.errno(), datagrams) {
            (Some(Errno::EACCES), true) => e.remedy(
                "the sysctl net.ipv4.ping_group_range of config.json must let group 0 make ping sockets",
            ),
            _ => e,
        })?;
    sockopts::restore_early(&fd, &e.opts)?;
    let set = |level, name, value: i32| {
        set_int(&fd, level, name, value).during(what, || format!("setsockopt(_, {level}, {name}, {value})"))
    };
    // A raw socket counts as bound from its birth, and then it is too late.
    if let (true, false, Some(only)) = (v6, raw, e.v6only) {
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
    if let (true, Some(options)) = (raw, &ip.raw) {
        raw::restore(&fd, protocol, v6, options)?;
    }
    let options = e.tcp_opts.clone().unwrap_or_default();
    let flag = |v: Option<bool>| v.filter(|v| *v).map(|_| 1);
    let number = |v: Option<u32>| v.map(u32::cast_signed);
    let options = [
        (libc::TCP_CORK, flag(options.cork)),
        (libc::TCP_NODELAY, flag(options.nodelay)),
        (libc::TCP_KEEPCNT, number(options.keepcnt)),
        (libc::TCP_KEEPIDLE, number(options.keepidle)),
        (libc::TCP_KEEPINTVL, number(options.keepintvl)),
    ];
    for (name, value) in options {
        if let (true, Some(value)) = (tcp, value) {
            set(libc::SOL_TCP, name, value)?;
        }
    }
    if let Some(more) = more {
        options::restore(&fd, more)?;
        md5::restore(&fd, v6, &more.keys)?;
    }
    match (stream, tcp && state::is_connection(e.state)) {
        (Some(stream), _) => connect(&fd, e, stream)?,
        (None, true) => tcp::close(&fd)?,
        (None, false) => place(&fd, e)?,
    }
    sockopts::restore(&fd, &e.opts, family)?;
    if more.is_some_and(|more| more.locked) {
        sockopts::lock(&fd)?;
    }
    external::set_flags(&fd, e.flags)?;
    Ok(fd)
}

/// The device that the addresses belong to.
fn scope(e: &InetSkEntry) -> Result<u32> {
    let Some(name) = &e.ifname else { return Ok(0) };
    nix::net::if_::if_nametoindex(name.as_str())
        .during("cannot put a socket in its place", || format!("if_nametoindex({name:?})"))
        .map_err(|e| e.remedy("the network namespace lacks a device that the socket is bound to"))
}

/// Makes it one end of its connection.
fn connect(fd: &OwnedFd, e: &InetSkEntry, stream: &TcpStream) -> Result<()> {
    let scope = scope(e)?;
    let ends = address::from_words(&e.src_addr, e.src_port, scope).zip(address::from_words(
        &e.dst_addr,
        e.dst_port,
        scope,
    ));
    let (local, remote) = ends.ok_or_else(|| Error::new("the images have a TCP connection without ends"))?;
    tcp::make::make(fd, e.state, stream, local, remote)?;
    if e.shutdown == Some(SkShutdown::Read as i32) && !state::has_received_fin(e.state) {
        shut(fd, Shutdown::Read)?;
    }
    Ok(())
}

fn shut(fd: &OwnedFd, how: Shutdown) -> Result<()> {
    shutdown(fd.as_raw_fd(), how)
        .during("cannot put a socket in its place", || format!("shutdown(_, {how:?})"))
}

/// Binds, connects, listens.
fn place(fd: &OwnedFd, e: &InetSkEntry) -> Result<()> {
    let what = "cannot put a socket in its place";
    let scope = scope(e)?;
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
    let of_tcp = is_tcp(e.r#type.cast_signed(), e.proto.cast_signed());
    if !of_tcp && (e.dst_port != 0 || e.state == state::ESTABLISHED) {
        if let Some(remote) = address::from_words(&e.dst_addr, e.dst_port, scope) {
            sockopt::connect(fd, &address::bytes(&remote))
                .during(what, || format!("connect(_, {remote})"))?;
        }
    }
    if of_tcp && e.state == state::CLOSE && e.shutdown.is_some() {
        // A connection that has ended; one that never was has another end to read.
        tcp::close(fd)?;
    }
    if !of_tcp {
        if let Some(how) = sockopts::directions(e.shutdown) {
            shut(fd, how).or_else(|err| match err.errno() {
                // So it says of a socket that is not connected, and shuts it down.
                Some(Errno::ENOTCONN) => Ok(()),
                _ => Err(err),
            })?;
        }
    }
    Ok(())
}
