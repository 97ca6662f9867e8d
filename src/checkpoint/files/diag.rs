//! Sockets of a network namespace, as sock_diag(7) lists them: what no socket tells about itself.
//!
//! ```text
//!   request:  nlmsghdr (16) | unix_diag_req (24): family, protocol, states, inode, what to show, cookie
//!   answer:   nlmsghdr (16) | unix_diag_msg (16): family, type, state, inode, cookie | attributes: len, type, bytes
//! ```

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, recv, send};

use crate::checkpoint::error::Context;
use crate::checkpoint::files::inside;
use crate::checkpoint::{Error, Result};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// TCP_LISTEN.
const LISTEN: u32 = 10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// Names, inodes of files, peers, waiting connections, queue lengths.
const SHOW: u32 = 1 | 2 | 4 | 8 | 0x10;

/// What the kernel lists of a unix socket.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct UnixSocket {
    /// TCP_ESTABLISHED (1), TCP_CLOSE (7), TCP_LISTEN (10).
    pub state: u32,
    /// Inode and device of its file, where it is bound to a path.
    pub file: Option<(u32, u32)>,
    /// Inode of its peer; 0 for one that is gone, was not accepted, or never was.
    pub peer: u32,
    /// It has a peer, and that one has no inode.
    pub faceless: bool,
    /// Inodes of the peers of connections that were not accepted; 0 for a peer that is gone.
    pub waiting: Vec<u32>,
    /// For a listener: how many connections may wait.
    pub backlog: u32,
    /// For any other: it has sent what nobody has received yet.
    pub sent: bool,
    /// What was shut down: 1 receiving, 2 sending.
    pub shutdown: u8,
}

/// The unix sockets of the container's network namespace, by inode.
#[derive(Debug, Default)]
pub struct Diag {
    /// By inode.
    pub unix: BTreeMap<u32, UnixSocket>,
}

impl Diag {
    /// Asks the kernel, in the network namespace of that process.
    pub fn read(pid: i32) -> Result<Self> {
        let mut diag = Self::default();
        list(pid, &request(), |message| diag.add(message))
            .map_err(|e| e.remedy("the kernel must be built with CONFIG_UNIX_DIAG"))?;
        Ok(diag)
    }

    /// Asks in all network namespaces of a container: that of init, and those of these processes.
    pub fn of(init: i32, others: &[i32]) -> Result<Self> {
        let mut all = Self::read(init)?;
        for pid in others {
            all.unix.extend(Self::read(*pid)?.unix);
        }
        Ok(all)
    }

    /// The listener that has not accepted the connection of this socket yet.
    pub fn listener_of(&self, client: u32) -> Option<u32> {
        self.unix.iter().find(|(_, s)| s.waiting.contains(&client)).map(|(inode, _)| *inode)
    }

    fn add(&mut self, message: &[u8]) -> Result<()> {
        let (fixed, rest) = message.split_at_checked(16).ok_or_else(garbled)?;
        let mut socket = UnixSocket { state: fixed[2].into(), ..UnixSocket::default() };
        attributes(rest, |number, value| match number {
            1 => socket.file = Some((word(value, 0), word(value, 4))),
            2 => (socket.peer, socket.faceless) = (word(value, 0), word(value, 0) == 0),
            3 => socket.waiting = value.chunks_exact(4).map(|c| word(c, 0)).collect(),
            4 if socket.state == LISTEN => socket.backlog = word(value, 4),
            4 => socket.sent = word(value, 4) != 0,
            6 => socket.shutdown = value.first().copied().unwrap_or(0),
            _ => {}
        })?;
        self.unix.insert(word(fixed, 4), socket);
        Ok(())
    }
}

fn request() -> Vec<u8> {
    let mut bytes = vec![libc::AF_UNIX as u8, 0, 0, 0];
    for word in [u32::MAX, 0, SHOW, 0, 0] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// Has the kernel list sockets, in the network namespace of that process. `add` gets each socket's message.
pub fn list(pid: i32, request: &[u8], add: impl FnMut(&[u8]) -> Result<()> + Send) -> Result<()> {
    inside::in_network(pid, || list_here(request, add))
}

/// Has the kernel list sockets, in this thread's network namespace.
pub fn list_here(request: &[u8], mut add: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let length = u32::try_from(HEADER + request.len()).map_err(|_| garbled())?;
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&(flags as u16).to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(request);
    let what = "cannot list the sockets";
    let fd = crate::sys::socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)
        .during(what, || "socket(AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG)".into())?;
    send(fd.as_raw_fd(), &bytes, MsgFlags::empty()).during(what, || "send(_, SOCK_DIAG_BY_FAMILY)".into())?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())
            .during(what, || "recv(_, _, _, 0)".into())?;
        if take(&buffer[..length], &mut add)? {
            return Ok(());
        }
    }
}

/// Takes in one datagram of messages. True at the end of the list.
fn take(mut bytes: &[u8], add: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<bool> {
    while let Some(header) = bytes.get(..HEADER) {
        let length = word(header, 0) as usize;
        let message = bytes.get(HEADER..length).ok_or_else(garbled)?;
        match half(header, 4) {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let errno = word(message, 0).cast_signed().wrapping_neg();
                return Err(Error::new("cannot list the sockets")
                    .call("SOCK_DIAG_BY_FAMILY", nix::errno::Errno::from_raw(errno)));
            }
            SOCK_DIAG_BY_FAMILY => add(message)?,
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The attributes in `bytes`: number and value.
pub fn attributes(mut bytes: &[u8], mut each: impl FnMut(u16, &[u8])) -> Result<()> {
    while bytes.len() >= 4 {
        let length = usize::from(half(bytes, 0));
        each(half(bytes, 2), bytes.get(4..length).ok_or_else(garbled)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(())
}

/// What the kernel lists cannot be read.
pub fn garbled() -> Error {
    Error::new("the kernel's list of sockets is garbled")
}

/// Zero behind the end.
pub fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn inode(fd: impl std::os::fd::AsFd) -> u32 {
        nix::sys::stat::fstat(fd).unwrap().st_ino as u32
    }

    #[test]
    fn peers_and_listeners_are_found() {
        let (a, b) = UnixStream::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let waiting = UnixStream::connect(dir.path().join("s")).unwrap();
        let diag = Diag::read(std::process::id().cast_signed()).unwrap();
        assert_eq!(diag.unix[&inode(&a)].peer, inode(&b));
        assert_eq!(diag.unix[&inode(&a)].state, 1);
        let listening = &diag.unix[&inode(&listener)];
        assert_eq!((listening.state, &listening.waiting[..]), (10, &[inode(&waiting)][..]));
        assert_ne!(listening.backlog, 0);
        assert!(!diag.unix[&inode(&waiting)].sent && !diag.unix[&inode(&a)].sent);
        assert_eq!(diag.listener_of(inode(&waiting)), Some(inode(&listener)));
        assert_eq!(diag.listener_of(inode(&a)), None);
        std::io::Write::write_all(&mut &waiting, b"x").unwrap();
        let diag = Diag::read(std::process::id().cast_signed()).unwrap();
        assert!(diag.unix[&inode(&waiting)].sent);
        assert!(listening.file.is_some());
    }

    #[test]
    fn garbage_is_an_error() {
        let mut none = |_: &[u8]| Ok(());
        assert!(take(&[0xff; 40], &mut none).is_err());
        assert!(!take(&[], &mut none).unwrap());
        assert!(attributes(&[0xff; 8], |_, _| {}).is_err());
    }
}
