//! A connection out of its image.
//!
//! ```text
//!   repair on ── bind ── sequences ── connect ── options, timestamp ── received ── sent ── unsent ── windows
//!      ── ends of the two directions: ours by shutdown(2), the peer's by a segment in its name
//!                                                       ... everything else of the restore ...  ── repair off
//! ```

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, shutdown};

use crate::checkpoint::error::Context;
use crate::checkpoint::files::tcp::repair::{self, Queue, SACK, TIMESTAMPS, WSCALE};
use crate::checkpoint::files::tcp::segment::{ACK, FIN, Segment};
use crate::checkpoint::files::tcp::state::{self, SYN_SENT};
use crate::checkpoint::files::{address, sockopts};
use crate::checkpoint::image::TcpStreamEntry;
use crate::checkpoint::model::TcpStream;
use crate::checkpoint::{Error, Result};
use crate::sys::{ioctl, sockopt};

/// How long the kernel may take to hand a segment to a socket of the same host.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long until it is sent again.
const AGAIN: Duration = Duration::from_millis(20);

/// Turns a new socket, options set, into this connection. It stays in repair mode.
pub fn make(
    fd: &OwnedFd,
    from: u32,
    stream: &TcpStream,
    local: SocketAddr,
    remote: SocketAddr,
) -> Result<()> {
    let mut e = stream.entry.clone();
    check(from, stream)?;
    // The numbers of the data alone; the ends follow.
    if state::has_received_fin(from) {
        e.inq_seq = e.inq_seq.wrapping_sub(1);
    }
    if state::has_sent_fin(from) {
        e.outq_seq = e.outq_seq.wrapping_sub(1);
    }
    sockopts::open_buffers(fd)?;
    repair::on(fd)?;
    bind(fd, local)?;
    let first = e.outq_seq.wrapping_sub(e.outq_len).wrapping_sub(u32::from(from == SYN_SENT));
    repair::set_sequence(fd, Queue::Received, e.inq_seq.wrapping_sub(e.inq_len))?;
    repair::set_sequence(fd, Queue::Sent, first)?;
    connect(fd, from, remote)?;
    set_options(fd, from, &e)?;

    if !stream.received.is_empty() {
        repair::set(fd, libc::TCP_REPAIR_QUEUE, Queue::Received as i32)?;
        repair::fill(fd, &stream.received)?;
    }
    let unsent = e.unsq_len.unwrap_or(0);
    let (sent, rest) = stream.sent.split_at(stream.sent.len().saturating_sub(unsent as usize));
    if !sent.is_empty() {
        repair::set(fd, libc::TCP_REPAIR_QUEUE, Queue::Sent as i32)?;
        repair::fill(fd, sent)?;
    }
    repair::set(fd, libc::TCP_REPAIR_QUEUE, Queue::None as i32)?;
    if !rest.is_empty() {
        // What was never sent goes the ordinary way, into a window that is still closed.
        repair::off(fd)?;
        let filled = repair::fill(fd, rest);
        repair::on(fd)?;
        filled?;
    }
    set_window(fd, from, &e)?;
    end(fd, from, &e, local, remote)?;
    repair::set(fd, libc::TCP_REPAIR_QUEUE, Queue::None as i32)?;
    verify(fd, from, stream)
}

/// Images are anybody's.
fn check(from: u32, stream: &TcpStream) -> Result<()> {
    let e = &stream.entry;
    let lengths = (e.inq_len as usize, e.outq_len as usize) == (stream.received.len(), stream.sent.len());
    if !lengths || e.unsq_len.unwrap_or(0) > e.outq_len {
        return Err(Error::new("the images tell the queues of a TCP connection wrong"));
    }
    if from == SYN_SENT && (e.inq_len, e.outq_len) != (0, 0) {
        return Err(Error::new("the images have data of a TCP connection that was never made"));
    }
    Ok(())
}

fn bind(fd: &OwnedFd, local: SocketAddr) -> Result<()> {
    // An IPv6 address that has just been given to its device cannot be bound to otherwise.
    const IPV6_FREEBIND: i32 = 78;
    let was = local.is_ipv6().then(|| sockopt::get_int(fd, libc::SOL_IPV6, IPV6_FREEBIND).ok()).flatten();
    let set = |value| {
        sockopt::set_int(fd, libc::SOL_IPV6, IPV6_FREEBIND, value)
            .during("cannot bind a TCP connection", || format!("setsockopt(_, IPV6_FREEBIND, {value})"))
    };
    if was == Some(0) {
        set(1)?;
    }
    let what = "cannot put a TCP connection in its place";
    sockopt::bind(fd, &address::bytes(&local)).during(what, || format!("bind(_, {local})")).map_err(|e| {
        match e.errno() {
            Some(Errno::EADDRNOTAVAIL) => {
                e.remedy("the network namespace needs this address, as it had at the checkpoint")
            }
            _ => e,
        }
    })?;
    if was == Some(0) { set(0) } else { Ok(()) }
}

