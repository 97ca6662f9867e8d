//! ENOSYS for system calls that are newer than the profile.
//!
//! A profile that denies by default answers EPERM to a call that nobody had heard of when it was written. C libraries
//! try such calls first and fall back to older ones only on ENOSYS. So in front of the filter stands a stub that answers
//! ENOSYS to every number above the highest that the profile mentions, for each architecture:
//!
//! ```text
//!        A = arch
//!        A != x86_64 ? ──────────────> next section
//!        A = nr
//!        A & x32 bit ? ──┐
//!        A > highest ? ──┼─> return ENOSYS ── else ──> filter
//!        A > highest of x32 ? ┘
//! ```

use libseccomp::{ScmpArch, ScmpSyscall};
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_SET: u16 = 0x45;
const RETURN: u16 = 0x06;

const X32_BIT: u32 = 1 << 30;
const RET_ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

fn insn(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// AUDIT_ARCH_* that the kernel reports; x32 is x86_64 with a bit in the number. On other architectures than these
/// there is no stub.
fn audit_arch(arch: ScmpArch) -> Option<u32> {
    match arch {
        ScmpArch::X8664 | ScmpArch::X32 => Some(0xc000_003e),
        ScmpArch::X86 => Some(0x4000_0003),
        ScmpArch::Aarch64 => Some(0xc000_00b7),
        ScmpArch::Arm => Some(0x4000_0028),
        ScmpArch::Riscv64 => Some(0xc000_00f3),
        ScmpArch::Ppc64Le => Some(0xc000_0015),
        ScmpArch::Loongarch64 => Some(0xc000_0102),
        _ => None,
    }
}

/// The stub, or nothing where the profile allows by default or answers ENOSYS itself.
pub(super) fn stub(config: &LinuxSeccomp, archs: &[ScmpArch]) -> Option<Vec<libc::sock_filter>> {
    let permissive = matches!(
        config.default_action(),
        LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog | LinuxSeccompAction::ScmpActTrace
    );
    if permissive || config.default_errno_ret() == Some(libc::ENOSYS as u32) {
        return None;
    }
    let highest = |arch: ScmpArch| -> Option<u32> {
        if !archs.contains(&arch) {
            return None;
        }
        let names = config.syscalls().iter().flatten().flat_map(|rule| rule.names());
        let numbers = names.filter_map(|n| ScmpSyscall::from_name_by_arch(n, arch).ok());
        // Numbers below zero stand for calls that the architecture lacks.
        numbers.map(ScmpSyscall::as_raw_syscall).max().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0)
    };
    let mut sections = Vec::new();
    for arch in archs {
        let (own, x32) = match arch {
            ScmpArch::X8664 => (highest(*arch), highest(ScmpArch::X32)),
            ScmpArch::X32 if archs.contains(&ScmpArch::X8664) => continue,
            ScmpArch::X32 => (None, highest(*arch)),
            _ => (highest(*arch), None),
        };
        if let Some(audit) = audit_arch(*arch)
            && (own.is_some() || x32.is_some())
        {
            sections.push(section(audit, own, x32));
        }
    }
    if sections.is_empty() {
        return None;
    }
    let total: usize = sections.iter().map(Vec::len).sum();
    let mut stub = vec![insn(LOAD, 0, 0, 4)];
    for mut section in sections {
        // The last instruction of a section leads into the filter, over what is left of the stub.
        let left = total - (stub.len() - 1) - section.len();
        if let Some(last) = section.last_mut() {
            last.k = left as u32;
        }
        stub.extend(section);
    }
    Some(stub)
}

/// One architecture. Numbers with the x32 bit are judged by `x32`, others by `own`; what has no limit passes.
fn section(audit: u32, own: Option<u32>, x32: Option<u32>) -> Vec<libc::sock_filter> {
    let mut body = vec![insn(LOAD, 0, 0, 0)];
    if audit == 0xc000_003e {
        // With the bit to the second comparison, without it to the first.
        body.push(insn(JUMP_SET, 1, 0, X32_BIT));
        // The greatest number passes everything.
        body.push(insn(JUMP_GREATER, 1, 2, own.unwrap_or(u32::MAX)));
        body.push(insn(JUMP_GREATER, 0, 1, x32.map_or(u32::MAX, |n| n | X32_BIT)));
    } else {
        body.push(insn(JUMP_GREATER, 0, 1, own.unwrap_or(u32::MAX)));
    }
    body.push(insn(RETURN, 0, 0, RET_ENOSYS));
    body.push(insn(JUMP, 0, 0, 0));
    let mut section = vec![insn(JUMP_EQUAL, 0, body.len() as u8, audit)];
    section.extend(body);
    section
}
