//! fanotify(7).

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag};

/// A new group, close-on-exec; `events` are the flags of the files that its events open.
pub fn init(flags: u32, events: u32) -> nix::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = Errno::result(unsafe { libc::fanotify_init(flags, events) })?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    let group = unsafe { OwnedFd::from_raw_fd(fd) };
    // Not by FAN_CLOEXEC, which the group would be known by.
    nix::fcntl::fcntl(&group, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(group)
}

/// Adds to the mark on the file that `node` is open to, O_PATH included, or on its mount or file system.
pub fn add_mark(group: impl AsFd, flags: u32, mask: u64, node: impl AsFd) -> nix::Result<()> {
    let path = format!("/proc/self/fd/{}", node.as_fd().as_raw_fd());
    let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
    let (group, flags) = (group.as_fd().as_raw_fd(), flags | libc::FAN_MARK_ADD);
    // SAFETY: the path is a C string that outlives the call.
    Errno::result(unsafe { libc::fanotify_mark(group, flags, mask, libc::AT_FDCWD, path.as_ptr()) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_are_none_are_refused() {
        assert!(init(0x8000_0000, 0).is_err());
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(add_mark(&null, 0, libc::FAN_OPEN, &null).unwrap_err(), Errno::EINVAL);
    }
}
