//! Signals: what a process does about each, which are blocked, which wait, and the alternate stack.
//!
//! Queued signals carry a siginfo that must come back bit by bit. The kernel lets nobody but a thread itself forge one
//! that claims to come from kill(2) or the kernel (si_code >= 0, or SI_TKILL), not even root: so the restored thread
//! queues its own, the leader those of the whole process, while everything is blocked.

use std::collections::BTreeSet;

use libc::{SIGKILL, SIGSTOP};

use crate::checkpoint::arch::compat;
use crate::checkpoint::image::{SaEntry, SiginfoEntry, SignalQueueEntry, ThreadSasEntry};
use crate::checkpoint::remote::{Batch, Injection, Out, Results};
use crate::checkpoint::{Error, Result};

/// Size of the kernel's signal set.
const SET: u64 = 8;
/// Size of a siginfo.
pub const SIGINFO: usize = 128;
const SS_DISABLE: u32 = 2;
const SS_AUTODISARM: u32 = 1 << 31;

/// All signals that can have an action, in the order of the image's records.
fn with_action() -> impl Iterator<Item = i32> {
    (1..=64).filter(|sig| ![SIGKILL, SIGSTOP].contains(sig))
}

/// Asks for all actions of a process.
#[derive(Debug)]
pub struct AskActions(Vec<Out>);

impl AskActions {
    /// Adds the questions to `batch`.
    pub fn new(batch: &mut Batch) -> Self {
        let ask = |sig: i32| {
            let out = batch.out(32);
            batch.call(libc::SYS_rt_sigaction, &[sig.into(), 0_u64.into(), out.arg(), SET.into()]);
            out
        };
        Self(with_action().map(ask).collect())
    }
    /// Takes the answers.
    pub fn answers(&self, results: &Results) -> Vec<SaEntry> {
        let entry = |out: &Out| {
            let [sigaction, flags, restorer, mask] = quads(results.out(*out));
            SaEntry { sigaction, flags, restorer, mask, compat_sigaction: Some(false), mask_extended: None }
        };
        self.0.iter().map(entry).collect()
    }
}

/// Marks the actions as those of a 32-bit program, whose handlers get other frames.
pub fn make_compat(actions: &mut [SaEntry]) {
    for action in actions {
        action.compat_sigaction = Some(true);
    }
}

/// Sets all actions of a process.
pub fn restore_actions(injection: &mut Injection, actions: &[SaEntry]) -> Result<()> {
    let is_compat = |(_, action): &(i32, &SaEntry)| action.compat_sigaction == Some(true);
    let (compat, native): (Vec<_>, Vec<_>) = with_action().zip(actions).partition(is_compat);
    let mut batch = Batch::new();
    batch.about("cannot set the signal actions");
    for (sig, action) in native {
        let raw = batch.words(&[action.sigaction, action.flags, action.restorer, action.mask]);
        batch.call(libc::SYS_rt_sigaction, &[sig.into(), raw, 0_u64.into(), SET.into()]);
    }
    if !batch.is_empty() {
        injection.run(&batch)?;
    }
    if !compat.is_empty() {
        compat::set_actions(injection, compat.into_iter())?;
    }
    Ok(())
}

/// Asks for a thread's alternate stack.
#[derive(Debug)]
pub struct AskStack(Out);

impl AskStack {
    /// Adds the question to `batch`.
    pub fn new(batch: &mut Batch) -> Self {
        let out = batch.out(24);
        batch.call(libc::SYS_sigaltstack, &[0_u64.into(), out.arg()]);
        Self(out)
    }
    /// Takes the answer. Whether the thread is *on* the stack follows from its stack pointer.
    pub fn answer(&self, results: &Results) -> ThreadSasEntry {
        let [ss_sp, flags, ss_size] = quads(results.out(self.0));
        let flags = u32::try_from(flags & 0xffff_ffff).unwrap_or_default();
        ThreadSasEntry { ss_sp, ss_size, ss_flags: flags & (SS_DISABLE | SS_AUTODISARM) }
    }
}

