//! prctl(2) requests that `nix` does not cover.

use nix::errno::Errno;

use super::check;

/// True if the capability is in the bounding set; `EINVAL` for a number that this kernel does not know.
pub fn bounding_has(capability: u8) -> Result<bool, Errno> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(capability), 0, 0, 0) };
    check(ret.into()).map(|set| set == 1)
}

/// The highest capability that this kernel knows, found from the one that was the last for years.
pub fn last_capability() -> u8 {
    let known = |capability: &u8| bounding_has(*capability).is_ok();
    let start = 40_u8; // CAP_CHECKPOINT_RESTORE
    if known(&start) {
        (start..64).take_while(known).last().unwrap_or(start)
    } else {
        (0..start).rev().find(known).unwrap_or(0)
    }
}

/// Whether this kernel lets memory have names: `PR_SET_VMA_ANON_NAME`; Linux 5.17 with `CONFIG_ANON_VMA_NAME`.
pub fn can_name_memory() -> bool {
    const PR_SET_VMA: libc::c_int = 0x5356_4d41;
    const PR_SET_VMA_ANON_NAME: libc::c_ulong = 0;
    // SAFETY: takes the name of no memory at all.
    unsafe { libc::prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, 0_u64, 0_u64, 0_u64) == 0 }
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

/// Drops one capability from the bounding set.
pub fn drop_from_bounding(capability: u8) -> Result<(), Errno> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
    check(ret.into()).map(drop)
}

/// Three capability sets as bit masks, which only change together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// What is in force.
    pub effective: u64,
    /// What may be made effective.
    pub permitted: u64,
    /// What survives execve(2) with the file's inheritable set.
    pub inheritable: u64,
}

/// capset(2), version 3: one call, so that no order of the three sets can make it fail.
pub fn set_capabilities(sets: Capabilities) -> Result<(), Errno> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let half =
        |shift: u32| [sets.effective, sets.permitted, sets.inheritable].map(|bits| (bits >> shift) as u32);
    let data = [half(0), half(32)];
    // SAFETY: the kernel reads a header of two words and two records of three words.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// Soft and hard limit of another process, 0 for this one. prlimit(2)
pub fn limit(pid: i32, resource: u32) -> Result<(u64, u64), Errno> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one structure, and no new limit is given.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, 0, &raw mut limit) })?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// prlimit(2) of another process, 0 for this one.
pub fn set_limit(pid: i32, resource: u32, soft: u64, hard: u64) -> Result<(), Errno> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the kernel reads one structure, and no old limit is asked for.
    let ret = unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, &raw const limit, 0) };
    check(ret).map(drop)
}
