//! Running a test's body in a forked child, in namespaces of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// Runs `body` in a child process that has unshared `namespaces` (CLONE_NEW* bits). With CLONE_NEWNS the mounts are
/// made private first. A panic in the child becomes a panic here, with the same message.
pub fn in_child(namespaces: i32, body: impl FnOnce()) {
    let (read, write) = nix::unistd::pipe().unwrap();
    // SAFETY: the child only runs the test's body and leaves by _exit. It allocates, which glibc allows after a
    // fork of a threaded process.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            drop(read);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let flags = CloneFlags::from_bits_truncate(namespaces);
                unshare(flags).unwrap();
                if flags.contains(CloneFlags::CLONE_NEWNS) {
                    use nix::mount::{MsFlags, mount};
                    let none: Option<&str> = None;
                    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
                }
                body();
            }));
            let code = match outcome {
                Ok(()) => 0,
                Err(panic) => {
                    let text = panic
                        .downcast_ref::<String>()
                        .cloned()
                        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                        .unwrap_or_default();
                    let _ = nix::unistd::write(&write, text.as_bytes());
                    1
                }
            };
            // SAFETY: ends the child without running the test harness's exit handlers.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => {
            drop(write);
            let mut text = String::new();
            let mut read = std::fs::File::from(read);
            std::io::Read::read_to_string(&mut read, &mut text).unwrap();
            match waitpid(child, None).unwrap() {
                WaitStatus::Exited(_, 0) => {}
                other => panic!("child: {text} ({other:?})"),
            }
        }
    }
}
