//! A namespace without an inhabitant: a child that only lives until somebody has opened its namespaces.

use nix::errno::Errno;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::{Context, Result, check};

/// Makes a child in the new namespaces `flags` (CLONE_NEW* bits), calls `with` with its pid, and ends it.
pub fn with_idle_child<T>(flags: libc::c_int, with: impl FnOnce(i32) -> T) -> Result<T> {
    let args = [(flags as u64), 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    // SAFETY: the argument is eight 64-bit fields, the first version of clone_args; no memory is shared with the
    // child, which calls nothing but pause(2).
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) })
        .context(|| "clone3")?;
    if pid == 0 {
        // Should the parent vanish, nobody else would end this child.
        // SAFETY: numbers only.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
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
}
