//! What waits in a unix socket: bytes or packets, their senders, and the descriptors passed along.
//!
//! ```text
//!   stream     one MSG_PEEK takes all that SIOCINQ counts, unless descriptors or credentials lie between
//!   packets    one MSG_PEEK tells whether there are any
//!   else       SO_PEEK_OFF walks along the queue, and is put back
//! ```
//!
//! So the running program's socket is touched only where there is no other way. An error that the socket has not
//! reported yet (ECONNRESET) would be taken from the program by a receive that finds nothing: poll(2) tells of it, and
//! what is read then is what is known to be there.
//!
//! An empty packet is seen once: the kernel lets the offset step over it afterwards. When a dump has left the program
//! running and such a packet is still there at the next one, only the first in the queue is found.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrLike, UnixAddr, recvmsg};

use super::more::Credentials;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::{Error, Result};
use crate::sys::ioctl;
use crate::sys::sockopt::{get_int, set_int};

const WHAT: &str = "cannot look into a socket's queue";
/// Room for a packet at first. It grows as needed, up to the most that a socket's buffer can hold.
const PACKET: usize = 256 << 10;
const PACKET_MAX: usize = 1 << 30;
/// Room for 253 descriptors (SCM_MAX_FD), credentials, a label and a pidfd.
const CONTROL: usize = 8 << 10;

/// One packet, or bytes that belong together.
#[derive(Debug, Default)]
pub struct Packet {
    /// What is in it.
    pub bytes: Vec<u8>,
    /// Descriptors passed with it.
    pub rights: Vec<OwnedFd>,
    /// The sender's address, as bind(2) takes it.
    pub from: Vec<u8>,
    /// What it says of its sender.
    pub credentials: Option<Credentials>,
}

/// What a socket holds for its program.
#[derive(Debug, Default)]
pub struct Queue {
    /// What waits, in order.
    pub packets: Vec<Packet>,
    /// ECONNRESET has not been reported yet.
    pub reset: bool,
    /// SO_PEEK_OFF.
    pub peek_offset: i32,
}

/// Is there urgent data, which cannot be put back?
pub fn urgent(live: &Live, kind: i32) -> bool {
    let mut byte = [0; 1];
    let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    kind == libc::SOCK_STREAM
        && recvmsg::<()>(live.file.as_raw_fd(), &mut [IoSliceMut::new(&mut byte)], None, flags)
            .is_ok_and(|message| message.bytes == 1)
}

/// Reads the queue of a socket, which keeps it.
pub fn read(live: &Live, kind: i32) -> Result<Queue> {
    let peek_offset = get_int(&live.file, libc::SOL_SOCKET, libc::SO_PEEK_OFF)
        .during(WHAT, || "getsockopt(_, SOL_SOCKET, SO_PEEK_OFF)".into())?;
    let mut queue = Queue { peek_offset, reset: has_error(live)?, packets: Vec::new() };
    let bytes = ioctl::readable(&live.file).during(WHAT, || "ioctl(_, SIOCINQ)".into())?;
    let bytes = usize::try_from(bytes).unwrap_or(0);
    if kind == libc::SOCK_STREAM {
        if bytes > 0 {
            queue.packets = stream(live, bytes, peek_offset)?;
        }
        return Ok(queue);
    }
    if queue.reset {
        // Any look would take the error. An empty queue needs none.
        return if kind == libc::SOCK_SEQPACKET && bytes == 0 {
            Ok(queue)
        } else {
            Err(Error::new("a unix socket with packets was disconnected, which its program has not noticed")
                .remedy("try again")
                .passing())
        };
    }
    queue.packets = packets(live, kind, peek_offset)?;
    Ok(queue)
}

