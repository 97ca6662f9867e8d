//! Connections that the kernel tracks for packet filters, in CRIU's image of them: messages of netlink(7).
//!
//! A filter that lets only packets of known connections pass would shut a kept one out. Of TCP the windows are not watched
//! any more: packets that were on their way at the checkpoint may be outside. An address that was translated is told
//! apart from the answer that is expected:
//!
//! ```text
//!   told    original 10.0.0.2:7 → 192.0.2.1:80    answer 192.0.2.1:80 → 198.51.100.9:4000     source is translated
//!   taken   original 10.0.0.2:7 → 192.0.2.1:80    answer 192.0.2.1:80 → 10.0.0.2:7            source: 198.51.100.9:4000
//! ```

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::checkpoint::error::{Context, Error, Result};
use crate::sys::netlink::{CREATE, EXCLUSIVE, Message, Netlink, attribute, attributes, nested, u32_at};

/// NFNL_SUBSYS_CTNETLINK; IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET.
const NEW: u16 = 1 << 8;
const GET: u16 = 1 << 8 | 1;
const FIXED: usize = 4;
const ORIGINAL: u16 = 1;
const ANSWER: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL: u16 = 4;
const NAT_SOURCE: u16 = 6;
const NAT_DESTINATION: u16 = 13;
const MASTER: u16 = 14;
/// Helper, time left, mark, adjusted sequence numbers, zone, labels.
const KEPT: [u16; 7] = [5, 7, 8, 15, 16, 18, 22];
const IS_SOURCE: u32 = 1 << 4;
const IS_DESTINATION: u32 = 1 << 5;
/// Expected by another, being offloaded: bits of which the kernel wants to hear nothing.
const PASSING: u32 = 1 | 1 << 14 | 1 << 15;
const TCP: u16 = 1;
const TCP_FLAGS: [u16; 2] = [4, 5];
const LIBERAL: u8 = 0x08;

fn open() -> Result<Netlink> {
    Netlink::open(libc::NETLINK_NETFILTER)
        .during("cannot ask for connections", || "socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER)".into())
}

/// Those of this thread's network namespace.
pub fn save() -> Result<Vec<Message>> {
    match open()?.dump(GET, &[0; FIXED]) {
        // A kernel that tracks none.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Vec::new()),
        all => all.during("cannot list the tracked connections", || "IPCTNL_MSG_CT_GET".into()),
    }
}

/// The connections of an image.
pub fn read(bytes: &[u8]) -> Result<Vec<Message>> {
    let bad = || Error::new("netns-ct-N.img has messages that make no sense there");
    let all = Message::all(bytes).map_err(|_| bad())?;
    let sane = |m: &Message| m.kind == NEW && m.body.len() >= FIXED;
    if all.iter().all(sane) { Ok(all) } else { Err(bad()) }
}

/// Has them tracked. Runs in the namespace.
pub fn restore(all: &[Message]) -> Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    let socket = open()?;
    // What another has led to is tracked anew, when it says something.
    for m in all.iter().filter(|m| m.attribute(FIXED, MASTER).is_none()) {
        let Some(body) = taken(m) else { continue };
        match socket.change(NEW, CREATE | EXCLUSIVE, &body) {
            Err(Errno::EEXIST) => {}
            done => done
                .during("cannot have a connection tracked", || "IPCTNL_MSG_CT_NEW".into())
                .map_err(|e| e.remedy("does this kernel have nf_conntrack_netlink?"))?,
        }
    }
    Ok(())
}

/// A connection as the kernel takes it; none where it cannot.
fn taken(m: &Message) -> Option<Vec<u8>> {
    let status = u32::from_be(u32_at(m.attribute(FIXED, STATUS)?, 0)?);
    let (original, answer) = (m.attribute(FIXED, ORIGINAL)?, m.attribute(FIXED, ANSWER)?);
    let mut body = vec![*m.body.first()?, 0, 0, 0];
    body.extend(nested(ORIGINAL, original));
    if status & (IS_SOURCE | IS_DESTINATION) == 0 {
        body.extend(nested(ANSWER, answer));
    } else {
        let (from, to) = (End::all(original)?, End::all(answer)?);
        body.extend(nested(ANSWER, &from.turned()));
        if status & IS_DESTINATION != 0 {
            body.extend(nested(NAT_DESTINATION, &to.source.range()));
        }
        if status & IS_SOURCE != 0 {
            body.extend(nested(NAT_SOURCE, &to.destination.range()));
        }
    }
    body.extend(attribute(STATUS, &(status & !PASSING).to_be_bytes()));
    if let Some(protocol) = m.attribute(FIXED, PROTOCOL) {
        let one = |(kind, value): (u16, &[u8])| match kind {
            TCP => nested(TCP, &attributes(value).flat_map(liberal).collect::<Vec<_>>()),
            _ => nested(kind, value),
        };
        body.extend(nested(PROTOCOL, &attributes(protocol).flat_map(one).collect::<Vec<_>>()));
    }
    let kept = m.attributes(FIXED).filter(|(kind, _)| KEPT.contains(kind));
    // Those that hold others are the helper and the adjusted numbers.
    body.extend(kept.flat_map(|(kind, value)| match kind {
        5 | 15 | 16 => nested(kind, value),
        _ => attribute(kind, value),
    }));
    Some(body)
}

