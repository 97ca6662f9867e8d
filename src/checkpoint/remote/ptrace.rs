//! The ptrace requests that the engine uses, one function each. They know nothing of what they are used for.

use std::ffi::c_void;
use std::mem::size_of;
use std::ptr::null_mut;

use libc::c_uint;
use nix::errno::Errno;

const PTRACE_GETSIGMASK: c_uint = 0x420a;
const PTRACE_SETSIGMASK: c_uint = 0x420b;
const PTRACE_PEEKSIGINFO: c_uint = 0x4209;
const PTRACE_SECCOMP_GET_FILTER: c_uint = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: c_uint = 0x420d;
const PTRACE_GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: c_uint = 0x4210;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: c_uint = 0x4211;

/// Seccomp filters of the tracee sleep while it is traced. Needs CAP_SYS_ADMIN in the initial user namespace.
pub(super) const O_SUSPEND_SECCOMP: i32 = 0x20_0000;
/// The tracee dies with its tracer.
pub(super) const O_EXITKILL: i32 = 0x10_0000;
/// New children and threads are born traced.
pub(super) const O_BIRTHS: i32 =
    libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK;

/// Classic BPF programs have at most 4096 instructions.
const FILTER_MAX: usize = 4096;

/// Calls ptrace(2) with pointers or numbers as the request wants them.
pub(in crate::checkpoint) fn request(
    request: c_uint,
    tid: i32,
    addr: usize,
    data: *mut c_void,
) -> nix::Result<usize> {
    // SAFETY: each caller below passes memory that is as large as its request reads or writes, and that lives
    // longer than the call; requests without pointers ignore both or take them as numbers.
    let answer = unsafe { libc::ptrace(request, tid, addr as *mut c_void, data) };
    usize::try_from(answer).map_err(|_| Errno::last())
}

fn number(value: usize) -> *mut c_void {
    value as *mut c_void
}

pub(super) fn seize(tid: i32, options: i32) -> nix::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, number(options as usize)).map(drop)
}
pub(super) fn interrupt(tid: i32) -> nix::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, null_mut()).map(drop)
}
pub(super) fn cont(tid: i32, signal: i32) -> nix::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, number(signal as usize)).map(drop)
}
/// Goes on to the next entry or return of a system call.
pub(super) fn to_syscall(tid: i32) -> nix::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, null_mut()).map(drop)
}
/// Makes one instruction.
pub(super) fn step(tid: i32) -> nix::Result<()> {
    request(libc::PTRACE_SINGLESTEP, tid, 0, null_mut()).map(drop)
}
pub(super) fn listen(tid: i32) -> nix::Result<()> {
    request(libc::PTRACE_LISTEN, tid, 0, null_mut()).map(drop)
}
pub(super) fn detach(tid: i32, signal: i32) -> nix::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, number(signal as usize)).map(drop)
}
pub(super) fn set_options(tid: i32, options: i32) -> nix::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, number(options as usize)).map(drop)
}
pub(super) fn event_message(tid: i32) -> nix::Result<u64> {
    let mut message: u64 = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, (&raw mut message).cast())?;
    Ok(message)
}
pub(super) fn siginfo(tid: i32) -> nix::Result<[u8; 128]> {
    let mut info = [0u8; 128];
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr().cast())?;
    Ok(info)
}

pub(super) fn sigmask(tid: i32) -> nix::Result<u64> {
    let mut mask: u64 = 0;
    request(PTRACE_GETSIGMASK, tid, size_of::<u64>(), (&raw mut mask).cast())?;
    Ok(mask)
}
pub(super) fn set_sigmask(tid: i32, mut mask: u64) -> nix::Result<()> {
    request(PTRACE_SETSIGMASK, tid, size_of::<u64>(), (&raw mut mask).cast()).map(drop)
}

/// At most `slots.len()` queued signals from position `from` on; how many there were.
pub(super) fn peek_siginfo(tid: i32, shared: bool, from: u64, slots: &mut [[u8; 128]]) -> nix::Result<usize> {
    #[repr(C)]
    struct PeekSiginfo {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let nr = i32::try_from(slots.len()).unwrap_or(i32::MAX);
    let args = PeekSiginfo { off: from, flags: u32::from(shared), nr };
    request(PTRACE_PEEKSIGINFO, tid, (&raw const args) as usize, slots.as_mut_ptr().cast())
}

/// The instructions of a seccomp filter, the newest filter has index 0. ENOENT past the last.
pub(super) fn seccomp_filter(tid: i32, index: usize) -> nix::Result<Vec<u64>> {
    let mut program = vec![0u64; FILTER_MAX];
    let len = request(PTRACE_SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr().cast())?;
    program.truncate(len);
    Ok(program)
}
/// The flags that a seccomp filter was loaded with.
pub(super) fn seccomp_flags(tid: i32, index: u64) -> nix::Result<u64> {
    let mut metadata: [u64; 2] = [index, 0];
    request(PTRACE_SECCOMP_GET_METADATA, tid, size_of::<[u64; 2]>(), metadata.as_mut_ptr().cast())?;
    Ok(metadata[1])
}

/// What `rseq(2)` registered; all zero where nothing is.
#[repr(C)]
#[derive(Default)]
pub(super) struct RawRseq {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) sig: u32,
    pub(super) flags: u32,
    pad: u32,
}
pub(super) fn rseq(tid: i32) -> nix::Result<RawRseq> {
    let mut config = RawRseq::default();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size_of::<RawRseq>(), (&raw mut config).cast())?;
    Ok(config)
}

/// Syscall user dispatch: mode, selector address, offset and length of a range.
///
/// The kernel tells mode 1, whose range is let through, also of mode 2, whose range is not: by the range that remains,
/// which goes around the end of the address space. In mode 1 it takes no such range.
#[repr(C)]
#[derive(Default, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RawDispatch {
    pub(super) mode: u64,
    pub(super) selector: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
}
pub(super) fn dispatch(tid: i32) -> nix::Result<RawDispatch> {
    let mut config = RawDispatch::default();
    request(
        PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        size_of::<RawDispatch>(),
        (&raw mut config).cast(),
    )?;
    Ok(config)
}
pub(super) fn set_dispatch(tid: i32, mut config: RawDispatch) -> nix::Result<()> {
    let end = config.offset.wrapping_add(config.len);
    if config.offset != 0 && end <= config.offset {
        config = RawDispatch { mode: 2, offset: end, len: config.len.wrapping_neg(), ..config };
    }
    request(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, tid, size_of::<RawDispatch>(), (&raw mut config).cast())
        .map(drop)
}