fn has_error(live: &Live) -> Result<bool> {
    let mut fds = [PollFd::new(live.file.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).during(WHAT, || "poll(_, 1, 0)".into())?;
    Ok(fds[0].revents().is_some_and(|r| r.contains(PollFlags::POLLERR)))
}

/// As many bytes as there are, and not a look more.
fn stream(live: &Live, bytes: usize, offset: i32) -> Result<Vec<Packet>> {
    let mut buffer = vec![0; bytes];
    if offset < 0 {
        match peek(live, &mut buffer)? {
            Seen::Packet(packet) if packet.bytes.len() == bytes => return Ok(vec![packet]),
            Seen::Nothing => return Err(Error::new(WHAT).call("recvmsg(_, MSG_PEEK)", Errno::EAGAIN)),
            _ => {}
        }
    }
    at_offset(live, offset, || {
        let (mut found, mut seen) = (Vec::new(), 0);
        while seen < bytes {
            match peek(live, buffer.get_mut(seen..).unwrap_or_default())? {
                Seen::Packet(packet) if !packet.bytes.is_empty() => {
                    seen += packet.bytes.len();
                    found.push(packet);
                }
                _ => {
                    return Err(Error::new(format!("of {bytes} bytes in a unix socket, {seen} can be read")));
                }
            }
        }
        Ok(found)
    })
}

fn packets(live: &Live, kind: i32, offset: i32) -> Result<Vec<Packet>> {
    let mut buffer = vec![0; PACKET];
    let mut found = Vec::new();
    if offset < 0 {
        match peek(live, &mut buffer)? {
            Seen::Nothing => return Ok(found),
            Seen::Packet(packet) if packet.bytes.is_empty() && packet.rights.is_empty() => {
                if ended(live, kind)? {
                    return Ok(found);
                }
                // This look lets the offset step over it.
                found.push(packet);
            }
            _ => {}
        }
    }
    at_offset(live, offset, || {
        let mut seen = 0;
        loop {
            match peek(live, &mut buffer)? {
                Seen::Nothing => return Ok(found),
                Seen::Packet(p) if p.bytes.is_empty() && p.rights.is_empty() && ended(live, kind)? => {
                    return Ok(found);
                }
                Seen::Packet(packet) => {
                    seen += packet.bytes.len();
                    found.push(packet);
                }
                Seen::More => {
                    if buffer.len() >= PACKET_MAX {
                        return Err(Error::new("a packet in a unix socket is larger than can be read"));
                    }
                    buffer = vec![0; buffer.len() * 4];
                    set_offset(live, i32::try_from(seen).unwrap_or(i32::MAX))?;
                }
            }
        }
    })
}

/// Would a receive say 0 because nobody sends any more? An empty packet before that end cannot be told from it.
fn ended(live: &Live, kind: i32) -> Result<bool> {
    if kind != libc::SOCK_SEQPACKET {
        return Ok(false);
    }
    let end = PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut fds = [PollFd::new(live.file.as_fd(), end)];
    poll(&mut fds, PollTimeout::ZERO).during(WHAT, || "poll(_, 1, 0)".into())?;
    Ok(fds[0].any().unwrap_or(true))
}

fn set_offset(live: &Live, offset: i32) -> Result<()> {
    set_int(&live.file, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
        .during(WHAT, || format!("setsockopt(_, SO_PEEK_OFF, {offset})"))
}

/// Looks from the front of the queue on, whatever offset the program looks from.
fn at_offset<T>(live: &Live, before: i32, look: impl FnOnce() -> Result<T>) -> Result<T> {
    set_offset(live, 0)?;
    let result = look();
    set_offset(live, before)?;
    result
}

enum Seen {
    /// Nothing waits, and nobody may ever send.
    Nothing,
    /// A packet, or bytes.
    Packet(Packet),
    /// A packet that the buffer is too small for.
    More,
}

fn peek(live: &Live, buffer: &mut [u8]) -> Result<Seen> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut packet = Packet::default();
    let (length, flags) = loop {
        let mut control = vec![0; CONTROL];
        let mut data = [IoSliceMut::new(buffer)];
        let message = match recvmsg::<UnixAddr>(live.file.as_raw_fd(), &mut data, Some(&mut control), flags) {
            Ok(message) => message,
            // EINVAL: listening. ENOTCONN: nobody is there, and nothing waits.
            Err(Errno::EAGAIN | Errno::EINVAL | Errno::ENOTCONN) => return Ok(Seen::Nothing),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(Error::new(WHAT).call("recvmsg(_, MSG_PEEK)", errno)),
        };
        for part in message.cmsgs().during(WHAT, || "recvmsg(_, MSG_PEEK)".into())? {
            match part {
                ControlMessageOwned::ScmRights(fds) => {
                    // SAFETY: the kernel has just installed these for us, and nobody else knows of them.
                    packet.rights.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
                ControlMessageOwned::ScmCredentials(c) => {
                    packet.credentials = Some(Credentials { pid: c.pid(), uid: c.uid(), gid: c.gid() });
                }
                _ => {}
            }
        }
        packet.from = message.address.as_ref().map(address).unwrap_or_default();
        break (message.bytes, message.flags);
    };
    if flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(Error::new("what comes with a packet in a unix socket is larger than can be read"));
    }
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return Ok(Seen::More);
    }
    packet.bytes = buffer.get(..length).unwrap_or_default().to_vec();
    Ok(Seen::Packet(packet))
}

