//! Just enough of nftables' netlink language to drop the packets of some connections.
//!
//! ```text
//!   a transaction   BATCH_BEGIN | message | message | ... | BATCH_END            all of it is done, or nothing
//!   a message       nlmsghdr (16) | nfgenmsg (4): family, version, subsystem | attributes
//!   an attribute    length (2), type (2), bytes, padded to 4; numbers are big-endian; may hold attributes
//!
//!   table inet NAME {
//!     set conns4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; elements = { ... } }
//!     set conns6 { the same of IPv6 }
//!     chain output { hook output priority -300: meta mark 0xc114 accept; saddr . sport . daddr . dport @conns4 drop; ... }
//!     chain input  { hook input priority 300:   the same }
//!   }
//! ```
//!
//! The priorities are such that addresses are those of the sockets: before anything that is sent is translated, and
//! after what is received has been translated back.

mod message;

use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use message::{Attributes, Batch};

/// What our own packets carry, and pass with. CRIU's are marked so too.
pub const MARK: u32 = 0xc114;

const CREATE: u16 = libc::NLM_F_CREATE as u16;
/// Elements in one message: an attribute has at most 64 KiB, an element at most 56 bytes.
const ELEMENTS: usize = 1000;

/// A way that packets take: from here to there.
pub type Way = (SocketAddr, SocketAddr);

/// Whether this kernel has nftables, and we may use it, in this thread's network namespace.
pub fn available() -> nix::Result<()> {
    let mut batch = Batch::default();
    batch.message(libc::NFT_MSG_GETGEN, libc::NLM_F_ACK as u16, |_| ());
    batch.talk()
}

