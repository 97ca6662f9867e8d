//! Files that have a path: regular files, directories, devices, and what /proc and /sys show.
//!
//! ```text
//!   live:  /var/log/x, flags, offset ──> RegFileEntry, and where the path no longer leads there:
//!            another link    -> its name
//!            unlinked        -> RemapFilePathEntry ──> ghost (`ghost.rs`)
//!            another mount on top -> refused
//! ```
//!
//! At restore the path is resolved inside the new root and never outside; size and kind must be what they were.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::{Live, reopen};
use crate::checkpoint::files::registry::PathKey;
use crate::checkpoint::files::{Surroundings, changed, device, ghost, memfd, watched};
use crate::checkpoint::image::{FdTypes, FileEntry, RegFileEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::resolve;

const PROC_SUPER_MAGIC: i64 = 0x9fa0;
const OVERLAYFS_SUPER_MAGIC: i64 = 0x794c_7630;

/// A file with a path, a directory, a symbolic link opened with O_PATH.
pub fn is(live: &Live) -> bool {
    let plain = matches!(live.format(), libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK | libc::S_IFBLK);
    live.link.is_absolute()
        && (plain || live.format() == libc::S_IFCHR || live.info.flags & libc::O_PATH as u32 != 0)
}

/// Refuses what could not be opened again.
pub fn check(live: &Live, around: &Surroundings<'_>) -> Result<()> {
    if live.format() == libc::S_IFCHR && live.info.flags & libc::O_PATH as u32 == 0 {
        device::check(live)?;
    }
    if live.format() == libc::S_IFDIR && live.fown(around.pids)?.pid != 0 {
        // F_NOTIFY makes the caller its owner, and is told of nowhere else.
        return Err(live
            .name(Error::new("a directory has an owner to send signals to (dnotify: fcntl F_NOTIFY)"))
            .remedy("let the program close it, and use inotify"));
    }
    place(live, around).map(drop)
}

/// Where a file is found again.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// Under its name.
    Name,
    /// Under this one, for it has lost the name that it was opened by.
    Other(PathBuf),
    /// Nowhere: it has no name any more.
    Unlinked,
}

/// Looks where the name of a file leads to now.
fn place(live: &Live, around: &Surroundings<'_>) -> Result<Place> {
    let root = around.root;
    let (name, deleted) = live.undeleted();
    if live.fs == PROC_SUPER_MAGIC {
        if of_a_part(&name) {
            return Err(live
                .name(Error::new("an open file of /proc tells of one thread or descriptor of a process"))
                .remedy("let the program close it: at a restore files are opened before threads are there"));
        }
        // An entry of a dead process has the mark itself, or lies below one that has.
        return if deleted || resolve::open_in_root(root, &name, OFlag::O_PATH | OFlag::O_NOFOLLOW).is_err() {
            Err(live
                .name(Error::new("an open file of /proc belongs to a process that is gone"))
                .remedy("let the program close it"))
        } else {
            Ok(Place::Name)
        };
    }
    if live.stat.st_nlink == 0 {
        return Ok(Place::Unlinked);
    }
    let key = (live.stat.st_dev, live.stat.st_ino, live.info.mnt_id, live.link.clone());
    if around.named.is_some_and(|named| named.borrow().contains(&key)) {
        return Ok(Place::Name);
    }
    let found = resolve::open_in_root(root, &live.link, OFlag::O_PATH | OFlag::O_NOFOLLOW)
        .and_then(|fd| nix::sys::stat::fstat(&fd));
    match found {
        Ok(stat) if (stat.st_dev, stat.st_ino) == (live.stat.st_dev, live.stat.st_ino) => {
            if let Some(named) = around.named {
                named.borrow_mut().insert(key);
            }
            Ok(Place::Name)
        }
        Ok(_) => Err(live.name(Error::new("an open file's name now leads to another file")).remedy(
            "another file, or a mount, took the place of the one that is open; let the program reopen it",
        )),
        Err(Errno::ENOENT | Errno::ENOTDIR) => {
            let is_dir = live.format() == libc::S_IFDIR;
            let other = if is_dir || !around.own { None } else { watched::other_name(around, &live.file)? };
            match other {
                Some(other) => Ok(Place::Other(other)),
                None if deleted && counts_wrong(live) => Ok(Place::Unlinked),
                None => Err(live
                    .name(Error::new("an open file was removed under this name, and has others outside"))
                    .remedy(
                    "a copy would no longer be the same file as its other names; let the program reopen it",
                )),
            }
        }
        Err(errno) => Err(live.name(
            Error::new("cannot find an open file by its name")
                .call(format!("openat2(root, {:?}, O_PATH, RESOLVE_IN_ROOT)", live.link), errno),
        )),
    }
}

