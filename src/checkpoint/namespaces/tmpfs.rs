//! Contents of a tmpfs: a gzip'ed tar, as CRIU has GNU tar write it, so that each can read the other's.
//!
//! ```text
//!   tmpfs-dev-N.tar.gz.img     N: device number of the file system, in the kernel's encoding
//!     ./  ./dir/  ./dir/file ...
//!     PAX records before an entry:      SCHILY.xattr.NAME, and mtime where it has nanoseconds
//!     a global PAX header at the end:   sockets, flags of chattr(1), and the attributes that would break a
//!                                       record of their own; see records.rs
//! ```
//!
//! Both directions work on a detached copy of the mount: no other mount lies over its files, nothing is hidden.

mod attributes;
mod pack;
mod records;
mod unpack;

pub use pack::{pack, pack_visible};
pub use unpack::{Policy, unpack, verify};

use std::ffi::CString;
use std::fmt::Display;
use std::os::fd::{AsFd, AsRawFd};

use crate::checkpoint::error::Error;

/// Name of the image for the tmpfs with that device number.
pub fn name(dev: u32) -> String {
    format!("tmpfs-dev-{dev}.tar.gz.img")
}

/// Bytes that a tmpfs has.
pub fn used(root: impl AsFd) -> u64 {
    nix::sys::statfs::fstatfs(root).map_or(u64::MAX, |fs| {
        let block = u64::try_from(fs.block_size()).unwrap_or(0);
        (fs.blocks() - fs.blocks_free().min(fs.blocks())) * block
    })
}

fn broken(e: impl Display) -> Error {
    Error::new(format!("the contents of the tmpfs are damaged: {e}"))
}

/// A path to whatever a descriptor is, O_PATH ones included. Only for use where /proc is ours.
fn magic_path(fd: impl AsFd) -> CString {
    // A formatted number has no zero byte.
    CString::new(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).unwrap_or_default()
}

/// How an attribute's name begins in a PAX record.
const XATTR: &str = "SCHILY.xattr.";

/// Those that a tmpfs can keep: immutable, append only, no dump, no access times.
const KEPT: u32 = 0x10 | 0x20 | 0x40 | 0x80;

#[cfg(test)]
mod tests;
