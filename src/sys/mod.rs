//! Thin, safe wrappers of system calls that `nix` lacks.
//!
//! One family of calls a file. A wrapper checks nothing the kernel checks: it only makes the call safe to write
//! and gives its answer a type. It returns the errno unchanged; what the failure means is for the caller to say,
//! the runtime with [`Error`], the engine with its own.

pub mod bpf;
pub mod credentials;
pub mod epoll;
pub mod error;
pub mod fanotify;
pub mod fcntl;
pub mod fd;
pub mod handle;
pub mod hugetlb;
pub mod inotify;
pub mod io_uring;
pub mod ioctl;
pub mod kcmp;
pub mod keyring;
pub mod last_pid;
pub mod memory;
pub mod mount;
pub mod mqueue;
pub mod namespace;
pub mod netlink;
pub mod network;
mod newborn;
pub mod pagemap;
pub mod pidfd;
pub mod prctl;
pub mod probe;
pub mod process;
pub mod procfs;
pub mod program;
pub mod resolve;
pub mod route;
pub mod sched;
pub mod seccomp;
pub mod signalfd;
pub mod socket;
pub mod sockopt;
pub mod stat;
pub mod sysv;
#[cfg(test)]
pub mod testing;
pub mod tty;
pub mod tun;
pub mod userfaultfd;
pub mod uts;
pub mod xattr;

pub use error::{Context, Error, Result};

use nix::errno::Errno;

/// The result of a raw system call: -1 becomes the errno.
pub(crate) fn check(ret: libc::c_long) -> Result<libc::c_long, Errno> {
    if ret == -1 { Err(Errno::last()) } else { Ok(ret) }
}
