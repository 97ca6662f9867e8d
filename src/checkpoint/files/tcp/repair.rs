//! Repair mode: the socket options that read and write what a TCP socket knows, while it keeps still.
//!
//! A socket in repair mode refuses to be read and written by its program, and forgets its connection silently when it
//! is closed. Its `SO_REUSEADDR` is overruled meanwhile, and cleared at the end, so it is put back.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::checkpoint::error::Context;
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{get_bytes, get_int, set_bytes, set_int};

use libc::{SOL_SOCKET, SOL_TCP};

const SO_PEEK_OFF: i32 = 42;
/// Leave repair mode without asking the peer for its window. Since 4.19.
const OFF_WITHOUT_PROBE: i32 = -1;

/// The queues that TCP_REPAIR_QUEUE knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// Neither.
    None = 0,
    /// What was received.
    Received = 1,
    /// What was sent, or is to be.
    Sent = 2,
}

/// Sets an option of TCP.
pub fn set(fd: &OwnedFd, name: i32, value: i32) -> Result<()> {
    set_int(fd, SOL_TCP, name, value)
        .during("cannot repair a TCP connection", || format!("setsockopt(_, SOL_TCP, {name}, {value})"))
}

/// Reads an option of TCP.
pub fn get(fd: &OwnedFd, name: i32) -> Result<u32> {
    get_int(fd, SOL_TCP, name)
        .map(i32::cast_unsigned)
        .during("cannot look at a TCP connection", || format!("getsockopt(_, SOL_TCP, {name}, _, _)"))
}

/// Sets an option of TCP that is some words.
pub fn set_words(fd: &OwnedFd, name: i32, words: &[u32]) -> Result<()> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    set_bytes(fd, SOL_TCP, name, &bytes)
        .during("cannot repair a TCP connection", || format!("setsockopt(_, SOL_TCP, {name}, {words:?})"))
}

/// Into repair mode. No queue is chosen.
pub fn on(fd: &OwnedFd) -> Result<()> {
    set(fd, libc::TCP_REPAIR, 1).map_err(|e| match e.errno() {
        Some(Errno::EPERM) => {
            e.remedy("this needs CAP_NET_ADMIN in the user namespace that owns the network namespace")
        }
        _ => e,
    })
}

/// Out of repair mode, without a word to the peer.
pub fn off(fd: &OwnedFd) -> Result<()> {
    match set_int(fd, SOL_TCP, libc::TCP_REPAIR, OFF_WITHOUT_PROBE) {
        Err(Errno::EINVAL) => set(fd, libc::TCP_REPAIR, 0),
        other => other.during("cannot end the repair of a TCP connection", || {
            "setsockopt(_, SOL_TCP, TCP_REPAIR, -1)".into()
        }),
    }
}

/// Out of repair mode for good: the peer is asked for its window, and SO_REUSEADDR is as it was.
pub fn finish(fd: &OwnedFd, reuse: bool) -> Result<()> {
    set(fd, libc::TCP_REPAIR, 0)?;
    set_reuse(fd, i32::from(reuse))
}

/// Whether it is in repair mode.
pub fn is_on(fd: &OwnedFd) -> bool {
    get_int(fd, SOL_TCP, libc::TCP_REPAIR).is_ok_and(|on| on == 1)
}

/// SO_REUSEADDR.
pub fn reuse(fd: &OwnedFd) -> Result<i32> {
    get_int(fd, SOL_SOCKET, libc::SO_REUSEADDR)
        .during("cannot look at a TCP connection", || "getsockopt(_, SOL_SOCKET, SO_REUSEADDR, _, _)".into())
}

/// Sets SO_REUSEADDR.
pub fn set_reuse(fd: &OwnedFd, reuse: i32) -> Result<()> {
    set_int(fd, SOL_SOCKET, libc::SO_REUSEADDR, reuse)
        .during("cannot repair a TCP connection", || format!("setsockopt(_, SO_REUSEADDR, {reuse})"))
}

/// Repair mode for a while; what it changes is put back at the end.
pub struct Repair<'a> {
    fd: &'a OwnedFd,
    reuse: i32,
    /// SO_PEEK_OFF, where the program has set one.
    peek: Option<i32>,
}

impl<'a> Repair<'a> {
    /// Begins.
    pub fn begin(fd: &'a OwnedFd) -> Result<Self> {
        let reuse = reuse(fd)?;
        let peek = get_int(fd, SOL_SOCKET, SO_PEEK_OFF).ok().filter(|at| *at >= 0);
        on(fd)?;
        let repair = Self { fd, reuse, peek };
        if peek.is_some() {
            set_int(fd, SOL_SOCKET, SO_PEEK_OFF, -1)
                .during("cannot look at a TCP connection", || "setsockopt(_, SO_PEEK_OFF, -1)".into())?;
        }
        Ok(repair)
    }

