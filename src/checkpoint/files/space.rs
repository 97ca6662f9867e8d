//! A namespace held open: a file of /proc/PID/ns.
//!
//! ```text
//!   dump      the inode tells which namespace ──▶ its number, as in ids-N.img
//!   restore   init's own, or the door that was kept when the namespace was made again: opened anew
//! ```

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;

use crate::checkpoint::context::Dump;
use crate::checkpoint::files::Surroundings;
use crate::checkpoint::files::live::{Live, reopen};
use crate::checkpoint::files::opener::{Files, Opener};
use crate::checkpoint::image::{FdTypes, FileEntry, NsFileEntry};
use crate::checkpoint::namespaces::{Kind, enter, nested};
use crate::checkpoint::{Error, Result};

const NSFS_MAGIC: i64 = 0x6e73_6673;

/// A namespace.
pub fn is(live: &Live) -> bool {
    live.fs == NSFS_MAGIC && live.info.flags & libc::O_PATH as u32 == 0
}

/// Refuses namespaces that cannot be made again.
pub fn check(live: &Live, around: &Surroundings<'_>) -> Result<()> {
    let Some(source) = around.source else { return Ok(()) };
    nested::check_door(around.options, source, &live.file).map_err(|e| live.name(e))
}

/// Records it, by the number of the namespace.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let door = live.reopen(OFlag::O_RDONLY)?;
    let kind = nested::kind_of(&door)?;
    let entry = NsFileEntry {
        id,
        ns_id: dump.spaces.of_door(dump.source.init, door)?,
        ns_cflag: kind.flag().bits().cast_unsigned(),
        flags: live.info.flags,
    };
    let r#type = FdTypes::Ns as i32;
    dump.model.files.push(FileEntry { r#type, id, nsf: Some(entry), ..FileEntry::default() });
    Ok(())
}

/// Opens those that are there; others wait for the control groups and the processes.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let all: Vec<&NsFileEntry> = opener.of(FdTypes::Ns).filter_map(|e| e.nsf.as_ref()).collect();
    for entry in all {
        if matches!(kind(entry)?, Kind::Cgroup | Kind::Pid) {
            opener.files.late.insert(entry.id);
        } else {
            opener.files.open_space(entry)?;
        }
    }
    Ok(())
}

fn kind(entry: &NsFileEntry) -> Result<Kind> {
    Kind::with_flag(entry.ns_cflag.cast_signed())
        .ok_or_else(|| Error::new(format!("a namespace is of unknown kind {:#x}", entry.ns_cflag)))
}

impl Files<'_> {
    /// Opens the namespace of an entry, as an open file of its own.
    pub(super) fn open_space(&mut self, entry: &NsFileEntry) -> Result<()> {
        let kind = kind(entry)?;
        let door: OwnedFd = match self.restore.made.door(entry.ns_id)? {
            Some(door) => door,
            None if entry.ns_id == kind.inits(self.restore.model) => {
                enter::door(self.restore.target.init, kind)?
            }
            None => {
                return Err(Error::new(format!(
                    "a descriptor is of the {} namespace {}, which the images lack",
                    kind.title(),
                    entry.ns_id
                )));
            }
        };
        let file = reopen(door.as_fd(), OFlag::O_RDONLY)?;
        self.opened.insert(entry.id, file);
        Ok(())
    }
}
