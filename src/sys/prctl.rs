//! prctl(2) requests that `nix` does not cover.

use nix::errno::Errno;

use super::check;

/// True if the capability is in the bounding set; `EINVAL` for a number that this kernel does not know.
pub fn bounding_has(capability: u8) -> Result<bool, Errno> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(capability), 0, 0, 0) };
    check(ret.into()).map(|set| set == 1)
}

/// The signal that this process gets when its parent dies, 0 for none.
pub fn parent_death_signal() -> Result<i32, Errno> {
    let mut signal: libc::c_int = 0;
    // SAFETY: the kernel writes one int.
    check(unsafe { libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal, 0, 0, 0) }.into())?;
    Ok(signal)
}

/// Sets the signal of [`parent_death_signal`], real-time signals included.
pub fn set_parent_death_signal(signal: i32) -> Result<(), Errno> {
    // SAFETY: numbers only.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) }.into()).map(drop)
}

/// True if this process may not gain privileges by execve(2).
pub fn no_new_privs() -> Result<bool, Errno> {
    // SAFETY: numbers only.
    check(unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) }.into()).map(|set| set == 1)
}
