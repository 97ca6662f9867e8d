//! POSIX message queues: mq_open(2) and its family, by system calls; names are without their slash.
//!
//! ```text
//!   contents():   this process                     a child, deaf to signals
//!                 shared memory <────────────────── receive all, send all again in the same order
//! ```
//!
//! A queue cannot be looked into without taking messages out. They are put back at once, by a child: whatever kills
//! this process does not keep the messages from returning.

use std::ffi::CStr;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::sys::signal::{SigSet, SigmaskHow};

/// `struct mq_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// O_NONBLOCK of the descriptor.
    pub flags: i64,
    /// How many messages it takes.
    pub maxmsg: i64,
    /// How long they may be.
    pub msgsize: i64,
    /// How many it holds.
    pub curmsgs: i64,
    reserved: [i64; 4],
}

impl Attributes {
    /// Of a queue to be made.
    pub fn new(maxmsg: i64, msgsize: i64) -> Self {
        Self { maxmsg, msgsize, ..Self::default() }
    }
}

/// A message: its priority, and its text.
pub type Message = (u32, Vec<u8>);

/// Opens a queue of the caller's IPC namespace, close-on-exec, or makes it.
pub fn open(name: &CStr, flags: i32, mode: u32, attributes: Option<&Attributes>) -> nix::Result<OwnedFd> {
    let attributes = attributes.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the kernel reads a C string and, where there are any, attributes.
    let fd =
        unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags | libc::O_CLOEXEC, mode, attributes) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// What a queue is like.
pub fn attributes(fd: impl AsFd) -> nix::Result<Attributes> {
    let mut got = Attributes::default();
    let none: *const Attributes = std::ptr::null();
    // SAFETY: the kernel writes attributes.
    let r = unsafe { libc::syscall(libc::SYS_mq_getsetattr, fd.as_fd().as_raw_fd(), none, &raw mut got) };
    Errno::result(r).map(|_| got)
}

/// Puts a message into a queue, without waiting if it was opened so.
pub fn send(fd: impl AsFd, priority: u32, text: &[u8]) -> nix::Result<()> {
    let none: *const libc::timespec = std::ptr::null();
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads the text.
    let r = unsafe { libc::syscall(libc::SYS_mq_timedsend, fd, text.as_ptr(), text.len(), priority, none) };
    Errno::result(r).map(drop)
}

/// Header of the memory that is shared with the child, and of each message in it: two words.
const HEADER: usize = 8;

/// All messages of a queue, which keeps them. `fd` must be open for both, O_NONBLOCK. Whoever waits for the queue to
/// be filled is told.
pub fn contents(fd: impl AsFd) -> nix::Result<Vec<Message>> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open as long as `fd` is.
    let is = attributes(unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) })?;
    let number = |n: i64| usize::try_from(n).map_err(|_| Errno::EOVERFLOW);
    let (count, size) = (number(is.curmsgs)?, number(is.msgsize)?);
    if count == 0 {
        return Ok(Vec::new());
    }
    let slot =
        size.checked_next_multiple_of(8).and_then(|s| s.checked_add(HEADER)).ok_or(Errno::EOVERFLOW)?;
    let length = slot.checked_mul(count).and_then(|l| l.checked_add(HEADER)).ok_or(Errno::EOVERFLOW)?;
    let length = NonZeroUsize::new(length).ok_or(Errno::EOVERFLOW)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: new memory, that nothing else knows of.
    let memory =
        unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE)? };
    let base = memory.cast::<u8>().as_ptr();
    let result = by_child(fd, base, slot, size, count).map(|()| {
        // SAFETY: the child has ended; the memory is ours alone, and as long as this.
        let bytes = unsafe { std::slice::from_raw_parts(base, length.get()) };
        messages(bytes, slot, size)
    });
    // SAFETY: mapped above, and referred to no more.
    unsafe { munmap(memory, length.get())? };
    result
}

fn word(bytes: &[u8], at: usize) -> usize {
    let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u32::from_ne_bytes) as usize
}

fn messages(bytes: &[u8], slot: usize, size: usize) -> Vec<Message> {
    let one = |message: &[u8]| {
        let text = message.get(HEADER..HEADER + word(message, 0).min(size)).unwrap_or_default();
        (word(message, 4) as u32, text.to_vec())
    };
    bytes.get(HEADER..).unwrap_or_default().chunks_exact(slot).take(word(bytes, 0)).map(one).collect()
}

fn by_child(fd: i32, base: *mut u8, slot: usize, size: usize, count: usize) -> nix::Result<()> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: a fork on the caller's stack, with memory of its own; the child makes system calls and ends.
    let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) });
    if pid == Ok(0) {
        // SAFETY: the memory has room for `count` slots behind its header.
        let code = unsafe { exchange(fd, base, slot, size, count) };
        // SAFETY: does not return.
        unsafe { libc::_exit(code) }
    }
    before.thread_set_mask()?;
    match super::process::wait_child(pid? as i32, true)? {
        Some(0) => Ok(()),
        code => Err(Errno::from_raw(code.unwrap_or(libc::ECHILD))),
    }
}

/// Takes up to `count` messages out, and puts them back; 0, or why one could not be. Allocates nothing.
///
/// # Safety
/// `base` has room for a header and `count` slots.
unsafe fn exchange(fd: i32, base: *mut u8, slot: usize, size: usize, count: usize) -> i32 {
    let none: *const libc::timespec = std::ptr::null();
    let (mut taken, mut failed) = (0, 0);
    while taken < count {
        // SAFETY: within the memory, by the caller's promise; slots are aligned to eight bytes.
        unsafe {
            let at = base.add(HEADER + taken * slot);
            let priority = at.add(4).cast::<u32>();
            let got = libc::syscall(libc::SYS_mq_timedreceive, fd, at.add(HEADER), size, priority, none);
            if got < 0 {
                break;
            }
            at.cast::<u32>().write(got as u32);
        }
        taken += 1;
    }
    for n in 0..taken {
        // SAFETY: as above.
        unsafe {
            let at = base.add(HEADER + n * slot);
            let (length, priority) = (at.cast::<u32>().read(), at.add(4).cast::<u32>().read());
            if libc::syscall(libc::SYS_mq_timedsend, fd, at.add(HEADER), length as usize, priority, none) < 0
            {
                failed = Errno::last_raw();
            }
        }
    }
    // SAFETY: the header.
    unsafe { base.cast::<u32>().write(taken as u32) };
    failed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;

    #[test]
    fn a_queue_keeps_what_is_read() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        in_child(libc::CLONE_NEWIPC, || {
            let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_NONBLOCK;
            let queue = open(c"queue", flags, 0o600, Some(&Attributes::new(5, 13))).unwrap();
            assert!(contents(&queue).unwrap().is_empty());
            for (priority, text) in [(0, "last"), (7, "first"), (3, ""), (7, "second"), (0, "last of all")] {
                send(&queue, priority, text.as_bytes()).unwrap();
            }
            assert_eq!(send(&queue, 1, b"too many").unwrap_err(), Errno::EAGAIN);
            let order: Vec<_> = [(7, "first"), (7, "second"), (3, ""), (0, "last"), (0, "last of all")]
                .map(|(p, t)| (p, t.as_bytes().to_vec()))
                .into();
            assert_eq!(contents(&queue).unwrap(), order);
            assert_eq!(contents(&queue).unwrap(), order);
            let is = attributes(&queue).unwrap();
            assert_eq!((is.maxmsg, is.msgsize, is.curmsgs), (5, 13, 5));
        });
    }
}