/// Is there a table of this name?
pub fn exists(table: &str) -> nix::Result<bool> {
    let mut batch = Batch::default();
    batch.message(libc::NFT_MSG_GETTABLE, libc::NLM_F_ACK as u16, |a| a.text(1, table));
    match batch.talk() {
        Ok(()) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Drops the packets that take these ways. Adds to the table where it exists.
pub fn lock(table: &str, ways: &[Way]) -> nix::Result<()> {
    let fresh = !exists(table)?;
    let mut batch = Batch::default();
    batch.border(libc::NFNL_MSG_BATCH_BEGIN);
    if fresh {
        batch.message(libc::NFT_MSG_NEWTABLE, CREATE, |a| a.text(1, table));
        for set in [&V4, &V6] {
            batch.message(libc::NFT_MSG_NEWSET, CREATE, |a| {
                a.text(1, table);
                a.text(2, set.name);
                a.word(3, 0);
                a.word(4, set.r#type);
                a.word(5, set.length);
                a.word(10, set.id);
            });
        }
        for (chain, hook, priority) in [("output", 3, -300i32), ("input", 1, 300)] {
            batch.message(libc::NFT_MSG_NEWCHAIN, CREATE, |a| {
                a.text(1, table);
                a.text(3, chain);
                a.nest(4, |a| {
                    a.word(1, hook);
                    a.word(2, priority.cast_unsigned());
                });
                a.text(7, "filter");
            });
            batch.rule(table, chain, |a| {
                a.load_meta(META_MARK);
                a.equal(&MARK.to_ne_bytes());
                a.verdict(ACCEPT);
            });
            for set in [&V4, &V6] {
                batch.rule(table, chain, |a| set.rule(a));
            }
        }
    }
    for set in [&V4, &V6] {
        let keys: Vec<Vec<u8>> = ways.iter().filter_map(|way| set.key(way)).collect();
        for part in keys.chunks(ELEMENTS) {
            batch.message(libc::NFT_MSG_NEWSETELEM, CREATE, |a| {
                a.text(1, table);
                a.text(2, set.name);
                if fresh {
                    a.word(4, set.id);
                }
                a.nest(3, |a| part.iter().for_each(|key| a.nest(1, |a| a.nest(1, |a| a.bytes(1, key)))));
            });
        }
    }
    batch.acknowledge();
    batch.border(libc::NFNL_MSG_BATCH_END);
    batch.talk()
}

/// Removes a table, if it is there.
pub fn unlock(table: &str) -> nix::Result<()> {
    let mut batch = Batch::default();
    batch.border(libc::NFNL_MSG_BATCH_BEGIN);
    batch.message(libc::NFT_MSG_DELTABLE, libc::NLM_F_ACK as u16, |a| a.text(1, table));
    batch.border(libc::NFNL_MSG_BATCH_END);
    match batch.talk() {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

const META_MARK: u32 = 3;
const META_PROTOCOL_FAMILY: u32 = 15;
const META_TRANSPORT: u32 = 16;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// The first register of four bytes; eight of these are behind it at least.
const REGISTER: u32 = 8;

/// One of the two sets.
struct Set {
    name: &'static str,
    id: u32,
    /// Kinds of the parts of a key, six bits each, for those who list it.
    r#type: u32,
    length: u32,
    /// NFPROTO_IPV4, NFPROTO_IPV6.
    family: u8,
    /// Where the sender's address is in the packet; the receiver's is behind it.
    at: u32,
    /// Bytes of an address.
    address: u32,
}

const V4: Set = Set {
    name: "conns4",
    id: 1,
    r#type: (7 << 18) | (13 << 12) | (7 << 6) | 13,
    length: 16,
    family: 2,
    at: 12,
    address: 4,
};
const V6: Set = Set {
    name: "conns6",
    id: 2,
    r#type: (8 << 18) | (13 << 12) | (8 << 6) | 13,
    length: 40,
    family: 10,
    at: 8,
    address: 16,
};

impl Set {
    /// The key of packets that take this way, if they are of this family.
    fn key(&self, way: &Way) -> Option<Vec<u8>> {
        let mut key = Vec::new();
        for end in [way.0, way.1] {
            match end.ip().to_canonical() {
                IpAddr::V4(a) => key.extend(a.octets()),
                IpAddr::V6(a) => key.extend(a.octets()),
            }
            key.extend(end.port().to_be_bytes());
            key.extend([0, 0]);
        }
        (key.len() == self.length as usize).then_some(key)
    }

    fn rule(&self, a: &mut Attributes) {
        a.load_meta(META_PROTOCOL_FAMILY);
        a.equal(&[self.family]);
        a.load_meta(META_TRANSPORT);
        a.equal(&[libc::IPPROTO_TCP as u8]);
        let words = self.address / 4;
        a.load_packet(REGISTER, NETWORK, self.at, self.address);
        a.load_packet(REGISTER + words, TRANSPORT, 0, 2);
        a.load_packet(REGISTER + words + 1, NETWORK, self.at + self.address, self.address);
        a.load_packet(REGISTER + 2 * words + 1, TRANSPORT, 2, 2);
        a.expression("lookup", |a| {
            a.text(1, self.name);
            a.word(2, REGISTER);
            a.word(4, self.id);
        });
        a.verdict(DROP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::files::tcp::testing::in_new_network;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    fn pair(address: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    fn ways(s: &TcpStream) -> [Way; 2] {
        let (a, b) = (s.local_addr().unwrap(), s.peer_addr().unwrap());
        [(a, b), (b, a)]
    }

    #[test]
    fn exactly_the_locked_connections_are_silent() {
        in_new_network(|| {
            for address in ["127.0.0.1:0", "[::1]:0"] {
                let ((mut a, mut b), (mut c, mut d)) = (pair(address), pair(address));
                lock("stasis-test", &ways(&a)).unwrap();
                assert!(exists("stasis-test").unwrap());
                let mut buffer = [0; 8];
                a.write_all(b"silent").unwrap();
                b.write_all(b"silent").unwrap();
                c.write_all(b"heard").unwrap();
                assert_eq!(d.read(&mut buffer).unwrap(), 5);
                for s in [&mut a, &mut b] {
                    s.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                    assert!(s.read(&mut buffer).is_err());
                }
                // A second connection joins the first.
                lock("stasis-test", &ways(&c)).unwrap();
                d.write_all(b"silent").unwrap();
                c.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                assert!(c.read(&mut buffer).is_err());
                unlock("stasis-test").unwrap();
                assert!(!exists("stasis-test").unwrap());
                unlock("stasis-test").unwrap();
                for s in [&mut a, &mut b, &mut c] {
                    s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                    assert_eq!(s.read(&mut buffer).unwrap(), 6);
                }
            }
        });
    }

    #[test]
    fn mapped_addresses_are_those_of_their_packets() {
        let way = ("[::ffff:10.0.0.1]:80".parse().unwrap(), "[::ffff:10.0.0.2]:1025".parse().unwrap());
        assert_eq!(V4.key(&way).unwrap(), [10, 0, 0, 1, 0, 80, 0, 0, 10, 0, 0, 2, 4, 1, 0, 0]);
        assert_eq!(V6.key(&way), None);
    }

    #[test]
    fn thousands_fit() {
        in_new_network(|| {
            available().unwrap();
            let _ = UdpSocket::bind("127.0.0.1:0").unwrap();
            let end = |port: u16| SocketAddr::from(([0xfd, 0, 0, 0, 0, 0, 0, 1], port));
            let many: Vec<Way> = (1..20_000).map(|port| (end(port), end(1))).collect();
            lock("stasis-test", &many).unwrap();
            unlock("stasis-test").unwrap();
        });
    }

    #[test]
    fn an_error_is_told() {
        in_new_network(|| {
            assert_eq!(lock(&"x".repeat(300), &[]), Err(Errno::ERANGE));
        });
    }
}
