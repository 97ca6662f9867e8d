//! `PAGEMAP_SCAN` on `/proc/PID/pagemap`: ioctl_pagemap_scan(2), Linux 6.7.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// The mapping's writes are being noted: it is registered with a userfaultfd of `UFFD_FEATURE_WP_ASYNC`.
pub const PAGE_IS_WPALLOWED: u64 = 1 << 0;
/// The page has been written since it was protected, or was never protected.
pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// The page belongs to a file or to shared memory, not to the mapping alone.
pub const PAGE_IS_FILE: u64 = 1 << 2;
/// The page is in memory.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
/// The page is in swap.
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// The page is the zero page.
pub const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// The page is a guard: `madvise(MADV_GUARD_INSTALL)`. Linux 6.15; older kernels answer EINVAL.
pub const PAGE_IS_GUARD: u64 = 1 << 8;

/// Protects the pages that match, so that the next write to one is noted; mappings whose writes are not noted are passed
/// over.
pub const PM_SCAN_WP_MATCHING: u64 = 1;

/// `struct page_region`: pages next to each other that are of the same kind.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// First byte behind.
    pub end: u64,
    /// `PAGE_IS_*` bits, of those asked for.
    pub categories: u64,
}

/// What to look for: a page matches when `(categories ^ inverted)` has all of `all` and one of `any` (if `any` is not 0).
#[derive(Debug, Default, Clone, Copy)]
pub struct Query {
    /// Bits whose meaning is turned round before matching.
    pub inverted: u64,
    /// Bits that must all be set.
    pub all: u64,
    /// Bits of which one must be set.
    pub any: u64,
    /// Bits to report.
    pub report: u64,
    /// `PM_SCAN_*`
    pub flags: u64,
}

impl Query {
    /// The same question to a kernel that does not know some of the bits.
    #[must_use]
    pub fn without(self, bits: u64) -> Self {
        Self {
            inverted: self.inverted & !bits,
            all: self.all & !bits,
            any: self.any & !bits,
            report: self.report & !bits,
            flags: self.flags,
        }
    }
}

/// `struct pm_scan_arg`
#[repr(C)]
#[derive(Default)]
struct Arg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

mod raw {
    #![allow(missing_docs)]
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, super::Arg);
}

/// Fills `regions` from `start` on. Returns how many were found, and where the walk ended: `end`, or earlier when
/// `regions` was full.
pub fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    query: Query,
    regions: &mut [Region],
) -> nix::Result<(usize, u64)> {
    let mut arg = Arg {
        size: size_of::<Arg>() as u64,
        flags: query.flags,
        start,
        end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_inverted: query.inverted,
        category_mask: query.all,
        category_anyof_mask: query.any,
        return_mask: query.report,
        ..Arg::default()
    };
    // SAFETY: `arg` has the layout of struct pm_scan_arg and says so in `size`; `vec` points to `vec_len` writable regions.
    let found = unsafe { raw::pagemap_scan(pagemap.as_raw_fd(), &raw mut arg)? };
    let found = usize::try_from(found).map_err(|_| Errno::EIO)?;
    if found > regions.len() {
        return Err(Errno::EIO);
    }
    Ok((found, arg.walk_end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stack_of_this_test_is_present() {
        let here = 0u8;
        let page = (&raw const here as u64) & !4095;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let query = Query { all: PAGE_IS_PRESENT, report: PAGE_IS_PRESENT, ..Query::default() };
        let mut regions = [Region::default(); 2];
        match scan(&pagemap, page, page + 4096, query, &mut regions) {
            Ok((found, walked)) => {
                assert_eq!((found, walked), (1, page + 4096));
                assert_eq!(regions[0], Region { start: page, end: page + 4096, categories: PAGE_IS_PRESENT });
            }
            // Before Linux 6.7: the caller falls back to reading the file.
            Err(errno) => assert_eq!(errno, Errno::ENOTTY),
        }
    }
}
