//! What a thread sets by itself before it goes on, credentials last.

use std::collections::BTreeSet;

use super::{PR_SET_NAME, Revival, vpid};
use crate::checkpoint::arch::{compat, features, record};
use crate::checkpoint::image::{CoreEntry, PstreeEntry, TaskCoreEntry, ThreadCoreEntry};
use crate::checkpoint::namespaces::nested::user_of;
use crate::checkpoint::remote::{Batch, Dispatch, Final, Injection, Thread};
use crate::checkpoint::task::{credentials, modes, scheduling, seccomp, signals};
use crate::checkpoint::{Error, Result};

const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_DUMPABLE: u64 = 4;

impl Revival<'_> {
    /// What a thread sets by itself, credentials last. The signals of timers in `expired` these queue themselves.
    pub(super) fn thread(
        &self,
        (entry, tc, expired): (&PstreeEntry, &TaskCoreEntry, &BTreeSet<u32>),
        vtid: u32,
        injection: &mut Injection,
        attributes: Option<i32>,
    ) -> Result<()> {
        let core = self.core(vtid)?;
        let empty = ThreadCoreEntry::default();
        let thread = core.thread_core.as_ref().unwrap_or(&empty);
        let (pid, tid) = (self.pids.own(vpid(entry)), self.pids.own(vtid.cast_signed()));
        let compat = core.thread_info.as_ref().filter(|info| compat::is_compat(info));
        if let Some(info) = compat {
            compat::restore_segments(injection.thread().tid(), &info.tls)?;
            compat::set_robust_list(injection, thread.futex_rla, thread.futex_rla_len)?;
        }

        let mut batch = Batch::new();
        scheduling::restore(&mut batch, thread, self.extra(vtid));
        batch.about("cannot restore the thread's state");
        let clear = core.thread_info.as_ref().map_or(0, |i| i.clear_tid_addr);
        batch.call(libc::SYS_set_tid_address, &[clear.into()]);
        if thread.futex_rla_len != 0 && compat.is_none() {
            batch.call(libc::SYS_set_robust_list, &[thread.futex_rla.into(), thread.futex_rla_len.into()]);
        }
        if let Some(stack) = &thread.sas {
            signals::restore_stack(&mut batch, stack);
        }
        if let Some(rseq) = thread.rseq_entry.as_ref().filter(|r| r.rseq_abi_pointer != 0) {
            let args =
                [rseq.rseq_abi_pointer.into(), rseq.rseq_abi_size.into(), 0.into(), rseq.signature.into()];
            batch.call(libc::SYS_rseq, &args);
        }
        let name = thread.comm.as_deref().filter(|_| vtid != entry.pid).unwrap_or(&tc.comm);
        let name = batch.string(name);
        batch.call(libc::SYS_prctl, &[PR_SET_NAME.into(), name]);

        batch.about("cannot queue the signals again");
        if vtid == entry.pid {
            if let Some(queue) = &tc.signals_s {
                signals::restore_queue(&mut batch, queue, (pid, None), expired)?;
            }
        }
        if let Some(queue) = &thread.signals_p {
            signals::restore_queue(&mut batch, queue, (pid, Some(tid)), expired)?;
        }
        let strict = thread.seccomp_mode == Some(1);
        seccomp::restore(&mut batch, &self.chain(core)?, strict)?;
        if let Some(creds) = &thread.creds {
            let inside = user_of(self.restore.model, entry.pid).is_some();
            credentials::restore(&mut batch, creds, &self.policy, inside)?;
        }
        batch.about("cannot restore the thread's state");
        batch.call(libc::SYS_prctl, &[PR_SET_PDEATHSIG.into(), thread.pdeath_sig.unwrap_or(0).into()]);
        if let Some(extra) = self.extra(vtid) {
            modes::restore(&mut batch, &extra.modes, vtid == entry.pid)?;
        }
        batch.about("cannot restore the thread's state");
        if vtid == entry.pid {
            // 2 is what a change of credentials leaves; it cannot be asked for.
            let dumpable = self.restore.model.mm.get(&entry.pid).and_then(|mm| mm.dumpable).unwrap_or(1);
            batch.call(libc::SYS_prctl, &[PR_SET_DUMPABLE.into(), u64::from(dumpable == 1).into()]);
        }
        if let (Some(label), Some(door)) = (&self.label, attributes) {
            let own = injection.thread().tid();
            label.restore_in_thread(&mut batch, door, own, entry.threads.len() == 1);
            label.restore_next(&mut batch, door, own, (thread.creds.as_ref(), self.extra(vtid)));
            if vtid == entry.pid {
                batch.call(libc::SYS_close, &[door.into()]);
            }
        }
        injection.run(&batch).map(|_| ())
    }

    /// Puts the thread where it was.
    pub(super) fn leave(&self, vtid: u32, mut injection: Injection, last: bool) -> Result<Thread> {
        let core = self.core(vtid)?;
        let info = core.thread_info.as_ref().ok_or_else(|| Error::new("the image has no registers"))?;
        let thread = injection.thread().clone();
        let extra = self.extra(vtid).map_or(&[][..], |e| &e.xstate);
        features::make_room(&mut injection, extra)?;
        thread.set_xstate(&record::restore_extended(info, extra, &thread.xstate()?)?)?;
        let regs = record::restore_general(info, &thread.regs()?)?;
        injection.leave(&Final { regs, sigmask: mask(core), unmap_window: last })?;
        // The last thing: no batch gets through it.
        if let Some(d) = self.extra(vtid).and_then(|extra| extra.dispatch.as_ref()) {
            thread.set_dispatch(Some(Dispatch { selector: d.selector, range: (d.offset, d.length) }))?;
        }
        Ok(thread)
    }
}

/// Blocked signals of a thread.
pub(super) fn mask(core: &CoreEntry) -> u64 {
    let own = core.thread_core.as_ref().and_then(|t| t.blk_sigset);
    own.or(core.tc.as_ref().map(|tc| tc.blk_sigset)).unwrap_or(0)
}
