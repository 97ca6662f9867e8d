//! Extended attributes, by path: listxattr(2), getxattr(2), setxattr(2).
//!
//! The f- variants refuse O_PATH descriptors; a path of the form /proc/self/fd/N reaches whatever N is.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// Largest list, and largest value, that the kernel has.
const MAX: usize = 65536;

fn filled(mut buffer: Vec<u8>, length: isize) -> Result<Vec<u8>, Errno> {
    buffer.truncate(usize::try_from(length).map_err(|_| Errno::last())?);
    Ok(buffer)
}

/// Names of the attributes of a file.
pub fn list(path: &CStr) -> Result<Vec<Vec<u8>>, Errno> {
    let mut buffer = vec![0u8; MAX];
    // SAFETY: the kernel writes at most `MAX` bytes into the buffer.
    let length = unsafe { libc::listxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), MAX) };
    let names = filled(buffer, length)?;
    Ok(names.split(|b| *b == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
}

/// Value of an attribute.
pub fn get(path: &CStr, name: &CStr) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0u8; MAX];
    // SAFETY: the kernel writes at most `MAX` bytes into the buffer.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), MAX) };
    filled(buffer, length)
}

/// Sets an attribute of an open file. fsetxattr(2)
pub fn set_open(file: impl AsFd, name: &CStr, value: &[u8]) -> Result<(), Errno> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `value.len()` bytes from the slice.
    let ret = unsafe { libc::fsetxattr(fd, name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    super::check(ret.into()).map(drop)
}

/// Sets an attribute.
pub fn set(path: &CStr, name: &CStr, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: the kernel reads `value.len()` bytes from the slice.
    let ret = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    super::check(ret.into()).map(drop)
}
