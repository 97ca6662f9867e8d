//! A live connection into its image.
//!
//! ```text
//!            sent                                   received
//!     ───────┬──────────┬────────┬──>        ────────┬──────────┬──>
//!            │ not ack- │ not    │                   │ not read │
//!            │ nowledged│ sent   │                   │          │
//!         snd_una    snd_nxt  outq_seq           copied_seq   inq_seq
//!            └─── outq_len ──────┘                   └ inq_len ─┘
//!                       └unsq_len┘
//! ```
//!
//! The end of a direction (FIN) counts one in the sequence, and is not in the lengths.

use std::os::fd::OwnedFd;

use crate::checkpoint::error::Context;
use crate::checkpoint::files::tcp::repair::{self, Info, Queue, Repair, TIMESTAMPS, WSCALE};
use crate::checkpoint::files::tcp::state;
use crate::checkpoint::image::TcpStreamEntry;
use crate::checkpoint::model::TcpStream;
use crate::checkpoint::{Error, Result};
use crate::sys::ioctl;

/// How often the look is taken again when something has arrived in between.
const ATTEMPTS: u32 = 1000;

/// What must be the same before and after the queues were read.
#[derive(Debug, PartialEq, Eq)]
struct Marks {
    info: Info,
    lengths: [u32; 3],
    sequences: [u32; 2],
}

fn marks(fd: &OwnedFd) -> Result<Marks> {
    let what = "cannot look at a TCP connection";
    let info = repair::info(fd)?;
    let length = |n: i32| n.max(0).cast_unsigned();
    let received = length(ioctl::readable(fd).during(what, || "ioctl(_, SIOCINQ)".into())?);
    let mut sent = length(ioctl::unacknowledged(fd).during(what, || "ioctl(_, SIOCOUTQ)".into())?);
    let mut unsent = length(ioctl::unsent(fd).during(what, || "ioctl(_, SIOCOUTQNSD)".into())?);
    if info.state == state::CLOSE {
        // Nobody waits for it any more.
        (sent, unsent) = (0, 0);
    }
    if state::has_sent_fin(info.state) {
        (sent, unsent) = (sent.saturating_sub(1), unsent.saturating_sub(1));
    }
    let sequences = [repair::sequence(fd, Queue::Received)?, repair::sequence(fd, Queue::Sent)?];
    Ok(Marks { info, lengths: [received, sent, unsent], sequences })
}

/// Reads a connection. It is out of repair mode again afterwards, whatever happens.
pub fn capture(fd: &OwnedFd) -> Result<(u32, TcpStream)> {
    let repair = Repair::begin(fd)?;
    for _ in 0..ATTEMPTS {
        let before = marks(fd)?;
        let [inq, outq, unsq] = before.lengths;
        let received = repair::peek(fd, Queue::Received, inq as usize)?;
        let sent = repair::peek(fd, Queue::Sent, outq as usize)?;
        let entry = entry(fd, &before, unsq)?;
        if let (Some(received), Some(sent), true) = (received, sent, marks(fd)? == before) {
            repair.end()?;
            return Ok((before.info.state, TcpStream { entry, received, sent }));
        }
    }
    Err(Error::new("a TCP connection does not keep still while it is read")
        .remedy("lock the network: --network-lock nftables"))
}

fn entry(fd: &OwnedFd, marks: &Marks, unsq: u32) -> Result<TcpStreamEntry> {
    let info = marks.info;
    let [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup] = repair::window(fd)?;
    let scaled = info.options & WSCALE != 0;
    Ok(TcpStreamEntry {
        inq_len: marks.lengths[0],
        inq_seq: marks.sequences[0],
        outq_len: marks.lengths[1],
        outq_seq: marks.sequences[1],
        opt_mask: info.options,
        snd_wscale: if scaled { info.snd_wscale } else { 0 },
        rcv_wscale: scaled.then_some(info.rcv_wscale),
        mss_clamp: repair::get(fd, libc::TCP_MAXSEG)?,
        timestamp: (info.options & TIMESTAMPS != 0)
            .then(|| repair::get(fd, libc::TCP_TIMESTAMP))
            .transpose()?,
        unsq_len: Some(unsq),
        snd_wl1: Some(snd_wl1),
        snd_wnd: Some(snd_wnd),
        max_window: Some(max_window),
        rcv_wnd: Some(rcv_wnd),
        rcv_wup: Some(rcv_wup),
        ..TcpStreamEntry::default()
    })
}
