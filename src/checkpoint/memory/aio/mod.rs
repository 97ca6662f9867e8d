//! Linux AIO: io_setup(2), whose contexts are the addresses of mappings.
//!
//! ```text
//!   /[aio]   │ id │ nr │ head │ tail │ magic │ ... │ event 0 │ event 1 │ ...      struct aio_ring, then io_event
//!                        └ seen by the program   └ written by the kernel, modulo nr
//!
//!   dump      settle.rs: what is under way is waited for; then the ring is a mapping like others    AIORING, mm.aios
//!   restore   make.rs: io_setup ──> as many requests for nothing as there were results ──> the results
//!             ──> mremap to the old address, which makes it the old context
//! ```
//!
//! How many requests are under way, no kernel tells. io_destroy(2) waits for all of them, and takes the ring away; so
//! the program gets a new one that has the same results in it and stands in the same place. See `settle`.
//!
//! Nobody but the ring itself knows how far head and tail have come, so a new one begins at 0.
//!
//! A request to poll has no end of its own. It ends with the old ring, without having seen anything, and is made again
//! by the program's own `struct iocb`. CRIU loses such requests: sets that have them are none of its.

mod make;
mod settle;

use std::collections::BTreeMap;

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{AioRingEntry, MmEntry, VmaEntry, vma as status};
use crate::checkpoint::memory::pages::PAGE;

pub use make::restore;
pub use settle::{check, polls, refusals, settle};

/// How `maps` calls a ring.
pub const NAME: &[u8] = b"/[aio]";
/// The name of this room's extension in stasis.img: requests to poll that were under way.
pub const EXTENSION: &str = "aio-polls";

/// `struct aio_ring` without its events.
const HEADER: usize = 32;
/// `struct io_event`.
const EVENT: usize = 32;
/// `AIO_RING_MAGIC`
const MAGIC: u32 = 0xa10a_10a1;
/// `IOCB_CMD_POLL`; Linux 4.18.
const POLL: u16 = 5;

/// A request under way: its context and its `struct iocb`.
type Poll = (u64, u64);
/// Those of every process.
type Polls = BTreeMap<u32, Vec<Poll>>;

/// A ring as it stands in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ring(Vec<u8>);

impl Ring {
    /// Checks its header.
    fn parse(bytes: Vec<u8>) -> Result<Self> {
        let ring = Self(bytes);
        let room = (ring.0.len().saturating_sub(HEADER) / EVENT) as u64;
        let (nr, head, tail) = (ring.nr(), ring.word(2), ring.word(3));
        // magic, compatible features, incompatible features, length of the header
        let kind = [ring.word(4), ring.word(5), ring.word(6), ring.word(7)];
        if kind != [MAGIC, 1, 0, HEADER as u32] || u64::from(nr) != room || head >= nr || tail >= nr {
            return Err(Error::new("a ring of Linux AIO is malformed")
                .remedy("the program has written into it, which it should not"));
        }
        Ok(ring)
    }

    fn word(&self, index: usize) -> u32 {
        let bytes = self.0.get(index * 4..index * 4 + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_ne_bytes)
    }

    /// How many events it has room for.
    fn nr(&self) -> u32 {
        self.word(1)
    }

    /// The events that the program has not seen yet.
    fn unseen(&self) -> Vec<Event> {
        self.between(self.word(2), self.word(3))
    }

    /// The events that have come since it was as `before`.
    fn since(&self, before: &Self) -> Vec<Event> {
        self.between(before.word(3), self.word(3))
    }

    fn between(&self, from: u32, to: u32) -> Vec<Event> {
        let nr = self.nr().max(1);
        let count = (to + nr - from) % nr;
        let place = |index: u32| HEADER + ((from + index) % nr) as usize * EVENT;
        (0..count).filter_map(|index| self.0.get(place(index)..)?.first_chunk().map(Event::parse)).collect()
    }
}

/// `struct io_event`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Event {
    data: u64,
    /// The request's `struct iocb`.
    iocb: u64,
    result: i64,
    bytes: [u8; EVENT],
}

impl Event {
    fn parse(bytes: &[u8; EVENT]) -> Self {
        let word = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
        Self { data: word(0), iocb: word(8), result: word(16).cast_signed(), bytes: *bytes }
    }
}

/// Whether a mapping of the images is a ring.
pub fn is(entry: &VmaEntry) -> bool {
    entry.status & status::AIORING != 0
}

/// Lists the rings of a process.
pub fn record(mm: &mut MmEntry) {
    let entry = |vma: &VmaEntry| {
        let len = vma.end - vma.start;
        Some(AioRingEntry {
            id: vma.start,
            nr_req: requests(len),
            // No ring is that large.
            ring_len: u32::try_from(len).ok()?,
        })
    };
    mm.aios = mm.vmas.iter().filter(|vma| is(vma)).filter_map(entry).collect();
}

/// What io_setup(2) has to be asked for to make a ring of this size: it takes twice as many and two, and rounds up to
/// whole pages. It takes four times the number of processors at least.
fn requests(len: u64) -> u32 {
    let events = (len / PAGE * PAGE).saturating_sub(HEADER as u64) / EVENT as u64;
    u32::try_from(events.saturating_sub(2) / 2).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(head: u32, tail: u32) -> Vec<u8> {
        let mut bytes = vec![0; PAGE as usize];
        let words = [0, 127, head, tail, MAGIC, 1, 0, 32];
        for (at, word) in words.iter().enumerate() {
            bytes[at * 4..at * 4 + 4].copy_from_slice(&u32::to_ne_bytes(*word));
        }
        for (index, event) in bytes[HEADER..].chunks_exact_mut(EVENT).enumerate() {
            event[0] = index as u8;
        }
        bytes
    }

    #[test]
    fn events_are_read_around_the_end() {
        let data = |events: Vec<Event>| events.iter().map(|event| event.data).collect::<Vec<_>>();
        let before = Ring::parse(ring(125, 126)).unwrap();
        let after = Ring::parse(ring(125, 2)).unwrap();
        assert_eq!(data(before.unseen()), [125]);
        assert_eq!(data(after.unseen()), [125, 126, 0, 1]);
        assert_eq!(data(after.since(&before)), [126, 0, 1]);
        assert!(before.since(&before).is_empty());
    }

    #[test]
    fn what_is_no_ring_is_refused() {
        for at in [4, 16, 20, 24, 28] {
            let mut bytes = ring(0, 0);
            bytes[at] ^= 0xff;
            assert!(Ring::parse(bytes).is_err(), "byte {at}");
        }
        assert!(Ring::parse(ring(127, 0)).is_err() && Ring::parse(ring(0, 127)).is_err());
        assert!(Ring::parse(vec![0; 16]).is_err() && Ring::parse(Vec::new()).is_err());
    }

    /// As the kernel rounds up, with as few processors as there can be.
    #[test]
    fn as_many_requests_as_make_a_ring_of_that_size() {
        for pages in 1..2000 {
            let events = u64::from(requests(pages * PAGE)) * 2 + 2;
            let size = HEADER as u64 + events * EVENT as u64;
            assert_eq!(size.next_multiple_of(PAGE), pages * PAGE);
        }
        assert_eq!((requests(PAGE), requests(0)), (62, 0));
    }
}
