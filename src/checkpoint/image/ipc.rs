//! System V IPC of an IPC namespace, and its limits.

use crate::checkpoint::image::record::records;

records! {
    /// What the three kinds have in common: key, owners, mode, id.
    IpcDescEntry = "ipc_desc_entry" {
        key: required uint32 = 1,
        uid: required uint32 = 2,
        gid: required uint32 = 3,
        cuid: required uint32 = 4,
        cgid: required uint32 = 5,
        mode: required uint32 = 6,
        id: required uint32 = 7,
    }

    /// ipcns-var-N.img: the limits of the namespace.
    IpcVarEntry = "ipc_var_entry" {
        sem_ctls: repeated uint32 = 1,
        msg_ctlmax: required uint32 = 2,
        msg_ctlmnb: required uint32 = 3,
        msg_ctlmni: required uint32 = 4,
        auto_msgmni: required uint32 = 5,
        shm_ctlmax: required uint64 = 6,
        shm_ctlall: required uint64 = 7,
        shm_ctlmni: required uint32 = 8,
        shm_rmid_forced: required uint32 = 9,
        mq_queues_max: required uint32 = 10,
        mq_msg_max: required uint32 = 11,
        mq_msgsize_max: required uint32 = 12,
        mq_msg_default: optional uint32 = 13,
        mq_msgsize_default: optional uint32 = 14,
        msg_next_id: optional uint32 = 15,
        sem_next_id: optional uint32 = 16,
        shm_next_id: optional uint32 = 17,
    }

    /// ipcns-shm-N.img: a shared memory segment. Its pages follow the record, padded to 4 bytes, or are
    /// in `pagemap-shmem-<id>.img` where `in_pagemaps` is set.
    IpcShmEntry = "ipc_shm_entry" {
        desc: required message(IpcDescEntry) = 1,
        size: required uint64 = 2,
        in_pagemaps: optional bool = 3,
        hugetlb_flag: optional uint32 = 4,
    }

    /// ipcns-sem-N.img: a semaphore set. Its values follow as 16-bit words, padded to 8 bytes.
    IpcSemEntry = "ipc_sem_entry" {
        desc: required message(IpcDescEntry) = 1,
        nsems: required uint32 = 2,
    }

    /// ipcns-msg-N.img: a message queue; `qnum` messages follow.
    IpcMsgEntry = "ipc_msg_entry" {
        desc: required message(IpcDescEntry) = 1,
        qbytes: required uint32 = 2,
        qnum: required uint32 = 3,
    }

    /// One message of a queue; its text follows, padded to 8 bytes.
    IpcMsg = "ipc_msg" {
        mtype: required uint64 = 1,
        msize: required uint32 = 2,
    }
}
