//! The ptrace requests that read and write registers.

use std::mem::zeroed;

use super::Regs;
use crate::checkpoint::remote::ptrace::request;

/// Register set with everything that xsave keeps.
const NT_X86_XSTATE: usize = 0x202;
/// Largest xsave area accepted: AMX takes 11 KiB.
const XSTATE_MAX: usize = 64 << 10;

/// `PTRACE_GETREGS`: unlike the register set of that name, it has one layout also for 32-bit programs.
pub fn regs(tid: i32) -> nix::Result<Regs> {
    // SAFETY: a plain structure of integers, for which zero is a value.
    let mut regs: Regs = unsafe { zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, (&raw mut regs).cast())?;
    Ok(regs)
}

/// `PTRACE_SETREGS`
pub fn set_regs(tid: i32, regs: &Regs) -> nix::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, std::ptr::from_ref(regs).cast_mut().cast()).map(drop)
}

/// Floating point, vector and tile registers: the xsave area in its standard format.
pub fn extended(tid: i32) -> nix::Result<Vec<u8>> {
    let mut area = vec![0u8; XSTATE_MAX];
    let mut iov = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, (&raw mut iov).cast())?;
    area.truncate(iov.iov_len);
    Ok(area)
}

/// Sets what [`extended`] read.
pub fn set_extended(tid: i32, area: &[u8]) -> nix::Result<()> {
    let mut iov = libc::iovec { iov_base: area.as_ptr().cast_mut().cast(), iov_len: area.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, (&raw mut iov).cast()).map(drop)
}
