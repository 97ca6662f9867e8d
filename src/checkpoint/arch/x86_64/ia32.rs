//! Calls that a 64-bit process can make in the way of 32-bit programs only, by `int $0x80`.

use std::arch::asm;
use std::ptr::null_mut;

use nix::errno::Errno;

const GET_ROBUST_LIST: i32 = 312;
const PAGE: usize = 4096;

/// The robust futexes of a thread of a 32-bit program: address and length of the list's head.
/// get_robust_list(2)
///
/// Only to be asked where the kernel runs 32-bit programs: elsewhere the instruction is none.
pub fn robust_list(tid: i32) -> nix::Result<(u32, u32)> {
    let page = low_page()?;
    let (head, len) = (page, page.wrapping_add(4));
    let mut answer = GET_ROBUST_LIST;
    // SAFETY: the kernel writes 4 bytes to each of two places in a page of ours, and preserves all registers that
    // the call does not use. `rbx` belongs to the compiler and is put back.
    unsafe {
        asm!(
            "xchg {tid:r}, rbx",
            "int 0x80",
            "xchg {tid:r}, rbx",
            tid = inout(reg) u64::from(tid.cast_unsigned()) => _,
            inout("eax") answer,
            in("ecx") head as u32,
            in("edx") len as u32,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    // SAFETY: the page is mapped, readable, and aligned.
    let list = unsafe { (head.cast::<u32>().read_volatile(), len.cast::<u32>().read_volatile()) };
    // SAFETY: nobody has a pointer into the page any more.
    unsafe { libc::munmap(page.cast(), PAGE) };
    if answer < 0 { Err(Errno::from_raw(-answer)) } else { Ok(list) }
}

/// A page with an address of 32 bits.
fn low_page() -> nix::Result<*mut u8> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address that the kernel chooses hurts nobody.
    let page = unsafe { libc::mmap(null_mut(), PAGE, prot, flags | libc::MAP_32BIT, -1, 0) };
    if page == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(page.cast()) }
}
