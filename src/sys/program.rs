//! The pages of this program's file. dl_iterate_phdr(3), madvise(2)

use std::ffi::{c_int, c_void};
use std::slice;

const PAGE: usize = 4096;

/// Gives the pages of the program that nobody writes to back, code and constants: what is used again comes from the page
/// cache, a few at a time. They count as memory of every process that has touched them, and much of what begins a command
/// is not used again.
pub fn forget_pages() {
    unsafe extern "C" fn own(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
        // SAFETY: the C library hands out a description that holds until this returns.
        let (base, headers) = unsafe {
            let info = &*info;
            (info.dlpi_addr as usize, slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()))
        };
        let constant = |h: &&libc::Elf64_Phdr| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0;
        for header in headers.iter().filter(constant) {
            let start = (base + header.p_vaddr as usize).next_multiple_of(PAGE);
            let end = (base + header.p_vaddr as usize + header.p_memsz as usize) / PAGE * PAGE;
            if start < end {
                // SAFETY: pages of the file that are mapped read-only and were never written to are the same when they
                // are read again. What fails leaves them where they are.
                unsafe { libc::madvise(start as *mut c_void, end - start, libc::MADV_DONTNEED) };
            }
        }
        // The first one is this program.
        1
    }
    // SAFETY: the function has the type that is asked for, and takes no data.
    unsafe { libc::dl_iterate_phdr(Some(own), std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;

    #[test]
    fn a_program_goes_on_with_less_memory() {
        in_child(0, || {
            let resident = || -> usize {
                let text = std::fs::read_to_string("/proc/self/statm").unwrap();
                text.split(' ').nth(2).unwrap().parse().unwrap()
            };
            let before = resident();
            forget_pages();
            let after = resident();
            assert!(after < before, "{before} pages of files, then {after}");
        });
    }
}
