//! What an image says of a mapping, before anything is made of it.

use std::ops::Range;

use super::TASK_SIZE_MAX;
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{VmaEntry, vma as status};
use crate::checkpoint::memory::aio;
use crate::checkpoint::memory::pages::PAGE;
use crate::checkpoint::memory::vmas::{self, HUGE, MAP_DROPPABLE};

/// The error for a mapping that cannot be restored.
pub fn malformed(entry: &VmaEntry, why: &str) -> Error {
    Error::new(format!(
        "the image has a mapping {} that cannot be restored: {why}",
        vmas::Range(entry.start, entry.end)
    ))
}

/// Whether the addresses are some that a program can have, and free.
pub fn check_range(entry: &VmaEntry, window: &Range<u64>) -> Result<()> {
    let aligned = (entry.start | entry.end | entry.pgoff).is_multiple_of(PAGE);
    if !aligned || entry.start >= entry.end || entry.end > TASK_SIZE_MAX {
        return Err(malformed(entry, "its addresses are wrong"));
    }
    if entry.start < window.end && window.start < entry.end {
        return Err(malformed(entry, "it overlaps the code that restores it"));
    }
    Ok(())
}

/// Whether a mapping is of a kind that is known, and all its fields go together.
pub fn validate(entry: &VmaEntry, window: &Range<u64>) -> Result<()> {
    if entry.status & (status::VSYSCALL | status::UPROBES) != 0 {
        return Ok(());
    }
    check_range(entry, window)?;
    let unsupported = [(status::SOCKET, "a ring of a packet socket"), (status::SHSTK, "a shadow stack")];
    if let Some((_, what)) = unsupported.iter().find(|(bit, _)| entry.status & bit != 0) {
        return Err(malformed(entry, what));
    }
    if aio::is(entry) {
        let usual = entry.status == status::AIORING && entry.flags == libc::MAP_SHARED.cast_unsigned();
        return if usual { Ok(()) } else { Err(malformed(entry, "it is a strange ring of Linux AIO")) };
    }
    let kinds = status::ANON_PRIVATE | status::ANON_SHARED | status::FILE_PRIVATE | status::FILE_SHARED;
    let known = kinds
        | status::REGULAR
        | status::STACK
        | status::HEAP
        | status::VDSO
        | status::VVAR
        | status::SYSVIPC
        | status::MEMFD;
    if entry.status & !known != 0 || (entry.status & kinds).count_ones() != 1 || entry.status & 1 == 0 {
        return Err(malformed(entry, &format!("its status is {:#x}", entry.status)));
    }
    let flags = (libc::MAP_SHARED
        | libc::MAP_PRIVATE
        | libc::MAP_ANONYMOUS
        | libc::MAP_GROWSDOWN
        | libc::MAP_LOCKED
        | libc::MAP_NORESERVE)
        .cast_unsigned()
        | MAP_DROPPABLE;
    let huge = vmas::huge(entry);
    if let Some(size) = huge {
        let shared = status::ANON_SHARED | status::FILE_SHARED;
        let known = entry.status & (status::ANON_PRIVATE | shared) != 0;
        let offset = if entry.status & shared != 0 { entry.pgoff } else { 0 };
        if !known || !(entry.start | entry.end | offset).is_multiple_of(size) {
            return Err(malformed(entry, &format!("it has pages of {size} bytes")));
        }
    }
    let flags = if huge.is_some() { flags | HUGE } else { flags };
    if entry.flags & !flags != 0 {
        return Err(malformed(entry, &format!("its flags are {:#x}", entry.flags)));
    }
    let kind = entry.flags & 0xf;
    let shared = entry.status & (status::ANON_SHARED | status::FILE_SHARED) != 0;
    let droppable = kind == MAP_DROPPABLE && entry.status & status::ANON_PRIVATE != 0;
    let expected = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    if kind != expected.cast_unsigned() && !droppable {
        return Err(malformed(entry, "its flags do not match its status"));
    }
    if entry.prot & !7 != 0 {
        return Err(malformed(entry, &format!("its protection is {:#x}", entry.prot)));
    }
    Ok(())
}
