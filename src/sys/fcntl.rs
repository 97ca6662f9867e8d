//! The part of fcntl(2) that says who is told about I/O on a descriptor: F_SETOWN_EX, F_SETSIG, F_GETOWNER_UIDS.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_GETOWNER_UIDS: i32 = 17;

/// Who receives SIGIO.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// F_OWNER_TID (0), F_OWNER_PID (1) or F_OWNER_PGRP (2).
    pub kind: i32,
    /// Id in the caller's pid namespace; 0: nobody, or one that this namespace can't see.
    pub pid: i32,
}

/// F_GETOWN_EX.
pub fn owner(fd: impl AsFd) -> nix::Result<Owner> {
    let mut owner = Owner::default();
    // SAFETY: the argument points to an f_owner_ex, which `Owner` has the layout of.
    Errno::result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWN_EX, &raw mut owner) })?;
    Ok(owner)
}

/// F_SETOWN_EX. The caller's real and effective uid are kept with the owner and checked at each signal.
pub fn set_owner(fd: impl AsFd, owner: Owner) -> nix::Result<()> {
    // SAFETY: the argument points to an f_owner_ex, which `Owner` has the layout of.
    Errno::result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETOWN_EX, &raw const owner) }).map(drop)
}

/// F_SETOWN_EX by a thread with these real and effective uids, which are kept with the owner.
pub fn set_owner_as(fd: impl AsFd, owner: Owner, [uid, euid]: [u32; 2]) -> nix::Result<()> {
    let fd = fd.as_fd();
    let set = move || {
        // The C library would change the ids of all threads.
        // SAFETY: numbers only; the thread ends with this closure.
        Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, uid, euid, u32::MAX) })?;
        set_owner(fd, owner)
    };
    std::thread::scope(|scope| scope.spawn(set).join().unwrap_or(Err(Errno::ECANCELED)))
}

/// F_GETOWNER_UIDS: real and effective uid of the one who set the owner.
pub fn owner_uids(fd: impl AsFd) -> nix::Result<[u32; 2]> {
    let mut uids = [0u32; 2];
    // SAFETY: the argument points to two uid_t.
    Errno::result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) })?;
    Ok(uids)
}

/// F_GETSIG: 0 stands for SIGIO.
pub fn signal(fd: impl AsFd) -> nix::Result<i32> {
    // SAFETY: no pointers are passed.
    Errno::result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETSIG) })
}

/// F_SETSIG.
pub fn set_signal(fd: impl AsFd, signal: i32) -> nix::Result<()> {
    // SAFETY: no pointers are passed.
    Errno::result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETSIG, signal) }).map(drop)
}

/// Has the kernel begin to write a part of a file to the disk, without waiting for it: sync_file_range(2). Only a hint: it
/// promises nothing about what will be on the disk.
pub fn begin_writing(file: impl AsFd, offset: u64, len: usize) {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return };
    // SAFETY: numbers only.
    unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Has the file system set room aside for a file that is about to be written: fallocate(2). Only a hint: where it cannot,
/// writing finds the room piece by piece, which takes longer; where there is none, writing says so. A file system in
/// memory would fill that room with zeros.
pub fn set_aside(file: impl AsFd, len: u64) {
    let file = file.as_fd();
    let in_memory =
        nix::sys::statfs::fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC);
    if let (false, Ok(len)) = (in_memory, i64::try_from(len)) {
        let _ = nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_set_as_somebody_else() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (r, _w) = nix::unistd::pipe().unwrap();
        let me = Owner { kind: 1, pid: std::process::id().cast_signed() };
        set_owner_as(&r, me, [1234, 4321]).unwrap();
        assert_eq!((owner(&r).unwrap(), owner_uids(&r).unwrap()), (me, [1234, 4321]));
        assert!(nix::unistd::geteuid().is_root(), "only the helper thread changed");
    }

    #[test]
    fn owner_and_signal_are_read_back() {
        let (r, _w) = nix::unistd::pipe().unwrap();
        assert_eq!(owner(&r).unwrap().pid, 0);
        let me = Owner { kind: 1, pid: std::process::id() as i32 };
        set_owner(&r, me).unwrap();
        set_signal(&r, 40).unwrap();
        assert_eq!(owner(&r).unwrap(), me);
        assert_eq!(signal(&r).unwrap(), 40);
        assert_eq!(
            owner_uids(&r).unwrap(),
            [nix::unistd::getuid().as_raw(), nix::unistd::geteuid().as_raw()]
        );
    }
}
