//! What /proc says of a process, read without more work than it takes: `state` and `kill` are called often.

use std::fs;

/// The two fields of /proc/PID/stat that tell whether a container's init is still itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// State letter: `R`, `S`, `Z`, ...
    pub state: u8,
    /// Start time in clock ticks since boot.
    pub start: u64,
}

impl Stat {
    /// Reads /proc/PID/stat; None where there is no such process.
    pub fn of(pid: i32) -> Option<Self> {
        Self::parse(&fs::read(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(line: &[u8]) -> Option<Self> {
        // The name stands in parentheses and may hold any byte, parentheses too: the last one ends it.
        let after_name = line.iter().rposition(|&b| b == b')')? + 2;
        let mut fields = line.get(after_name..)?.split(|b| b.is_ascii_whitespace());
        let state = *fields.next()?.first()?;
        let start = std::str::from_utf8(fields.nth(18)?).ok()?.parse().ok()?;
        Some(Self { state, start })
    }

    /// True for a process that has not exited.
    pub fn alive(self) -> bool {
        !matches!(self.state, b'Z' | b'X' | b'x')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let line = b"7 (a) R 1 (b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 8675309 1 2 3\n";
        assert_eq!(Stat::parse(line), Some(Stat { state: b'S', start: 8_675_309 }));
        assert_eq!(Stat::parse(b"7 (a"), None);
    }

    #[test]
    fn we_are_alive() {
        let stat = Stat::of(std::process::id() as i32).unwrap();
        assert!(stat.alive());
    }
}
