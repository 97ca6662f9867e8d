//! Address spaces: mm-N.img, and the maps of pages-N.img.

use crate::checkpoint::image::record::records;

records! {
    /// One mapping. `status` has the bits of [`crate::checkpoint::image::vma`]; `shmid` is the file's id or that of the shared memory.
    VmaEntry = "vma_entry" {
        start: required uint64 = 1,
        end: required uint64 = 2,
        pgoff: required uint64 = 3,
        shmid: required uint64 = 4,
        prot: required uint32 = 5,
        flags: required uint32 = 6,
        status: required uint32 = 7,
        fd: required sint64 = 8,
        madv: optional uint64 = 9,
        fdflags: optional uint32 = 10,
    }

    /// One ring of Linux AIO.
    AioRingEntry = "aio_ring_entry" {
        id: required uint64 = 1,
        nr_req: required uint32 = 2,
        ring_len: required uint32 = 3,
    }

    /// An address space: its bounds as in prctl(PR_SET_MM_MAP), its mappings, its auxiliary vector.
    MmEntry = "mm_entry" {
        mm_start_code: required uint64 = 1,
        mm_end_code: required uint64 = 2,
        mm_start_data: required uint64 = 3,
        mm_end_data: required uint64 = 4,
        mm_start_stack: required uint64 = 5,
        mm_start_brk: required uint64 = 6,
        mm_brk: required uint64 = 7,
        mm_arg_start: required uint64 = 8,
        mm_arg_end: required uint64 = 9,
        mm_env_start: required uint64 = 10,
        mm_env_end: required uint64 = 11,
        exe_file_id: required uint32 = 12,
        mm_saved_auxv: repeated uint64 = 13,
        vmas: repeated message(VmaEntry) = 14,
        dumpable: optional int32 = 15,
        aios: repeated message(AioRingEntry) = 16,
        thp_disabled: optional bool = 17,
    }

    /// First record of a pagemap: the number of the pages-N.img it describes.
    PagemapHead = "pagemap_head" {
        pages_id: required uint32 = 1,
    }

    /// A run of pages. `flags` has the bits of [`crate::checkpoint::image::pagemap`]; `nr_pages` is the length,
    /// `compat_nr_pages` the older place for it, still required.
    PagemapEntry = "pagemap_entry" {
        vaddr: required uint64 = 1,
        compat_nr_pages: required uint32 = 2,
        in_parent: optional bool = 3,
        flags: optional uint32 = 4,
        nr_pages: optional uint64 = 5,
    }
}
