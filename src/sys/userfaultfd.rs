//! The ioctls and events of userfaultfd(2), by which one process fills the memory of another.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// Only faults of user mode are handled: makes userfaultfd(2) available without privilege.
pub const UFFD_USER_MODE_ONLY: i32 = 1;

const UFFD_API: u64 = 0xAA;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
/// Pages that are not there yet can be write-protected too. Since Linux 6.4.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// A write to a protected page is noted by the kernel, and goes on. Since Linux 6.7.
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// A fork is told, with a descriptor for the memory of the child.
pub const FEATURE_EVENT_FORK: u64 = 1 << 1;
/// mremap(2) is told.
pub const FEATURE_EVENT_REMAP: u64 = 1 << 2;
/// Pages given back by madvise(2) are told.
pub const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// munmap(2) is told.
pub const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
const COPY_MODE_DONTWAKE: u64 = 1;
/// `ioctl(open("/dev/userfaultfd"), USERFAULTFD_IOC_NEW, flags)`: as userfaultfd(2), for whoever was given the device.
pub const IOC_NEW: u64 = 0xAA00;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Zeropage {
    range: Range,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_writeprotect`
#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

mod raw {
    #![allow(missing_docs)]
    use super::{Api, Copy, Range, Register, WriteProtect, Zeropage};
    nix::ioctl_readwrite!(uffdio_api, 0xAA, 0x3F, Api);
    nix::ioctl_readwrite!(uffdio_register, 0xAA, 0x00, Register);
    nix::ioctl_read!(uffdio_unregister, 0xAA, 0x01, Range);
    nix::ioctl_read!(uffdio_wake, 0xAA, 0x02, Range);
    nix::ioctl_readwrite!(uffdio_copy, 0xAA, 0x03, Copy);
    nix::ioctl_readwrite!(uffdio_zeropage, 0xAA, 0x04, Zeropage);
    nix::ioctl_readwrite!(uffdio_writeprotect, 0xAA, 0x06, WriteProtect);
}

/// A descriptor for the memory of this process. Since Linux 4.3; UFFD_USER_MODE_ONLY since 5.11.
pub fn open(flags: i32) -> nix::Result<OwnedFd> {
    // SAFETY: numbers only; the kernel has just made the descriptor.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_userfaultfd, flags))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// The handshake that comes first on every descriptor. EINVAL: the kernel lacks one of the features.
pub fn api(uffd: BorrowedFd<'_>, features: u64) -> nix::Result<()> {
    let mut arg = Api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: `arg` has the layout of struct uffdio_api.
    unsafe { raw::uffdio_api(uffd.as_raw_fd(), &raw mut arg)? };
    Ok(())
}

/// Registers missing pages of `start..start + len` in the address space that made the descriptor.
pub fn register_missing(uffd: BorrowedFd<'_>, start: u64, len: u64) -> nix::Result<()> {
    register(uffd, start, len, REGISTER_MODE_MISSING)
}

/// Registers protected pages of `start..start + len` in the address space that made the descriptor.
pub fn register_protected(uffd: BorrowedFd<'_>, start: u64, len: u64) -> nix::Result<()> {
    register(uffd, start, len, REGISTER_MODE_WP)
}

fn register(uffd: BorrowedFd<'_>, start: u64, len: u64, mode: u64) -> nix::Result<()> {
    let mut arg = Register { start, len, mode, ioctls: 0 };
    // SAFETY: `arg` has the layout of struct uffdio_register.
    unsafe { raw::uffdio_register(uffd.as_raw_fd(), &raw mut arg)? };
    Ok(())
}

/// Takes the registration back.
pub fn unregister(uffd: BorrowedFd<'_>, start: u64, len: u64) -> nix::Result<()> {
    let mut arg = Range { start, len };
    // SAFETY: `arg` has the layout of struct uffdio_range.
    unsafe { raw::uffdio_unregister(uffd.as_raw_fd(), &raw mut arg)? };
    Ok(())
}

/// Takes the protection from pages of `start..start + len`, which must all be registered: they count as written.
pub fn unprotect(uffd: BorrowedFd<'_>, start: u64, len: u64) -> nix::Result<()> {
    let mut arg = WriteProtect { start, len, mode: 0 };
    // SAFETY: `arg` has the layout of struct uffdio_writeprotect.
    unsafe { raw::uffdio_writeprotect(uffd.as_raw_fd(), &raw mut arg)? };
    Ok(())
}

/// Puts whole pages from `from`, in this process, to `to`, in the other one, where no pages may be yet.
/// Returns how many bytes were put; less than all of `from` when the other address space was busy.
pub fn copy(uffd: BorrowedFd<'_>, to: u64, from: &[u8]) -> nix::Result<usize> {
    copy_in_mode(uffd, to, from, COPY_MODE_DONTWAKE)
}

/// As [`copy`], and whoever waits for one of the pages goes on.
pub fn copy_and_wake(uffd: BorrowedFd<'_>, to: u64, from: &[u8]) -> nix::Result<usize> {
    copy_in_mode(uffd, to, from, 0)
}

fn copy_in_mode(uffd: BorrowedFd<'_>, to: u64, from: &[u8], mode: u64) -> nix::Result<usize> {
    let mut arg = Copy { dst: to, src: from.as_ptr() as u64, len: from.len() as u64, mode, copy: 0 };
    // SAFETY: `arg` has the layout of struct uffdio_copy, and `src` points to `len` readable bytes. The memory written
    // to is of the process that made the descriptor; a descriptor of this process's own would have been made by
    // userfaultfd(2), which nothing here calls.
    match unsafe { raw::uffdio_copy(uffd.as_raw_fd(), &raw mut arg) } {
        Ok(_) => Ok(from.len()),
        Err(Errno::EAGAIN) => usize::try_from(arg.copy.max(0)).map_err(|_| Errno::EIO),
        Err(errno) => Err(errno),
    }
}

/// Puts zero pages to `start..start + len`, and whoever waits for one of them goes on.
pub fn zero_and_wake(uffd: BorrowedFd<'_>, start: u64, len: u64) -> nix::Result<()> {
    let mut arg = Zeropage { range: Range { start, len }, mode: 0, zeropage: 0 };
    // SAFETY: `arg` has the layout of struct uffdio_zeropage.
    unsafe { raw::uffdio_zeropage(uffd.as_raw_fd(), &raw mut arg)? };
    Ok(())
}

/// Whoever waits for a page of `start..start + len` tries again.
pub fn wake(uffd: BorrowedFd<'_>, start: u64, len: u64) -> nix::Result<()> {
    let mut arg = Range { start, len };
    // SAFETY: `arg` has the layout of struct uffdio_range.
    unsafe { raw::uffdio_wake(uffd.as_raw_fd(), &raw mut arg)? };
    Ok(())
}

/// What a userfaultfd tells.
#[derive(Debug)]
pub enum Event {
    /// Somebody waits for the page of this address.
    Fault(u64),
    /// The process has forked; the memory of its child.
    Fork(OwnedFd),
    /// Memory has moved.
    Remap {
        /// From there.
        from: u64,
        /// To there.
        to: u64,
        /// So many bytes.
        len: u64,
    },
    /// Pages have been given back: they are zero now.
    Remove(u64, u64),
    /// Memory has been unmapped.
    Unmap(u64, u64),
    /// Something of a later kernel, by its number.
    Other(u8),
}

/// Reads the next event of a descriptor that does not block; None if there is none.
pub fn event(uffd: BorrowedFd<'_>) -> nix::Result<Option<Event>> {
    let mut message = [0u8; 32];
    match nix::unistd::read(uffd, &mut message) {
        Ok(32) => {}
        Ok(_) => return Err(Errno::EIO),
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
        Err(errno) => return Err(errno),
    }
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    Ok(Some(match message[0] {
        0x12 => Event::Fault(word(16)),
        // SAFETY: reading the event has made this descriptor, and nobody else knows of it.
        0x13 => Event::Fork(unsafe { OwnedFd::from_raw_fd(word(8) as u32 as i32) }),
        0x14 => Event::Remap { from: word(8), to: word(16), len: word(24) },
        0x15 => Event::Remove(word(8), word(16)),
        0x16 => Event::Unmap(word(8), word(16)),
        other => Event::Other(other),
    }))
}
