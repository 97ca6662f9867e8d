//! Locked memory: mlock(2), and what the image format has no place for, mlock2(2) with MLOCK_ONFAULT and mlockall(2) with
//! MCL_FUTURE.
//!
//! ```text
//!   extension lock-on-fault   { process: [start of a mapping, ...], ... }   ancillary: without it pages are locked at once
//!   extension lock-future     { process: flags of mlockall(2), ... }        ancillary: without it new mappings are not locked
//! ```
//!
//! The kernel tells nobody of MCL_FUTURE. But what is mapped for the time of the dump is locked then, too: its flags tell,
//! of a process that has locked something already.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::checkpoint::Result;
use crate::checkpoint::context::Dump;
use crate::checkpoint::memory::maps::VmFlags;
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::Batch;

const EXTENSION: &str = "lock-on-fault";
const FUTURE: &str = "lock-future";

/// Starts of the mappings that are locked as their pages come.
pub type OnFault = BTreeSet<u64>;

/// What mlockall(2) was told of mappings to come, by the flags of one that has come: no flags, if it was told nothing.
pub fn future(new: VmFlags) -> i32 {
    match (new.has(b"lo"), new.has(b"lf")) {
        (false, _) => 0,
        (true, false) => libc::MCL_FUTURE,
        (true, true) => libc::MCL_FUTURE | libc::MCL_ONFAULT,
    }
}

/// Records what one process has told mlockall(2).
pub fn record_future(dump: &mut Dump<'_>, vpid: u32, flags: i32) -> Result<()> {
    if flags == 0 {
        return Ok(());
    }
    let mut all: BTreeMap<u32, i32> = dump.model.extension(FUTURE)?;
    all.insert(vpid, flags);
    dump.model.set_extension(FUTURE, &all)
}

/// Has what one process maps from now on locked, if it had. mlockall(2)
pub fn lock_future(batch: &mut Batch, model: &Model, vpid: u32) -> Result<()> {
    let all: BTreeMap<u32, i32> = model.extension(FUTURE)?;
    if let Some(flags) = all.get(&vpid) {
        let known = flags & (libc::MCL_FUTURE | libc::MCL_ONFAULT);
        batch.about("cannot have new mappings locked");
        batch.call(libc::SYS_mlockall, &[known.into()]);
    }
    Ok(())
}

/// Records the mappings of one process that are locked as their pages come.
pub fn record(dump: &mut Dump<'_>, vpid: u32, starts: OnFault) -> Result<()> {
    if starts.is_empty() {
        return Ok(());
    }
    let mut all = read(&dump.model)?;
    all.insert(vpid, starts);
    dump.model.set_extension(EXTENSION, &all)
}

/// What the images say of one process.
pub fn of(model: &Model, vpid: u32) -> Result<OnFault> {
    Ok(read(model)?.remove(&vpid).unwrap_or_default())
}

fn read(model: &Model) -> Result<BTreeMap<u32, OnFault>> {
    model.extension(EXTENSION)
}

/// Locks a mapping. What cannot be read cannot be made present: then the kernel locks it and says ENOMEM.
pub fn lock(batch: &mut Batch, range: &Range<u64>, prot: u32, on_fault: &OnFault) {
    batch.about("cannot lock the memory of the images");
    let len = range.end - range.start;
    let call = if on_fault.contains(&range.start) {
        let flags = libc::MLOCK_ONFAULT;
        batch.call(libc::SYS_mlock2, &[range.start.into(), len.into(), flags.into()])
    } else {
        batch.call(libc::SYS_mlock, &[range.start.into(), len.into()])
    };
    if prot == libc::PROT_NONE.cast_unsigned() {
        batch.tolerate(call);
    }
}