/// Whether a path of a proc leads to what a process gets after its files: descriptors and threads.
fn of_a_part(path: &Path) -> bool {
    let parts: Vec<&str> = path.components().filter_map(|part| part.as_os_str().to_str()).collect();
    let number = |part: &str| part.parse::<u32>().is_ok();
    parts.windows(3).any(|part| match part {
        [_, "fdinfo", descriptor] => number(descriptor),
        [process, "task", thread] => number(thread) && thread != process,
        _ => false,
    })
}

/// Lower files of an overlay, and directories of some file systems, keep a link count of 1 when they are removed.
fn counts_wrong(live: &Live) -> bool {
    live.stat.st_nlink == 1 && (live.fs == OVERLAYFS_SUPER_MAGIC || live.format() == libc::S_IFDIR)
}

/// Records the file under `id`.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let entry = entry(dump, live, id)?;
    dump.model.files.push(entry);
    Ok(())
}

/// The record of a file, its ghost recorded too where it has no name.
pub fn entry(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<FileEntry> {
    let (name, deleted) = live.undeleted();
    let place = place(live, &Surroundings::of(dump, live.info.mnt_id)?)?;
    if place == Place::Unlinked {
        ghost::dump(dump, live, id)?;
    }
    let name = match &place {
        Place::Other(other) => other,
        Place::Unlinked if deleted => &name,
        Place::Unlinked | Place::Name => &live.link,
    };
    let reg = RegFileEntry { name: bytes(name), mnt_id: Some(live.info.mnt_id), ..bare(dump, live, id)? };
    if reg.size.is_some() {
        dump.files.times.insert(id, live.stat.st_mtime);
    }
    Ok(FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(reg), ..FileEntry::default() })
}

/// What is known of a file apart from its name.
pub fn bare(dump: &Dump<'_>, live: &Live, id: u32) -> Result<RegFileEntry> {
    // The size of a file that is only appended to, a log, may change: whoever rotates it is outside.
    let flags = live.info.flags;
    let appended =
        flags & (libc::O_ACCMODE | libc::O_APPEND) as u32 == (libc::O_WRONLY | libc::O_APPEND) as u32;
    let sized = live.format() == libc::S_IFREG && !appended && live.fs != PROC_SUPER_MAGIC;
    Ok(RegFileEntry {
        id,
        flags,
        pos: live.info.pos,
        fown: live.fown(&dump.files.pids).map_err(|e| live.name(e))?,
        size: sized.then_some(live.stat.st_size.cast_unsigned()),
        mode: Some(live.stat.st_mode),
        ..RegFileEntry::default()
    })
}

/// A path as the images hold it.
pub fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// Records a file that is not, or not only, open: a mapped one, an executable, a root or working directory.
///
/// `opened` may be O_PATH; `link` is its name as /proc shows it, `flags` how it is to be opened.
pub fn register_path(dump: &mut Dump<'_>, opened: OwnedFd, link: &Path, flags: OFlag) -> Result<u32> {
    let live = Live::named(opened, link, flags.bits().cast_unsigned() & !(libc::O_CLOEXEC.cast_unsigned()))?;
    let key: PathKey =
        (live.stat.st_dev, live.stat.st_ino, live.info.mnt_id, live.info.flags, live.link.clone());
    if let Some(&id) = dump.files.paths.get(&key) {
        return Ok(id);
    }
    let id = dump.new_id();
    if memfd::is(&live) {
        memfd::dump(dump, &live, id)?;
    } else {
        let entry = entry(dump, &live, id)?;
        dump.model.files.push(entry);
    }
    dump.files.paths.insert(key, id);
    Ok(id)
}

/// Flags for opening: creation, truncation and the like were done when the program opened it.
pub fn open_flags(flags: u32) -> OFlag {
    let once = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY;
    if flags.cast_signed() & libc::O_PATH != 0 {
        // openat2(2) refuses all others beside it.
        let with = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        return OFlag::from_bits_retain(flags.cast_signed() & with) | OFlag::O_CLOEXEC;
    }
    let mut flags = flags.cast_signed() & !once;
    if is_tmpfile(flags.cast_unsigned()) {
        // It has been made; what is opened is no directory.
        flags &= !libc::O_TMPFILE;
    }
    OFlag::from_bits_retain(flags) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC
}

/// Was it made without a name?
pub fn is_tmpfile(flags: u32) -> bool {
    flags.cast_signed() & libc::O_TMPFILE == libc::O_TMPFILE
}

