//! Scheduling: policy, nice value, real-time priority, processor affinity, I/O priority, timer slack,
//! the utilisation that it is taken to have, the NUMA policy of memory to come. All of a thread.

use crate::checkpoint::Result;
use crate::checkpoint::image::{ThreadCoreEntry, ThreadDeadline, ThreadExtra};
use crate::checkpoint::remote::{Batch, Call, Out, Results};
use crate::checkpoint::task::status::Stat;

/// Version 1 of `struct sched_attr`: up to the utilisation clamps.
const ATTR: usize = 56;
/// Bytes of a processor set: 8192 processors.
const CPUS: usize = 1024;
/// Bytes of a set of NUMA nodes: 1024 nodes, the most that a kernel can be built for.
pub(super) const NODES: usize = 128;
/// The kernel takes one bit less than the number it is given.
pub(super) const NODE_BITS: usize = NODES * 8 + 1;
const PR_SET_TIMERSLACK: u64 = 29;
const PR_GET_TIMERSLACK: u64 = 30;
const PR_SET_IO_FLUSHER: u64 = 57;
/// What the kernel's flags of such a thread have: PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE.
const IO_FLUSHER: i64 = 0x0008_0000 | 0x0010_0000;
const IOPRIO_WHO_PROCESS: u64 = 1;
const PRIO_PROCESS: u64 = libc::PRIO_PROCESS as u64;
/// What the system call getpriority(2) says of the nice value 0, and 1 of the highest.
const NICE_ZERO: i32 = 20;
const SCHED_DEADLINE: u32 = 6;
pub(super) const MPOL_DEFAULT: u32 = 0;
/// SCHED_FLAG_RESET_ON_FORK: the others ask for values that the image doesn't have.
const RESET_ON_FORK: u64 = 1;
/// That, SCHED_FLAG_RECLAIM and SCHED_FLAG_DL_OVERRUN: those of a thread with deadlines.
const DEADLINE_FLAGS: u64 = 7;
/// SCHED_RESET_ON_FORK: the same in the policy, where sched_getscheduler(2) and the images have it.
const RESET_ON_FORK_POLICY: u32 = 0x4000_0000;
/// SCHED_FLAG_KEEP_ALL, SCHED_FLAG_UTIL_CLAMP_MIN, SCHED_FLAG_UTIL_CLAMP_MAX.
const KEEP: u64 = 8 | 16;
const CLAMP: u64 = 32 | 64;
/// What a processor can do, to the kernel.
const CAPACITY: u32 = 1024;
const SCHED_FIFO: u32 = 1;
const SCHED_RR: u32 = 2;
const SCHED_IDLE: u32 = 5;

/// Asks how a thread is scheduled.
#[derive(Debug)]
pub struct Ask {
    attr: Out,
    nice: Call,
    cpus: Out,
    size: Call,
    slack: Call,
    io: Call,
    mode: Out,
    nodes: Out,
    policy: Call,
}

impl Ask {
    /// Adds the questions to `batch`.
    pub fn new(batch: &mut Batch) -> Self {
        batch.about("cannot read how the thread is scheduled");
        let (attr, cpus) = (batch.out(ATTR), batch.out(CPUS));
        batch.call(libc::SYS_sched_getattr, &[0.into(), attr.arg(), ATTR.into(), 0.into()]);
        let nice = batch.call(libc::SYS_getpriority, &[PRIO_PROCESS.into(), 0.into()]);
        let size = batch.call(libc::SYS_sched_getaffinity, &[0.into(), CPUS.into(), cpus.arg()]);
        let slack = batch.call(libc::SYS_prctl, &[PR_GET_TIMERSLACK.into()]);
        let io = batch.call(libc::SYS_ioprio_get, &[IOPRIO_WHO_PROCESS.into(), 0.into()]);
        batch.tolerate(io);
        let (mode, nodes) = (batch.out(4), batch.out(NODES));
        let asked = [mode.arg(), nodes.arg(), NODE_BITS.into(), 0.into(), 0.into()];
        let policy = batch.call(libc::SYS_get_mempolicy, &asked);
        // A kernel without NUMA has no policies.
        batch.tolerate(policy);
        Self { attr, nice, cpus, size, slack, io, mode, nodes, policy }
    }

