//! netlink(7): messages of attributes, one datagram or many.
//!
//! ```text
//!   message    length u32 │ kind u16 │ flags u16 │ sequence u32 │ port u32 │ body       padded to 4
//!   body       a fixed part that depends on the kind │ attributes
//!   attribute  length u16 │ kind u16 │ bytes                                            padded to 4
//! ```

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::socket::socket;
use super::sockopt::set_int;

const HEADER: usize = 16;
const ERROR: u16 = libc::NLMSG_ERROR as u16;
const DONE: u16 = libc::NLMSG_DONE as u16;
const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const MULTI: u16 = libc::NLM_F_MULTI as u16;
const DUMP: u16 = libc::NLM_F_DUMP as u16;
const INTERRUPTED: u16 = libc::NLM_F_DUMP_INTR as u16;
/// Says in a kind of attribute that it holds attributes; another bit says that numbers are big-endian.
const KIND: u16 = 0x3fff;
const NESTED: u16 = 0x8000;
/// A length of two bytes counts itself and the kind.
const LONGEST: usize = u16::MAX as usize - 4;

/// Asks for an answer even if all goes well.
pub const ACK: u16 = libc::NLM_F_ACK as u16;
/// Makes what is not there.
pub const CREATE: u16 = libc::NLM_F_CREATE as u16;
/// Fails where it is there.
pub const EXCLUSIVE: u16 = libc::NLM_F_EXCL as u16;
/// Takes the place of what is there.
pub const REPLACE: u16 = libc::NLM_F_REPLACE as u16;
/// Comes after what is there.
pub const APPEND: u16 = libc::NLM_F_APPEND as u16;

/// One message, without what only its conversation needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// What it is about.
    pub kind: u16,
    /// How it is meant.
    pub flags: u16,
    /// The fixed part and the attributes.
    pub body: Vec<u8>,
}

impl Message {
    /// As it goes over a socket, or into an image.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = ((HEADER + self.body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend([0; 8]); // sequence, port
        bytes.extend(&self.body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// All messages in these bytes.
    pub fn all(mut bytes: &[u8]) -> nix::Result<Vec<Self>> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let length = u32_at(bytes, 0).ok_or(Errno::EBADMSG)? as usize;
            let body = bytes.get(HEADER..length).ok_or(Errno::EBADMSG)?.to_vec();
            let kind = u16_at(bytes, 4).ok_or(Errno::EBADMSG)?;
            let flags = u16_at(bytes, 6).ok_or(Errno::EBADMSG)?;
            all.push(Self { kind, flags, body });
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(all)
    }

    /// The attributes behind a fixed part of that length.
    pub fn attributes(&self, fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
        attributes(self.body.get(fixed.next_multiple_of(4)..).unwrap_or_default())
    }

    /// The first attribute of a kind.
    pub fn attribute(&self, fixed: usize, kind: u16) -> Option<&[u8]> {
        self.attributes(fixed).find(|(k, _)| *k == kind).map(|(_, value)| value)
    }
}

/// The attributes in these bytes, up to the first that makes no sense.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & KIND;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// One attribute. A value longer than any can be is cut: its end would pass for attributes of their own.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let value = &value[..value.len().min(LONGEST)];
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An attribute that holds attributes.
pub fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    attribute(kind | NESTED, value)
}

/// An attribute that holds a string.
pub fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), b"\0"].concat())
}

