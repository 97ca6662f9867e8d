//! Whether the kernel has a system call, asked by calling it with arguments that it refuses.

use nix::errno::Errno;

/// System calls that may be asked for: each refuses arguments that are all ones, and has done nothing by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// clone3(2), which gives processes their old ids.
    Clone3,
    /// pidfd_open(2).
    PidfdOpen,
    /// pidfd_getfd(2).
    PidfdGetfd,
    /// kcmp(2).
    Kcmp,
    /// openat2(2).
    Openat2,
    /// open_tree(2), and with it move_mount(2), fsopen(2), fsconfig(2), fsmount(2).
    OpenTree,
    /// mount_setattr(2).
    MountSetattr,
    /// close_range(2).
    CloseRange,
    /// userfaultfd(2).
    Userfaultfd,
    /// process_vm_readv(2).
    ProcessVmReadv,
    /// seccomp(2).
    Seccomp,
}

impl Call {
    fn number(self) -> libc::c_long {
        match self {
            Self::Clone3 => libc::SYS_clone3,
            Self::PidfdOpen => libc::SYS_pidfd_open,
            Self::PidfdGetfd => libc::SYS_pidfd_getfd,
            Self::Kcmp => libc::SYS_kcmp,
            Self::Openat2 => libc::SYS_openat2,
            Self::OpenTree => libc::SYS_open_tree,
            Self::MountSetattr => libc::SYS_mount_setattr,
            Self::CloseRange => libc::SYS_close_range,
            Self::Userfaultfd => libc::SYS_userfaultfd,
            Self::ProcessVmReadv => libc::SYS_process_vm_readv,
            Self::Seccomp => libc::SYS_seccomp,
        }
    }
}

/// True if the kernel knows the call.
pub fn has(call: Call) -> bool {
    // SAFETY: all pointers and sizes are invalid, so no memory is touched, and the kernel refuses the call.
    let ret = unsafe { libc::syscall(call.number(), -1, -1, -1, -1, -1, -1) };
    ret != -1 || Errno::last() != Errno::ENOSYS
}

/// True if prctl(PR_SET_MM) can set the whole description of an address space: CONFIG_CHECKPOINT_RESTORE.
pub fn has_mm_map() -> bool {
    let mut size: libc::c_uint = 0;
    // SAFETY: the kernel writes one unsigned int.
    let ret = unsafe { libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_MAP_SIZE, &raw mut size, 0, 0) };
    ret == 0 && size > 0
}

/// True if timer_create(2) can be told which id to give.
pub fn has_timer_ids() -> bool {
    const PR_TIMER_CREATE_RESTORE_IDS: libc::c_int = 77;
    const GET: libc::c_ulong = 2;
    // SAFETY: numbers only.
    unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0) >= 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_runs_the_tests_has_these() {
        for call in [Call::Clone3, Call::PidfdOpen, Call::Openat2, Call::ProcessVmReadv, Call::Seccomp] {
            assert!(has(call), "{call:?}");
        }
    }
}
