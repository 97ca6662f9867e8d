//! System calls that other architectures lack.

use crate::checkpoint::remote::Batch;

/// Maps the vdso of 32-bit programs and its data at an address.
const ARCH_MAP_VDSO_32: i32 = 0x2002;
/// Maps the vdso and its data at an address.
const ARCH_MAP_VDSO_64: i32 = 0x2003;

/// The name of a system call that other architectures lack.
pub fn call_name(nr: i64) -> Option<&'static str> {
    Some(match nr {
        libc::SYS_arch_prctl => "arch_prctl",
        libc::SYS_dup2 => "dup2",
        libc::SYS_getpgrp => "getpgrp",
        libc::SYS_open => "open",
        libc::SYS_poll => "poll",
        _ => return None,
    })
}

/// Maps this kernel's vdso with its data at `start`. arch_prctl(2)
pub fn map_vdso(batch: &mut Batch, start: u64) {
    batch.call(libc::SYS_arch_prctl, &[ARCH_MAP_VDSO_64.into(), start.into()]);
}

/// As [`map_vdso`], for a 32-bit program.
pub fn map_compat_vdso(batch: &mut Batch, start: u64) {
    batch.call(libc::SYS_arch_prctl, &[ARCH_MAP_VDSO_32.into(), start.into()]);
}
