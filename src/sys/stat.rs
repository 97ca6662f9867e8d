//! statx(2), for what fstat(2) does not tell: the mount an inode was reached through.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use super::check;

/// What identifies a place in the file system: which file, reached through which mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Device, major and minor.
    pub device: (u32, u32),
    /// Inode number.
    pub inode: u64,
    /// Mount id, as mountinfo numbers them. 0 before Linux 5.8.
    pub mount: u64,
    /// True for the root of that mount. False before Linux 5.8.
    pub mount_root: bool,
}

/// Where a descriptor points.
pub fn place(fd: impl AsFd) -> Result<Place, Errno> {
    // SAFETY: all zeroes is a valid statx structure.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_STATX_DONT_SYNC;
    let mask = libc::STATX_INO | libc::STATX_MNT_ID;
    // SAFETY: the path is an empty C string, and the kernel writes one statx structure.
    let ret = unsafe { libc::statx(fd.as_fd().as_raw_fd(), c"".as_ptr(), flags, mask, &raw mut st) };
    check(ret.into())?;
    Ok(Place {
        device: (st.stx_dev_major, st.stx_dev_minor),
        inode: st.stx_ino,
        mount: if st.stx_mask & libc::STATX_MNT_ID == 0 { 0 } else { st.stx_mnt_id },
        mount_root: st.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_a_mount_is_told_from_a_directory_in_it() {
        let proc = std::fs::File::open("/proc").unwrap();
        let sys = std::fs::File::open("/proc/sys").unwrap();
        let (proc, sys) = (place(&proc).unwrap(), place(&sys).unwrap());
        assert!(proc.mount_root);
        assert!(!sys.mount_root);
        assert_eq!(proc.mount, sys.mount);
        assert_ne!(proc.inode, sys.inode);
    }
}
