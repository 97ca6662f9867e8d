//! core-N.img: one process or thread, apart from memory and files.

use crate::checkpoint::image::creds::CredsEntry;
use crate::checkpoint::image::pstree::{RlimitEntry, RseqEntry, SaEntry, SignalQueueEntry};
use crate::checkpoint::image::record::records;
use crate::checkpoint::image::timer::TaskTimersEntry;
use crate::checkpoint::image::x86::ThreadInfoX86;

/// Architecture of a thread.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Machine {
    Unknown = 0,
    X8664 = 1,
    Arm = 2,
    Aarch64 = 3,
    Ppc64 = 4,
    S390 = 5,
    Mips = 6,
    Loongarch64 = 7,
    Riscv64 = 8,
}

/// Seccomp mode of a thread, as in linux/seccomp.h.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum SeccompMode {
    Disabled = 0,
    Strict = 1,
    Filter = 2,
}

records! {
    /// What belongs to the process as a whole. `task_state` is 1 alive, 2 dead, 3 stopped, 6 zombie.
    TaskCoreEntry = "task_core_entry" {
        task_state: required uint32 = 1,
        exit_code: required uint32 = 2,
        personality: required uint32 = 3,
        flags: required uint32 = 4,
        blk_sigset: required uint64 = 5,
        comm: required bytes = 6,
        timers: optional message(TaskTimersEntry) = 7,
        rlimits: optional message(TaskRlimitsEntry) = 8,
        cg_set: optional uint32 = 9,
        signals_s: optional message(SignalQueueEntry) = 10,
        old_seccomp_mode: optional enumeration(SeccompMode) = 11,
        old_seccomp_filter: optional uint32 = 12,
        loginuid: optional uint32 = 13,
        oom_score_adj: optional int32 = 14,
        sigactions: repeated message(SaEntry) = 15,
        child_subreaper: optional bool = 18,
        blk_sigset_extended: optional uint64 = 20,
        stop_signo: optional uint32 = 21,
        membarrier_registration_mask: optional uint32 = 22,
    }

    /// Ids of what processes may share: equal ids, one object.
    TaskKobjIdsEntry = "task_kobj_ids_entry" {
        vm_id: required uint32 = 1,
        files_id: required uint32 = 2,
        fs_id: required uint32 = 3,
        sighand_id: required uint32 = 4,
        pid_ns_id: optional uint32 = 5,
        net_ns_id: optional uint32 = 6,
        ipc_ns_id: optional uint32 = 7,
        uts_ns_id: optional uint32 = 8,
        mnt_ns_id: optional uint32 = 9,
        user_ns_id: optional uint32 = 10,
        cgroup_ns_id: optional uint32 = 11,
        time_ns_id: optional uint32 = 12,
    }

    /// Alternate signal stack.
    ThreadSasEntry = "thread_sas_entry" {
        ss_sp: required uint64 = 1,
        ss_size: required uint64 = 2,
        ss_flags: required uint32 = 3,
    }

    /// What belongs to one thread.
    ThreadCoreEntry = "thread_core_entry" {
        futex_rla: required uint64 = 1,
        futex_rla_len: required uint32 = 2,
        sched_nice: optional sint32 = 3,
        sched_policy: optional uint32 = 4,
        sched_prio: optional uint32 = 5,
        blk_sigset: optional uint64 = 6,
        sas: optional message(ThreadSasEntry) = 7,
        pdeath_sig: optional uint32 = 8,
        signals_p: optional message(SignalQueueEntry) = 9,
        creds: optional message(CredsEntry) = 10,
        seccomp_mode: optional enumeration(SeccompMode) = 11,
        seccomp_filter: optional uint32 = 12,
        comm: optional bytes = 13,
        blk_sigset_extended: optional uint64 = 14,
        rseq_entry: optional message(RseqEntry) = 15,
        cg_set: optional uint32 = 16,
    }

    /// Resource limits, in the order of their numbers.
    TaskRlimitsEntry = "task_rlimits_entry" {
        rlimits: repeated message(RlimitEntry) = 1,
    }

    /// A process leader (with `tc`) or another thread (without). Fields of other architectures are refused.
    CoreEntry = "core_entry" {
        mtype: required enumeration(Machine) = 1,
        thread_info: optional message(ThreadInfoX86) = 2,
        tc: optional message(TaskCoreEntry) = 3,
        ids: optional message(TaskKobjIdsEntry) = 4,
        thread_core: optional message(ThreadCoreEntry) = 5,
    }
}
