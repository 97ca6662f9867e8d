//! Timers: the three interval timers and POSIX timers, with what is left and their old ids.
//!
//! A periodic timer that has expired while its signal waits shows nothing left: it is armed again with a whole period,
//! since "nothing left" would disarm it. Where the signal of a POSIX timer waits, the timer expires once more at once: then
//! it is the kernel that has queued the signal, and counts how often the timer has run over.
//!
//! ```text
//!  ids:  prctl(PR_TIMER_CREATE_RESTORE_IDS)      6.15: timer_create takes the id that it is given
//!        otherwise                               ids are handed out in order: create and delete until it is the one
//! ```

use std::collections::BTreeSet;

use super::status;
use crate::checkpoint::image::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use crate::checkpoint::remote::{Batch, Call, Injection, Out, Results};
use crate::checkpoint::{Error, Result};

/// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
const KINDS: [i32; 3] = [0, 1, 2];
const SIGEV_THREAD_ID: u32 = 4;
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// More timers than this are no program's; an id beyond it cannot be reached one by one.
const IDS: u32 = 1 << 16;

/// Asks for all timers of a process.
#[derive(Debug)]
pub struct Ask {
    interval: [Out; 3],
    posix: Vec<(PosixTimerEntry, Out, Call)>,
}

impl Ask {
    /// Adds the questions to `batch`; which POSIX timers there are, `/proc` tells. `threads`: ids of the process's
    /// threads here and inside.
    pub fn new(batch: &mut Batch, pid: i32, threads: &[(i32, i32)]) -> Result<Self> {
        batch.about("cannot read the timers");
        let interval = KINDS.map(|which| {
            let out = batch.out(32);
            batch.call(libc::SYS_getitimer, &[which.into(), out.arg()]);
            out
        });
        let mut posix = Vec::new();
        for timer in parse(&status::read(format!("/proc/{pid}/timers"))?, threads)? {
            let out = batch.out(32);
            batch.call(libc::SYS_timer_gettime, &[timer.it_id.into(), out.arg()]);
            let overrun = batch.call(libc::SYS_timer_getoverrun, &[timer.it_id.into()]);
            batch.tolerate(overrun);
            posix.push((timer, out, overrun));
        }
        Ok(Self { interval, posix })
    }

    /// Takes the answers.
    pub fn answer(&self, results: &Results) -> TaskTimersEntry {
        let interval = |out: Out| ItimerEntry {
            isec: results.u64(out, 0),
            iusec: results.u64(out, 8),
            vsec: results.u64(out, 16),
            vusec: results.u64(out, 24),
        };
        let [real, virt, prof] = self.interval.map(interval);
        let posix = |(timer, out, overrun): &(PosixTimerEntry, Out, Call)| PosixTimerEntry {
            isec: results.u64(*out, 0),
            insec: results.u64(*out, 8),
            vsec: results.u64(*out, 16),
            vnsec: results.u64(*out, 24),
            overrun: u32::try_from(results.ret(*overrun)).unwrap_or(0),
            ..timer.clone()
        };
        TaskTimersEntry { real, virt, prof, posix: self.posix.iter().map(posix).collect() }
    }
}

/// `/proc/PID/timers`: four lines a timer.
fn parse(text: &str, threads: &[(i32, i32)]) -> Result<Vec<PosixTimerEntry>> {
    let mut timers: Vec<PosixTimerEntry> = Vec::new();
    for line in text.lines() {
        let bad = || Error::new(format!("/proc/PID/timers has a line that cannot be understood: {line}"));
        let (key, value) = line.split_once(": ").ok_or_else(bad)?;
        if key == "ID" {
            timers.push(PosixTimerEntry {
                it_id: value.parse().map_err(|_| bad())?,
                ..PosixTimerEntry::default()
            });
            continue;
        }
        let timer = timers.last_mut().ok_or_else(bad)?;
        match key {
            "signal" => {
                let (signal, value) = value.split_once('/').ok_or_else(bad)?;
                timer.si_signo = signal.parse().map_err(|_| bad())?;
                timer.sival_ptr =
                    u64::from_str_radix(value.trim_start_matches("0x"), 16).map_err(|_| bad())?;
            }
            "notify" => {
                let (how, whom) = value.split_once('/').ok_or_else(bad)?;
                let (kind, id) = whom.split_once('.').ok_or_else(bad)?;
                timer.it_sigev_notify = match how {
                    "signal" => 0,
                    "none" => 1,
                    "thread" => 2,
                    _ => return Err(bad()),
                };
                if kind == "tid" {
                    timer.it_sigev_notify |= SIGEV_THREAD_ID;
                    let id: i32 = id.parse().map_err(|_| bad())?;
                    let inside = threads.iter().find(|(host, _)| *host == id).map(|(_, inside)| *inside);
                    timer.notify_thread_id =
                        Some(inside.ok_or_else(|| {
                            Error::new(format!("a timer notifies thread {id}, which is gone"))
                        })?);
                }
            }
            "ClockID" => {
                let clock: i32 = value.parse().map_err(|_| bad())?;
                timer.clock_id = clock.cast_unsigned();
            }
            _ => {}
        }
    }
    // The kernel lists the newest first.
    timers.sort_by_key(|timer| timer.it_id);
    Ok(timers)
}

/// Arms the interval timers.
pub fn restore_interval(batch: &mut Batch, timers: &TaskTimersEntry) {
    batch.about("cannot set the interval timers");
    for (which, timer) in KINDS.into_iter().zip([&timers.real, &timers.virt, &timers.prof]) {
        let ItimerEntry { isec, iusec, mut vsec, mut vusec } = *timer;
        if vsec == 0 && vusec == 0 {
            (vsec, vusec) = (isec, iusec);
        }
        if vsec != 0 || vusec != 0 {
            let value = batch.words(&[isec, iusec, vsec, vusec]);
            batch.call(libc::SYS_setitimer, &[which.into(), value, 0_u64.into()]);
        }
    }
}

