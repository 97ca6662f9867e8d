//! Descriptors without a file behind them: eventfd, epoll, signalfd, timerfd, pidfd, memfd.

use crate::checkpoint::image::record::records;
use crate::checkpoint::image::regfile::FownEntry;

records! {
    /// An eventfd and its counter.
    EventfdFileEntry = "eventfd_file_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        fown: required message(FownEntry) = 3,
        counter: required uint64 = 4,
    }

    /// One descriptor watched by an epoll instance. `dev`, `inode` and `pos` tell which file it is
    /// when the number has been given to another since.
    EventpollTfdEntry = "eventpoll_tfd_entry" {
        id: required uint32 = 1,
        tfd: required uint32 = 2,
        events: required uint32 = 3,
        data: required uint64 = 4,
        dev: optional uint32 = 5,
        inode: optional uint64 = 6,
        pos: optional uint64 = 7,
    }

    /// An epoll instance and what it watches.
    EventpollFileEntry = "eventpoll_file_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        fown: required message(FownEntry) = 3,
        tfd: repeated message(EventpollTfdEntry) = 4,
    }

    /// A signalfd and its mask.
    SignalfdEntry = "signalfd_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        fown: required message(FownEntry) = 3,
        sigmask: required uint64 = 4,
    }

    /// A timerfd: `v*` is the time left, `i*` the interval.
    TimerfdEntry = "timerfd_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        fown: required message(FownEntry) = 3,
        clockid: required uint32 = 4,
        ticks: required uint64 = 5,
        settime_flags: required uint32 = 6,
        vsec: required uint64 = 7,
        vnsec: required uint64 = 8,
        isec: required uint64 = 9,
        insec: required uint64 = 10,
    }

    /// A pidfd; `nspid` is -1 for a process that is gone, `ino` then tells such processes apart.
    PidfdEntry = "pidfd_entry" {
        id: required uint32 = 1,
        ino: required uint32 = 2,
        flags: required uint32 = 3,
        nspid: required int32 = 4,
        fown: required message(FownEntry) = 5,
    }

    /// An open description of a memfd; `inode_id` names its [`MemfdInodeEntry`].
    MemfdFileEntry = "memfd_file_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        pos: required uint64 = 3,
        fown: required message(FownEntry) = 4,
        inode_id: required uint32 = 5,
    }

    /// memfd.img: a memfd itself. Its pages are in `pagemap-shmem-<shmid>.img`.
    MemfdInodeEntry = "memfd_inode_entry" {
        name: required bytes = 1,
        uid: required uint32 = 2,
        gid: required uint32 = 3,
        size: required uint64 = 4,
        shmid: required uint32 = 5,
        seals: required uint32 = 6,
        inode_id: required uint64 = 7,
        hugetlb_flag: optional uint32 = 8,
        mode: optional uint32 = 9,
    }
}
