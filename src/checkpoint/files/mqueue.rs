//! POSIX message queues that are open.
//!
//! A queue itself, and what it holds, belongs to the IPC namespace. A descriptor of it is recorded as a file below the
//! container's mqueue mount, whichever way it was opened: the kernel makes no difference.

use std::path::PathBuf;

use crate::checkpoint::context::Dump;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::{Surroundings, regular};
use crate::checkpoint::image::{FdTypes, FileEntry, RegFileEntry};
use crate::checkpoint::namespaces::mountinfo;
use crate::checkpoint::{Error, Result};

const MQUEUE_MAGIC: i64 = 0x1980_0202;

/// A message queue.
pub fn is(live: &Live) -> bool {
    live.fs == MQUEUE_MAGIC && live.format() == libc::S_IFREG
}

/// Refuses queues that have no name, and those that no mount of the container shows.
pub fn check(live: &Live, around: &Surroundings<'_>) -> Result<()> {
    path(live, around.init).map(drop).map_err(|e| live.name(e))
}

fn path(live: &Live, init: i32) -> Result<PathBuf> {
    let name = live.link.file_name().unwrap_or_default();
    if live.stat.st_nlink == 0 {
        return Err(Error::new("a POSIX message queue is open and has no name any more")
            .remedy("let the program close it"));
    }
    let mounts = mountinfo::of(&init.to_string())?;
    match mounts.into_iter().rev().find(|m| m.fstype == "mqueue" && m.root == "/") {
        Some(mount) => Ok(mount.point.join(name)),
        None => Err(Error::new("a POSIX message queue is open, and the container has no mqueue mount")
            .remedy("add one to config.json, at /dev/mqueue")),
    }
}

/// Records an open queue.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let name = regular::bytes(&path(live, dump.source.init)?);
    let reg = RegFileEntry { name, size: None, pos: 0, ..regular::bare(dump, live, id)? };
    let r#type = FdTypes::Reg as i32;
    dump.model.files.push(FileEntry { r#type, id, reg: Some(reg), ..FileEntry::default() });
    Ok(())
}
