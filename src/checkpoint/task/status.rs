//! `/proc/PID/status` and its kin, parsed: what the kernel tells of a thread without stopping it.

use std::fs;
use std::path::Path;

use crate::checkpoint::error::Context;
use crate::checkpoint::namespaces::Kind;
use crate::checkpoint::remote::Facts;
use crate::checkpoint::{Error, Result};
use crate::sys::procfs::{read_bytes, read_text};

/// The lines of `/proc/PID/status` that matter to a dump.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// One letter: `R S D T t Z X`.
    pub state: char,
    /// Parent, as a pid of the reader's namespace; 0 outside of it.
    pub ppid: i32,
    /// Who traces it, 0 if nobody.
    pub tracer: i32,
    /// File mode creation mask.
    pub umask: u32,
    /// Real, effective, saved and file system user.
    pub uid: [u32; 4],
    /// The same for groups.
    pub gid: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The thread's id in every pid namespace from the reader's down to its own.
    pub ns_tid: Vec<i32>,
    /// The process's id likewise.
    pub ns_pid: Vec<i32>,
    /// The process group's id likewise; 0 where the group lives outside.
    pub ns_pgid: Vec<i32>,
    /// The session's id likewise.
    pub ns_sid: Vec<i32>,
    /// Threads alive.
    pub threads: u32,
    /// Signals pending for the thread.
    pub pending: u64,
    /// Signals pending for the process.
    pub shared_pending: u64,
    /// Blocked signals.
    pub blocked: u64,
    /// Ignored signals.
    pub ignored: u64,
    /// Signals that have a handler.
    pub caught: u64,
    /// Locked memory in KiB; none is told of a process without memory.
    pub locked: Option<u64>,
    /// Capabilities: inheritable, permitted, effective, bounding, ambient.
    pub caps: [u64; 5],
    /// No new privileges.
    pub no_new_privs: bool,
    /// Seccomp mode: 0, 1 strict, 2 filters.
    pub seccomp: u32,
    /// Has a shadow stack (x86).
    pub shadow_stack: bool,
}

/// Reads one small file of `/proc`, with the call in the error.
pub fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    read_text(path).during("cannot read the process's state", || format!("read({})", path.display()))
}

impl Status {
    /// Of process (or thread) `pid`.
    pub fn of(pid: i32) -> Result<Self> {
        Self::parse(&read(format!("/proc/{pid}/status"))?)
    }
    /// Of thread `tid` of process `pid`.
    pub fn of_thread(pid: i32, tid: i32) -> Result<Self> {
        Self::parse(&read(format!("/proc/{pid}/task/{tid}/status"))?)
    }
    /// Parses the file's text. Lines it doesn't know are skipped; those it needs must be there.
    pub fn parse(text: &str) -> Result<Self> {
        let mut status = Self { state: '?', ..Self::default() };
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            let bad = || Error::new(format!("/proc/PID/status has a line that cannot be understood: {line}"));
            let hex = || u64::from_str_radix(value, 16).map_err(|_| bad());
            match key {
                "State" => status.state = value.chars().next().ok_or_else(bad)?,
                "PPid" => status.ppid = value.parse().map_err(|_| bad())?,
                "TracerPid" => status.tracer = value.parse().map_err(|_| bad())?,
                "Umask" => status.umask = u32::from_str_radix(value, 8).map_err(|_| bad())?,
                "Uid" => status.uid = four(value).ok_or_else(bad)?,
                "Gid" => status.gid = four(value).ok_or_else(bad)?,
                "Groups" => status.groups = numbers(value).ok_or_else(bad)?,
                "NSpid" => status.ns_tid = numbers(value).ok_or_else(bad)?,
                "NStgid" => status.ns_pid = numbers(value).ok_or_else(bad)?,
                "NSpgid" => status.ns_pgid = numbers(value).ok_or_else(bad)?,
                "NSsid" => status.ns_sid = numbers(value).ok_or_else(bad)?,
                "Threads" => status.threads = value.parse().map_err(|_| bad())?,
                "SigPnd" => status.pending = hex()?,
                "ShdPnd" => status.shared_pending = hex()?,
                "SigBlk" => status.blocked = hex()?,
                "SigIgn" => status.ignored = hex()?,
                "SigCgt" => status.caught = hex()?,
                "VmLck" => status.locked = value.split(' ').next().and_then(|n| n.parse().ok()),
                "CapInh" => status.caps[0] = hex()?,
                "CapPrm" => status.caps[1] = hex()?,
                "CapEff" => status.caps[2] = hex()?,
                "CapBnd" => status.caps[3] = hex()?,
                "CapAmb" => status.caps[4] = hex()?,
                "NoNewPrivs" => status.no_new_privs = value != "0",
                "Seccomp" => status.seccomp = value.parse().map_err(|_| bad())?,
                "x86_Thread_features" => status.shadow_stack = value.split(' ').any(|name| name == "shstk"),
                _ => {}
            }
        }
        match status.ns_tid.is_empty() || status.ns_pid.is_empty() || status.state == '?' {
            true => Err(Error::new("/proc/PID/status lacks State, NSpid or NStgid")),
            false => Ok(status),
        }
    }
}