fn liberal((kind, value): (u16, &[u8])) -> Vec<u8> {
    match value.first() {
        Some(flags) if TCP_FLAGS.contains(&kind) => {
            let flags = flags | LIBERAL;
            attribute(kind, &[flags, flags])
        }
        _ => attribute(kind, value),
    }
}

/// An address, as an attribute of its family, and a port.
#[derive(Clone, Default)]
struct End {
    address: Vec<u8>,
    port: Vec<u8>,
}

/// Both ends of one direction.
struct Ends {
    source: End,
    destination: End,
    protocol: Vec<u8>,
}

impl End {
    /// The ends in a tuple; none without ports.
    fn all(tuple: &[u8]) -> Option<Ends> {
        let part = |kind| attributes(tuple).find(|(k, _)| *k == kind).map(|(_, value)| value);
        let addresses: BTreeMap<u16, &[u8]> = attributes(part(1)?).collect();
        let ports: BTreeMap<u16, &[u8]> = attributes(part(2)?).collect();
        let end = |v4: u16, v6: u16, port: u16| {
            let address = addresses.get(&v4).or_else(|| addresses.get(&v6))?;
            Some(Self { address: address.to_vec(), port: ports.get(&port)?.to_vec() })
        };
        Some(Ends { source: end(1, 3, 2)?, destination: end(2, 4, 3)?, protocol: ports.get(&1)?.to_vec() })
    }

    /// Exactly this one, for a translation.
    fn range(&self) -> Vec<u8> {
        let kinds = if self.address.len() == 4 { [1, 2] } else { [4, 5] };
        let ports = [attribute(1, &self.port), attribute(2, &self.port)].concat();
        let addresses = kinds.map(|kind| attribute(kind, &self.address)).concat();
        [addresses, nested(3, &ports)].concat()
    }
}

impl Ends {
    /// The other direction.
    fn turned(&self) -> Vec<u8> {
        let kinds = if self.source.address.len() == 4 { [1, 2] } else { [3, 4] };
        let addresses =
            [attribute(kinds[0], &self.destination.address), attribute(kinds[1], &self.source.address)];
        let ports = [
            attribute(1, &self.protocol),
            attribute(2, &self.destination.port),
            attribute(3, &self.source.port),
        ];
        [nested(1, &addresses.concat()), nested(2, &ports.concat())].concat()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::sys::network::loopback_up;
    use crate::sys::testing::in_child;

    fn nft(words: &str) -> bool {
        Command::new("nft").arg(words).status().is_ok_and(|status| status.success())
    }

    /// What does not pass: ends, and what is translated.
    fn lasting(all: &[Message]) -> Vec<(Vec<u8>, Vec<u8>, u32)> {
        let one = |m: &Message| {
            let value = |kind| m.attribute(FIXED, kind).unwrap_or_default().to_vec();
            let status = u32::from_be(u32_at(&value(STATUS), 0).unwrap_or(0));
            // That nothing is translated is decided when a connection begins, and not asked later.
            (value(ORIGINAL), value(ANSWER), status & !0x180)
        };
        let mut all: Vec<_> = all.iter().map(one).collect();
        all.sort();
        all
    }

    #[test]
    fn connections_and_their_translations_come_back() {
        in_child(libc::CLONE_NEWNET, || {
            loopback_up().unwrap();
            let rules = "table ip t {
                chain in { type filter hook input priority 0; ct state established,related accept; }
                chain out { type nat hook output priority -100; udp dport 7007 redirect to :7008; }
            }";
            if !nft(rules) {
                eprintln!("SKIPPED: nft is not installed, or the kernel tracks no connections");
                return;
            }
            let listener = TcpListener::bind("127.0.0.1:7009").unwrap();
            let _client = TcpStream::connect("127.0.0.1:7009").unwrap();
            let _server = listener.accept().unwrap();
            let (a, b) =
                (UdpSocket::bind("127.0.0.1:7001").unwrap(), UdpSocket::bind("127.0.0.1:7008").unwrap());
            b.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut buffer = [0; 8];
            a.send_to(b"one", "127.0.0.1:7007").unwrap();
            assert_eq!(b.recv(&mut buffer).unwrap(), 3);
            let before = save().unwrap();
            assert!(before.len() >= 2, "{before:?}");
            // Forgotten; new ones would not be translated.
            open().unwrap().change(1 << 8 | 2, 0, &[0; FIXED]).unwrap();
            assert!(nft("flush chain ip t out"));
            assert!(save().unwrap().is_empty());
            let bytes: Vec<u8> = before.iter().flat_map(Message::bytes).collect();
            restore(&read(&bytes).unwrap()).unwrap();
            assert_eq!(lasting(&save().unwrap()), lasting(&before));
            a.send_to(b"four", "127.0.0.1:7007").unwrap();
            assert_eq!(b.recv(&mut buffer).unwrap(), 4);
        });
    }

    #[test]
    fn garbage_is_refused() {
        assert!(read(&[7]).is_err());
        assert!(read(&Message { kind: GET, flags: 0, body: vec![0; 4] }.bytes()).is_err());
        assert_eq!(taken(&Message { kind: NEW, flags: 0, body: vec![0; 4] }), None);
    }
}
