//! Locked memory: mlock(2), and what the image format has no place for, mlock2(2) with MLOCK_ONFAULT.
//!
//! ```text
//!   extension lock-on-fault   { process: [start of a mapping, ...], ... }   ancillary: without it pages are locked at once
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::checkpoint::Result;
use crate::checkpoint::context::Dump;
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::Batch;

const EXTENSION: &str = "lock-on-fault";

/// Starts of the mappings that are locked as their pages come.
pub type OnFault = BTreeSet<u64>;

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
