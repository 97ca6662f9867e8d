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

/// Is a datagram being put together on this UDP socket?
///
/// sendto(2) of nothing to port 0: a socket in the middle of a datagram does not look at the address, and adds nothing
/// to it; any other says EINVAL.
pub fn is_corked(fd: i32, family: i32) -> bool {
    let mut address = [0u8; 28];
    address[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    let length = if family == libc::AF_INET6 { 28 } else { 16 };
    let flags = libc::MSG_MORE | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads no byte of the message, and at most `length` of `address`.
    let sent = unsafe { libc::sendto(fd, std::ptr::null(), 0, flags, address.as_ptr().cast(), length) };
    sent == 0
}
