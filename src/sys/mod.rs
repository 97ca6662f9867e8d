//! Thin, safe wrappers of system calls that `nix` lacks.
//!
//! One family of calls a file. A wrapper checks nothing the kernel checks: it only makes the call safe to write
//! and gives its answer a type.

pub mod fcntl;
pub mod ioctl;
pub mod kcmp;
pub mod pidfd;
pub mod sockopt;
