//! What runs inside a new container before its program does.
//!
//! Each leaf is one subject of config.json: it takes its part of the spec, does it to the calling process, and says
//! in runc's words what failed. The order in which a new process goes through the leaves is its own module's.
//!
//! ```text
//!   rootfs::prepare ── mounts, devices          paths are the host's
//!   rootfs::pivot                               ── from here on "/" is the container ──
//!   rootfs::finish  ── masked, sysctl, lsm
//!   scheduling, seccomp, credentials, capabilities ── execve(2)
//! ```
//!
//! The root file system is hostile: whoever made it wants the runtime to write, mount or look somewhere else. Paths in
//! it are resolved by [`crate::sys::resolve`] only, once, to a descriptor; mounts are attached to descriptors; /proc is
//! written through [`crate::sys::procfs`] only.

pub mod capabilities;
pub mod channel;
pub mod console;
pub mod credentials;
pub mod devices;
pub mod lsm;
pub mod masked;
pub mod mounts;
pub mod namespaces;
pub mod privileges;
pub mod process;
pub mod program;
pub mod rlimits;
pub mod rootfs;
pub mod scheduling;
pub mod seal;
pub mod seccomp;
pub mod setns;
pub mod sysctl;
pub mod time;

#[cfg(test)]
mod tests;