impl Status {
    /// What batches in the thread go by.
    pub fn facts(&self) -> Facts {
        Facts {
            ids: (self.ns_pid.last().copied().unwrap_or(0), self.ns_tid.last().copied().unwrap_or(0)),
            pending: self.pending | self.shared_pending,
            blocked: self.blocked,
            caught: self.caught,
            ignored: self.ignored,
        }
    }
    /// The process's id in the pid namespace that lies `depth` below the reader's.
    pub fn pid_at(&self, depth: usize) -> Option<i32> {
        self.ns_pid.get(depth).copied()
    }
    /// The thread's id there.
    pub fn tid_at(&self, depth: usize) -> Option<i32> {
        self.ns_tid.get(depth).copied()
    }
}

/// How deep the pid namespace of a process lies below ours. That of init is the container's: the images know every
/// process by its id there, even one in a pid namespace below.
pub fn depth(pid: i32) -> Result<usize> {
    Ok(Status::of(pid)?.ns_pid.len() - 1)
}

fn numbers<T: std::str::FromStr>(text: &str) -> Option<Vec<T>> {
    text.split_ascii_whitespace().map(|n| n.parse().ok()).collect()
}

fn four(text: &str) -> Option<[u32; 4]> {
    numbers(text)?.try_into().ok()
}

/// The threads of `pid`, the leader first.
pub fn threads(pid: i32) -> Result<Vec<i32>> {
    let path = format!("/proc/{pid}/task");
    let entries = fs::read_dir(&path).during("cannot list the threads", || format!("open({path})"))?;
    let mut tids = vec![pid];
    for entry in entries {
        let entry = entry.during("cannot list the threads", || format!("getdents({path})"))?;
        tids.extend(
            entry.file_name().to_str().and_then(|name| name.parse().ok()).filter(|tid: &i32| *tid != pid),
        );
    }
    tids[1..].sort_unstable();
    Ok(tids)
}

/// Whether the kernel has made the thread, to work for io_uring: it runs nothing of the program, and would work for
/// nobody while it is traced.
pub fn is_kernels(pid: i32, tid: i32) -> bool {
    const PF_IO_WORKER: i64 = 0x10;
    let named = read(format!("/proc/{pid}/task/{tid}/comm")).is_ok_and(|name| name.starts_with("iou-"));
    let flags = || Stat::parse(&read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default()).field(9);
    named && flags() & PF_IO_WORKER != 0
}

/// Numbered fields of `/proc/PID/stat`, counted as proc(5) does: field 1 is the pid, 3 the state.
#[derive(Debug, Clone, Default)]
pub struct Stat(Vec<i64>);

