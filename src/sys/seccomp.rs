//! seccomp(2).

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::check;

/// Installs a filter on this thread (or on all, with SECCOMP_FILTER_FLAG_TSYNC). With
/// SECCOMP_FILTER_FLAG_NEW_LISTENER the notification descriptor is returned.
pub fn set_mode_filter(flags: u64, filter: &[libc::sock_filter]) -> Result<Option<OwnedFd>, Errno> {
    let len = u16::try_from(filter.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the kernel copies `len` instructions and keeps no pointer.
    let ret = check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    })?;
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 {
        return Ok(None);
    }
    let fd = i32::try_from(ret).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// True if the kernel knows the filter flag: a null filter gives EFAULT for a known flag, EINVAL for another.
pub fn knows_flag(flags: u64) -> bool {
    // SAFETY: a null pointer is refused by the kernel, and nothing is installed.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            std::ptr::null::<libc::sock_fprog>(),
        )
    };
    check(ret) == Err(Errno::EFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_flags_are_told_from_unknown_ones() {
        assert!(knows_flag(libc::SECCOMP_FILTER_FLAG_LOG));
        assert!(!knows_flag(1 << 20));
    }
}
