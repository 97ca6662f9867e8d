//! Internet addresses: as the kernel lays them out, as the images hold them, as they are printed.
//!
//! ```text
//!   sockaddr_in    family(2) port(2, big-endian) address(4)
//!   sockaddr_in6   family(2) port(2, big-endian) flow(4) address(16) scope(4)
//!   images         address as words in memory order, port as a number
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// From a sockaddr.
pub fn parse(bytes: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match i32::from(family) {
        libc::AF_INET => {
            let octets: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
            Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(octets)), port))
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            let scope = u32::from_ne_bytes(bytes.get(24..28)?.try_into().ok()?);
            Some(SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, scope)))
        }
        _ => None,
    }
}

/// To a sockaddr.
pub fn bytes(address: &SocketAddr) -> Vec<u8> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut bytes = Vec::with_capacity(28);
    bytes.extend((family as u16).to_ne_bytes());
    bytes.extend(address.port().to_be_bytes());
    match address {
        SocketAddr::V4(a) => {
            bytes.extend(a.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(a) => {
            bytes.extend([0; 4]);
            bytes.extend(a.ip().octets());
            bytes.extend(a.scope_id().to_ne_bytes());
        }
    }
    bytes
}

/// To the words and the port of an image; zeros where there is none.
pub fn words(address: Option<SocketAddr>, v6: bool) -> (Vec<u32>, u32) {
    let octets = match address.map(|a| a.ip()) {
        Some(IpAddr::V4(a)) => a.octets().to_vec(),
        Some(IpAddr::V6(a)) => a.octets().to_vec(),
        None => vec![0; if v6 { 16 } else { 4 }],
    };
    let words = octets.chunks_exact(4).map(|c| u32::from_ne_bytes([c[0], c[1], c[2], c[3]])).collect();
    (words, address.map_or(0, |a| u32::from(a.port())))
}

/// From the words and the port of an image.
pub fn from_words(words: &[u32], port: u32, scope: u32) -> Option<SocketAddr> {
    let octets: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let port = u16::try_from(port).ok()?;
    if let Ok(octets) = <[u8; 4]>::try_from(octets.as_slice()) {
        return Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(octets)), port));
    }
    let octets = <[u8; 16]>::try_from(octets.as_slice()).ok()?;
    Some(SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, scope)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for text in ["127.0.0.1:80", "[fe80::1%7]:443"] {
            let a: SocketAddr = text.parse().unwrap();
            assert_eq!(parse(&bytes(&a)), Some(a));
            let (w, port) = words(Some(a), a.is_ipv6());
            let scope = if a.is_ipv6() { 7 } else { 0 };
            assert_eq!(from_words(&w, port, scope), Some(a));
        }
    }

    #[test]
    fn nonsense_is_no_address() {
        assert_eq!(parse(&[2]), None);
        assert_eq!(parse(&[99; 28]), None);
        assert_eq!(from_words(&[1, 2], 3, 0), None);
        assert_eq!(from_words(&[1], 70_000, 0), None);
        assert_eq!(words(None, true).0.len(), 4);
    }
}
