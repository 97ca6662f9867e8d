//! Whether an open file is still the one of the checkpoint: its kind, and its size. When it was written last is told, too.

use std::collections::BTreeMap;

use nix::libc::stat as Stat;

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::image::RegFileEntry;
use crate::checkpoint::{Error, Result};
use crate::container::clock;

/// Name of the extension in stasis.img: by file, when it was written last, in seconds.
const EXTENSION: &str = "file-times";

/// Records the times of the files that were recorded.
pub fn record(dump: &mut Dump<'_>) -> Result<()> {
    let times = std::mem::take(&mut dump.files.times);
    if times.is_empty() { Ok(()) } else { dump.model.set_extension(EXTENSION, &times) }
}

/// The file must be of the kind that it was, and, unless whoever restores it says otherwise, of the size.
pub fn verify(restore: &Restore<'_>, reg: &RegFileEntry, now: &Stat) -> Result<()> {
    if let Some(was) = reg.mode.filter(|was| (was ^ now.st_mode) & libc::S_IFMT != 0) {
        return Err(Error::new(format!(
            "a file is of another kind than at the checkpoint: mode {:o}, was {was:o}",
            now.st_mode
        ))
        .path(reg.path()));
    }
    let sized = now.st_mode & libc::S_IFMT == libc::S_IFREG && !restore.options.any_file_size;
    let Some(was) = reg.size.filter(|was| sized && *was != now.st_size.cast_unsigned()) else {
        return Ok(());
    };
    let times: BTreeMap<u32, i64> = restore.model.extension(EXTENSION)?;
    let written = |at: i64| clock::utc(at);
    let before = times.get(&reg.id).map_or(String::new(), |at| format!(" and was written {}", written(*at)));
    Err(Error::new(format!(
        "a file has changed since the checkpoint: it has {} bytes and was written {}, had {was}{before}",
        now.st_size,
        written(now.st_mtime)
    ))
    .path(reg.path())
    .remedy(
        "restore with the root file system and volumes as they were at the checkpoint, or with --file-validation none",
    ))
}