/// Sets a thread's alternate stack. The kernel answers EPERM while the stack pointer lies on it: the injected code has
/// none.
pub fn restore_stack(batch: &mut Batch, stack: &ThreadSasEntry) {
    let flags = u64::from(stack.ss_flags & (SS_DISABLE | SS_AUTODISARM));
    let raw: Vec<u8> = [stack.ss_sp, flags, stack.ss_size].iter().flat_map(|v| v.to_le_bytes()).collect();
    let raw = batch.data(&raw);
    batch.call(libc::SYS_sigaltstack, &[raw, 0_u64.into()]);
}

/// The record of a queue. `set` is the kernel's own account of what is pending: a standard signal that was sent while
/// the queue was full has a bit there and no siginfo; it gets a plain one.
pub fn queue(infos: &[[u8; SIGINFO]], set: u64) -> SignalQueueEntry {
    let queued = infos.iter().fold(0_u64, |all, info| all | bit(number(info)));
    let bare = (1..=64).filter(|sig| set & !queued & bit(*sig) != 0).map(|sig| {
        let mut info = [0_u8; SIGINFO];
        info[..4].copy_from_slice(&sig.to_le_bytes());
        info
    });
    let signals =
        infos.iter().copied().chain(bare).map(|info| SiginfoEntry { siginfo: info.to_vec() }).collect();
    SignalQueueEntry { signals }
}

fn number(info: &[u8; SIGINFO]) -> i32 {
    i32::from_le_bytes([info[0], info[1], info[2], info[3]])
}

fn bit(sig: i32) -> u64 {
    u32::try_from(sig - 1).ok().and_then(|n| 1_u64.checked_shl(n)).unwrap_or_default()
}

/// The timers whose expiry a queue tells of: `SI_TIMER`, which the kernel queues once for each.
pub fn timers(queue: &SignalQueueEntry) -> impl Iterator<Item = u32> {
    queue.signals.iter().filter_map(|entry| timer(&entry.siginfo))
}

fn timer(info: &[u8]) -> Option<u32> {
    const SI_TIMER: i32 = -2;
    let word = |at: usize| info.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    if word(8)?.cast_signed() == SI_TIMER { word(16) } else { None }
}

/// Queues a thread's own signals again; `tid` None: those of the process, in its leader. Those of timers in `expired` are
/// left to these.
pub fn restore_queue(
    batch: &mut Batch,
    queue: &SignalQueueEntry,
    (pid, tid): (i32, Option<i32>),
    expired: &BTreeSet<u32>,
) -> Result<()> {
    for entry in &queue.signals {
        let info: &[u8; SIGINFO] = entry.siginfo.as_slice().try_into().map_err(|_| {
            Error::new(format!(
                "a queued signal has {} bytes in the image instead of 128",
                entry.siginfo.len()
            ))
            .pid(pid)
        })?;
        let sig = number(info);
        if !(1..=64).contains(&sig) {
            return Err(Error::new(format!("the image queues signal {sig}, which does not exist")).pid(pid));
        }
        if timer(info).is_some_and(|timer| expired.contains(&timer)) {
            continue;
        }
        let raw = batch.data(info);
        match tid {
            None => batch.call(libc::SYS_rt_sigqueueinfo, &[pid.into(), sig.into(), raw]),
            Some(tid) => batch.call(libc::SYS_rt_tgsigqueueinfo, &[pid.into(), tid.into(), sig.into(), raw]),
        };
    }
    Ok(())
}

fn quads<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut all = [0; N];
    for (value, chunk) in all.iter_mut().zip(bytes.chunks_exact(8)) {
        *value = chunk.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overflowed_standard_signal_is_not_lost() {
        let mut term = [0_u8; SIGINFO];
        term[0] = 15;
        let entry = queue(&[term], bit(15) | bit(10));
        let numbers: Vec<u8> = entry.signals.iter().map(|s| s.siginfo[0]).collect();
        assert_eq!(numbers, [15, 10]);
    }

    #[test]
    fn there_are_62_actions() {
        assert_eq!(with_action().count(), 62);
    }

    #[test]
    fn hostile_queues_are_refused() {
        let short = SignalQueueEntry { signals: vec![SiginfoEntry { siginfo: vec![1; 12] }] };
        assert!(restore_queue(&mut Batch::new(), &short, (5, None), &BTreeSet::new()).is_err());
        let odd = SignalQueueEntry { signals: vec![SiginfoEntry { siginfo: vec![0xff; 128] }] };
        assert!(restore_queue(&mut Batch::new(), &odd, (5, Some(6)), &BTreeSet::new()).is_err());
    }
}