/// Of the timers whose signals wait, those that can expire again.
pub fn expired(timers: &TaskTimersEntry, waiting: &BTreeSet<u32>) -> BTreeSet<u32> {
    let goes_by_itself = |timer: &&PosixTimerEntry| {
        // Those of CPU time go on only when the program does.
        let cpu = [libc::CLOCK_PROCESS_CPUTIME_ID, libc::CLOCK_THREAD_CPUTIME_ID];
        let clock = timer.clock_id.cast_signed();
        waiting.contains(&timer.it_id) && clock >= 0 && !cpu.contains(&clock)
    };
    timers.posix.iter().filter(goes_by_itself).map(|timer| timer.it_id).collect()
}

/// Creates the POSIX timers under their ids, and arms them; those in `expired` so that they expire at once.
pub fn restore_posix(
    injection: &mut Injection,
    timers: &TaskTimersEntry,
    expired: &BTreeSet<u32>,
) -> Result<()> {
    if timers.posix.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::new();
    let on = batch.call(libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS.into(), 1_u64.into()]);
    batch.tolerate(on);
    let given = injection.run(&batch)?.ret(on) == 0;
    let mut sorted: Vec<&PosixTimerEntry> = timers.posix.iter().collect();
    sorted.sort_by_key(|timer| timer.it_id);
    for timer in sorted {
        if timer.it_id >= IDS && !given {
            return Err(Error::new(format!("timer {} cannot get its id back on this kernel", timer.it_id))
                .remedy("restore on Linux 6.15 or newer"));
        }
        create(injection, timer, given)?;
        arm(injection, timer, expired.contains(&timer.it_id))?;
    }
    if given {
        injection.syscall(libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS.into(), 0_u64.into()])?;
    }
    Ok(())
}

fn create(injection: &mut Injection, timer: &PosixTimerEntry, given: bool) -> Result<()> {
    let mut event = [0_u8; 64];
    event[..8].copy_from_slice(&timer.sival_ptr.to_ne_bytes());
    event[8..12].copy_from_slice(&timer.si_signo.to_ne_bytes());
    event[12..16].copy_from_slice(&timer.it_sigev_notify.to_ne_bytes());
    event[16..20].copy_from_slice(&timer.notify_thread_id.unwrap_or(0).to_ne_bytes());
    // A clock is a signed number: those of CPU time are negative.
    let clock = timer.clock_id.cast_signed();
    let mut batch = Batch::new();
    batch.about(format!("cannot create timer {}", timer.it_id));
    let event = batch.data(&event);
    if given {
        let id = batch.data(&timer.it_id.to_ne_bytes());
        batch.call(libc::SYS_timer_create, &[clock.into(), event, id]);
        return injection.run(&batch).map(|_| ());
    }
    let id = batch.out(4);
    batch.call(libc::SYS_timer_create, &[clock.into(), event, id.arg()]);
    loop {
        let made = injection.run(&batch)?.u32(id, 0);
        if made == timer.it_id {
            return Ok(());
        }
        injection.syscall(libc::SYS_timer_delete, &[made.into()])?;
        if made > timer.it_id {
            return Err(Error::new(format!("timer {} cannot get its id back on this kernel", timer.it_id))
                .remedy("restore on Linux 6.15 or newer"));
        }
    }
}

fn arm(injection: &mut Injection, timer: &PosixTimerEntry, expired: bool) -> Result<()> {
    let PosixTimerEntry { isec, insec, mut vsec, mut vnsec, .. } = *timer;
    if vsec == 0 && vnsec == 0 {
        (vsec, vnsec) = (isec, insec);
    }
    if expired {
        (vsec, vnsec) = (0, 1);
    }
    if vsec == 0 && vnsec == 0 {
        return Ok(());
    }
    let mut batch = Batch::new();
    batch.about("cannot set the timer");
    let value = batch.words(&[isec, insec, vsec, vnsec]);
    batch.call(libc::SYS_timer_settime, &[timer.it_id.into(), 0_u64.into(), value, 0_u64.into()]);
    injection.run(&batch).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_as_proc_prints_them() {
        let text = "ID: 7\nsignal: 34/00000000deadbeef\nnotify: signal/pid.10\nClockID: 1\n\
                    ID: 3\nsignal: 60/0000000000000001\nnotify: signal/tid.12\nClockID: -6\n";
        let timers = parse(text, &[(10, 1), (12, 3)]).unwrap();
        assert_eq!(timers.iter().map(|t| t.it_id).collect::<Vec<_>>(), [3, 7]);
        assert_eq!(timers[0].notify_thread_id, Some(3));
        assert_eq!(timers[0].it_sigev_notify, 4);
        assert_eq!(timers[0].clock_id.cast_signed(), -6);
        assert_eq!(timers[1].sival_ptr, 0xdead_beef);
        assert!(parse(text, &[]).is_err());
        assert!(parse("nonsense", &[]).is_err());
    }

    #[test]
    fn an_expired_period_is_armed_again() {
        let expired = ItimerEntry { isec: 2, ..ItimerEntry::default() };
        let mut batch = Batch::new();
        restore_interval(&mut batch, &TaskTimersEntry { real: expired, ..TaskTimersEntry::default() });
        let mut expected = Batch::new();
        expected.about("cannot set the interval timers");
        let value = expected.words(&[2, 0, 2, 0]);
        expected.call(libc::SYS_setitimer, &[0.into(), value, 0_u64.into()]);
        assert_eq!(batch, expected);
    }
}
