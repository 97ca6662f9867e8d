//! Work that is done in pieces by two threads, and taken up in order by one.
//!
//! ```text
//!   this thread    piece 0 ─ take up 0 ─ take up 1 ─ piece 3 ─ take up 2 ─ ...
//!   the other      piece 1 ─ piece 2 ────────────── piece 4 ─ ...          whoever is free has the next
//! ```
//!
//! Whoever takes up results may be slower than both are at making them, or faster: neither waits for the other while
//! there is something to do.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use crate::checkpoint::{Error, Result};

/// How many things a piece has, as a rule: enough that handing them over does not matter.
pub const LENGTH: usize = 32;
/// From so many pieces on a second thread is worth its start.
const FEW: usize = 4;
/// So many pieces may wait to be taken up.
const AHEAD: usize = 8;

/// Makes the result of each piece, on two threads where there are many, and hands them to `take` in order until it says
/// false.
pub fn in_order<P: Sync, R: Send>(
    pieces: &[P],
    make: impl Fn(&P) -> R + Sync,
    mut take: impl FnMut(R) -> Result<bool>,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let claim = || {
        let at = next.fetch_add(1, Ordering::Relaxed);
        pieces.get(at).map(|piece| (at, piece))
    };
    std::thread::scope(|scope| {
        let (put, made) = sync_channel(AHEAD);
        // Ends when nobody takes any more.
        let other = || {
            let put = put;
            while let Some((at, piece)) = claim() {
                if put.send((at, make(piece))).is_err() {
                    break;
                }
            }
        };
        let helped = pieces.len() >= FEW && std::thread::Builder::new().spawn_scoped(scope, other).is_ok();
        let mut ready = BTreeMap::new();
        for at in 0..pieces.len() {
            let result = loop {
                ready.extend(made.try_iter());
                if let Some(result) = ready.remove(&at) {
                    break result;
                }
                if let Some((at, piece)) = (!helped || ready.len() < AHEAD).then(claim).flatten() {
                    ready.insert(at, make(piece));
                    continue;
                }
                // The other has it.
                match made.recv() {
                    Ok((at, result)) => _ = ready.insert(at, result),
                    Err(_) => return Err(Error::new("a second thread has ended before its work was done")),
                }
            };
            if !take(result)? {
                break;
            }
        }
        Ok(())
    })
}

/// Does `make` with all of them, on two threads where there are many; the results are in order.
pub fn all<P: Sync, R: Send>(things: &[P], make: impl Fn(&P) -> R + Sync) -> Result<Vec<R>> {
    let pieces: Vec<&[P]> = things.chunks(4).collect();
    let mut done = Vec::with_capacity(things.len());
    in_order(
        &pieces,
        |piece| piece.iter().map(&make).collect::<Vec<_>>(),
        |results| {
            done.extend(results);
            Ok(true)
        },
    )?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_taken_up_once_and_in_order() {
        let things: Vec<u64> = (0..10_000).collect();
        for few in [0, 1, 5, 63, 10_000] {
            // Some take longer than others.
            let double = |n: &u64| (0..n % 7 * 100).fold(2 * n, |n, _| std::hint::black_box(n));
            let done = all(&things[..few], double).unwrap();
            assert!(done.iter().zip(&things).all(|(a, b)| *a == 2 * b) && done.len() == few);
        }
    }

    #[test]
    fn it_ends_when_nobody_wants_more_or_something_fails() {
        let things: Vec<u64> = (0..1000).collect();
        let mut seen = 0;
        let mut some = |n| {
            seen = n;
            Ok(n < 300)
        };
        in_order(&things, |n| *n, &mut some).unwrap();
        assert_eq!(seen, 300);
        let fails = |n| if n < 500 { Ok(true) } else { Err(Error::new("no more")) };
        assert_eq!(in_order(&things, |n| *n, fails).unwrap_err().to_string(), "no more");
    }
}
