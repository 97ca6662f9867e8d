//! keyctl(2), as far as a container needs it: a session keyring of its own, and what is in one.

use std::ffi::CStr;

use nix::errno::Errno;

use super::check;

const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
const KEYCTL_SETPERM: libc::c_long = 5;
const KEYCTL_DESCRIBE: libc::c_long = 6;
const KEYCTL_READ: libc::c_long = 11;
/// Keys of a keyring that are looked at.
const MOST: usize = 64;

/// Joins (or creates) the session keyring of that name and returns its serial number.
pub fn join_session(name: &CStr) -> Result<i32, Errno> {
    // SAFETY: the kernel reads the name up to its zero byte.
    let serial =
        check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) })?;
    i32::try_from(serial).map_err(|_| Errno::EOVERFLOW)
}

/// What a key is: `type;uid;gid;perm;description`.
pub fn describe(serial: i32) -> Result<String, Errno> {
    let mut text = [0u8; 512];
    // SAFETY: the kernel writes at most `text.len()` bytes.
    let len = check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_DESCRIBE, serial, text.as_mut_ptr(), text.len())
    })?;
    let text = text.get(..usize::try_from(len).unwrap_or(0)).ok_or(Errno::EOVERFLOW)?;
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// The serial numbers of the keys in a keyring.
pub fn list(serial: i32) -> Result<Vec<i32>, Errno> {
    let mut keys = [0_i32; MOST];
    // SAFETY: the kernel writes at most the bytes of `keys`, and returns how many there are.
    let len = check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_READ, serial, keys.as_mut_ptr(), size_of_val(&keys))
    })?;
    let count = usize::try_from(len).unwrap_or(0) / size_of::<i32>();
    Ok(keys[..count.min(MOST)].to_vec())
}

/// The permission bits of a key.
pub fn permissions(serial: i32) -> Result<u32, Errno> {
    let text = describe(serial)?;
    text.split(';').nth(3).and_then(|t| u32::from_str_radix(t, 16).ok()).ok_or(Errno::EINVAL)
}

/// Replaces the permission bits of a key.
pub fn set_permissions(serial: i32, bits: u32) -> Result<(), Errno> {
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, serial, bits) }).map(drop)
}
