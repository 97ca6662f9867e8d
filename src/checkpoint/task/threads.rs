//! One thread: what belongs to it alone, gathered from the rooms next door into its core record.
//!
//! ```text
//!   stopped     extended state, signal mask, queue, rseq       by ptrace, before a batch disturbs them
//!   injected    registers as they were; robust list, where its death is announced, alternate stack, securebits, ...
//! ```

use crate::checkpoint::arch::{MACHINE, Regs, compat, record};
use crate::checkpoint::context::LiveTask;
use crate::checkpoint::image::{CoreEntry, RseqEntry, ThreadCoreEntry, ThreadDispatch, ThreadExtra};
use crate::checkpoint::remote::{Batch, Injection, Out, Results, Thread};
use crate::checkpoint::task::status::{self, IdMap, Status};
use crate::checkpoint::task::{credentials, keys, labels, modes, scheduling, seccomp, signals};
use crate::checkpoint::{Error, Result};

const PR_GET_PDEATHSIG: u64 = 2;
const PR_GET_TID_ADDRESS: u64 = 40;

/// A thread as ptrace shows it.
#[derive(Debug)]
pub struct Captured {
    /// Its id inside the container.
    pub vtid: i32,
    /// Its id as it has it itself: in its own pid namespace.
    pub own: i32,
    /// `/proc/PID/task/TID/status`.
    pub status: Status,
    /// Where it ran last.
    pub processor: i32,
    /// Its general registers as they were.
    raw: Regs,
    /// Its core record, without what only a batch can tell.
    pub core: CoreEntry,
    /// What has no place in it.
    pub extra: ThreadExtra,
}

impl Captured {
    /// Whether it is a thread of a 32-bit program.
    pub fn is_compat(&self) -> bool {
        self.raw.is_compat()
    }
}

/// Reads what must be read before a batch runs in the thread.
/// `depth`: how deep the container's pid namespace lies below ours; `compat`: whether its program is one of 32 bits.
pub fn capture(
    task: &LiveTask,
    thread: &Thread,
    (depth, compat): (usize, bool),
    filters: &mut seccomp::Filters,
) -> Result<Captured> {
    let tid = thread.tid();
    let status = Status::of_thread(task.pid, tid)?;
    let (comm, stat) = status::named(task.pid, tid)?;
    let own = status.ns_tid.last().copied().unwrap_or(tid);
    let vtid = status.tid_at(depth).unwrap_or(own);
    let named = |e: Error| e.pid(task.vpid);
    thread.leave_vdso(status.ignored).map_err(named)?;
    let raw = thread.regs().map_err(named)?;
    if raw.is_compat() != compat {
        return Err(named(
            Error::new("a thread runs code of another width than its program's")
                .remedy("try again later")
                .passing(),
        ));
    }
    let (mut info, xstate) = record::dump_extended(&thread.xstate().map_err(named)?).map_err(named)?;
    if raw.is_compat() {
        info.tls = compat::segments(tid).map_err(named)?;
    }
    let mut thread_core = ThreadCoreEntry {
        blk_sigset: Some(thread.sigmask().map_err(named)?),
        signals_p: Some(signals::queue(&thread.pending(false).map_err(named)?, status.pending)),
        comm: Some(comm),
        ..ThreadCoreEntry::default()
    };
    thread_core.rseq_entry = thread.rseq().map_err(named)?.map(|rseq| RseqEntry {
        rseq_abi_pointer: rseq.addr,
        rseq_abi_size: rseq.len,
        signature: rseq.sig,
        rseq_cs_pointer: None,
    });
    filters.dump(thread, status.seccomp, &mut thread_core).map_err(named)?;
    let core = CoreEntry {
        mtype: MACHINE.into(),
        thread_info: Some(info),
        thread_core: Some(thread_core),
        ..CoreEntry::default()
    };
    let dispatch = thread.dispatch().map_err(named)?.map(|d| ThreadDispatch {
        selector: d.selector,
        offset: d.range.0,
        length: d.range.1,
    });
    let io_flusher = scheduling::is_io_flusher(&stat).then_some(true);
    let extra =
        ThreadExtra { tid: vtid.cast_unsigned(), xstate, dispatch, io_flusher, ..ThreadExtra::default() };
    let processor = scheduling::processor(&stat);
    Ok(Captured { vtid, own, status, processor, raw, core, extra })
}

/// Asks a thread for what only it can tell.
#[derive(Debug)]
pub struct Ask {
    stack: signals::AskStack,
    creds: credentials::Ask,
    sched: scheduling::Ask,
    modes: modes::Ask,
    keys: keys::Ask,
    tid_address: Out,
    death: Out,
    robust: (Out, Out),
}

impl Ask {
    /// Adds the questions to `batch`.
    pub fn new(batch: &mut Batch) -> Self {
        batch.about("cannot read the thread's state");
        let (tid_address, death) = (batch.out(8), batch.out(4));
        let robust = (batch.out(8), batch.out(8));
        let call = batch.call(libc::SYS_prctl, &[PR_GET_TID_ADDRESS.into(), tid_address.arg()]);
        batch.tolerate(call);
        batch.call(libc::SYS_prctl, &[PR_GET_PDEATHSIG.into(), death.arg()]);
        batch.call(libc::SYS_get_robust_list, &[0.into(), robust.0.arg(), robust.1.arg()]);
        Self {
            stack: signals::AskStack::new(batch),
            creds: credentials::Ask::new(batch),
            sched: scheduling::Ask::new(batch),
            modes: modes::Ask::new(batch),
            keys: keys::Ask::new(batch),
            tid_address,
            death,
            robust,
        }
    }

    /// Completes the record.
    pub fn answer(
        &self,
        results: &Results,
        injection: &mut Injection,
        ids: (&IdMap, &IdMap),
        captured: &mut Captured,
    ) -> Result<()> {
        let Captured { status, raw, core, extra, .. } = captured;
        let read = |addr: u64, into: &mut [u8]| injection.read_mem(addr, into).is_ok();
        let regs = raw.again(&read).or_else(|| injection.image_regs());
        let regs = regs.ok_or_else(|| Error::new("the thread's registers are lost"))?;
        let (Some(info), Some(thread)) = (&mut core.thread_info, &mut core.thread_core) else {
            return Ok(());
        };
        record::dump_general(&regs, info);
        info.clear_tid_addr = results.u64(self.tid_address, 0);
        thread.pdeath_sig = Some(results.u32(self.death, 0));
        (thread.futex_rla, thread.futex_rla_len) = if raw.is_compat() {
            let (head, len) = compat::robust_list(injection.thread().tid())?;
            (head.into(), len)
        } else {
            let len = u32::try_from(results.u64(self.robust.1, 0)).unwrap_or(0);
            (results.u64(self.robust.0, 0), len)
        };
        thread.sas = Some(self.stack.answer(results));
        let mut creds = self.creds.answer(results, status, ids.0, ids.1);
        labels::read(injection.thread().tid(), &mut creds, extra)?;
        thread.creds = Some(creds);
        extra.modes = self.modes.answer(results);
        self.keys.answer(results, injection)?;
        self.sched.answer(results, thread, extra)
    }
}
