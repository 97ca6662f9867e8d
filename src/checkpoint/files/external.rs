//! Standard input, output and error that lead out of the container: the pipes, files, sockets and terminals that a
//! shim, a shell or conmon gave it.
//!
//! ```text
//!   state.json of `create`:  stdio = ["/dev/null", "pipe:[4711]", "pipe:[4712]"]
//!          │ a descriptor with such a name, on no mount of the container
//!          ▼
//!   descriptors.json: the same list, as runc writes it; pipes as PipeEntry with pipe_id 4711, others as
//!   RegFileEntry (ext) with that name: CRIU finds both by --inherit-fd
//!          │
//!          ▼
//!   restore: descriptor 1 that the caller has now, opened anew with the flags of then
//! ```
//!
//! What is on its way in such a pipe belongs to the other side, which is there to read it.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::{Live, reopen};
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{regular, uring};
use crate::checkpoint::image::{ExtFileEntry, FdTypes, FileEntry, ImageDir, RegFileEntry};
use crate::checkpoint::{Error, Result};

/// runc's file with the names of the first three descriptors.
pub const DESCRIPTORS: &str = "descriptors.json";

/// Which of the descriptors given at create this one is, if any.
pub fn stdio_index(stdio: &[String], live: &Live, inside: bool) -> Option<usize> {
    let name = live.link.to_str()?;
    let anonymous = name.starts_with("pipe:[") || name.starts_with("socket:[");
    if inside && !anonymous {
        return None;
    }
    stdio.iter().take(3).position(|s| s == name)
}

/// Records a descriptor that leads out, and is neither pipe nor tty.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    if live.format() == libc::S_IFSOCK {
        let ext = ExtFileEntry { id, fown: live.fown(&dump.files.pids)? };
        let entry = FileEntry { r#type: FdTypes::Ext as i32, id, ext: Some(ext), ..FileEntry::default() };
        dump.model.files.push(entry);
        return Ok(());
    }
    let reg = RegFileEntry {
        name: regular::bytes(&live.link),
        ext: Some(true),
        size: None,
        ..regular::bare(dump, live, id)?
    };
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Reg as i32,
        id,
        reg: Some(reg),
        ..FileEntry::default()
    });
    Ok(())
}

/// Writes the names that the descriptors of create had.
pub fn write_names(dump: &Dump<'_>) -> Result<()> {
    let text = serde_json::to_vec(&dump.source.stdio)
        .map_err(|e| Error::new(format!("cannot write {DESCRIPTORS}: {e}")))?;
    let mut file = dump.images.raw_create(DESCRIPTORS)?;
    std::io::Write::write_all(&mut file, &text)
        .during("cannot write the image", || "write(_, _, _)".into())
        .map_err(|e| e.path(DESCRIPTORS))
}

/// Reads the names that the descriptors of create had. A set without them has no such descriptors.
pub fn read_names(images: &ImageDir) -> Result<Vec<String>> {
    use std::io::Read;
    if !images.exists(DESCRIPTORS) {
        return Ok(Vec::new());
    }
    let mut text = Vec::new();
    images
        .raw_open(DESCRIPTORS)?
        .take(1 << 16)
        .read_to_end(&mut text)
        .during("cannot read the image", || "read(_, _, _)".into())
        .map_err(|e| e.path(DESCRIPTORS))?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::new(format!("the image is not what runc writes: {e}")).path(DESCRIPTORS))
}

/// The descriptor that stands in the place of the one that was number `index` at create, opened with `flags`.
pub fn attach(restore: &Restore<'_>, index: usize, flags: u32) -> Result<OwnedFd> {
    let given = restore.target.stdio.get(index).and_then(Option::as_ref).or(restore.target.console.as_ref());
    let given = given.ok_or_else(|| {
        Error::new(format!("descriptor {index} led out of the container, and the restore gives none"))
            .remedy("restore with standard input, output and error open, or with the terminal it had")
    })?;
    let call = || format!("fstat(descriptor {index} of the caller)");
    let stat = nix::sys::stat::fstat(given).during("cannot use a given descriptor", call)?;
    let duplicate = || {
        given
            .try_clone()
            .during("cannot duplicate a given descriptor", || "fcntl(_, F_DUPFD_CLOEXEC, 0)".into())
    };
    // A file keeps the offset that it shares with the caller; a socket can't be opened.
    if matches!(stat.st_mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFSOCK | libc::S_IFDIR) {
        return duplicate();
    }
    // O_NONBLOCK: a fifo without its other end would keep us waiting.
    let wanted = regular::open_flags(flags);
    match reopen(given.as_fd(), wanted | OFlag::O_NONBLOCK) {
        Ok(file) => {
            if !wanted.contains(OFlag::O_NONBLOCK) {
                set_flags(&file, flags)?;
            }
            Ok(file)
        }
        Err(e) if matches!(e.errno(), Some(Errno::ENXIO | Errno::EACCES | Errno::ENOENT)) => duplicate(),
        Err(e) => Err(e),
    }
}

/// F_SETFL, of the flags that it can change.
pub fn set_flags(file: &OwnedFd, flags: u32) -> Result<()> {
    let may = OFlag::O_APPEND | OFlag::O_ASYNC | OFlag::O_DIRECT | OFlag::O_NOATIME | OFlag::O_NONBLOCK;
    let flags = OFlag::from_bits_truncate(flags.cast_signed()) & may;
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFL(flags))
        .during("cannot set the status flags", || format!("fcntl(_, F_SETFL, {flags:?})"))
        .map(drop)
}

/// Attaches the files that are recorded as external.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    for entry in opener.of(FdTypes::Ext) {
        let Some(ext) = &entry.ext else { continue };
        if uring::has(opener.restore.model, ext.id)? {
            continue;
        }
        // A socket has no name that outlives it: its number is where it was at create.
        let index = opener
            .lowest_number(ext.id)
            .and_then(|fd| usize::try_from(fd).ok())
            .filter(|fd| *fd < 3)
            .ok_or_else(|| Error::new("an external file is none of the first three descriptors"))?;
        let file = attach(opener.restore, index, 0)?;
        opener.put(ext.id, file);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_leads_out_is_external() {
        let (r, _w) = nix::unistd::pipe().unwrap();
        let pipe = Live::own(r, 1).unwrap();
        let names = vec!["/dev/null".to_owned(), pipe.link.to_str().unwrap().to_owned()];
        assert_eq!(stdio_index(&names, &pipe, false), Some(1));
        assert_eq!(stdio_index(&names, &pipe, true), Some(1), "a pipe is on no mount");
        let null = Live::own(std::fs::File::open("/dev/null").unwrap().into(), 1).unwrap();
        assert_eq!(stdio_index(&names, &null, false), Some(0));
        assert_eq!(stdio_index(&names, &null, true), None, "opened inside");
        assert_eq!(stdio_index(&[], &null, false), None);
    }
}
