//! socket(2) and socketpair(2) with numbers as the images hold them.

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

/// A socket of any family, type and protocol. Close-on-exec.
pub fn socket(family: i32, kind: i32, protocol: i32) -> nix::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = Errno::result(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Two unix sockets connected to each other. Close-on-exec.
pub fn unix_pair(kind: i32) -> nix::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the kernel writes two descriptors.
    Errno::result(unsafe {
        libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
    })?;
    // SAFETY: the kernel has just made these descriptors, and nobody else knows of them.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}
