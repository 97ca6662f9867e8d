//! epoll_ctl(2) under a chosen number: the kernel keeps the number a file was added under.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// Adds `file` to `epoll` under descriptor number `number`, which it gets for the purpose.
///
/// What this thread had under that number is lost: call it in a thread with a descriptor table of its own.
pub fn add_under(
    epoll: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    number: i32,
    events: u32,
    data: u64,
) -> nix::Result<()> {
    // Out of the way of `number`.
    // SAFETY: no memory is involved.
    let high = Errno::result(unsafe { libc::fcntl(epoll.as_raw_fd(), libc::F_DUPFD, number + 1) })?;
    if file.as_raw_fd() != number {
        // SAFETY: no memory is involved; that nobody here uses `number` is the caller's promise.
        Errno::result(unsafe { libc::dup2(file.as_raw_fd(), number) })?;
    }
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the event is read during the call.
    Errno::result(unsafe { libc::epoll_ctl(high, libc::EPOLL_CTL_ADD, number, &raw mut event) }).map(drop)
}