    /// Takes the answers.
    pub fn answer(
        &self,
        results: &Results,
        core: &mut ThreadCoreEntry,
        extra: &mut ThreadExtra,
    ) -> Result<()> {
        let policy = results.u32(self.attr, 4);
        extra.deadline = (policy == SCHED_DEADLINE).then(|| ThreadDeadline {
            flags: results.u64(self.attr, 8) & DEADLINE_FLAGS,
            runtime: results.u64(self.attr, 24),
            deadline: results.u64(self.attr, 32),
            period: results.u64(self.attr, 40),
        });
        let reset = results.u64(self.attr, 8) & RESET_ON_FORK != 0;
        core.sched_policy = Some(policy | if reset { RESET_ON_FORK_POLICY } else { 0 });
        // Not from `attr`, which has none for a policy that does not go by it.
        core.sched_nice = Some(NICE_ZERO - results.int(self.nice));
        core.sched_prio = Some(results.u32(self.attr, 20));
        (extra.least_use, extra.most_use) =
            clamps(policy, results.u32(self.attr, 48), results.u32(self.attr, 52));
        let size = usize::try_from(results.ret(self.size)).unwrap_or(0).min(CPUS);
        extra.affinity = Some(results.out(self.cpus)[..size].to_vec());
        extra.timer_slack = u64::try_from(results.ret(self.slack)).ok();
        extra.io_priority = u32::try_from(results.ret(self.io)).ok();
        if results.ret(self.policy) == 0 {
            extra.memory_policy = Some(results.u32(self.mode, 0));
            let nodes = results.out(self.nodes);
            extra.memory_nodes = nodes.iter().any(|b| *b != 0).then(|| nodes.to_vec());
        }
        Ok(())
    }
}

/// Whether it flushes what others wait for: prctl(PR_GET_IO_FLUSHER), without the capability that this needs.
pub fn is_io_flusher(stat: &Stat) -> bool {
    // Field 9 are the flags.
    stat.field(9) & IO_FLUSHER == IO_FLUSHER
}

/// The processor that it ran on last.
pub fn processor(stat: &Stat) -> i32 {
    i32::try_from(stat.field(39)).unwrap_or(-1)
}

/// Puts a thread's scheduling back. Processors that do not exist here, or are not in the destination's cpuset, are left
/// out by the kernel; if none is left, the thread stays where the container may run.
pub fn restore(batch: &mut Batch, core: &ThreadCoreEntry, extra: Option<&ThreadExtra>) {
    batch.about("cannot restore how the thread is scheduled");
    if let Some(extra) = extra {
        if let Some(cpus) = extra.affinity.as_ref().filter(|cpus| cpus.len() <= CPUS) {
            let set = batch.data(cpus);
            let call = batch.call(libc::SYS_sched_setaffinity, &[0.into(), cpus.len().into(), set]);
            batch.tolerate(call);
        }
        if let Some(slack) = extra.timer_slack.filter(|slack| *slack != 0) {
            batch.call(libc::SYS_prctl, &[PR_SET_TIMERSLACK.into(), slack.into()]);
        }
        if extra.io_flusher == Some(true) {
            batch.about("cannot make the thread an I/O flusher again, which needs CAP_SYS_RESOURCE");
            let (on, none) = (1.into(), || 0.into());
            batch.call(libc::SYS_prctl, &[PR_SET_IO_FLUSHER.into(), on, none(), none(), none()]);
            batch.about("cannot restore how the thread is scheduled");
        }
        if let Some(io) = extra.io_priority {
            let call = batch.call(libc::SYS_ioprio_set, &[IOPRIO_WHO_PROCESS.into(), 0.into(), io.into()]);
            batch.tolerate(call);
        }
    }
    if let Some(mode) = extra.and_then(|e| e.memory_policy) {
        let nodes = extra.and_then(|e| e.memory_nodes.as_ref()).filter(|nodes| nodes.len() == NODES);
        let (mask, bits) = match nodes {
            Some(nodes) => (batch.data(nodes), NODE_BITS),
            None => (0.into(), 0),
        };
        batch.about("cannot restore the thread's NUMA memory policy");
        let call = batch.call(libc::SYS_set_mempolicy, &[mode.into(), mask, bits.into()]);
        // The default has to be set, too: a thread is born with its creator's. Without NUMA there is no other.
        if mode == MPOL_DEFAULT {
            batch.tolerate(call);
        }
        batch.about("cannot restore how the thread is scheduled");
    }
    if let Some(policy) = core.sched_policy {
        let nice = core.sched_nice.unwrap_or(0);
        // Where sched_setattr(2) sets no nice value, the thread has that of whoever restores it.
        if goes_not_by_nice(policy) {
            batch.call(libc::SYS_setpriority, &[PRIO_PROCESS.into(), 0.into(), nice.into()]);
        }
        let mut raw = attr(policy, nice, core.sched_prio.unwrap_or(0));
        if let Some(deadline) = extra.and_then(|e| e.deadline.as_ref()).filter(|_| is_deadline(policy)) {
            batch.about(
                "cannot give the thread its deadlines again (SCHED_DEADLINE): for that the processors must have the \
                 time, and the container must be confined to none of them",
            );
            raw[8..16].copy_from_slice(&(deadline.flags & DEADLINE_FLAGS).to_ne_bytes());
            raw[24..32].copy_from_slice(&deadline.runtime.to_ne_bytes());
            raw[32..40].copy_from_slice(&deadline.deadline.to_ne_bytes());
            raw[40..48].copy_from_slice(&deadline.period.to_ne_bytes());
        }
        let attr = batch.data(&raw);
        batch.call(libc::SYS_sched_setattr, &[0.into(), attr, 0.into()]);
    }
    if let Some((least, most)) = extra.and_then(|e| e.least_use.zip(e.most_use)) {
        batch.about(format!(
            "cannot have the thread taken to use {least} to {most} of {CAPACITY}: the kernel must have CONFIG_UCLAMP_TASK"
        ));
        let mut raw = attr(0, 0, 0);
        raw[..4].copy_from_slice(&(ATTR as u32).to_ne_bytes());
        raw[8..16].copy_from_slice(&(KEEP | CLAMP).to_ne_bytes());
        raw.extend([least.to_ne_bytes(), most.to_ne_bytes()].concat());
        let attr = batch.data(&raw);
        batch.call(libc::SYS_sched_setattr, &[0.into(), attr, 0.into()]);
    }
}

