//! Work inside the new container's namespaces and root directory, on a thread of its own.
//!
//! Sockets belong to the namespace they are made in, and a unix socket's path is looked up by the kernel as a string.
//! A thread that has unshared its file system state may change both without the rest of this process noticing.

use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};

use crate::checkpoint::context::Target;
use crate::checkpoint::error::Context;
use crate::checkpoint::{Error, Result};
use crate::sys::ioctl;

/// Runs `work` on a thread in a network namespace, that of the target's init if there is none, with the target's root
/// as its own.
pub fn inside<T: Send>(
    target: &Target,
    network: Option<OwnedFd>,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let (root, init) = (target.root.as_fd(), target.init);
    on_thread(move || {
        match &network {
            Some(door) => through(door)?,
            None => enter_network(init)?,
        }
        let what = "cannot enter the container's root";
        unshare(CloneFlags::CLONE_FS).during(what, || "unshare(CLONE_FS)".into())?;
        nix::unistd::fchdir(root).during(what, || "fchdir(root)".into())?;
        nix::unistd::chroot(".").during(what, || "chroot(\".\")".into())?;
        work()
    })
}

/// Runs `work` on a thread in the network namespace of process `pid`.
pub fn in_network<T: Send>(pid: i32, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_thread(move || {
        enter_network(pid)?;
        work()
    })
}

/// Runs `work` on a thread in the network namespace behind a door.
pub fn in_space<T: Send>(door: &OwnedFd, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_thread(move || {
        through(door)?;
        work()
    })
}

/// Runs `work` in the network namespace of a socket; in that of `init` where it does not tell.
pub fn beside<T: Send>(socket: &OwnedFd, init: i32, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    match ioctl::socket_namespace(socket) {
        Ok(door) => in_space(&door, work),
        Err(_) => in_network(init, work),
    }
}

/// Runs `work` on a thread whose children are born into the pid namespace of process `pid`.
pub fn giving_birth_in<T: Send>(pid: i32, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_thread(move || {
        enter(pid, "pid", CloneFlags::CLONE_NEWPID)?;
        work()
    })
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        scope.spawn(work).join().unwrap_or_else(|_| Err(Error::new("a helper thread of the engine failed")))
    })
}

fn enter_network(pid: i32) -> Result<()> {
    enter(pid, "net", CloneFlags::CLONE_NEWNET)
}

/// Moves this thread into the network namespace behind a door.
pub fn through(door: &OwnedFd) -> Result<()> {
    let flag = CloneFlags::CLONE_NEWNET;
    setns(door, flag).during("cannot enter a namespace of the container", || format!("setns(_, {flag:?})"))
}

/// Moves this thread into the network namespace of process `pid`.
pub fn into_network(pid: i32) -> Result<()> {
    enter_network(pid)
}

fn enter(pid: i32, name: &str, flag: CloneFlags) -> Result<()> {
    let path = format!("/proc/{pid}/ns/{name}");
    let what = "cannot enter a namespace of the container";
    let namespace = std::fs::File::open(&path).during(what, || format!("open({path:?}, O_RDONLY)"))?;
    setns(namespace, flag).during(what, || format!("setns({path:?}, {flag:?})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_alone_enters() {
        let before = std::fs::read_link("/proc/self/ns/net").unwrap();
        let mut child = std::process::Command::new("unshare").args(["-n", "sleep", "100"]).spawn().unwrap();
        let pid = child.id().cast_signed();
        let theirs = (0..500)
            .find_map(|_| {
                std::thread::sleep(std::time::Duration::from_millis(2));
                std::fs::read_link(format!("/proc/{pid}/ns/net")).ok().filter(|ns| *ns != before)
            })
            .unwrap();
        let seen = in_network(pid, || Ok(std::fs::read_link("/proc/thread-self/ns/net").unwrap())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen, theirs);
        assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), before);
    }
}
