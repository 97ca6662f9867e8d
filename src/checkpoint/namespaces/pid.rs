//! Pid namespaces. The container's own one is made by its init; one that it joined is named by the key that runc uses.
//!
//! ```text
//!   extension last-pid   the pid given last   ancillary: without it new processes get low pids again, which programs
//!                                             may still have in mind for processes that are long gone
//! ```

use crate::checkpoint::context::{Dump, Restore, Source};
use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::PidnsEntry;
use crate::checkpoint::namespaces::enter::within;
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
    if dump.last_pid.is_some() {
        dump.model.set_extension(EXTENSION, &dump.last_pid)?;
    }
    Ok(())
}

/// The pid that the container's own namespace has given last. It takes a thread and a process to ask, so it is asked before
/// the container stands still: those that are given until then are the pids of processes in the images, or of some that
/// have just ended.
pub fn last(source: &Source) -> Result<Option<u32>> {
    if !Kind::Pid.owned(source.init, &source.spec)? {
        return Ok(None);
    }
    within(source.init, &[Kind::Pid], || {
        last_pid::get().during("cannot read the last pid of the container", || "read(ns_last_pid)".into())
    })
    .map(Some)
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
