//! pstree.img: the process tree.

use crate::checkpoint::image::record::records;

records! {
    /// One process: its parent, group, session and threads, all as ids inside the container.
    PstreeEntry = "pstree_entry" {
        pid: required uint32 = 1,
        ppid: required uint32 = 2,
        pgid: required uint32 = 3,
        sid: required uint32 = 4,
        threads: repeated uint32 = 5,
    }

    /// One resource limit; all ones is infinity.
    RlimitEntry = "rlimit_entry" {
        cur: required uint64 = 1,
        max: required uint64 = 2,
    }

    /// The restartable sequence area a thread has registered.
    RseqEntry = "rseq_entry" {
        rseq_abi_pointer: required uint64 = 1,
        rseq_abi_size: required uint32 = 2,
        signature: required uint32 = 3,
        rseq_cs_pointer: optional uint64 = 4,
    }

    /// One signal handler.
    SaEntry = "sa_entry" {
        sigaction: required uint64 = 1,
        flags: required uint64 = 2,
        restorer: required uint64 = 3,
        mask: required uint64 = 4,
        compat_sigaction: optional bool = 5,
        mask_extended: optional uint64 = 6,
    }

    /// One pending signal: the raw siginfo_t.
    SiginfoEntry = "siginfo_entry" {
        siginfo: required bytes = 1,
    }

    /// Pending signals, oldest first.
    SignalQueueEntry = "signal_queue_entry" {
        signals: repeated message(SiginfoEntry) = 1,
    }
}