/// An address as bind(2) takes it.
fn address(address: &UnixAddr) -> Vec<u8> {
    // A connected socket names nobody: not even a family.
    if usize::try_from(address.len()).is_ok_and(|len| len <= size_of::<libc::sa_family_t>()) {
        return Vec::new();
    }
    if let Some(name) = address.as_abstract() {
        [&[0], name].concat()
    } else if let Some(path) = address.path() {
        [path.as_os_str().as_encoded_bytes(), &[0]].concat()
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket::unix_pair;
    use nix::sys::socket::{ControlMessage, send, sendmsg};
    use std::io::{IoSlice, Read};

    fn live(fd: &OwnedFd) -> Live {
        Live::own(fd.try_clone().unwrap(), 1).unwrap()
    }

    fn put(fd: &OwnedFd, bytes: &[u8], rights: &[i32]) {
        let control = [ControlMessage::ScmRights(rights)];
        let control = if rights.is_empty() { &control[..0] } else { &control[..] };
        sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None).unwrap();
    }

    fn bytes(queue: &Queue) -> Vec<&[u8]> {
        queue.packets.iter().map(|p| p.bytes.as_slice()).collect()
    }

    #[test]
    fn a_stream_is_read_whole_and_kept() {
        let (a, b) = unix_pair(libc::SOCK_STREAM).unwrap();
        put(&a, b"one", &[]);
        put(&a, b"two", &[]);
        assert_eq!(bytes(&read(&live(&b), libc::SOCK_STREAM).unwrap()), [b"onetwo"]);
        put(&a, b"three", &[a.as_raw_fd()]);
        put(&a, b"four", &[]);
        for _ in 0..2 {
            let queue = read(&live(&b), libc::SOCK_STREAM).unwrap();
            assert_eq!(bytes(&queue), [&b"onetwothree"[..], b"four"]);
            assert_eq!(queue.packets[0].rights.len(), 1);
            assert_eq!(get_int(&b, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap(), -1);
        }
        assert!(!urgent(&live(&b), libc::SOCK_STREAM));
        send(a.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
        assert!(urgent(&live(&b), libc::SOCK_STREAM));
    }

    #[test]
    fn packets_of_any_size() {
        for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
            let (a, b) = unix_pair(kind).unwrap();
            set_int(&a, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 4 << 20).unwrap();
            assert!(read(&live(&b), kind).unwrap().packets.is_empty());
            let large = vec![7; PACKET + 1];
            for packet in [&b""[..], b"x", &large, b"", b"last"] {
                put(&a, packet, &[]);
            }
            let queue = read(&live(&b), kind).unwrap();
            assert_eq!(bytes(&queue), [&b""[..], b"x", &large, b"", b"last"]);
            // The one in front is found again.
            assert_eq!(read(&live(&b), kind).unwrap().packets[0].bytes, b"");
            set_int(&b, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 1).unwrap();
            let queue = read(&live(&b), kind).unwrap();
            assert!(queue.packets.iter().any(|p| p.bytes == b"last"));
            assert_eq!(queue.peek_offset, 1);
            assert_eq!(get_int(&b, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap(), 1);
        }
    }

    #[test]
    fn a_reset_is_left_to_the_program() {
        for kind in [libc::SOCK_STREAM, libc::SOCK_SEQPACKET] {
            let (a, b) = unix_pair(kind).unwrap();
            put(&b, b"never read", &[]);
            drop(a);
            let queue = read(&live(&b), kind).unwrap();
            assert!(queue.reset && queue.packets.is_empty());
            let e = std::fs::File::from(b).read(&mut [0; 4]).unwrap_err();
            assert_eq!(e.raw_os_error(), Some(libc::ECONNRESET));
        }
    }
}
