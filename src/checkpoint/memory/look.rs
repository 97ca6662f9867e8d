//! The flags of mappings, read while the program still runs.
//!
//! ```text
//!   runs           smaps ──> Looks
//!   stands still   maps: mappings that are as they were have the flags that they had
//!   runs again     smaps, of the copy where there is one: as before? then they were so in between, too
//!                                                         not? the dump is made again, with smaps read in the middle
//! ```
//!
//! Only `smaps` has the flags, and it walks the page tables of all that is mapped: milliseconds a gigabyte, for which
//! nobody should have to wait. A copy of a process has the very flags of that moment. Without one, what the program
//! gives and takes back between the two looks goes unseen: an advice, which changes nothing about what is in the memory.
//! What it locks is not left to that: a process that has locked memory is looked at while it stands still.

use std::collections::BTreeMap;

use crate::checkpoint::memory::maps::{self, Mapping, VmFlags};

/// The mappings of one process, in ascending order.
pub type Flagged = Vec<(Mapping, VmFlags)>;

/// The mappings of running processes, by pid.
#[derive(Debug, Default)]
pub struct Looks {
    seen: BTreeMap<i32, Flagged>,
    /// Those of which somebody has believed that they are so still.
    used: BTreeMap<i32, Flagged>,
}

/// What a copy does not inherit, and what is ours.
const NOT_COMPARED: [&[u8; 2]; 5] = [b"sd", b"um", b"uw", b"lo", b"lf"];

impl Looks {
    /// Looks at running processes. One that has ended is left out.
    pub fn at(pids: impl IntoIterator<Item = i32>) -> Self {
        let look = |pid| Some((pid, maps::read_with_flags(pid).ok()?));
        Self { seen: pids.into_iter().filter_map(look).collect(), used: BTreeMap::new() }
    }

    /// Adds what has been seen of a process.
    pub fn add(&mut self, pid: i32, seen: Flagged) {
        self.seen.insert(pid, seen);
    }

    /// The processes that have been looked at.
    pub fn pids(&self) -> impl Iterator<Item = i32> {
        self.seen.keys().copied()
    }

    /// What has been seen of a process.
    pub fn of(&self, pid: i32) -> &[(Mapping, VmFlags)] {
        self.seen.get(&pid).map_or(&[], Vec::as_slice)
    }

    /// Whether a process has been looked at.
    pub fn know(&self, pid: i32) -> bool {
        self.seen.contains_key(&pid)
    }

    /// The mappings of a stopped process, `now`, with the flags that were seen. None: something is new, or locked.
    pub fn of_stopped(&mut self, pid: i32, now: &[Mapping], locked: bool) -> Option<Flagged> {
        let seen = self.seen.remove(&pid).filter(|_| !locked)?;
        let mut left = seen.into_iter();
        let all: Option<Flagged> = now.iter().map(|now| left.find(|(seen, _)| seen == now)).collect();
        let all = all.filter(|all| !all.iter().any(|(_, flags)| flags.has(b"lo")))?;
        self.used.insert(pid, all.clone());
        Some(all)
    }

    /// Whether the mappings of a process still have the flags that were taken for true. `source` is the process itself
    /// or its copy. What is no longer mapped, or has no process any more, contradicts nobody; but a copy has all that the
    /// process had.
    pub fn hold(&self, pid: i32, source: i32) -> bool {
        let Some(used) = self.used.get(&pid) else { return true };
        match maps::read_with_flags(source) {
            Ok(now) => used.iter().all(|used| holds(used, &now, pid != source)),
            Err(_) => pid == source,
        }
    }
}

fn holds((mapping, flags): &(Mapping, VmFlags), now: &[(Mapping, VmFlags)], in_copy: bool) -> bool {
    let first = now.partition_point(|(other, _)| other.end <= mapping.start);
    let mut there = now[first..].iter().take_while(|(other, _)| other.start < mapping.end).peekable();
    let kept_back = flags.has(b"dc") || mapping.name() == b"[vsyscall]";
    let missing = in_copy && there.peek().is_none() && !kept_back;
    !missing && there.all(|(_, now)| comparable(*now) == comparable(*flags))
}

fn comparable(mut flags: VmFlags) -> VmFlags {
    NOT_COMPARED.iter().for_each(|word| flags.clear(word));
    flags
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    const PID: i32 = 7;

    fn mapping(start: u64, end: u64) -> Mapping {
        let name = OsString::from("");
        Mapping { start, end, prot: 3, shared: false, offset: 0, device: (0, 0), inode: 0, name }
    }

    fn flagged(start: u64, end: u64, words: &str) -> (Mapping, VmFlags) {
        (mapping(start, end), VmFlags::parse(words.as_bytes()))
    }

    #[test]
    fn only_a_process_that_is_as_it_was_is_believed_to_be() {
        let pid = std::process::id().cast_signed();
        let seen = vec![flagged(0x1000, 0x2000, "rd wr"), flagged(0x3000, 0x4000, "rd hg")];
        let of = |now: &[Mapping], seen: &Flagged| {
            let mut looks = Looks::default();
            looks.add(pid, seen.clone());
            looks.of_stopped(pid, now, false)
        };
        assert_eq!(of(&[mapping(0x1000, 0x2000), mapping(0x3000, 0x4000)], &seen), Some(seen.clone()));
        assert_eq!(of(&[mapping(0x3000, 0x4000)], &seen), Some(seen[1..].to_vec()), "what is gone is gone");
        assert_eq!(of(&[mapping(0x1000, 0x2000), mapping(0x3000, 0x5000)], &seen), None);
        assert_eq!(of(&[mapping(0x1000, 0x2000)], &vec![flagged(0x1000, 0x2000, "rd lo")]), None);
        assert_eq!(Looks::default().of_stopped(pid, &[], false), None, "who was not looked at");
    }

    #[test]
    fn what_has_changed_meanwhile_is_seen() {
        let used = flagged(0x2000, 0x4000, "rd wr");
        let holds = |now: &[(Mapping, VmFlags)], in_copy| holds(&used, now, in_copy);
        for in_copy in [false, true] {
            assert!(holds(&[flagged(0x1000, 0x5000, "rd wr um uw")], in_copy), "grown, and watched by us");
            assert!(!holds(&[flagged(0x2000, 0x4000, "rd wr wf")], in_copy));
            assert!(!holds(
                &[flagged(0x1000, 0x3000, "rd wr"), flagged(0x3000, 0x5000, "rd wr dd")],
                in_copy
            ));
        }
        let elsewhere = [flagged(0x1000, 0x2000, "ex"), flagged(0x4000, 0x5000, "ex")];
        assert!(holds(&elsewhere, false), "unmapped since");
        assert!(!holds(&elsewhere, true), "not inherited");
        assert!(super::holds(&flagged(0x2000, 0x4000, "rd dc"), &elsewhere, true));
        assert!(Looks::default().hold(PID, PID), "nothing was believed");
    }
}
