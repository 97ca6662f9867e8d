//! What this kernel offers, and what is done where it does not: the table that `stasis check` prints.
//!
//! `docs/kernel-features.md` is the same table without the answers; a test keeps the two together.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use nix::errno::Errno;
use serde::Serialize;

use crate::sys::pagemap::{self, Query, Region};
use crate::sys::probe::{self, Call};
use crate::sys::{pidfd, prctl, userfaultfd};

/// One thing that the engine uses where it is there.
pub struct Known {
    /// Its name, as manual pages have it.
    pub name: &'static str,
    /// The version of Linux that brought it, and the option that may leave it out.
    pub since: &'static str,
    /// What for.
    pub purpose: &'static str,
    /// What is done without it; nothing, where there is no way without.
    pub fallback: Option<&'static str>,
    probe: fn() -> bool,
}

/// One line of the answer.
#[derive(Debug, Serialize)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
    /// The version of Linux that brought it.
    pub since: &'static str,
    /// What for.
    pub purpose: &'static str,
    /// It is here, and may be used.
    pub present: bool,
    /// There is no way without it.
    pub required: bool,
    /// What is done without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<&'static str>,
}

const fn known(
    name: &'static str,
    since: &'static str,
    purpose: &'static str,
    fallback: Option<&'static str>,
    probe: fn() -> bool,
) -> Known {
    Known { name, since, purpose, fallback, probe }
}

/// All of them.
pub const ALL: &[Known] = &[
    known("ptrace of other processes", "CAP_SYS_PTRACE, Yama below 3", "every process", None, may_trace),
    known(
        "PTRACE_O_SUSPEND_SECCOMP",
        "4.3, CAP_SYS_ADMIN",
        "processes under seccomp filters",
        Some("such processes are refused where their filters forbid what the engine has them do"),
        may_suspend_seccomp,
    ),
    known(
        "PTRACE_GET_RSEQ_CONFIGURATION",
        "5.13",
        "restartable sequences",
        Some("threads that have registered one lose it"),
        || release() >= (5, 13),
    ),
    known("kcmp", "3.5, CONFIG_KCMP", "what processes share", None, || probe::has(Call::Kcmp)),
    known("process_vm_readv", "3.2", "reading memory", Some("read(2) of /proc/PID/mem"), || {
        probe::has(Call::ProcessVmReadv)
    }),
    known("pidfd_open", "5.3", "handles on processes", None, || probe::has(Call::PidfdOpen)),
    known("pidfd_getfd", "5.6", "reading open files", None, || probe::has(Call::PidfdGetfd)),
    known("clone3 with set_tid", "5.5, CAP_CHECKPOINT_RESTORE", "old process ids", None, || {
        probe::has(Call::Clone3)
    }),
    known(
        "PR_SET_MM_MAP",
        "3.18, CONFIG_CHECKPOINT_RESTORE",
        "arguments, heap and executable of a process",
        None,
        probe::has_mm_map,
    ),
    known("/proc/PID/task/TID/children", "3.5, CONFIG_PROC_CHILDREN", "finding zombies", None, || {
        Path::new("/proc/thread-self/children").exists()
    }),
    known(
        "next ids of System V objects",
        "3.9, CONFIG_CHECKPOINT_RESTORE",
        "semaphores, message queues, shared memory",
        Some("containers that hold such objects are not restored"),
        || Path::new("/proc/sys/kernel/sem_next_id").exists(),
    ),
    known(
        "control group freezer",
        "2.6.28 (v1), 5.2 (v2)",
        "stopping all at once",
        Some("processes are seized until a pass finds no new one"),
        has_freezer,
    ),
    known("openat2", "5.6", "paths in a container's root", None, || probe::has(Call::Openat2)),
    known(
        "open_tree, move_mount, fsopen",
        "5.2",
        "mounts made by the container, contents of tmpfs",
        None,
        || probe::has(Call::OpenTree),
    ),
    known("mount_setattr", "5.12", "flags and id mappings of mounts", None, || {
        probe::has(Call::MountSetattr)
    }),
    known(
        "close_range",
        "5.9",
        "memory snapshots",
        Some("memory is written while the container stands still"),
        || probe::has(Call::CloseRange),
    ),
    known(
        "time namespaces",
        "5.6, CONFIG_TIME_NS",
        "clocks that never go back",
        Some("monotonic clocks are those of the machine"),
        || Path::new("/proc/self/ns/time").exists(),
    ),
    known(
        "userfaultfd",
        "4.3, CONFIG_USERFAULTFD",
        "filling memory from outside",
        Some("each process reads its own memory, at a third of the speed"),
        has_userfaultfd,
    ),
    known(
        "UFFD_FEATURE_WP_ASYNC",
        "6.7",
        "--pre-dump, --precopy: what was written since",
        Some("all memory counts as written"),
        || has_userfaultfd_feature(userfaultfd::FEATURE_WP_ASYNC),
    ),
    known(
        "PAGEMAP_SCAN",
        "6.7",
        "--pre-dump, --precopy; pages that are not in memory",
        Some("/proc/PID/pagemap, an entry a page"),
        has_pagemap_scan,
    ),
    known(
        "PR_SET_VMA_ANON_NAME",
        "5.17, CONFIG_ANON_VMA_NAME",
        "names of memory",
        Some("a restore warns that they are lost"),
        prctl::can_name_memory,
    ),
    known("PIDFD_THREAD", "6.9", "descriptors of threads", Some("no program has any"), has_pidfd_thread),
    known(
        "PR_TIMER_CREATE_RESTORE_IDS",
        "6.15",
        "POSIX timers under their old ids",
        Some("timers are made and deleted until the id comes up"),
        probe::has_timer_ids,
    ),
];

