//! How far it is, on a terminal, for what lasts over a second.
//!
//! ```text
//!   [###############               ]  51 %, 522 of 1024 MiB
//!   522 MiB                                                     where nobody knows how many there will be
//! ```
//!
//! The line is drawn by whichever thread has just moved something, on standard error, and is gone when all is moved. A
//! terminal that takes nothing at the moment (^S) is not waited for: a container may be standing still.

use std::io::{IsTerminal, Write, stderr};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What is done sooner than this is not worth a line.
const LONG: Duration = Duration::from_secs(1);
/// Nobody reads faster.
const AGAIN: Duration = Duration::from_millis(100);
/// Characters between the brackets.
const WIDTH: u64 = 30;

static WANTED: AtomicBool = AtomicBool::new(false);

/// Shows progress from now on, if standard error is a terminal.
pub fn show() {
    WANTED.store(stderr().is_terminal(), Ordering::Relaxed);
}

/// Something that is under way.
#[derive(Debug)]
pub struct Bar {
    total: Option<u64>,
    done: AtomicU64,
    began: Instant,
    /// When the line was last drawn.
    drawn: Mutex<Option<Instant>>,
}

impl Bar {
    /// `total` bytes are to be moved. None: nobody looks.
    pub fn new(total: u64) -> Option<Self> {
        Self::of(Some(total))
    }

    /// Bytes are to be moved, nobody knows how many. None: nobody looks.
    pub fn unbounded() -> Option<Self> {
        Self::of(None)
    }

    fn of(total: Option<u64>) -> Option<Self> {
        let bar = || Self { total, done: AtomicU64::new(0), began: Instant::now(), drawn: Mutex::new(None) };
        WANTED.load(Ordering::Relaxed).then(bar)
    }

    /// So many more have been.
    pub fn add(&self, bytes: usize) {
        let done = self.done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        let Ok(mut drawn) = self.drawn.try_lock() else { return };
        let now = Instant::now();
        if is_due(now, self.began, *drawn) && draw(&format!("\r{}", line(done, self.total))) {
            *drawn = Some(now);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.drawn.get_mut().is_ok_and(|drawn| drawn.is_some()) {
            draw("\r\x1b[K");
        }
    }
}

fn is_due(now: Instant, began: Instant, drawn: Option<Instant>) -> bool {
    now.duration_since(began) >= LONG && drawn.is_none_or(|drawn| now.duration_since(drawn) >= AGAIN)
}

fn line(done: u64, total: Option<u64>) -> String {
    let Some(total) = total else { return format!("{} MiB", done >> 20) };
    let done = done.min(total);
    let part = |of: u64| {
        if total == 0 { of } else { (u128::from(done) * u128::from(of) / u128::from(total)) as u64 }
    };
    let filled = "#".repeat(usize::try_from(part(WIDTH)).unwrap_or(0));
    let width = usize::try_from(WIDTH).unwrap_or(0);
    format!("[{filled:<width$}] {:>3} %, {} of {} MiB", part(100), done >> 20, total >> 20)
}

/// Whether the terminal has taken it.
fn draw(text: &str) -> bool {
    let mut out = stderr();
    let takes = {
        let mut polled = [PollFd::new(out.as_fd(), PollFlags::POLLOUT)];
        poll(&mut polled, PollTimeout::ZERO).is_ok_and(|n| n == 1)
    };
    takes && out.write_all(text.as_bytes()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_it_is() {
        let line_of = line;
        let line = |done, total| line_of(done, Some(total));
        assert_eq!(line_of(522 << 20, None), "522 MiB");
        assert_eq!(line(0, 1 << 30), format!("[{}]   0 %, 0 of 1024 MiB", " ".repeat(30)));
        assert_eq!(
            line(522 << 20, 1 << 30),
            format!("[{}{}]  50 %, 522 of 1024 MiB", "#".repeat(15), " ".repeat(15))
        );
        let full = format!("[{}] 100 %, 1 of 1 MiB", "#".repeat(30));
        assert_eq!((line(1 << 20, 1 << 20), line(2 << 20, 1 << 20)), (full.clone(), full));
        assert!(line(0, 0).contains("100 %") && line(u64::MAX, u64::MAX).contains("100 %"));
    }

    #[test]
    fn what_is_soon_done_has_no_line() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        assert!(!is_due(at(999), began, None));
        assert!(is_due(at(1000), began, None));
        assert!(!is_due(at(1099), began, Some(at(1000))));
        assert!(is_due(at(1100), began, Some(at(1000))));
    }

    #[test]
    fn nobody_looks_unless_asked() {
        assert!(Bar::new(1 << 30).is_none() && Bar::unbounded().is_none());
    }
}
