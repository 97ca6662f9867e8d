//! Scheduling: sched_setattr(2), ioprio_set(2), set_mempolicy(2), prctl(PR_SCHED_CORE).

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

/// The nice value of this thread.
pub fn nice() -> i32 {
    // SAFETY: numbers only. The call cannot fail, for the thread is there.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
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

const PR_SCHED_CORE: libc::c_int = 62;
const SCOPE_THREAD: libc::c_ulong = 0;

/// The cookie of core scheduling that a thread has: equal ones, and only those, may run on one core at a time. 0: none.
pub fn core_cookie(tid: i32) -> Result<u64, Errno> {
    const GET: libc::c_ulong = 0;
    let mut cookie = 0u64;
    // SAFETY: the kernel writes eight bytes.
    let ret = unsafe { libc::prctl(PR_SCHED_CORE, GET, long(tid), SCOPE_THREAD, &raw mut cookie) };
    check(ret.into())?;
    Ok(cookie)
}

/// A thread id as prctl(2) takes it; none is below 0.
fn long(tid: i32) -> libc::c_ulong {
    libc::c_ulong::from(tid.unsigned_abs())
}

/// Gives all these threads a new cookie.
pub fn share_core(tids: &[i32]) -> Result<(), Errno> {
    const CREATE: libc::c_ulong = 1;
    const SHARE_TO: libc::c_ulong = 2;
    const SHARE_FROM: libc::c_ulong = 3;
    let order = |what: libc::c_ulong, tid: i32| {
        const NOWHERE: libc::c_ulong = 0;
        // SAFETY: numbers only.
        let ret = unsafe { libc::prctl(PR_SCHED_CORE, what, long(tid), SCOPE_THREAD, NOWHERE) };
        check(ret.into()).map(drop)
    };
    let Some((first, others)) = tids.split_first() else { return Ok(()) };
    order(CREATE, *first)?;
    // The one that passes the cookie on has it, too, until it ends.
    let pass =
        || order(SHARE_FROM, *first).and_then(|()| others.iter().try_for_each(|tid| order(SHARE_TO, *tid)));
    std::thread::scope(|scope| scope.spawn(pass).join()).unwrap_or(Err(Errno::EIO))
}
