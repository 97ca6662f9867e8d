//! 32-bit programs (i386), which the kernel of this architecture runs beside its own.
//!
//! Such a program is dumped and restored by 64-bit code: its threads are led to the stub's code segment and back, and the
//! stub makes the calls of 64-bit programs. A few things the kernel keeps apart for it:
//!
//! | what                     | read                              | put back                                    |
//! |--------------------------|-----------------------------------|---------------------------------------------|
//! | registers                | PTRACE_GETREGS, in 64-bit layout  | PTRACE_SETREGS with its code segment        |
//! | thread-local segments    | PTRACE_GET_THREAD_AREA            | PTRACE_SET_THREAD_AREA                      |
//! | vdso                     | —                                 | arch_prctl(ARCH_MAP_VDSO_32)                |
//! | signal actions           | rt_sigaction(2), as any           | its own rt_sigaction: the frames of handlers |
//! | robust futexes           | its own get_robust_list(2)        | its own set_robust_list(2)                  |
//!
//! Its own calls are made by `int $0x80`, which works from 64-bit code as long as all addresses have 32 bits. So the window
//! of such a restore lies below 4 GiB.
//!
//! What is not put back: the kernel takes the new process for one with 64-bit addresses (TIF_ADDR32 is set by execve(2)
//! alone). Its own calls get addresses of 32 bits all the same, because that is decided call by call.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::ia32;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{SaEntry, ThreadInfoX86, UserDescT, UserX86RegsMode};
use crate::checkpoint::remote::Injection;
use crate::checkpoint::remote::ptrace::request;

/// The addresses of 32-bit programs.
pub const ADDRESSES: u64 = 1 << 32;

const PTRACE_GET_THREAD_AREA: u32 = 25;
const PTRACE_SET_THREAD_AREA: u32 = 26;
/// The segments in the global descriptor table that a thread has to itself: GDT_ENTRY_TLS_MIN to _MAX.
const SEGMENTS: std::ops::Range<u32> = 12..15;

const RT_SIGACTION: u32 = 174;
const SET_ROBUST_LIST: u32 = 311;
const SIGNAL_SET: u32 = 8;

/// Makes the calls of a list, one after the other: number, four arguments, room for the result; 0 ends it.
///
/// ```text
///      mov  r8, rbx
///   1: mov  eax, [r8];  test eax, eax;  jz 2f
///      mov  ebx, [r8 + 4];  mov ecx, [r8 + 8];  mov edx, [r8 + 12];  mov esi, [r8 + 16]
///      int  0x80
///      mov  [r8 + 20], eax;  add r8, 24;  jmp 1b
///   2: jmp  rbp
/// ```
const CALLS: [u8; 40] = [
    0x49, 0x89, 0xd8, 0x41, 0x8b, 0x00, 0x85, 0xc0, 0x74, 0x1c, 0x41, 0x8b, 0x58, 0x04, 0x41, 0x8b, 0x48,
    0x08, 0x41, 0x8b, 0x50, 0x0c, 0x41, 0x8b, 0x70, 0x10, 0xcd, 0x80, 0x41, 0x89, 0x40, 0x14, 0x49, 0x83,
    0xc0, 0x18, 0xeb, 0xdd, 0xff, 0xe5,
];
const CALL: usize = 24;

/// Whether the image is that of a 32-bit program's thread.
pub fn is_compat(info: &ThreadInfoX86) -> bool {
    info.gpregs.mode == Some(UserX86RegsMode::Compat.into())
}

/// Whether a process runs a 32-bit program, by its executable.
pub fn runs_in(pid: i32) -> bool {
    header_of(pid).is_some_and(|header| header[CLASS] == CLASS_32)
}

/// Refuses what runs with 32-bit addresses in 64-bit code.
pub fn check(pid: i32) -> Result<()> {
    match header_of(pid) {
        Some(header) if header[CLASS] == CLASS_32 && header[MACHINE] != MACHINE_386 => {
            Err(Error::new("a program of the x32 interface cannot be dumped").remedy("use its 64-bit build"))
        }
        _ => Ok(()),
    }
}

/// Offset of the class in an ELF file's header.
const CLASS: usize = 4;
const CLASS_32: u8 = 1;
/// Offset of the machine.
const MACHINE: usize = 18;
const MACHINE_386: u8 = 3;

fn header_of(pid: i32) -> Option<[u8; 20]> {
    let mut header = [0; 20];
    File::open(format!("/proc/{pid}/exe")).and_then(|exe| exe.read_exact_at(&mut header, 0)).ok()?;
    Some(header)
}

/// Reads the segments that a thread has to itself.
pub fn segments(tid: i32) -> Result<Vec<UserDescT>> {
    let read = |number: u32| {
        let mut desc = [0_u32; 4];
        request(PTRACE_GET_THREAD_AREA, tid, number as usize, desc.as_mut_ptr().cast())
            .during("cannot read the thread's segments", || {
                format!("ptrace(PTRACE_GET_THREAD_AREA, {tid}, {number})")
            })?;
        Ok(unpack(desc))
    };
    SEGMENTS.map(read).collect()
}

/// Puts them back.
pub fn restore_segments(tid: i32, segments: &[UserDescT]) -> Result<()> {
    for segment in segments {
        let number = segment.entry_number;
        if !SEGMENTS.contains(&number) {
            return Err(Error::new(format!("the image has a thread-local segment {number}")));
        }
        let mut desc = pack(segment);
        request(PTRACE_SET_THREAD_AREA, tid, number as usize, desc.as_mut_ptr().cast())
            .during("cannot set the thread's segments", || {
                format!("ptrace(PTRACE_SET_THREAD_AREA, {tid}, {number})")
            })?;
    }
    Ok(())
}

