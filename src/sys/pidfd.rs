//! Process descriptors: pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// A handle on process `pid` of the caller's pid namespace. `flags`: 0, or PIDFD_THREAD (O_EXCL) since 6.9.
pub fn open(pid: i32, flags: u32) -> nix::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) })?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// A duplicate of descriptor `fd` of the process behind `pidfd`: the same open file description. Close-on-exec.
pub fn getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends `signal` to the process behind `pidfd`. Signal 0 only asks whether it is there.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    // SAFETY: a null siginfo asks for the one that kill(2) would make.
    let r = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(r).map(drop)
}

/// Handles, one for each of `flags`, on one process that has ended and was waited for.
pub fn of_ended(flags: &[u32]) -> nix::Result<Vec<OwnedFd>> {
    // No C library's fork: the child runs one system call, whatever locks other threads hold.
    // SAFETY: a fork on the caller's stack, with memory of its own; the child does nothing but end.
    let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) })?;
    if pid == 0 {
        // SAFETY: does not return, and touches nothing.
        unsafe { libc::_exit(0) }
    }
    let pid = pid as i32;
    let handles = flags.iter().map(|&flags| open(pid, flags)).collect();
    let waited = super::process::wait_child(pid, true);
    waited.and(handles)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn an_ended_process_cannot_be_signalled() {
        for handle in of_ended(&[0, libc::O_NONBLOCK as u32]).unwrap() {
            assert_eq!(send_signal(handle.as_fd(), 0).unwrap_err(), Errno::ESRCH);
        }
        assert!(of_ended(&[u32::MAX]).is_err());
    }

    #[test]
    fn a_descriptor_is_fetched_from_another_process() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pidfd = open(child.id() as i32, 0).unwrap();
        let got = getfd(pidfd.as_fd(), 0).unwrap();
        let mine = child.stdin.take().unwrap();
        let (a, b) = (nix::sys::stat::fstat(&got).unwrap(), nix::sys::stat::fstat(&mine).unwrap());
        assert_eq!(a.st_ino, b.st_ino);
        assert_eq!(getfd(pidfd.as_fd(), 99).unwrap_err(), Errno::EBADF);
        send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