/// What this kernel has of them.
pub fn all() -> Vec<Feature> {
    let answer = |k: &Known| Feature {
        name: k.name,
        since: k.since,
        purpose: k.purpose,
        present: (k.probe)(),
        required: k.fallback.is_none(),
        fallback: k.fallback,
    };
    ALL.iter().map(answer).collect()
}

/// The kernel's version.
fn release() -> (u32, u32) {
    let Ok(name) = nix::sys::utsname::uname() else { return (0, 0) };
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn effective(capability: caps::Capability) -> bool {
    caps::has_cap(None, caps::CapSet::Effective, capability).unwrap_or(false)
}

fn may_trace() -> bool {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    scope.trim() != "3" && effective(caps::Capability::CAP_SYS_PTRACE)
}

fn may_suspend_seccomp() -> bool {
    release() >= (4, 3) && effective(caps::Capability::CAP_SYS_ADMIN)
}

fn has_freezer() -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| {
        let mut words = line.split(' ').skip(2);
        let (kind, options) = (words.next(), words.next().unwrap_or_default());
        kind == Some("cgroup2") || kind == Some("cgroup") && options.split(',').any(|o| o == "freezer")
    })
}

fn has_userfaultfd() -> bool {
    Path::new("/dev/userfaultfd").exists() || userfaultfd::open(libc::O_CLOEXEC).is_ok()
}

fn has_userfaultfd_feature(feature: u64) -> bool {
    let opened = userfaultfd::open(libc::O_CLOEXEC | userfaultfd::UFFD_USER_MODE_ONLY);
    opened.is_ok_and(|fd| userfaultfd::api(fd.as_fd(), feature).is_ok())
}

fn has_pagemap_scan() -> bool {
    let Ok(file) = File::open("/proc/self/pagemap") else { return false };
    let query = Query { any: pagemap::PAGE_IS_PRESENT, report: pagemap::PAGE_IS_PRESENT, ..Query::default() };
    pagemap::scan(&file, 0, 4096, query, &mut [Region::default()]).is_ok()
}

fn has_pidfd_thread() -> bool {
    let me = std::process::id().cast_signed();
    !matches!(pidfd::open(me, libc::O_EXCL.cast_unsigned()), Err(Errno::EINVAL | Errno::ENOSYS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_the_same_table() {
        let page = include_str!("../../docs/kernel-features.md");
        let rows: Vec<&str> = page.lines().filter(|l| l.starts_with("| ")).skip(1).collect();
        let row = |k: &Known| {
            let fallback = k.fallback.unwrap_or("none: required");
            format!("| {} | {} | {} | {fallback} |", k.name, k.since, k.purpose)
        };
        let expected: Vec<String> = ALL.iter().map(row).collect();
        assert_eq!(rows, expected);
    }

    #[test]
    fn what_the_engine_cannot_do_without_is_here() {
        let missing: Vec<_> =
            all().into_iter().filter(|f| f.required && !f.present).map(|f| f.name).collect();
        assert!(missing.is_empty(), "{missing:?}");
        assert!(release() >= (4, 0));
    }
}
