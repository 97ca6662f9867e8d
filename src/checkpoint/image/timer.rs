//! Interval timers and POSIX timers of a process.

use crate::checkpoint::image::record::records;

records! {
    /// Seconds and microseconds.
    Timeval = "timeval" {
        tv_sec: required uint64 = 1,
        tv_usec: required uint64 = 2,
    }

    /// An interval timer: `i*` the interval, `v*` the time left.
    ItimerEntry = "itimer_entry" {
        isec: required uint64 = 1,
        iusec: required uint64 = 2,
        vsec: required uint64 = 3,
        vusec: required uint64 = 4,
    }

    /// A POSIX timer.
    PosixTimerEntry = "posix_timer_entry" {
        it_id: required uint32 = 1,
        clock_id: required uint32 = 2,
        si_signo: required uint32 = 3,
        it_sigev_notify: required uint32 = 4,
        sival_ptr: required uint64 = 5,
        overrun: required uint32 = 6,
        isec: required uint64 = 7,
        insec: required uint64 = 8,
        vsec: required uint64 = 9,
        vnsec: required uint64 = 10,
        notify_thread_id: optional int32 = 11,
    }

    /// All timers of a process.
    TaskTimersEntry = "task_timers_entry" {
        real: required message(ItimerEntry) = 1,
        virt: required message(ItimerEntry) = 2,
        prof: required message(ItimerEntry) = 3,
        posix: repeated message(PosixTimerEntry) = 4,
    }
}
