//! A namespace without an inhabitant: a child that only lives until somebody has opened its namespaces, or looked at one.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::{Context, Result, check};

/// Makes a child in the new namespaces `flags` (CLONE_NEW* bits), calls `with` with its pid, and ends it.
pub fn with_idle_child<T>(flags: libc::c_int, with: impl FnOnce(i32) -> T) -> Result<T> {
    idle_child(flags, || (), with)
}

/// Makes a child that enters a user namespace, calls `with` with its pid, and ends it.
pub fn with_idle_child_in<T>(door: impl AsFd, with: impl FnOnce(i32) -> T) -> Result<T> {
    let (read, write) = nix::unistd::pipe().context(|| "pipe")?;
    let door = door.as_fd();
    let enter = || {
        // Nothing but system calls: others of our threads may have held locks.
        let done = [u8::from(setns(door, CloneFlags::CLONE_NEWUSER).is_ok())];
        let _ = nix::unistd::write(&write, &done);
    };
    let wait = |pid| (entered(&read), with(pid));
    match idle_child(0, enter, wait)? {
        (Ok(()), result) => Ok(result),
        (Err(errno), _) => Err(errno).context(|| "setns(_, CLONE_NEWUSER)"),
    }
}

/// Waits for the child's word that it is there.
fn entered(read: &OwnedFd) -> std::result::Result<(), Errno> {
    let mut done = [0];
    loop {
        match nix::unistd::read(read, &mut done) {
            Err(Errno::EINTR) => {}
            Ok(1) if done == [1] => return Ok(()),
            Ok(_) => return Err(Errno::EPERM),
            Err(errno) => return Err(errno),
        }
    }
}

fn idle_child<T>(flags: libc::c_int, first: impl FnOnce(), with: impl FnOnce(i32) -> T) -> Result<T> {
    let args = [(flags as u64), 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    // SAFETY: the argument is eight 64-bit fields, the first version of clone_args; no memory is shared with the
    // child, which calls nothing but `first`, which makes system calls only, and pause(2).
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) })
        .context(|| "clone3")?;
    if pid == 0 {
        // Should the parent vanish, nobody else would end this child.
        // SAFETY: numbers only.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
        first();
        loop {
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
    }
    let child = Pid::from_raw(pid as i32);
    let result = with(child.as_raw());
    let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
    while waitpid(child, None) == Err(Errno::EINTR) {}
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_child_has_its_own_namespace_and_is_gone_afterwards() {
        let link = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/uts")).unwrap();
        let own = link(std::process::id() as i32);
        let pid = with_idle_child(libc::CLONE_NEWUTS, |pid| {
            assert_ne!(link(pid), own);
            pid
        })
        .unwrap();
        assert_eq!(nix::sys::signal::kill(Pid::from_raw(pid), None), Err(Errno::ESRCH));
    }

    #[test]
    fn a_child_tells_of_a_user_namespace_that_nobody_is_in() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let door = with_idle_child(libc::CLONE_NEWUSER, |pid| {
            std::fs::write(format!("/proc/{pid}/uid_map"), "7 0 1\n").unwrap();
            std::fs::File::open(format!("/proc/{pid}/ns/user")).unwrap()
        });
        let map = |pid| std::fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
        let text = with_idle_child_in(door.unwrap(), map).unwrap();
        assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["7", "0", "1"]);
        let none = std::fs::File::open("/dev/null").unwrap();
        assert!(with_idle_child_in(none, map).is_err());
    }
}
