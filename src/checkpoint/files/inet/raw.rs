//! What raw and ping sockets have beside others, and what datagrams are held back.
//!
//! ```text
//!   peer      of a socket connected to port 0 no call tells: /proc/PID/net/raw, raw6, icmp, icmp6, by inode
//!   filter    getsockopt(ICMP_FILTER, ICMP6_FILTER)
//!   corked    SO_MEMINFO counts what is on its way too; so one that is corked by MSG_MORE alone is asked by a datagram
//!             of nothing to port 0, which only a socket that is in the middle of one lets pass
//!   routing   a multicast routing daemon's socket has no mark of its own, but its routes are listed
//!   alert     IP_ROUTER_ALERT cannot be read, and cannot be set twice
//! ```

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use super::{ICMP, ICMPV6, Seen, UDP, UDPLITE};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::address;
use crate::checkpoint::files::tcp::state::ESTABLISHED;
use crate::checkpoint::image::IpOptsRawEntry;
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{get_bytes, get_int, set_bytes, set_int};

const SOL_RAW: i32 = 255;
const SOL_ICMPV6: i32 = 58;
/// ICMP_FILTER, ICMP6_FILTER.
const FILTER: i32 = 1;
const IPV6_HDRINCL: i32 = 36;
const SO_MEMINFO: i32 = 55;
const IGMP: i32 = libc::IPPROTO_IGMP;
/// Number of the option at the level SOL_IP.
pub const IP_ROUTER_ALERT: i32 = 5;
const IPV6_ROUTER_ALERT: i32 = 22;

/// Refuses a datagram that is being put together: the kernel does not show it.
pub fn holds_nothing(file: &OwnedFd, seen: &Seen) -> Result<()> {
    if seen.kind == libc::SOCK_STREAM {
        return Ok(());
    }
    // Nine numbers; the third is what of its memory is in packets to be sent.
    let (memory, _) = get_bytes::<36>(file, libc::SOL_SOCKET, SO_MEMINFO)
        .during("cannot look at the socket", || "getsockopt(_, SOL_SOCKET, SO_MEMINFO)".into())?;
    if memory[8..12] == [0; 4] {
        return Ok(());
    }
    let udp = seen.kind == libc::SOCK_DGRAM && matches!(seen.protocol, UDP | UDPLITE);
    let what = match udp {
        true if get_int(file, libc::SOL_UDP, libc::UDP_CORK) == Ok(1) => {
            "a UDP socket is corked, and what it holds back cannot be seen"
        }
        true if !crate::sys::socket::is_corked(file.as_raw_fd(), seen.family) => return Ok(()),
        true => "a UDP socket was corked by MSG_MORE, and what it holds back cannot be seen",
        false => "a raw or ping socket is sending a packet, or holds one back",
    };
    Err(Error::new(what).remedy("try again when the program has sent it").passing())
}

/// Refuses a socket through which somebody routes multicast: the kernel's routes would be gone.
pub fn routes_nothing(pid: i32, seen: &Seen) -> Result<()> {
    let name = match (seen.kind, seen.family, seen.protocol) {
        (libc::SOCK_RAW, libc::AF_INET, IGMP) => "ip_mr_vif",
        (libc::SOCK_RAW, libc::AF_INET6, ICMPV6) => "ip6_mr_vif",
        _ => return Ok(()),
    };
    // A kernel without multicast routing has no such file. The first line is a heading.
    let routes = std::fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
    if routes.lines().count() < 2 {
        return Ok(());
    }
    Err(Error::new("a raw socket routes multicast, which cannot be checkpointed")
        .remedy("stop the routing daemon, and start it again after the restore"))
}

/// Whether a raw socket of a process that stands still asks for packets with a router alert (IPv4). That of IPv6 says
/// for which, and that cannot be found out.
pub fn has_router_alert(fd: &OwnedFd, family: i32, kind: i32) -> Result<bool> {
    let (level, name, off) = match (kind, family) {
        (libc::SOCK_RAW, libc::AF_INET) => (libc::SOL_IP, IP_ROUTER_ALERT, 0),
        (libc::SOCK_RAW, libc::AF_INET6) => (libc::SOL_IPV6, IPV6_ROUTER_ALERT, -1),
        _ => return Ok(false),
    };
    match set_int(fd, level, name, 1) {
        Err(Errno::EADDRINUSE) if family == libc::AF_INET => Ok(true),
        Err(Errno::EADDRINUSE) => Err(Error::new("a raw socket has IPV6_ROUTER_ALERT, which cannot be read")
            .remedy("let the program close it")),
        // Not for a socket of this protocol.
        Err(_) => Ok(false),
        Ok(()) => set_int(fd, level, name, off)
            .map(|()| false)
            .during("cannot look at a raw socket", || format!("setsockopt(_, {level}, {name}, {off})")),
    }
}

