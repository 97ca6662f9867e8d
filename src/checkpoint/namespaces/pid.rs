//! Pid namespaces. The container's own one is made by its init; one that it joined is named by the key that runc uses.
//!
//! ```text
//!   extension last-pid   the pid given last   ancillary: without it new processes get low pids again, which programs
//!                                             may still have in mind for processes that are long gone
//! ```

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::PidnsEntry;
use crate::checkpoint::namespaces::enter::{door, through, within};
use crate::checkpoint::namespaces::kind::Kind;
use crate::sys::last_pid;

/// The key of a joined pid namespace.
pub const JOINED: &str = "extRootPidNS";

const EXTENSION: &str = "last-pid";

/// Notes a joined one, and how far the pids of its own are.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let (init, spec) = (dump.source.init, &dump.source.spec);
    if Kind::Pid.private(init)? && Kind::Pid.joined(spec).is_some() {
        let entry = PidnsEntry { ext_key: Some(JOINED.into()) };
        dump.model.pidns.insert(Kind::Pid.id(true), entry);
    }
    if Kind::Pid.owned(init, spec)? {
        dump.pids = Some(door(init, Kind::Pid)?);
    }
    Ok(())
}

/// Notes the pid that the container's own namespace has given last. It takes a thread and a process to ask: one that is left
/// running is not kept waiting for it, and has given some more then.
pub fn note_last(dump: &mut Dump<'_>) -> Result<()> {
    let Some(door) = dump.pids.take() else { return Ok(()) };
    let last = through(vec![(door, Kind::Pid)], || {
        last_pid::get().during("cannot read the last pid of the container", || "read(ns_last_pid)".into())
    });
    match last {
        Ok(last) => dump.model.set_extension(EXTENSION, &Some(last)),
        // It may have ended meanwhile.
        Err(_) if dump.options.leave_running => Ok(()),
        Err(e) => Err(e),
    }
}

/// Lets pids go on where they were. When every process and thread is there.
pub fn finish(restore: &Restore<'_>) -> Result<()> {
    let (init, spec) = (restore.target.init, &restore.target.spec);
    match restore.model.extension::<Option<u32>>(EXTENSION)? {
        // Where the file is read-only, or this machine has no pids that high, they start anew.
        Some(last) if Kind::Pid.owned(init, spec)? => within(init, &[Kind::Pid], || {
            let _ = last_pid::set(last);
            Ok(())
        }),
        _ => Ok(()),
    }
}
