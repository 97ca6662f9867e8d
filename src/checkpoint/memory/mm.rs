//! The bounds of an address space: what `/proc/PID/stat`, `auxv`, `exe` and brk(2) show, put back by PR_SET_MM_MAP.

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::MmEntry;
use crate::checkpoint::remote::{Arg, Batch, Call, Results};
use crate::sys::procfs::read_bytes;

const PR_GET_DUMPABLE: i32 = 3;
const PR_SET_MM: i32 = 35;
const PR_SET_MM_MAP: i32 = 14;
const PR_SET_THP_DISABLE: i32 = 41;
const PR_GET_THP_DISABLE: i32 = 42;

/// What only the process can tell of its address space.
#[derive(Debug)]
pub struct Ask {
    brk: Call,
    dumpable: Call,
    thp: Call,
}

impl Ask {
    /// Adds the questions to `batch`.
    pub fn new(batch: &mut Batch) -> Self {
        batch.about("cannot read the state of the address space");
        let brk = batch.call(libc::SYS_brk, &[Arg::from(0u64)]);
        let dumpable = batch.call(libc::SYS_prctl, &[PR_GET_DUMPABLE.into()]);
        let zero = || Arg::from(0u64);
        let thp = batch.call(libc::SYS_prctl, &[PR_GET_THP_DISABLE.into(), zero(), zero(), zero(), zero()]);
        Self { brk, dumpable, thp: batch.tolerate(thp) }
    }

    /// Takes the answers.
    pub fn answer(&self, results: &Results) -> Answers {
        Answers {
            brk: results.ret(self.brk).cast_unsigned(),
            dumpable: results.int(self.dumpable),
            thp_disabled: results.ret(self.thp) > 0,
        }
    }
}

/// The answers.
#[derive(Debug, Default, Clone, Copy)]
pub struct Answers {
    brk: u64,
    dumpable: i32,
    thp_disabled: bool,
}

/// Reads everything but the mappings and the executable.
pub fn capture(pid: i32, answers: &Answers) -> Result<MmEntry> {
    let path = format!("/proc/{pid}/stat");
    let stat = read_bytes(&path).during("cannot read the task's state", || format!("read({path:?})"))?;
    let mut mm = bounds(&stat).ok_or_else(|| Error::new("cannot understand /proc/PID/stat"))?;
    let path = format!("/proc/{pid}/auxv");
    let auxv = read_bytes(&path).during("cannot read the auxiliary vector", || format!("read({path:?})"))?;
    mm.mm_saved_auxv = auxv.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    // The kernel ends the vector itself, and CRIU has room for 22 pairs, which is what is left on Linux 6.18.
    while mm.mm_saved_auxv.ends_with(&[0, 0]) {
        mm.mm_saved_auxv.truncate(mm.mm_saved_auxv.len() - 2);
    }
    mm.mm_brk = answers.brk;
    mm.dumpable = Some(answers.dumpable);
    mm.thp_disabled = Some(answers.thp_disabled);
    Ok(mm)
}

/// The fields of proc_pid_stat(5), numbered as there.
fn bounds(stat: &[u8]) -> Option<MmEntry> {
    // The second field is in parentheses, and may have any bytes in it.
    let behind = stat.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(stat.get(behind + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(MmEntry {
        mm_start_code: field(26)?,
        mm_end_code: field(27)?,
        mm_start_stack: field(28)?,
        mm_start_data: field(45)?,
        mm_end_data: field(46)?,
        mm_start_brk: field(47)?,
        mm_arg_start: field(48)?,
        mm_arg_end: field(49)?,
        mm_env_start: field(50)?,
        mm_env_end: field(51)?,
        ..MmEntry::default()
    })
}

/// Adds the call that puts the bounds back. `exe` is a descriptor in the task, or -1 to leave the executable alone. No
/// mapping of the task's present executable may be left.
pub fn restore(batch: &mut Batch, mm: &MmEntry, exe: i32) {
    // struct prctl_mm_map: the last word is two of 32 bits.
    let auxv = batch.words(&mm.mm_saved_auxv);
    let size = mm.mm_saved_auxv.len() as u64 * 8;
    let map = batch.words(&[
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
        0,
        size | u64::from(exe.cast_unsigned()) << 32,
    ]);
    batch.link(map, 11 * 8, auxv);
    batch.about("cannot set the bounds of the address space");
    batch.call(
        libc::SYS_prctl,
        &[PR_SET_MM.into(), PR_SET_MM_MAP.into(), map, (13u64 * 8).into(), Arg::from(0u64)],
    );
}

/// Adds the call that switches transparent huge pages off, where they were.
pub fn restore_thp(batch: &mut Batch, mm: &MmEntry) {
    if mm.thp_disabled == Some(true) {
        batch.about("cannot disable transparent huge pages");
        let zero = || Arg::from(0u64);
        batch.call(libc::SYS_prctl, &[PR_SET_THP_DISABLE.into(), Arg::from(1u64), zero(), zero(), zero()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_of_this_process_are_in_order() {
        let mm = bounds(&std::fs::read("/proc/self/stat").unwrap()).unwrap();
        assert!(mm.mm_start_code < mm.mm_end_code);
        assert!(mm.mm_arg_start < mm.mm_arg_end && mm.mm_arg_end <= mm.mm_env_start);
        assert!(mm.mm_start_stack < mm.mm_arg_start);
        let args = std::fs::read("/proc/self/cmdline").unwrap();
        assert_eq!(mm.mm_arg_end - mm.mm_arg_start, args.len() as u64);
    }

    #[test]
    fn names_with_parentheses_and_short_lines() {
        let rest: Vec<String> = (3..=52).map(|n| n.to_string()).collect();
        let line = format!("7 (a) b) R) {}", rest.join(" "));
        let mm = bounds(line.as_bytes()).unwrap();
        assert_eq!((mm.mm_start_code, mm.mm_start_stack, mm.mm_env_end), (26, 28, 51));
        assert_eq!(bounds(b"7 (a) R 1 2 3"), None);
        assert_eq!(bounds(b"7"), None);
    }
}