/// Options of a raw socket.
pub fn options(fd: &OwnedFd, seen: &Seen) -> Option<IpOptsRawEntry> {
    if seen.kind != libc::SOCK_RAW {
        return None;
    }
    let flag = |level, name| get_int(fd, level, name).ok().map(|v| v != 0);
    let words =
        |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect();
    let v6 = seen.family == libc::AF_INET6;
    Some(IpOptsRawEntry {
        hdrincl: if v6 { flag(libc::SOL_IPV6, IPV6_HDRINCL) } else { flag(libc::SOL_IP, libc::IP_HDRINCL) },
        nodefrag: if v6 { None } else { flag(libc::SOL_IP, libc::IP_NODEFRAG) },
        checksum: None,
        icmpv_filter: match (v6, seen.protocol) {
            (false, ICMP) => get_bytes::<4>(fd, SOL_RAW, FILTER).map(|f| words(&f.0)).unwrap_or_default(),
            (true, ICMPV6) => {
                get_bytes::<32>(fd, SOL_ICMPV6, FILTER).map(|f| words(&f.0)).unwrap_or_default()
            }
            _ => Vec::new(),
        },
    })
}

/// Sets them.
pub fn restore(fd: &OwnedFd, protocol: i32, v6: bool, options: &IpOptsRawEntry) -> Result<()> {
    let what = "cannot set a raw socket's option";
    let (level, header) = if v6 { (libc::SOL_IPV6, IPV6_HDRINCL) } else { (libc::SOL_IP, libc::IP_HDRINCL) };
    let flags = [(header, options.hdrincl), (libc::IP_NODEFRAG, options.nodefrag.filter(|_| !v6))];
    for (name, value) in flags {
        if let Some(value) = value.map(i32::from).filter(|value| get_int(fd, level, name) != Ok(*value)) {
            set_int(fd, level, name, value)
                .during(what, || format!("setsockopt(_, {level}, {name}, {value})"))?;
        }
    }
    if !options.icmpv_filter.is_empty() && matches!(protocol, ICMP | ICMPV6) {
        let level = if v6 { SOL_ICMPV6 } else { SOL_RAW };
        let filter: Vec<u8> = options.icmpv_filter.iter().flat_map(|word| word.to_ne_bytes()).collect();
        set_bytes(fd, level, FILTER, &filter)
            .during(what, || format!("setsockopt(_, {level}, ICMP_FILTER, {} bytes)", filter.len()))?;
    }
    Ok(())
}

/// Whom a socket in the network namespace of process `pid` is connected to.
pub fn peer(pid: i32, seen: &Seen, inode: u64) -> Result<Option<SocketAddr>> {
    let name = match (seen.kind == libc::SOCK_RAW, seen.family == libc::AF_INET6) {
        (true, false) => "raw",
        (true, true) => "raw6",
        (false, false) => "icmp",
        (false, true) => "icmp6",
    };
    let path = format!("/proc/{pid}/net/{name}");
    let text = std::fs::read_to_string(&path)
        .during("cannot list the sockets", || format!("open({path:?}, O_RDONLY)"))?;
    Ok(text.lines().skip(1).filter_map(line).find(|(of, _)| *of == inode).and_then(|(_, peer)| peer))
}

/// `  1: 0100007F:0001 0100007F:0000 01 00000000:00000000 00:00000000 00000000 0 0 17665939 2 ...`: inode and peer.
fn line(line: &str) -> Option<(u64, Option<SocketAddr>)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = words.get(2)?.split_once(':')?;
    // The words of the address, each printed as a number of this machine.
    let address: Option<Vec<u32>> = (0..address.len() / 8)
        .map(|n| address.get(n * 8..n * 8 + 8).and_then(|word| u32::from_str_radix(word, 16).ok()))
        .collect();
    let connected = u32::from_str_radix(words.get(3)?, 16).ok()? == ESTABLISHED;
    let peer = address::from_words(&address?, u32::from_str_radix(port, 16).ok()?, 0);
    Some((words.get(9)?.parse().ok()?, peer.filter(|_| connected)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_read() {
        let of = " 155: 0100007F:0001 0200007F:0000 01 00000000:00000000 00:00000000 00000000  0  0 7 2 0 0";
        assert_eq!(line(of), Some((7, "127.0.0.2:0".parse().ok())));
        assert_eq!(line(&of.replace(" 01 ", " 07 ")), Some((7, None)));
        let of = "58: 00000000000000000000000001000000:003A 00000000000000000000000001000000:0000 01 0:0 0:0 0 0 0 9 2";
        assert_eq!(line(of), Some((9, "[::1]:0".parse().ok())));
        assert_eq!(line("garbage"), None);
    }

    #[test]
    fn what_is_held_back_is_noticed() {
        use nix::sys::socket::{MsgFlags, send};
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(to) = std::net::UdpSocket::bind(address) else { continue };
            let from = std::net::UdpSocket::bind(address).unwrap();
            from.connect(to.local_addr().unwrap()).unwrap();
            let fd: OwnedFd = from.into();
            let look = || holds_nothing(&fd, &super::super::see(&fd).unwrap()).err().map(|e| e.to_string());
            set_int(&fd, libc::SOL_UDP, libc::UDP_CORK, 1).unwrap();
            assert_eq!(look(), None);
            set_int(&fd, libc::SOL_UDP, libc::UDP_CORK, 0).unwrap();
            let family = super::super::see(&fd).unwrap().family;
            assert!(!crate::sys::socket::is_corked(fd.as_raw_fd(), family));
            send(fd.as_raw_fd(), b"one", MsgFlags::from_bits_retain(libc::MSG_MORE)).unwrap();
            assert!(look().unwrap().contains("MSG_MORE"));
            send(fd.as_raw_fd(), b"two", MsgFlags::empty()).unwrap();
            assert_eq!(look(), None);
        }
    }
}