fn connect(fd: &OwnedFd, from: u32, remote: SocketAddr) -> Result<()> {
    let what = "cannot connect a TCP connection again";
    if from != SYN_SENT {
        return sockopt::connect(fd, &address::bytes(&remote))
            .during(what, || format!("connect(_, {remote})"));
    }
    // This one asks the peer, without waiting for it.
    let flags = fcntl(fd, FcntlArg::F_GETFL).during(what, || "fcntl(_, F_GETFL)".into())?;
    let flags = OFlag::from_bits_retain(flags);
    let set = |flags| fcntl(fd, FcntlArg::F_SETFL(flags)).during(what, || "fcntl(_, F_SETFL)".into());
    set(flags | OFlag::O_NONBLOCK)?;
    repair::off(fd)?;
    let connected = sockopt::connect(fd, &address::bytes(&remote));
    repair::on(fd)?;
    set(flags)?;
    match connected {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
        Err(errno) => Err(Error::new(what).call(format!("connect(_, {remote})"), errno)),
    }
}

/// What was agreed upon when the connection was made.
fn set_options(fd: &OwnedFd, from: u32, e: &TcpStreamEntry) -> Result<()> {
    // Kinds as they stand in a segment: 2 largest segment, 3 window scale, 4 SACK permitted, 8 timestamps.
    let mut options = vec![2, e.mss_clamp];
    if e.opt_mask & SACK != 0 {
        options.extend([4, 0]);
    }
    if e.opt_mask & WSCALE != 0 {
        options.extend([3, e.snd_wscale | e.rcv_wscale.unwrap_or(0) << 16]);
    }
    if e.opt_mask & TIMESTAMPS != 0 {
        options.extend([8, 0]);
    }
    if from != SYN_SENT {
        repair::set_words(fd, libc::TCP_REPAIR_OPTIONS, &options)?;
    }
    match e.timestamp.filter(|_| e.opt_mask & TIMESTAMPS != 0) {
        Some(now) => repair::set(fd, libc::TCP_TIMESTAMP, now.cast_signed()),
        None => Ok(()),
    }
}

fn set_window(fd: &OwnedFd, from: u32, e: &TcpStreamEntry) -> Result<()> {
    let words = (e.snd_wl1, e.snd_wnd, e.max_window, e.rcv_wnd, e.rcv_wup);
    let (Some(wl1), Some(snd), Some(max), Some(mut rcv), Some(mut wup)) = words else { return Ok(()) };
    if from == SYN_SENT {
        return Ok(());
    }
    if state::has_received_fin(from) {
        (rcv, wup) = (rcv.wrapping_add(1), wup.wrapping_sub(1));
    }
    repair::set_words(fd, libc::TCP_REPAIR_WINDOW, &[wl1, snd, max, rcv, wup])
}

/// Ends the directions that had ended, in the order that leads to the state.
fn end(fd: &OwnedFd, from: u32, e: &TcpStreamEntry, local: SocketAddr, remote: SocketAddr) -> Result<()> {
    let unacknowledged = e.outq_seq.wrapping_sub(e.outq_len);
    let window = e.snd_wnd.unwrap_or(0) >> e.snd_wscale.min(14);
    let heard = |flags, sequence, acknowledged| Segment {
        from: remote,
        to: local,
        flags,
        sequence,
        acknowledged,
        window: u16::try_from(window).unwrap_or(u16::MAX),
    };
    let peer_ends = || deliver(fd, &heard(FIN | ACK, e.inq_seq, unacknowledged));
    // It goes out as sent if all before it was sent, so that the peer's word on it is understood.
    let queue = if e.unsq_len.unwrap_or(0) == 0 { Queue::Sent } else { Queue::None };
    let we_end = || {
        repair::set(fd, libc::TCP_REPAIR_QUEUE, queue as i32)?;
        shutdown(fd.as_raw_fd(), Shutdown::Write)
            .during("cannot end a direction of a TCP connection", || "shutdown(_, SHUT_WR)".into())?;
        repair::set(fd, libc::TCP_REPAIR_QUEUE, Queue::None as i32)
    };
    match from {
        state::FIN_WAIT1 => we_end(),
        state::FIN_WAIT2 => {
            we_end()?;
            deliver(fd, &heard(ACK, e.inq_seq, e.outq_seq.wrapping_add(1)))
        }
        state::CLOSING => we_end().and_then(|()| peer_ends()),
        state::CLOSE_WAIT => peer_ends(),
        state::LAST_ACK => peer_ends().and_then(|()| we_end()),
        state::CLOSE => {
            peer_ends()?;
            we_end()?;
            deliver(fd, &heard(ACK, e.inq_seq.wrapping_add(1), e.outq_seq.wrapping_add(1)))
        }
        _ => Ok(()),
    }
}

/// Sends a segment until the socket's state has changed.
fn deliver(fd: &OwnedFd, segment: &Segment) -> Result<()> {
    let before = repair::info(fd)?.state;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        segment.send()?;
        let again = Instant::now() + AGAIN;
        while Instant::now() < again {
            if repair::info(fd)?.state != before {
                return Ok(());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    Err(Error::new("a socket that is restored does not hear its peer").remedy(
        "a firewall of the network namespace, or a device that the socket is bound to, may be in the way",
    ))
}

/// The connection must be what it was.
fn verify(fd: &OwnedFd, from: u32, stream: &TcpStream) -> Result<()> {
    let what = "cannot look at a restored TCP connection";
    let is = repair::info(fd)?.state;
    let received = ioctl::readable(fd).during(what, || "ioctl(_, SIOCINQ)".into())?;
    if is != from || usize::try_from(received) != Ok(stream.received.len()) {
        return Err(Error::new(format!(
            "a restored TCP connection is in state {is} with {received} bytes to read, not in state {from} with {}",
            stream.received.len()
        )));
    }
    Ok(())
}
