//! Segments in the peer's name, for what only the peer can tell a socket: that it has ended its direction, or has
//! heard that we have ended ours.
//!
//! ```text
//!   IPv4 (20)  version, length 5 words │ total length │ ... │ TTL, protocol, checksum (the kernel's) │ from │ to
//!   IPv6 (40)  version │ payload length, next header, hop limit │ from │ to
//!   TCP  (20)  ports │ sequence │ acknowledged │ offset, flags, window │ checksum, urgent
//! ```
//!
//! A raw socket sends them to the local address, so that they never leave; a mark carries them through the network lock.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, sendto};

use crate::checkpoint::Result;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::tcp::nftables::MARK;
use crate::sys::socket::socket;
use crate::sys::sockopt::set_int;

/// The end of a direction.
pub const FIN: u8 = 1;
/// The acknowledged number counts.
pub const ACK: u8 = 16;

/// What a segment says.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Who speaks: the peer.
    pub from: SocketAddr,
    /// Who hears it.
    pub to: SocketAddr,
    /// [`FIN`], [`ACK`].
    pub flags: u8,
    /// Where the sender is.
    pub sequence: u32,
    /// What the sender has heard.
    pub acknowledged: u32,
    /// Its window, scaled.
    pub window: u16,
}

impl Segment {
    fn tcp(&self) -> [u8; 20] {
        let mut tcp = [0; 20];
        tcp[0..2].copy_from_slice(&self.from.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&self.to.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.acknowledged.to_be_bytes());
        tcp[12] = 5 << 4;
        tcp[13] = self.flags;
        tcp[14..16].copy_from_slice(&self.window.to_be_bytes());
        tcp
    }

    /// The packet, as a raw socket takes it.
    fn packet(&self) -> Vec<u8> {
        let mut tcp = self.tcp();
        match (self.from.ip().to_canonical(), self.to.ip().to_canonical()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let sum = checksum(&[&from.octets(), &to.octets(), &[0, 6, 0, 20], &tcp]);
                tcp[16..18].copy_from_slice(&sum.to_be_bytes());
                ipv4(from, to, &tcp)
            }
            (from, to) => {
                let (from, to) = (v6(from), v6(to));
                let sum = checksum(&[&from.octets(), &to.octets(), &[0, 0, 0, 20], &[0, 0, 0, 6], &tcp]);
                tcp[16..18].copy_from_slice(&sum.to_be_bytes());
                ipv6(from, to, &tcp)
            }
        }
    }

    /// Sends it, in this thread's network namespace.
    pub fn send(&self) -> Result<()> {
        let what = "cannot send a segment to a socket that is restored";
        let to = self.to.ip().to_canonical();
        let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let fd = socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)
            .during(what, || format!("socket({family}, SOCK_RAW, IPPROTO_RAW)"))?;
        set_int(&fd, libc::SOL_SOCKET, libc::SO_MARK, MARK.cast_signed())
            .during(what, || format!("setsockopt(_, SO_MARK, {MARK:#x})"))?;
        let packet = self.packet();
        let sent = match to {
            IpAddr::V4(to) => {
                let to = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
                sendto(fd.as_raw_fd(), &packet, &to, MsgFlags::empty())
            }
            IpAddr::V6(to) => {
                let scope = if let SocketAddr::V6(a) = self.to { a.scope_id() } else { 0 };
                let to = SockaddrIn6::from(std::net::SocketAddrV6::new(to, 0, 0, scope));
                sendto(fd.as_raw_fd(), &packet, &to, MsgFlags::empty())
            }
        };
        sent.during(what, || format!("sendto(_, {:?})", self)).map(drop)
    }
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped(),
        IpAddr::V6(a) => a,
    }
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, tcp: &[u8; 20]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(tcp);
    packet
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, tcp: &[u8; 20]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(tcp);
    packet
}

/// The internet's checksum of parts of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|p| p.chunks_exact(2));
    let mut sum: u32 = words.map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // The example of RFC 1071.
        assert_eq!(checksum(&[&[0x00, 0x01, 0xf2, 0x03], &[0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
        let segment = Segment {
            from: "10.0.0.2:80".parse().unwrap(),
            to: "10.0.0.1:4000".parse().unwrap(),
            flags: FIN | ACK,
            sequence: 7,
            acknowledged: 9,
            window: 500,
        };
        let packet = segment.packet();
        // Summed with its checksum, a segment is all ones.
        assert_eq!(checksum(&[&packet[12..20], &[0, 6, 0, 20], &packet[20..]]), 0);
        let mapped = Segment { from: "[::ffff:10.0.0.2]:80".parse().unwrap(), ..segment };
        assert_eq!(mapped.packet(), packet);
    }
}
