//! Terminals: what a container's console takes beyond [`ioctl`].

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;

use super::{check, ioctl};

/// Opens the slave of a master, without going through any path, after unlocking it.
pub fn open_slave(master: impl AsFd) -> Result<OwnedFd, Errno> {
    ioctl::set_pty_locked(&master, false)?;
    ioctl::pty_peer(&master, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC)
}

/// Makes the terminal the controlling one of this session, whose leader this process must be.
pub fn set_controlling(tty: impl AsFd) -> Result<(), Errno> {
    // SAFETY: numbers only.
    check(unsafe { libc::ioctl(tty.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}
