//! Ids of the calling thread alone. The C library's setresuid(2) would change all threads of the process.

use nix::errno::Errno;

use super::check;

/// SECBIT_NO_SETUID_FIXUP: capabilities stay when user ids change.
const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;

/// Lets the calling thread keep its capabilities when its user id changes.
pub fn keep_capabilities() -> nix::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) }.into()).map(drop)
}

/// Changes the effective ids of the calling thread. Its file system ids follow.
pub fn set_thread_ids(uid: u32, gid: u32) -> Result<(), Errno> {
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, -1, gid, -1) })?;
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_alone_changes() {
        let seen = std::thread::spawn(|| {
            keep_capabilities().unwrap();
            set_thread_ids(99, 77).unwrap();
            let there = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            set_thread_ids(0, 0).unwrap();
            there
        })
        .join()
        .unwrap();
        assert!(seen.contains("Uid:\t0\t99\t0\t99"), "{seen}");
        assert!(seen.contains("Gid:\t0\t77\t0\t77"), "{seen}");
        assert!(nix::unistd::geteuid().is_root());
    }
}
