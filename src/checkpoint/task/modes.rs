//! Ways in which the kernel treats a thread, set by prctl(2), and which of its memory a core dump has.
//!
//! | number | what                                            | as it is by default |
//! |--------|-------------------------------------------------|---------------------|
//! | 1      | may it read the time stamp counter              | yes                 |
//! | 2      | is it killed early for memory that has gone bad | as the machine says |
//! | 3      | memory may not become executable (the leader's) | it may              |
//! | 4..6   | mitigations of speculation that it has asked for| none                |
//! | 7      | all memory may be merged by KSM (the leader's)  | no                  |
//!
//! The numbers are those of stasis.img; CRIU's images have no place for any of this. What is as by default is left out.

use std::fs;

use super::status;
use crate::checkpoint::error::Context;
use crate::checkpoint::image::ThreadMode;
use crate::checkpoint::remote::{Arg, Batch, Call, Out, Results};
use crate::checkpoint::{Error, Result};

const PR_GET_TSC: u64 = 25;
const PR_SET_TSC: u64 = 26;
const PR_TSC_ENABLE: u32 = 1;
const PR_MCE_KILL: u64 = 33;
const PR_MCE_KILL_SET: u64 = 1;
const PR_MCE_KILL_GET: u64 = 34;
const PR_MCE_KILL_DEFAULT: u32 = 2;
const PR_GET_SPECULATION_CTRL: u64 = 52;
const PR_SET_SPECULATION_CTRL: u64 = 53;
/// `PR_SPEC_PRCTL`: a thread may choose.
const CHOICE: u32 = 1;
/// `PR_SPEC_DISABLE`, `PR_SPEC_FORCE_DISABLE`, `PR_SPEC_DISABLE_NOEXEC`.
const MITIGATED: u32 = 4 | 8 | 16;
const PR_SET_MDWE: u64 = 65;
const PR_GET_MDWE: u64 = 66;
/// Since Linux 6.4. PR_SET_MEMORY_MERGE(2const)
const PR_SET_MEMORY_MERGE: u64 = 67;
const PR_GET_MEMORY_MERGE: u64 = 68;

const TSC: u32 = 1;
const MEMORY_FAILURE: u32 = 2;
const NO_EXECUTABLE: u32 = 3;
const SPECULATION: [u32; 3] = [4, 5, 6];
const MERGE: u32 = 7;

/// Asks a thread for its modes.
#[derive(Debug)]
pub struct Ask {
    tsc: (Out, Call),
    others: Vec<(u32, Call)>,
}

impl Ask {
    /// Adds the questions to `batch`. A kernel that does not know one has nothing to tell.
    pub fn new(batch: &mut Batch) -> Self {
        let mut ask = |args: [Arg; 5]| {
            let call = batch.call(libc::SYS_prctl, &args);
            batch.tolerate(call)
        };
        let get = |option: u64, which: usize| [option.into(), which.into(), 0.into(), 0.into(), 0.into()];
        let mut others = vec![
            (MEMORY_FAILURE, ask(get(PR_MCE_KILL_GET, 0))),
            (NO_EXECUTABLE, ask(get(PR_GET_MDWE, 0))),
            (MERGE, ask(get(PR_GET_MEMORY_MERGE, 0))),
        ];
        for (which, number) in SPECULATION.into_iter().enumerate() {
            others.push((number, ask(get(PR_GET_SPECULATION_CTRL, which))));
        }
        let tsc = batch.out(4);
        let call = batch.call(libc::SYS_prctl, &[PR_GET_TSC.into(), tsc.arg()]);
        Self { tsc: (tsc, batch.tolerate(call)), others }
    }

    /// Takes the answers.
    pub fn answer(&self, results: &Results) -> Vec<ThreadMode> {
        let tsc = results.result(self.tsc.1).ok().map(|_| (TSC, results.u32(self.tsc.0, 0)));
        let other = |(number, call): &(u32, Call)| Some((*number, u32::try_from(results.ret(*call)).ok()?));
        let all = tsc.into_iter().chain(self.others.iter().filter_map(other));
        all.filter_map(|(number, value)| special(number, value)).collect()
    }
}

