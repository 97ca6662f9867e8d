//! Doing something inside the namespaces of a container.
//!
//! setns(2) moves one thread, so a thread is made for it and ends with it: the rest of the process stays where it is.
//! It shares memory and descriptors, so what it opens is ours afterwards.

use std::fs::File;

use nix::sched::{CloneFlags, setns, unshare};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::kind::Kind;

/// Runs `work` in a thread that has entered those namespaces of process `pid`.
///
/// In a foreign mount namespace, `/proc` and every other path are the container's: `work` must not trust them.
pub fn within<T: Send>(pid: i32, kinds: &[Kind], work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let mut doors = Vec::new();
    for kind in kinds {
        let path = format!("/proc/{pid}/ns/{}", kind.name());
        let what = format!("cannot enter the {} namespace of the container", kind.title());
        let door = File::open(&path).during(&what, || format!("open({path:?}, O_RDONLY)"))?;
        doors.push((door, kind, what));
    }
    let inside = move || {
        if kinds.contains(&Kind::Mnt) {
            // The thread's own root and working directory, or the kernel refuses.
            unshare(CloneFlags::CLONE_FS)
                .during("cannot enter the mount namespace of the container", || "unshare(CLONE_FS)".into())?;
        }
        for (door, kind, what) in &doors {
            setns(door, kind.flag()).during(what, || format!("setns(_, {:?})", kind.flag()))?;
        }
        drop(doors);
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("inside".into())
            .spawn_scoped(scope, inside)
            .during("cannot start a thread", || "clone3(CLONE_THREAD|...)".into())?;
        thread
            .join()
            .unwrap_or_else(|_| Err(Error::new("a thread inside the container's namespaces panicked")))
    })
}
