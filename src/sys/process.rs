//! Making and ending processes: `clone3(2)`, `setns(2)`, `wait4(2)`, and what a new one must let go of.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::unistd::Pid;

/// What a new process is to be: `struct clone_args` as far as a fork needs it.
#[derive(Debug, Default, Clone, Copy)]
pub struct Fork {
    /// CLONE_NEW* flags, CLONE_PARENT.
    pub flags: u64,
    /// Control group (v2) that the child starts in, as a descriptor of its directory.
    pub into_cgroup: Option<RawFd>,
    /// Its pid in the namespace that it is born in.
    pub set_tid: Option<libc::pid_t>,
}

/// Which side of a fork this is.
#[derive(Debug)]
pub enum Side {
    /// The new process.
    Child,
    /// The old process: the child's pid and its pidfd.
    Parent(Pid, OwnedFd),
}

/// Forks by `clone3(2)`; the child gets a copy of all memory, as with fork(2).
///
/// # Safety
/// Only the calling thread exists in the child: the process must have no other thread that could hold a lock.
pub unsafe fn clone3(fork: Fork) -> nix::Result<Side> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain integers, for which zero is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = fork.flags | libc::CLONE_PIDFD as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    // A child made with CLONE_PARENT takes over its creator's exit signal.
    args.exit_signal = if fork.flags & libc::CLONE_PARENT as u64 == 0 { libc::SIGCHLD as u64 } else { 0 };
    if let Some(fd) = fork.into_cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::try_from(fd).map_err(|_| Errno::EBADF)?;
    }
    if let Some(tid) = &fork.set_tid {
        (args.set_tid, args.set_tid_size) = (std::ptr::from_ref(tid) as u64, 1);
    }
    // SAFETY: args and fork outlive the call, which asks for no shared memory or stack, so the child is a fork;
    // the caller vouches for the absence of other threads.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match Errno::result(pid)? {
        0 => Ok(Side::Child),
        pid => {
            // SAFETY: the kernel has stored a new descriptor that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Side::Parent(Pid::from_raw(pid as i32), pidfd))
        }
    }
}

/// Put the child into the control group given by `clone_args.cgroup` (Linux 5.7).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `setns(2)` on a namespace file or, with several CLONE_NEW* flags, on a pidfd.
pub fn setns(fd: BorrowedFd<'_>, flags: i32) -> nix::Result<()> {
    // SAFETY: no memory is passed.
    Errno::result(unsafe { libc::setns(fd.as_raw_fd(), flags) }).map(drop)
}

/// Closes every descriptor from 3 on but those listed.
///
/// # Safety
/// No value that owns one of the closed descriptors may be used or dropped afterwards.
pub unsafe fn close_all_but(keep: &[RawFd]) -> nix::Result<()> {
    let mut keep: Vec<u32> =
        keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).filter(|&fd| fd >= 3).collect();
    keep.sort_unstable();
    let mut from = 3_u32;
    for fd in keep {
        if fd > from {
            close_range(from as RawFd, fd - 1, 0)?;
        }
        from = from.max(fd + 1);
    }
    close_range(from as RawFd, u32::MAX, 0)
}

/// Makes a fork a process on its own: a session of its own, nothing of the descriptors but those listed, standard ones
/// that lead nowhere, no mount kept busy, no signal handled.
///
/// # Safety
/// No value that owns one of the closed descriptors may be used or dropped afterwards.
pub unsafe fn detach(keep: &[RawFd]) -> nix::Result<()> {
    nix::unistd::setsid()?;
    nix::unistd::chdir("/")?;
    let null = nix::fcntl::open("/dev/null", nix::fcntl::OFlag::O_RDWR, nix::sys::stat::Mode::empty())?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    // Where it is one of the three it has to stay.
    std::mem::forget(null);
    // SAFETY: the caller's promise.
    unsafe { close_all_but(keep) }
}

fn close_range(first: RawFd, last: u32, flags: u32) -> nix::Result<()> {
    // SAFETY: no memory is passed; who owns the descriptors is the callers' promise.
    let r = unsafe { libc::syscall(libc::SYS_close_range, first as u32, last, flags) };
    Errno::result(r).map(drop)
}

/// Waits for a child by its pid; None while it runs (only with `block` false). The result is an exit status as a
/// shell prints it: 128 + signal for a killed process.
pub fn wait_child(pid: i32, block: bool) -> nix::Result<Option<i32>> {
    let mut status = 0;
    loop {
        // SAFETY: status outlives the call.
        let r = unsafe { libc::waitpid(pid, &raw mut status, if block { 0 } else { libc::WNOHANG }) };
        match Errno::result(r) {
            Ok(0) => return Ok(None),
            Ok(_) if libc::WIFEXITED(status) => return Ok(Some(libc::WEXITSTATUS(status))),
            Ok(_) if libc::WIFSIGNALED(status) => return Ok(Some(128 + libc::WTERMSIG(status))),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Ends this process at once: no destructor, no exit handler. For children that share nothing but a fork.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes an integer and does not return.
    unsafe { libc::_exit(code) }
}

/// Makes the signals that ask a process to end do so: the first process of a pid namespace ignores those that it does
/// not handle. A program that it becomes has the default actions again.
pub fn end_on_signals() -> nix::Result<()> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: _exit(2) may be called from a handler.
        unsafe { libc::_exit(128 + signal) }
    }
    let action = SigAction::new(SigHandler::Handler(end), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
        // SAFETY: the handler does nothing but end the process.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_fork_can_be_signalled_and_waited_for() {
        // The test harness has threads; the child calls only async-signal-safe functions.
        // SAFETY: see above.
        match unsafe { clone3(Fork::default()) }.unwrap() {
            Side::Child => loop {
                // SAFETY: pause has no arguments.
                unsafe { libc::pause() };
            },
            Side::Parent(pid, pidfd) => {
                crate::sys::pidfd::send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap();
                assert_eq!(wait_child(pid.as_raw(), true).unwrap(), Some(128 + libc::SIGKILL));
            }
        }
    }
}