/// Where a segment that a selector chooses begins.
pub(super) fn base(segments: &[UserDescT], selector: u64) -> Option<u64> {
    let chosen = |segment: &&UserDescT| u64::from(segment.entry_number) == selector >> 3;
    segments.iter().find(chosen).filter(|_| selector & 4 == 0).map(|segment| segment.base_addr.into())
}

/// From a `struct user_desc`: number, base, limit, and bits from the lowest on.
fn unpack([entry_number, base_addr, limit, bits]: [u32; 4]) -> UserDescT {
    let bit = |number: u32| bits & 1 << number != 0;
    UserDescT {
        entry_number,
        base_addr,
        limit,
        seg_32bit: bit(0),
        contents_l: bit(1),
        contents_h: bit(2),
        read_exec_only: bit(3),
        limit_in_pages: bit(4),
        seg_not_present: bit(5),
        usable: bit(6),
    }
}

fn pack(segment: &UserDescT) -> [u32; 4] {
    let bits = [
        segment.seg_32bit,
        segment.contents_l,
        segment.contents_h,
        segment.read_exec_only,
        segment.limit_in_pages,
        segment.seg_not_present,
        segment.usable,
    ];
    let bits = bits.iter().rev().fold(0, |all, bit| all << 1 | u32::from(*bit));
    [segment.entry_number, segment.base_addr, segment.limit, bits]
}

/// The robust futexes of a thread.
pub fn robust_list(tid: i32) -> Result<(u32, u32)> {
    ia32::robust_list(tid)
        .during("cannot read the thread's robust futexes", || format!("get_robust_list({tid})"))
}

/// Sets them, in a thread being restored.
pub fn set_robust_list(injection: &mut Injection, head: u64, len: u32) -> Result<()> {
    let calls = [[SET_ROBUST_LIST, narrow(head)?, len, 0, 0]];
    make(injection, &calls, &[], "set_robust_list").map(drop)
}

/// Sets signal actions of a process being restored.
pub fn set_actions<'a>(
    injection: &mut Injection,
    actions: impl Iterator<Item = (i32, &'a SaEntry)>,
) -> Result<()> {
    let actions: Vec<_> = actions.collect();
    let start = (actions.len() + 1) * CALL;
    let (mut calls, mut data, scratch) = (Vec::new(), Vec::new(), injection.scratch());
    for (sig, action) in actions {
        let at = narrow(scratch + (start + data.len()) as u64)?;
        calls.push([RT_SIGACTION, sig.cast_unsigned(), at, 0, SIGNAL_SET]);
        let words = [narrow(action.sigaction)?, narrow(action.flags)?, narrow(action.restorer)?];
        data.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        data.extend(action.mask.to_le_bytes());
    }
    make(injection, &calls, &data, "rt_sigaction")
}

fn narrow(value: u64) -> Result<u32> {
    u32::try_from(value).map_err(|_| {
        Error::new(format!("the image of a 32-bit program has {value:#x} where 32 bits must do"))
    })
}

/// Makes calls, with `data` behind them.
fn make(injection: &mut Injection, calls: &[[u32; 5]], data: &[u8], doing: &str) -> Result<()> {
    let mut list = Vec::with_capacity((calls.len() + 1) * CALL + data.len());
    for call in calls {
        list.extend(call.iter().chain([&0]).flat_map(|word| word.to_le_bytes()));
    }
    list.extend([0; CALL]);
    list.extend(data);
    injection.run_code(&CALLS, &list, doing)?;
    let mut results = vec![0; calls.len() * CALL];
    injection.read_mem(injection.scratch(), &mut results)?;
    for (call, result) in calls.iter().zip(results.chunks_exact(CALL)) {
        let answer = result[20..].try_into().map_or(0, i32::from_le_bytes);
        if answer != 0 {
            let errno = nix::errno::Errno::from_raw(-answer);
            let call = format!("{doing}({:#x}, {:#x}) as a 32-bit program", call[1], call[2]);
            return Err(Error::new("cannot restore what 32-bit programs have").call(call, errno));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_keep_all_their_bits() {
        for number in 0..7 {
            let desc = [12, 0x804_c0a0, 0xf_ffff, 1 << number];
            assert_eq!(pack(&unpack(desc)), desc);
        }
        // What glibc has for its thread pointer: 32-bit, in pages, usable, read-write data.
        let glibc = unpack([12, 0x804_c0a0, 0xf_ffff, 0x51]);
        assert!(glibc.seg_32bit && glibc.limit_in_pages && glibc.usable && !glibc.read_exec_only);
        assert_eq!(base(std::slice::from_ref(&glibc), 0x63), Some(0x804_c0a0));
        assert_eq!((base(std::slice::from_ref(&glibc), 0x6b), base(&[glibc], 0)), (None, None));
    }

    #[test]
    fn this_process_has_no_robust_futexes_of_that_kind() {
        if std::path::Path::new("/proc/sys/abi/vsyscall32").exists() {
            // SAFETY: gettid takes nothing.
            assert_eq!(ia32::robust_list(unsafe { libc::gettid() }).unwrap(), (0, 12));
        }
    }
}
