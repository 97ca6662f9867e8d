//! A network of their own for tests: nothing of the machine's is touched or needed.

use nix::sched::{CloneFlags, unshare};

/// Runs a test on a thread in a new network namespace with loopback up.
pub fn in_new_network<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            crate::sys::network::loopback_up().unwrap();
            test()
        });
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