/// A mode, unless it is as by default.
fn special(number: u32, value: u32) -> Option<ThreadMode> {
    let value = match number {
        TSC => Some(value).filter(|v| *v != PR_TSC_ENABLE),
        MEMORY_FAILURE => Some(value).filter(|v| *v != PR_MCE_KILL_DEFAULT),
        NO_EXECUTABLE | MERGE => Some(value).filter(|v| *v != 0),
        _ => Some(value & MITIGATED).filter(|v| *v != 0 && value & CHOICE != 0),
    };
    value.map(|value| ThreadMode { number, value })
}

/// Sets them again. Nothing may be mapped executable after this.
pub fn restore(batch: &mut Batch, modes: &[ThreadMode], is_leader: bool) -> Result<()> {
    for ThreadMode { number, value } in modes {
        let zero = || Arg::from(0);
        let value = || Arg::from(u64::from(*value));
        let args = match *number {
            TSC => [PR_SET_TSC.into(), value(), zero(), zero(), zero()],
            MEMORY_FAILURE => [PR_MCE_KILL.into(), PR_MCE_KILL_SET.into(), value(), zero(), zero()],
            NO_EXECUTABLE | MERGE if !is_leader => continue,
            NO_EXECUTABLE => [PR_SET_MDWE.into(), value(), zero(), zero(), zero()],
            MERGE => [PR_SET_MEMORY_MERGE.into(), value(), zero(), zero(), zero()],
            number if SPECULATION.contains(&number) => {
                let which = number - SPECULATION[0];
                [PR_SET_SPECULATION_CTRL.into(), u64::from(which).into(), value(), zero(), zero()]
            }
            number => {
                return Err(Error::new(format!("the image has a thread mode {number}, which is unknown")));
            }
        };
        batch.about("cannot have the kernel treat the thread as before");
        let call = batch.call(libc::SYS_prctl, &args);
        // Another processor needs other mitigations.
        if SPECULATION.contains(number) {
            batch.tolerate(call);
        }
    }
    Ok(())
}

/// Which of its memory a core dump of the process has.
pub fn core_filter(pid: i32) -> Result<Option<u32>> {
    let path = format!("/proc/{pid}/coredump_filter");
    // Kernels without core dumps have no such file.
    Ok(status::read(path).ok().and_then(|text| u32::from_str_radix(text.trim(), 16).ok()))
}

/// Sets what [`core_filter`] told.
pub fn restore_core_filter(pid: i32, filter: u32) -> Result<()> {
    let path = format!("/proc/{pid}/coredump_filter");
    fs::write(&path, format!("{filter:#x}"))
        .during("cannot set what a core dump has", || format!("write({path})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_as_by_default_is_left_out() {
        let kept = |number, value| special(number, value).map(|mode| mode.value);
        assert_eq!((kept(TSC, 1), kept(TSC, 2)), (None, Some(2)));
        assert_eq!((kept(MEMORY_FAILURE, 2), kept(MEMORY_FAILURE, 0)), (None, Some(0)));
        assert_eq!((kept(NO_EXECUTABLE, 0), kept(NO_EXECUTABLE, 3)), (None, Some(3)));
        assert_eq!((kept(MERGE, 0), kept(MERGE, 1)), (None, Some(1)));
        // Not to be chosen; chosen to be on; chosen to be off for good.
        assert_eq!((kept(4, 4), kept(4, 3), kept(5, 9)), (None, None, Some(8)));
    }

    #[test]
    fn unknown_modes_are_refused_by_number() {
        let error = restore(&mut Batch::new(), &[ThreadMode { number: 99, value: 1 }], true).unwrap_err();
        assert!(error.to_string().contains("mode 99"), "{error}");
    }
}
