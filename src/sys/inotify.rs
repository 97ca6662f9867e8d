//! inotify(7), with watch descriptors as the numbers that they are: nix hides them.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// A new instance, close-on-exec.
pub fn init() -> nix::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = Errno::result(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Watches the file that `node` is open to, O_PATH included. The watch's number.
pub fn add_watch(inotify: impl AsFd, node: impl AsFd, mask: u32) -> nix::Result<i32> {
    let path = format!("/proc/self/fd/{}", node.as_fd().as_raw_fd());
    let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the path is a C string that outlives the call.
    Errno::result(unsafe { libc::inotify_add_watch(inotify.as_fd().as_raw_fd(), path.as_ptr(), mask) })
}

/// Ends a watch.
pub fn remove_watch(inotify: impl AsFd, watch: i32) -> nix::Result<()> {
    // SAFETY: no pointers are passed.
    Errno::result(unsafe { libc::inotify_rm_watch(inotify.as_fd().as_raw_fd(), watch) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_numbered() {
        let inotify = init().unwrap();
        let (a, b) = (std::fs::File::open("/").unwrap(), std::fs::File::open("/proc").unwrap());
        let first = add_watch(&inotify, &a, libc::IN_DELETE_SELF).unwrap();
        assert_eq!(add_watch(&inotify, &a, libc::IN_DELETE_SELF).unwrap(), first);
        let second = add_watch(&inotify, &b, libc::IN_DELETE_SELF).unwrap();
        assert_ne!(first, second);
        remove_watch(&inotify, first).unwrap();
        assert_eq!(remove_watch(&inotify, first).unwrap_err(), Errno::EINVAL);
    }
}
