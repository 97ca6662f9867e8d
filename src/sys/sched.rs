//! Scheduling: sched_setattr(2), ioprio_set(2), set_mempolicy(2).

use nix::errno::Errno;

use super::check;

/// `struct sched_attr` as of Linux 3.14, its first version.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedAttr {
    /// Size of this structure; filled in by [`set_attr`].
    pub size: u32,
    /// SCHED_OTHER and so on.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// Nice value, for SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// Priority, for SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// SCHED_DEADLINE, in nanoseconds.
    pub runtime: u64,
    /// SCHED_DEADLINE, in nanoseconds.
    pub deadline: u64,
    /// SCHED_DEADLINE, in nanoseconds.
    pub period: u64,
}

/// Sets policy and attributes of this thread.
pub fn set_attr(attr: &SchedAttr) -> Result<(), Errno> {
    let attr = SchedAttr { size: size_of::<SchedAttr>() as u32, ..*attr };
    // SAFETY: the kernel reads `size` bytes of the structure.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) }).map(drop)
}

/// Sets class and level of this process's input and output.
pub fn set_io_priority(value: u32) -> Result<(), Errno> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(drop)
}

/// Sets the NUMA policy of this thread. `nodes` is a bit mask, the lowest node first.
pub fn set_mempolicy(mode: i32, nodes: &[u64]) -> Result<(), Errno> {
    let bits = nodes.len() * 64;
    let mask = if nodes.is_empty() { std::ptr::null() } else { nodes.as_ptr() };
    // The kernel takes one bit less than the number it is given.
    let max = if bits == 0 { 0 } else { bits + 1 };
    // SAFETY: the kernel reads `bits` bits of the slice.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, max) }).map(drop)
}