/// A thread's name and its numbered fields, those that it doesn't share with others.
pub fn named(pid: i32, tid: i32) -> Result<(Vec<u8>, Stat)> {
    let path = format!("/proc/{pid}/task/{tid}/stat");
    let bytes = read_bytes(&path).during("cannot read the thread's state", || format!("read({path})"))?;
    let name = bytes.iter().position(|b| *b == b'(').zip(bytes.iter().rposition(|b| *b == b')'));
    let name = name.and_then(|(start, end)| bytes.get(start + 1..end)).unwrap_or_default();
    Ok((name.to_vec(), Stat::parse(&String::from_utf8_lossy(&bytes))))
}

impl Stat {
    /// Of process `pid`.
    pub fn of(pid: i32) -> Result<Self> {
        Ok(Self::parse(&read(format!("/proc/{pid}/stat"))?))
    }
    /// The name in field 2 may hold blanks and parentheses: what counts begins after the last `)`.
    pub fn parse(text: &str) -> Self {
        let rest = text.rfind(')').map_or("", |end| &text[end + 1..]);
        // The state is a letter; large unsigned values wrap, none of those is asked for.
        Self(rest.split_ascii_whitespace().skip(1).map(|n| n.parse().unwrap_or_default()).collect())
    }
    /// Field `number`, from 4 on; 0 where this kernel has none.
    pub fn field(&self, number: usize) -> i64 {
        number.checked_sub(4).and_then(|i| self.0.get(i)).copied().unwrap_or_default()
    }
}

/// An id map of a user namespace, to turn ids that the host sees into those that the container sees.
#[derive(Debug, Clone, Default)]
pub struct IdMap(Vec<[u64; 3]>);

impl IdMap {
    /// The user ids of `pid`'s namespace.
    pub fn users(pid: i32) -> Result<Self> {
        Self::of(pid, "uid_map")
    }
    /// The group ids of `pid`'s namespace.
    pub fn groups(pid: i32) -> Result<Self> {
        Self::of(pid, "gid_map")
    }
    /// Whoever is in the same namespace has the same ids; the file tells him those of the one around it.
    fn of(pid: i32, file: &str) -> Result<Self> {
        if Kind::User.private(pid)? {
            Ok(Self::parse(&read(format!("/proc/{pid}/{file}"))?))
        } else {
            Ok(Self(vec![[0, 0, u64::from(u32::MAX)]]))
        }
    }
    fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(|line| numbers(line)?.try_into().ok()).collect())
    }
    /// The id inside for one outside; the overflow id when nothing maps to it.
    pub fn inside(&self, outside: u32) -> u32 {
        let outside = u64::from(outside);
        self.0
            .iter()
            .find(|[_, start, count]| (*start..start.saturating_add(*count)).contains(&outside))
            .and_then(|[inside, start, _]| u32::try_from(inside + (outside - start)).ok())
            .unwrap_or(65534)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_status_agrees_with_the_system_calls() {
        let status = Status::of(std::process::id().cast_signed()).unwrap();
        assert_eq!(status.uid[0], nix::unistd::getuid().as_raw());
        assert_eq!(status.ppid, nix::unistd::getppid().as_raw());
        assert_eq!(*status.ns_pid.last().unwrap(), nix::unistd::getpid().as_raw());
        assert!(status.threads >= 1);
    }

    #[test]
    fn a_name_full_of_parentheses_does_not_shift_the_fields() {
        let stat = Stat::parse("42 (a) S (b) R 7 8 9 0 -1 4194304");
        assert_eq!((stat.field(4), stat.field(5), stat.field(8), stat.field(99)), (7, 8, -1, 0));
    }

    #[test]
    fn ids_are_mapped_and_strangers_overflow() {
        let map = IdMap::parse("         0     100000      65536\n     70000          7          1\n");
        assert_eq!(map.inside(100_033), 33);
        assert_eq!(map.inside(7), 70000);
        assert_eq!(map.inside(0), 65534);
    }

    #[test]
    fn damage_is_an_error() {
        assert!(Status::parse("State:\tS (sleeping)\nNSpid:\tx\n").is_err());
        assert!(Status::parse("").is_err());
    }
}
