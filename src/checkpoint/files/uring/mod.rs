//! io_uring(7): rings on which nothing is under way.
//!
//! ```text
//!   fdinfo           sizes, counters, registered buffers and files; what is under way     facts.rs, look.rs
//!   mmap(ring)       both queues and the requests, as they are                            extension `io_uring`
//!
//!   restore, in the task itself: a ring can be passed to nobody                           make.rs
//!     io_uring_setup ──> as many no-ops as there were requests ──> the memory as it was
//!     ──> mapped where it was, with the other mappings ──> buffers and files registered
//! ```
//!
//! The kernel counts requests and completions for itself, and programs keep copies of these numbers in places of their
//! own. So they have to come out the same, and the only way to bring them there is to count.
//!
//! What a ring was made with is not shown by any kernel. What can be told from its memory and from the errors that it
//! gives is told; what cannot (`IORING_SETUP_SUBMIT_ALL`, `COOP_TASKRUN`, `TASKRUN_FLAG`) changes nothing but how often
//! the program is disturbed, or what comes after a request that the kernel cannot read.

mod facts;
mod look;
mod make;
mod under_way;

use std::collections::BTreeMap;

use prost::Message;

use crate::checkpoint::context::Dump;
use crate::checkpoint::files::Surroundings;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::image::{ExtFileEntry, FdTypes, FdinfoEntry, FileEntry, RingExtra, RingsExtra};
use crate::checkpoint::model::Model;
use crate::checkpoint::{Error, Result};
use crate::sys::io_uring::{COMPLETION, Params, REQUEST, SETUP_NO_SQARRAY};

pub use under_way::{stuck, under_way};

const EXTENSION: &str = "io_uring";
/// The kernel's own limits.
const REQUESTS_MAX: u32 = 32768;
const COMPLETIONS_MAX: u32 = 2 * REQUESTS_MAX;
/// Counting further would take more than a minute.
const COUNT_MAX: u32 = 1 << 26;
/// Indices of offsets: see [`Params`].
const HEAD: usize = 0;
const TAIL: usize = 1;
const MASK: usize = 2;
const FLAGS: usize = 4;
const ARRAY: usize = 6;
const COMPLETIONS: usize = 5;

/// A ring.
pub fn is(live: &Live) -> bool {
    live.is_anon("io_uring")
}

/// Refuses what can be told from outside.
pub(super) fn check(live: &Live, around: &Surroundings<'_>) -> Result<()> {
    look::check(live, around.pids).map_err(|e| live.name(e))
}

/// Records a ring. What is under way is waited for, a little.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let ring = look::record(dump, live, id)?;
    dump.files.rings.insert(live.stat.st_ino, id);
    let mut all = read(&dump.model)?;
    all.push(ring);
    dump.model.set_extension_data(EXTENSION, RingsExtra { rings: all }.encode_to_vec());
    let ext = ExtFileEntry { id, fown: live.fown(&dump.files.pids)? };
    let entry = FileEntry { r#type: FdTypes::Ext as i32, id, ext: Some(ext), ..FileEntry::default() };
    dump.model.files.push(entry);
    Ok(())
}

/// The rings of a set of images.
fn read(model: &Model) -> Result<Vec<RingExtra>> {
    let Some(data) = model.extension_data(EXTENSION) else { return Ok(Vec::new()) };
    let all = RingsExtra::decode(data)
        .map_err(|e| Error::new(format!("the extension {EXTENSION} of stasis.img cannot be read: {e}")))?;
    all.rings.iter().try_for_each(validate)?;
    Ok(all.rings)
}

/// Whether a file of the images is a ring.
pub fn has(model: &Model, id: u32) -> Result<bool> {
    Ok(read(model)?.iter().any(|ring| ring.id == id))
}

/// The rings that a table of descriptors has, and one number of each.
pub fn numbers(model: &Model, table: &[FdinfoEntry]) -> Result<BTreeMap<u32, i32>> {
    let rings = read(model)?;
    let is = |entry: &&FdinfoEntry| rings.iter().any(|ring| ring.id == entry.id);
    Ok(table.iter().filter(is).map(|entry| (entry.id, entry.fd.cast_signed())).collect())
}

/// The rings that a process has, by the numbers of their files, and one descriptor of each.
pub fn of_task(model: &Model, vpid: i32) -> Result<BTreeMap<u32, i32>> {
    let ids = model.ids.get(&vpid.cast_unsigned());
    let table = ids.and_then(|ids| model.fdinfo.get(&ids.files_id));
    numbers(model, table.map_or(&[], Vec::as_slice))
}

/// Nothing can be made in this process; the images are looked at.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    read(opener.restore.model).map(drop)
}

/// How many bytes the queues have.
fn size(ring: &RingExtra) -> Option<usize> {
    let at = |offsets: &[u32], index: usize| offsets.get(index).map(|at| *at as usize);
    let completions = at(&ring.cq_off, COMPLETIONS)? + ring.cq_entries as usize * COMPLETION;
    let array = at(&ring.sq_off, ARRAY)? + ring.sq_entries as usize * 4;
    Some(if ring.flags & SETUP_NO_SQARRAY != 0 { completions } else { array.max(completions) })
}

fn validate(ring: &RingExtra) -> Result<()> {
    let counts = ring.sq_entries.is_power_of_two()
        && ring.cq_entries.is_power_of_two()
        && ring.sq_entries <= REQUESTS_MAX
        && ring.cq_entries <= COMPLETIONS_MAX
        && ring.sq_entries <= ring.cq_entries;
    let offsets = ring.sq_off.len() == 8
        && ring.cq_off.len() == 8
        && ring.sq_off.iter().chain(&ring.cq_off).all(|at| at.is_multiple_of(4) && *at < 1 << 24);
    let known = ring.flags & !look::KEPT == 0;
    let bytes = counts
        && offsets
        && ring.requests.len() == ring.sq_entries as usize * REQUEST
        && size(ring) == Some(ring.queues.len());
    let registered = ring.files.len() <= REQUESTS_MAX as usize && ring.buffers.len() <= 1 << 14;
    if known && bytes && registered {
        return Ok(());
    }
    Err(Error::new(format!("the images have a malformed ring of io_uring, file {}", ring.id)))
}

/// What makes such a ring.
fn params(ring: &RingExtra) -> Params {
    Params::new(ring.sq_entries, ring.cq_entries, ring.flags)
}

/// A number in the queues' memory.
fn word(ring: &RingExtra, offsets: &[u32], index: usize) -> u32 {
    let at = offsets.get(index).map_or(usize::MAX, |at| *at as usize);
    let bytes = ring.queues.get(at..at.saturating_add(4)).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_ne_bytes)
}