/// The bounds of what a thread is taken to use, if they are not those that it has anyway. Kernels that know of none tell 0.
fn clamps(policy: u32, least: u32, most: u32) -> (Option<u32>, Option<u32>) {
    // A thread of a real-time policy is taken to use all.
    let all = matches!(policy, SCHED_FIFO | SCHED_RR) && least == CAPACITY;
    let usual = (least, most) == (0, 0) || most == CAPACITY && (least == 0 || all);
    if usual { (None, None) } else { (Some(least), Some(most)) }
}

fn is_deadline(policy: u32) -> bool {
    policy & !RESET_ON_FORK_POLICY == SCHED_DEADLINE
}

fn goes_not_by_nice(policy: u32) -> bool {
    matches!(policy & !RESET_ON_FORK_POLICY, SCHED_FIFO | SCHED_RR | SCHED_IDLE | SCHED_DEADLINE)
}

fn attr(policy: u32, nice: i32, priority: u32) -> Vec<u8> {
    let flags = if policy & RESET_ON_FORK_POLICY == 0 { 0 } else { RESET_ON_FORK };
    let policy = policy & !RESET_ON_FORK_POLICY;
    let mut attr = vec![0; 48];
    attr[..4].copy_from_slice(&48_u32.to_ne_bytes());
    attr[4..8].copy_from_slice(&policy.to_ne_bytes());
    attr[8..16].copy_from_slice(&flags.to_ne_bytes());
    attr[16..20].copy_from_slice(&nice.to_ne_bytes());
    attr[20..24].copy_from_slice(&priority.to_ne_bytes());
    attr
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_told_from_none() {
        assert_eq!(
            (clamps(0, 0, 0), clamps(0, 0, 1024), clamps(1, 1024, 1024)),
            ((None, None), (None, None), (None, None))
        );
        assert_eq!(
            (clamps(0, 1024, 1024), clamps(2, 0, 500)),
            ((Some(1024), Some(1024)), (Some(0), Some(500)))
        );
    }

    #[test]
    fn the_attributes_are_laid_out_as_the_kernel_reads_them() {
        let raw = attr(3, -5, 9);
        assert_eq!(raw.len(), 48);
        assert_eq!(raw[..16], [48, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(attr(0x4000_0003, -5, 9)[4..16], [3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(i32::from_ne_bytes(raw[16..20].try_into().unwrap()), -5);
        assert_eq!(raw[20], 9);
    }
}
