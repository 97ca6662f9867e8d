//! Registers of an x86-64 thread, in the layout of user_regs_struct and of the xsave area.

use crate::checkpoint::image::record::records;

/// Width of the registers.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum UserX86RegsMode {
    Native = 1,
    Compat = 2,
}

records! {
    /// General purpose registers, 64-bit layout even for a 32-bit task.
    UserX86RegsEntry = "user_x86_regs_entry" {
        r15: required uint64 = 1,
        r14: required uint64 = 2,
        r13: required uint64 = 3,
        r12: required uint64 = 4,
        bp: required uint64 = 5,
        bx: required uint64 = 6,
        r11: required uint64 = 7,
        r10: required uint64 = 8,
        r9: required uint64 = 9,
        r8: required uint64 = 10,
        ax: required uint64 = 11,
        cx: required uint64 = 12,
        dx: required uint64 = 13,
        si: required uint64 = 14,
        di: required uint64 = 15,
        orig_ax: required uint64 = 16,
        ip: required uint64 = 17,
        cs: required uint64 = 18,
        flags: required uint64 = 19,
        sp: required uint64 = 20,
        ss: required uint64 = 21,
        fs_base: required uint64 = 22,
        gs_base: required uint64 = 23,
        ds: required uint64 = 24,
        es: required uint64 = 25,
        fs: required uint64 = 26,
        gs: required uint64 = 27,
        mode: optional enumeration(UserX86RegsMode) = 28,
    }

    /// Shadow stack: the control word and the pointer.
    UserX86CetEntry = "user_x86_cet_entry" {
        cet: required uint64 = 1,
        ssp: required uint64 = 2,
    }

    /// What xsave adds to fxsave, one list a component; empty lists are components out of use.
    UserX86XsaveEntry = "user_x86_xsave_entry" {
        xstate_bv: required uint64 = 1,
        ymmh_space: repeated uint32 = 2,
        bndreg_state: repeated uint64 = 3,
        bndcsr_state: repeated uint64 = 4,
        opmask_reg: repeated uint64 = 5,
        zmm_upper: repeated uint64 = 6,
        hi16_zmm: repeated uint64 = 7,
        pkru: repeated uint32 = 8,
        cet: optional message(UserX86CetEntry) = 9,
    }

    /// The fxsave area, and the xsave components beside it.
    UserX86FpregsEntry = "user_x86_fpregs_entry" {
        cwd: required uint32 = 1,
        swd: required uint32 = 2,
        twd: required uint32 = 3,
        fop: required uint32 = 4,
        rip: required uint64 = 5,
        rdp: required uint64 = 6,
        mxcsr: required uint32 = 7,
        mxcsr_mask: required uint32 = 8,
        st_space: repeated uint32 = 9,
        xmm_space: repeated uint32 = 10,
        padding: repeated uint32 = 11,
        xsave: optional message(UserX86XsaveEntry) = 13,
    }

    /// One slot of the thread-local segments in the GDT.
    UserDescT = "user_desc_t" {
        entry_number: required uint32 = 1,
        base_addr: required uint32 = 2,
        limit: required uint32 = 3,
        seg_32bit: required bool = 4,
        contents_h: required bool = 5,
        contents_l: required bool = 6,
        read_exec_only: required bool = 7,
        limit_in_pages: required bool = 8,
        seg_not_present: required bool = 9,
        usable: required bool = 10,
    }

    /// All registers of a thread, and the address the kernel clears when it exits.
    ThreadInfoX86 = "thread_info_x86" {
        clear_tid_addr: required uint64 = 1,
        gpregs: required message(UserX86RegsEntry) = 2,
        fpregs: required message(UserX86FpregsEntry) = 3,
        tls: repeated message(UserDescT) = 4,
    }
}
