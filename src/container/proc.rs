//! What /proc says of a process, read without more work than it takes: `state` and `kill` are called often.

use crate::sys::procfs::read_bytes;

/// PF_EXITING: a thread that is in exit(2).
const EXITING: u64 = 0x4;
/// PF_FORKNOEXEC: a process that still runs what its parent ran.
const NOT_EXECED: u64 = 0x40;

/// The fields of /proc/PID/stat that tell whether a container's init is still itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// State letter of the first thread: `R`, `S`, `Z`, ...
    pub state: u8,
    /// The first thread is in exit(2).
    pub exiting: bool,
    /// The process has executed a program since it was forked.
    pub execed: bool,
    /// How many threads there are.
    pub threads: u32,
    /// Start time in clock ticks since boot.
    pub start: u64,
}

impl Stat {
    /// Reads /proc/PID/stat; None where there is no such process.
    pub fn of(pid: i32) -> Option<Self> {
        Self::parse(&read_bytes(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(line: &[u8]) -> Option<Self> {
        // The name stands in parentheses and may hold any byte, parentheses too: the last one ends it.
        let after_name = line.iter().rposition(|&b| b == b')')? + 2;
        let fields: Vec<&str> =
            std::str::from_utf8(line.get(after_name..)?).ok()?.split_ascii_whitespace().take(20).collect();
        let flags = fields.get(6)?.parse::<u64>().ok()?;
        Some(Self {
            state: *fields.first()?.as_bytes().first()?,
            exiting: flags & EXITING != 0,
            execed: flags & NOT_EXECED == 0,
            threads: fields.get(17)?.parse().ok()?,
            start: fields.get(19)?.parse().ok()?,
        })
    }

    /// True for a process that still runs something.
    ///
    /// The first thread may have ended and others go on. A last thread that is in exit(2) will run nothing any more; if
    /// it is init of a pid namespace it may be there for long, for it waits until whoever started further processes
    /// in the namespace has taken note of their end.
    pub fn alive(self) -> bool {
        self.threads > 1 || !(self.exiting || matches!(self.state, b'Z' | b'X' | b'x'))
    }
}

/// True for the first process of a pid namespace that is not ours.
pub fn is_first_of_its_namespace(pid: i32) -> bool {
    let status = read_bytes(format!("/proc/{pid}/status")).unwrap_or_default();
    let mut lines = status.split(|byte| *byte == b'\n');
    let pids = lines.find_map(|line| line.strip_prefix(b"NSpid:")).unwrap_or_default();
    let mut pids = pids.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    pids.next().is_some() && pids.next_back() == Some(b"1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_processes_have_a_number_of_ours_too() {
        assert!(!is_first_of_its_namespace(std::process::id() as i32));
        assert!(!is_first_of_its_namespace(1), "it is that of our own");
        assert!(!is_first_of_its_namespace(i32::MAX));
    }

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let line = b"7 (a) R 1 (b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 8675309 1 2 3\n";
        let stat = Stat { state: b'S', exiting: false, execed: true, threads: 1, start: 8_675_309 };
        assert_eq!(Stat::parse(line), Some(stat));
        assert_eq!(Stat::parse(b"7 (a"), None);
    }

    #[test]
    fn the_last_thread_decides() {
        let stat = |state, exiting, threads| Stat { state, exiting, execed: true, threads, start: 1 };
        assert!(stat(b'S', false, 1).alive());
        assert!(stat(b'Z', true, 2).alive(), "another thread goes on");
        assert!(!stat(b'S', true, 1).alive(), "it waits for its namespace to become empty");
        assert!(!stat(b'Z', true, 1).alive());
    }

    #[test]
    fn we_are_alive() {
        let stat = Stat::of(std::process::id() as i32).unwrap();
        assert!(stat.alive() && stat.execed);
        crate::sys::testing::in_child(0, || {
            assert!(!Stat::of(std::process::id() as i32).unwrap().execed);
        });
    }
}
