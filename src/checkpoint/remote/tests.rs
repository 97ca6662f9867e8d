//! Driving real children. Each test forks its own, which run on a copy of the test's memory and make no library
//! calls that take locks.

use std::ptr::null_mut;
use std::time::{Duration, Instant};

use super::*;

/// A forked child that is killed and reaped at the end.
struct Child(i32);

impl Child {
    fn fork(program: impl FnOnce()) -> Self {
        // SAFETY: the child only runs the test's program, which takes no locks, and leaves by _exit.
        match unsafe { libc::fork() } {
            0 => {
                program();
                // SAFETY: ends the child without running destructors of the parent's.
                unsafe { libc::_exit(0) }
            }
            pid => Self(pid),
        }
    }
    fn seize(&self) -> Thread {
        let thread = Thread::seize(self.0).unwrap();
        thread.stop(soon()).unwrap();
        thread
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, null_mut(), 0);
        }
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

fn pause() {
    // SAFETY: no arguments.
    unsafe { libc::pause() };
}

#[test]
fn a_live_batch_runs_in_the_child() {
    let child = Child::fork(|| {
        loop {
            pause();
        }
    });
    let thread = child.seize();
    let before = thread.regs().unwrap();
    let mut injection = Injection::start(&thread).unwrap();
    let mut batch = Batch::new();
    let pid = batch.call(libc::SYS_getpid, &[]);
    let pair = batch.out(8);
    batch.call(libc::SYS_pipe2, &[pair.arg(), 0.into()]);
    let hello = batch.data(b"hello");
    let put = batch.call(libc::SYS_write, &[pair.load_u32(4), hello, 5.into()]);
    let got = batch.out(16);
    batch.call(libc::SYS_read, &[pair.load_u32(0), got.arg(), put.into()]);
    batch.call(libc::SYS_close, &[pair.load_u32(0)]);
    let results = injection.run(&batch).unwrap();
    assert_eq!(results.ret(pid), i64::from(child.0));
    assert_eq!(&results.out(got)[..6], b"hello\0");
    injection.finish().unwrap();
    let after = thread.regs().unwrap();
    assert_eq!((before.rip, before.rax, before.rsp), (after.rip, after.rax, after.rsp));
}
