//! Doing something inside the namespaces of a container.
//!
//! setns(2) moves one thread, so a thread is made for it and ends with it: the rest of the process stays where it is.
//! It shares memory and descriptors, so what it opens is ours afterwards.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::sched::{CloneFlags, setns, unshare};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::kind::Kind;

/// Ways into namespaces: one each.
pub type Doors = Vec<(OwnedFd, Kind)>;

/// The doors of a process.
pub fn doors(pid: i32, kinds: &[Kind]) -> Result<Doors> {
    kinds.iter().map(|kind| Ok((door(pid, *kind)?, *kind))).collect()
}

/// The door of a process to one of its namespaces.
pub fn door(pid: i32, kind: Kind) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/ns/{}", kind.name());
    let door = File::open(&path).during(&what(kind), || format!("open({path:?}, O_RDONLY)"))?;
    Ok(door.into())
}

fn what(kind: Kind) -> String {
    format!("cannot enter the {} namespace of the container", kind.title())
}

/// Runs `work` in a thread that has entered those namespaces of process `pid`.
///
/// In a foreign mount namespace, `/proc` and every other path are the container's: `work` must not trust them.
pub fn within<T: Send>(pid: i32, kinds: &[Kind], work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    through(doors(pid, kinds)?, work)
}

/// Runs `work` in a thread that has gone through these doors.
pub fn through<T: Send>(doors: Doors, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let inside = move || {
        if doors.iter().any(|(_, kind)| *kind == Kind::Mnt) {
            // The thread's own root and working directory, or the kernel refuses.
            unshare(CloneFlags::CLONE_FS)
                .during("cannot enter the mount namespace of the container", || "unshare(CLONE_FS)".into())?;
        }
        for (door, kind) in &doors {
            setns(door, kind.flag()).during(&what(*kind), || format!("setns(_, {:?})", kind.flag()))?;
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