    /// Ends.
    pub fn end(self) -> Result<()> {
        let result = self.undo();
        std::mem::forget(self);
        result
    }

    fn undo(&self) -> Result<()> {
        off(self.fd)?;
        set_reuse(self.fd, self.reuse)?;
        if let Some(at) = self.peek {
            set_int(self.fd, SOL_SOCKET, SO_PEEK_OFF, at)
                .during("cannot look at a TCP connection", || format!("setsockopt(_, SO_PEEK_OFF, {at})"))?;
        }
        Ok(())
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        // What has failed before is what is told.
        let _ = self.undo();
    }
}

/// What TCP_INFO begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// State.
    pub state: u32,
    /// What was agreed upon: 1 timestamps, 2 SACK, 4 window scaling.
    pub options: u32,
    /// Scale of the windows that the peer tells us.
    pub snd_wscale: u32,
    /// Scale of those that we tell.
    pub rcv_wscale: u32,
}

/// Timestamps were agreed upon.
pub const TIMESTAMPS: u32 = 1;
/// Selective acknowledgements were agreed upon.
pub const SACK: u32 = 2;
/// Window scaling was agreed upon.
pub const WSCALE: u32 = 4;

/// Reads TCP_INFO.
pub fn info(fd: &OwnedFd) -> Result<Info> {
    let (info, _) = get_bytes::<8>(fd, SOL_TCP, libc::TCP_INFO)
        .during("cannot look at a TCP connection", || "getsockopt(_, SOL_TCP, TCP_INFO, _, _)".into())?;
    let [state, _, _, _, _, options, scales, _] = info.map(u32::from);
    Ok(Info { state, options, snd_wscale: scales & 15, rcv_wscale: scales >> 4 })
}

/// The five words of TCP_REPAIR_WINDOW: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
pub fn window(fd: &OwnedFd) -> Result<[u32; 5]> {
    let (bytes, _) = get_bytes::<20>(fd, SOL_TCP, libc::TCP_REPAIR_WINDOW)
        .during("cannot look at a TCP connection", || {
            "getsockopt(_, SOL_TCP, TCP_REPAIR_WINDOW, _, _)".into()
        })?;
    let word = |n: usize| bytes.iter().skip(4 * n).take(4).rev().fold(0, |w, b| w << 8 | u32::from(*b));
    Ok([word(0), word(1), word(2), word(3), word(4)])
}

/// The number of the byte at which a queue ends.
pub fn sequence(fd: &OwnedFd, queue: Queue) -> Result<u32> {
    set(fd, libc::TCP_REPAIR_QUEUE, queue as i32)?;
    get(fd, libc::TCP_QUEUE_SEQ)
}

/// Sets the number of the byte at which an empty queue begins.
pub fn set_sequence(fd: &OwnedFd, queue: Queue, sequence: u32) -> Result<()> {
    set(fd, libc::TCP_REPAIR_QUEUE, queue as i32)?;
    set(fd, libc::TCP_QUEUE_SEQ, sequence.cast_signed())
}

/// What is in a queue, of which this much is known to be. None if there is another number of bytes.
pub fn peek(fd: &OwnedFd, queue: Queue, length: usize) -> Result<Option<Vec<u8>>> {
    if length == 0 {
        return Ok(Some(Vec::new()));
    }
    set(fd, libc::TCP_REPAIR_QUEUE, queue as i32)?;
    let mut data = vec![0; length + 1];
    match recv(fd.as_raw_fd(), &mut data, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(got) if got == length => {
            data.truncate(length);
            Ok(Some(data))
        }
        Ok(_) | Err(Errno::EAGAIN) => Ok(None),
        Err(errno) => Err(Error::new("cannot look at a TCP connection")
            .call(format!("recv(_, _, {}, MSG_PEEK)", length + 1), errno)),
    }
}

/// Puts data into a socket that is in a state to take it without waiting: a queue under repair, or an unsent one.
pub fn fill(fd: &OwnedFd, mut data: &[u8]) -> Result<()> {
    // The kernel takes less at once when memory is in small pieces.
    let mut most = 64 << 10;
    while !data.is_empty() {
        let part = data.get(..most).unwrap_or(data);
        match send(fd.as_raw_fd(), part, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(taken) => data = data.get(taken..).unwrap_or_default(),
            Err(Errno::ENOMEM) if most > 1024 => most /= 2,
            Err(errno) => {
                return Err(Error::new("cannot fill a queue of a TCP connection")
                    .call(format!("send(_, _, {}, MSG_DONTWAIT)", part.len()), errno));
            }
        }
    }
    Ok(())
}
