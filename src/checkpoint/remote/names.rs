//! Names of the system calls that batches make, for errors that read like lines of strace.

use crate::checkpoint::arch;

/// The name of a call, or `syscall_N`.
pub(super) fn name(nr: i64) -> String {
    known(nr).or_else(|| arch::call_name(nr)).map_or_else(|| format!("syscall_{nr}"), str::to_owned)
}

macro_rules! names {
    ($($constant:ident)*) => {
        fn known(nr: i64) -> Option<&'static str> {
            match nr {
                $(libc::$constant => Some(&stringify!($constant)[4..]),)*
                _ => None,
            }
        }
    };
}

names! {
    SYS_accept4 SYS_bind SYS_brk SYS_capget SYS_capset SYS_chdir SYS_chroot SYS_clock_gettime
    SYS_clock_settime SYS_clone SYS_clone3 SYS_close SYS_close_range SYS_connect SYS_dup SYS_dup3
    SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_eventfd2 SYS_execve SYS_execveat SYS_exit SYS_exit_group
    SYS_fallocate SYS_fchdir SYS_fchmod SYS_fchown SYS_fcntl SYS_flock SYS_fstat SYS_fsync SYS_ftruncate SYS_futex
    SYS_get_robust_list SYS_getcwd SYS_getegid SYS_geteuid SYS_getgid SYS_getgroups SYS_getitimer SYS_getpgid
    SYS_getpid SYS_getppid SYS_getpriority SYS_getrandom SYS_getresgid SYS_getresuid SYS_getrlimit
    SYS_getsid SYS_getsockname SYS_getsockopt SYS_gettid SYS_getuid SYS_inotify_add_watch SYS_inotify_init1
    SYS_ioctl SYS_ioprio_get SYS_ioprio_set SYS_kcmp SYS_keyctl SYS_kill SYS_listen SYS_lseek SYS_madvise
    SYS_mbind SYS_membarrier SYS_memfd_create SYS_mincore SYS_mkdirat SYS_mknodat SYS_mlock SYS_mlock2
    SYS_mlockall SYS_mmap SYS_mount SYS_mprotect SYS_mq_open SYS_mremap SYS_mseal SYS_msgctl SYS_msgget
    SYS_msgrcv SYS_msgsnd SYS_msync SYS_munlock SYS_munmap SYS_nanosleep SYS_newfstatat SYS_openat
    SYS_openat2 SYS_personality SYS_pidfd_getfd SYS_pidfd_open SYS_pidfd_send_signal SYS_pipe2 SYS_pivot_root
    SYS_pkey_alloc SYS_pkey_free SYS_pkey_mprotect SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv SYS_prlimit64
    SYS_process_vm_readv SYS_process_vm_writev SYS_pwrite64 SYS_pwritev SYS_read SYS_readlinkat SYS_readv
    SYS_recvfrom SYS_recvmsg SYS_renameat2 SYS_rseq SYS_rt_sigaction SYS_rt_sigpending SYS_rt_sigprocmask
    SYS_rt_sigqueueinfo SYS_rt_sigtimedwait SYS_rt_tgsigqueueinfo SYS_sched_getaffinity SYS_sched_setaffinity
    SYS_sched_setattr SYS_sched_setscheduler SYS_sched_yield SYS_seccomp SYS_semctl SYS_semget SYS_semop
    SYS_semtimedop SYS_sendmsg SYS_sendto SYS_set_mempolicy SYS_set_robust_list SYS_set_tid_address
    SYS_setfsgid SYS_setfsuid SYS_setgid SYS_setgroups SYS_setitimer SYS_setns SYS_setpgid SYS_setpriority
    SYS_setregid SYS_setresgid SYS_setresuid SYS_setreuid SYS_setrlimit SYS_setsid SYS_setsockopt SYS_setuid
    SYS_shmat SYS_shmctl SYS_shmdt SYS_shmget SYS_shutdown SYS_sigaltstack SYS_signalfd4 SYS_socket
    SYS_socketpair SYS_splice SYS_statx SYS_symlinkat SYS_tee SYS_tgkill SYS_timer_create SYS_timer_delete
    SYS_timer_getoverrun SYS_timer_gettime SYS_timer_settime SYS_timerfd_create SYS_timerfd_gettime
    SYS_timerfd_settime SYS_tkill SYS_umask SYS_umount2 SYS_unlinkat SYS_unshare SYS_userfaultfd SYS_utimensat
    SYS_vmsplice SYS_wait4 SYS_waitid SYS_write SYS_writev
}

#[cfg(test)]
mod tests {
    #[test]
    fn known_and_unknown() {
        assert_eq!(super::name(libc::SYS_rt_sigaction), "rt_sigaction");
        assert_eq!(super::name(9999), "syscall_9999");
    }
}