/// Opens a file by its name inside the new root.
pub fn open(restore: &Restore<'_>, reg: &RegFileEntry) -> Result<OwnedFd> {
    let name = |e: Error| e.path(reg.path());
    let call = || format!("openat2(root, {:?}, {:#o}, RESOLVE_IN_ROOT)", reg.path(), reg.flags);
    let missing = |e: Error| match e.errno() {
        Some(Errno::ENOENT | Errno::ENOTDIR) => {
            e.remedy("the new root file system must have the files that were open")
        }
        _ => e,
    };
    // Looked at first: opening a device or a fifo has effects, and a name may have been replaced by a link.
    let root = restore.root_of(reg)?;
    let seen = resolve::open_in_root(&root, reg.path(), OFlag::O_PATH | OFlag::O_NOFOLLOW)
        .during("cannot open a file", call)
        .map_err(|e| name(missing(e)))?;
    let stat =
        nix::sys::stat::fstat(&seen).during("cannot stat a file", || "fstat(_)".into()).map_err(name)?;
    changed::verify(restore, reg, &stat)?;
    let flags = open_flags(reg.flags);
    if flags.contains(OFlag::O_PATH) {
        return resolve::open_in_root(&root, reg.path(), flags)
            .during("cannot open a file", call)
            .map_err(name);
    }
    if matches!(stat.st_mode & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK) {
        device::permit(&restore.target.spec, stat.st_mode, stat.st_rdev, reg.flags).map_err(name)?;
    }
    let file = reopen(seen.as_fd(), flags).map_err(name)?;
    seek(&file, reg).map_err(name)?;
    Ok(file)
}

/// Puts the offset back.
pub fn seek(file: &OwnedFd, reg: &RegFileEntry) -> Result<()> {
    let wanted = reg.pos.cast_signed();
    if wanted <= 0 || reg.flags & libc::O_PATH as u32 != 0 {
        return Ok(());
    }
    match nix::unistd::lseek(file, wanted, nix::unistd::Whence::SeekSet) {
        Ok(_) | Err(Errno::ESPIPE) => Ok(()),
        Err(errno) => {
            Err(Error::new("cannot set the offset").call(format!("lseek(_, {wanted}, SEEK_SET)"), errno))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::files::live::Pids;

    fn live(file: std::fs::File) -> Live {
        Live::own(file.into(), 3).unwrap()
    }

    fn root_of(dir: &Path) -> OwnedFd {
        std::fs::File::open(dir).unwrap().into()
    }

    #[test]
    fn parts_of_processes_are_told_from_processes() {
        let of = |path: &str| of_a_part(Path::new(path));
        assert!(of("/proc/3/fdinfo/4") && of("/proc/3/task/5/stat") && of("/data/proc/3/task/3/fdinfo/1"));
        assert!(
            !of("/proc/3/stat") && !of("/proc/3/task/3/stat") && !of("/proc/3/fdinfo") && !of("/proc/3/task")
        );
    }

    #[test]
    fn a_file_is_placed_by_what_its_name_leads_to() {
        let root = root_of(Path::new("/"));
        let pids = Pids::new();
        let around = Surroundings::here(&root, &pids);
        // A small file system: all of it is looked at.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "x").unwrap();
        let a = std::fs::File::open(&path).unwrap();
        assert_eq!(place(&live(a.try_clone().unwrap()), &around).unwrap(), Place::Name);
        std::fs::hard_link(&path, dir.path().join("b")).unwrap();
        std::fs::remove_file(&path).unwrap();
        if nix::unistd::geteuid().is_root() {
            let other = place(&live(a.try_clone().unwrap()), &around).unwrap();
            assert_eq!(other, Place::Other(dir.path().join("b")));
        }
        std::fs::remove_file(dir.path().join("b")).unwrap();
        assert_eq!(place(&live(a.try_clone().unwrap()), &around).unwrap(), Place::Unlinked);
        std::fs::write(dir.path().join("c"), "").unwrap();
        let c = std::fs::File::open(dir.path().join("c")).unwrap();
        std::fs::write(dir.path().join("d"), "").unwrap();
        let mut c = live(c);
        c.link = dir.path().join("d");
        assert!(place(&c, &around).unwrap_err().to_string().contains("another file"));
    }

    #[test]
    fn creation_is_not_repeated() {
        let flags = open_flags((libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND | libc::O_WRONLY) as u32);
        assert!(flags.contains(OFlag::O_APPEND | OFlag::O_WRONLY | OFlag::O_CLOEXEC));
        assert!(!flags.intersects(OFlag::O_CREAT | OFlag::O_TRUNC));
        let flags = open_flags((libc::O_TMPFILE | libc::O_RDWR) as u32);
        assert!(!flags.intersects(OFlag::O_TMPFILE));
    }
}
