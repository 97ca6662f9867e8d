//! File handles: open_by_handle_at(2), for what is known of a file when its name is not.

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

/// MAX_HANDLE_SZ.
pub const MAX: usize = 128;

/// `struct file_handle` with room for the longest.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX],
}

/// An O_PATH descriptor of the file with this handle, on the mount that the calling thread's working directory lies on.
/// Needs CAP_DAC_READ_SEARCH.
///
/// The working directory stands for the mount because a descriptor would have to be open for reading, which whoever
/// watches that directory is told of.
pub fn open_on_current_mount(kind: i32, data: &[u8]) -> nix::Result<OwnedFd> {
    let mut handle =
        Handle { bytes: u32::try_from(data.len()).map_err(|_| Errno::EINVAL)?, kind, data: [0; MAX] };
    handle.data.get_mut(..data.len()).ok_or(Errno::EINVAL)?.copy_from_slice(data);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle says how many of its bytes count, and has them.
    let fd = unsafe { libc::syscall(libc::SYS_open_by_handle_at, libc::AT_FDCWD, &raw mut handle, flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_that_is_none_is_refused() {
        assert!(open_on_current_mount(0x7f, &[1; 8]).is_err());
        assert_eq!(open_on_current_mount(1, &[0; MAX + 1]).unwrap_err(), Errno::EINVAL);
    }
}