/// The string that an attribute holds.
pub fn text_of(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

/// Two bytes in the machine's order.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Four bytes in the machine's order.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A socket of the network namespace in which it was made.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    /// A socket for one part of the kernel, in this thread's network namespace.
    pub fn open(protocol: i32) -> nix::Result<Self> {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol).map(Self)
    }

    /// Sends a request, and waits for the answer that it has been done.
    pub fn change(&self, kind: u16, flags: u16, body: &[u8]) -> nix::Result<()> {
        self.ask(kind, ACK | flags, body)?;
        self.answers(&mut |_| true).map(drop)
    }

    /// The one message that answers a request.
    pub fn get(&self, kind: u16, body: &[u8]) -> nix::Result<Message> {
        self.ask(kind, 0, body)?;
        let mut answer = None;
        self.answers(&mut |message| {
            answer = Some(message);
            true
        })?;
        answer.ok_or(Errno::ENODATA)
    }

    /// All that there is of a kind. What changes while it is told is told again.
    pub fn dump(&self, kind: u16, body: &[u8]) -> nix::Result<Vec<Message>> {
        for _ in 0..100 {
            self.ask(kind, DUMP, body)?;
            let mut all = Vec::new();
            if self.answers(&mut |message| {
                let more = message.flags & MULTI != 0;
                all.push(message);
                !more
            })? {
                return Ok(all);
            }
        }
        Err(Errno::EAGAIN)
    }

    /// Sends what may be long, and hears of the first failure and what kind of message it was, or that the one that asked
    /// for an answer was done.
    pub fn batch(&self, all: &[Message]) -> Result<(), (Errno, u16)> {
        let one = |m: &Message| Message { flags: m.flags | REQUEST, ..m.clone() }.bytes();
        let bytes: Vec<u8> = all.iter().flat_map(one).collect();
        let (mut sent, mut kind) = (Ok(()), 0);
        if bytes.len() > 64 << 10 {
            let room = i32::try_from(bytes.len().saturating_mul(2)).unwrap_or(i32::MAX / 2);
            sent = set_int(&self.0, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room);
        }
        sent.and_then(|()| send(self.0.as_raw_fd(), &bytes, MsgFlags::empty()).map(drop))
            .and_then(|()| self.hear(&mut |_| false, &mut kind).map(drop))
            .map_err(|errno| (errno, kind))
    }

    fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> nix::Result<()> {
        let message = Message { kind, flags: REQUEST | flags, body: body.to_vec() };
        send(self.0.as_raw_fd(), &message.bytes(), MsgFlags::empty()).map(drop)
    }

    /// Takes answers until `take` says that there are no more, or the kernel does. False: they may contradict each other.
    fn answers(&self, take: &mut dyn FnMut(Message) -> bool) -> nix::Result<bool> {
        self.hear(take, &mut 0)
    }

    /// As [`Self::answers`]; `of` becomes the kind of the message that failed.
    fn hear(&self, take: &mut dyn FnMut(Message) -> bool, of: &mut u16) -> nix::Result<bool> {
        let mut buffer = vec![0; 256 << 10];
        let mut sound = true;
        loop {
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for message in Message::all(buffer.get(..length).ok_or(Errno::EMSGSIZE)?)? {
                sound &= message.flags & INTERRUPTED == 0;
                match message.kind {
                    ERROR | DONE => {
                        let code = u32_at(&message.body, 0).unwrap_or(0).cast_signed();
                        *of = u16_at(&message.body, 8).unwrap_or(0);
                        return if code < 0 { Err(Errno::from_raw(code.wrapping_neg())) } else { Ok(sound) };
                    }
                    _ if take(message) => return Ok(sound),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_go_into_bytes_and_come_out() {
        let body = [&[0u8; 8][..], &text(3, "lo"), &attribute(4, &[1, 2, 3, 4])].concat();
        let all = [Message { kind: 16, flags: 2, body }, Message { kind: 20, flags: 0, body: vec![7; 9] }];
        let bytes: Vec<u8> = all.iter().flat_map(Message::bytes).collect();
        assert_eq!(Message::all(&bytes).unwrap(), all);
        assert_eq!(all[0].attribute(8, 3).map(text_of).as_deref(), Some("lo"));
        assert_eq!(all[0].attributes(8).count(), 2);
        assert_eq!(all[0].attribute(8, 5), None);
    }

    #[test]
    fn nothing_of_a_long_value_is_an_attribute_of_its_own() {
        let bytes = [attribute(1, &[0; 70_000]), attribute(2, &[7])].concat();
        let all: Vec<_> = attributes(&bytes).map(|(kind, value)| (kind, value.len())).collect();
        assert_eq!(all, [(1, LONGEST), (2, 1)]);
    }

    #[test]
    fn garbage_is_refused() {
        for bytes in [&[1, 0, 0, 0][..], &[200, 0, 0, 0, 0, 0, 0, 0], &[7]] {
            assert!(Message::all(bytes).is_err(), "{bytes:?}");
        }
        assert_eq!(attributes(&[200, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[0, 0, 1, 0, 0, 0]).count(), 0);
    }

    #[test]
    fn the_kernel_answers() {
        let socket = Netlink::open(libc::NETLINK_ROUTE).unwrap();
        let links = socket.dump(libc::RTM_GETLINK, &[0; 16]).unwrap();
        let names = links.iter().filter_map(|link| link.attribute(16, libc::IFLA_IFNAME)).map(text_of);
        assert!(names.into_iter().any(|name| name == "lo"));
        let none = [&[0u8; 16][..], &text(libc::IFLA_IFNAME, "none-such")].concat();
        assert_eq!(socket.get(libc::RTM_GETLINK, &none), Err(Errno::ENODEV));
    }
}
