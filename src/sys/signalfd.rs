//! signalfd4(2) with the mask as the 64 bits that the kernel knows, real-time signals included.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// A descriptor that reads the signals of `mask`; bit 0 is signal 1. `flags`: SFD_CLOEXEC, SFD_NONBLOCK.
pub fn signalfd(mask: u64, flags: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the mask is read, eight bytes of it.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, flags) })?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
