//! Files that are open, or mapped, and have no name any more.
//!
//! ```text
//!   dump:     RemapFilePathEntry: file 12 -> ghost 3        ghost-file-3.img: owner, mode, times, contents
//!   restore:  create it under its old name, or beside it where that is taken; open what was open; unlink
//! ```
//!
//! One ghost serves every open file description and mapping of its inode.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::{
    Mode, SFlag, UtimensatFlags, fchmodat, major, makedev, minor, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, unlinkat};

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::{Live, reopen};
use crate::checkpoint::files::{device, regular};
use crate::checkpoint::image::{
    GhostFileEntry, RegFileEntry, RemapFilePathEntry, RemapType, Timeval, device as dev, ghost, path_of,
};
use crate::checkpoint::{Error, Result};
use crate::sys::resolve;

/// Saves an unlinked file once, and points file `id` to it.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let key = (live.stat.st_dev, live.stat.st_ino);
    let ghost_id = match dump.files.ghosts.get(&key) {
        Some(&known) => known,
        None => {
            let new = dump.new_id();
            save(dump, live, new).map_err(|e| live.name(e))?;
            dump.files.ghosts.insert(key, new);
            new
        }
    };
    dump.model.remaps.push(RemapFilePathEntry {
        orig_id: id,
        remap_id: ghost_id,
        remap_type: Some(RemapType::Ghost as i32),
    });
    Ok(())
}

fn save(dump: &mut Dump<'_>, live: &Live, ghost_id: u32) -> Result<()> {
    let stat = &live.stat;
    let time = |sec: i64, nsec: i64| {
        Some(Timeval { tv_sec: sec.cast_unsigned(), tv_usec: nsec.cast_unsigned() / 1000 })
    };
    let node = matches!(live.format(), libc::S_IFCHR | libc::S_IFBLK);
    let mut entry = GhostFileEntry {
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode,
        dev: Some(dev::kernel(major(stat.st_dev), minor(stat.st_dev))),
        ino: Some(stat.st_ino),
        rdev: node.then(|| dev::stat(major(stat.st_rdev), minor(stat.st_rdev))),
        atim: time(stat.st_atime, stat.st_atime_nsec),
        mtim: time(stat.st_mtime, stat.st_mtime_nsec),
        ..GhostFileEntry::default()
    };
    let mut source = None;
    match live.format() {
        libc::S_IFREG => source = Some(File::from(live.reopen(OFlag::O_RDONLY | OFlag::O_NOATIME)?)),
        libc::S_IFDIR | libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO => {}
        libc::S_IFLNK => {
            let target = nix::fcntl::readlinkat(&live.file, "")
                .during("cannot read the removed link", || "readlinkat(_, \"\")".into())?;
            entry.symlnk_target = Some(target.into_vec());
        }
        other => {
            return Err(Error::new(format!("an unlinked file of kind {other:o} cannot be checkpointed")));
        }
    }
    let entry = ghost::write(dump.images, ghost_id, &entry, source.as_ref())?;
    dump.model.ghosts.insert(ghost_id, entry);
    Ok(())
}

/// A ghost that has been given a name until everything that was open is open again.
#[derive(Debug)]
struct Named {
    dir: OwnedFd,
    /// None for one that never had any.
    name: Option<PathBuf>,
    /// O_PATH, unless it has no name.
    node: OwnedFd,
    is_dir: bool,
}

/// The ghosts of a restore. Dropping it takes their names away.
#[derive(Debug, Default)]
pub struct Ghosts {
    named: BTreeMap<u32, Named>,
}

impl Ghosts {
    /// An O_PATH descriptor of the ghost that file `reg` was, made if this is its first use; the file itself where it
    /// was made without a name.
    pub fn node(&mut self, restore: &Restore<'_>, ghost_id: u32, reg: &RegFileEntry) -> Result<&OwnedFd> {
        if !self.named.contains_key(&ghost_id) {
            let entry = restore.model.ghosts.get(&ghost_id).ok_or_else(|| {
                Error::new(format!("the images lack ghost file {ghost_id}")).path(reg.path())
            })?;
            let named = make(restore, ghost_id, entry, reg).map_err(|e| e.path(reg.path()))?;
            self.named.insert(ghost_id, named);
        }
        self.named.get(&ghost_id).map(|n| &n.node).ok_or_else(|| Error::new("ghost file lost"))
    }

    /// Takes the names away.
    pub fn unlink(&mut self) -> Result<()> {
        for (_, n) in std::mem::take(&mut self.named) {
            let Some(name) = &n.name else { continue };
            unlink(&n.dir, name, n.is_dir)
                .during("cannot remove a ghost file again", || format!("unlinkat(_, {name:?}, _)"))?;
        }
        Ok(())
    }
}

impl Drop for Ghosts {
    fn drop(&mut self) {
        let _ = self.unlink();
    }
}

fn unlink(dir: &OwnedFd, name: &Path, is_dir: bool) -> nix::Result<()> {
    let how = if is_dir { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
    unlinkat(dir, name, how)
}

/// How it was made, if without a name, by O_TMPFILE. Such a file can be given one.
fn tmpfile(restore: &Restore<'_>, id: u32) -> Option<OFlag> {
    let of_ghost = |r: &&RemapFilePathEntry| {
        r.remap_id == id && r.remap_type.unwrap_or_default() == RemapType::Ghost as i32
    };
    let files: Vec<u32> = restore.model.remaps.iter().filter(of_ghost).map(|r| r.orig_id).collect();
    let mut all = restore.model.files.iter().filter(|f| files.contains(&f.id)).filter_map(|f| f.reg.as_ref());
    let reg = all.find(|reg| regular::is_tmpfile(reg.flags))?;
    Some(regular::open_flags(reg.flags) | OFlag::O_TMPFILE)
}

/// The nearest directory above `path` that is there.
fn nearest(root: &OwnedFd, path: &Path) -> Result<OwnedFd> {
    for dir in path.ancestors().skip(1) {
        match resolve::open_in_root(root, dir, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            other => {
                return other.during("cannot open a ghost file's directory", || {
                    format!("openat2(root, {dir:?}, O_PATH|O_DIRECTORY, RESOLVE_IN_ROOT)")
                });
            }
        }
    }
    Err(Error::new("a ghost file has no directory"))
}

fn make(restore: &Restore<'_>, id: u32, entry: &GhostFileEntry, reg: &RegFileEntry) -> Result<Named> {
    let path = reg.path();
    let dir = nearest(&restore.root_of(reg)?, path)?;
    let tmpfile = tmpfile(restore, id).filter(|_| entry.mode & libc::S_IFMT == libc::S_IFREG);
    if let Some(flags) = tmpfile {
        let made = openat(&dir, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR);
        // Not every file system can.
        if let Ok(node) = made {
            return finish(restore, id, entry, Named { dir, name: None, node, is_dir: false });
        }
    }
    let old = path.file_name().ok_or_else(|| Error::new("a ghost file has no name"))?;
    let mut name = PathBuf::from(old);
    for attempt in 0..100 {
        match create(restore, &dir, &name, entry)? {
            Ok(()) => {
                let is_dir = entry.mode & libc::S_IFMT == libc::S_IFDIR;
                let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let node = openat(&dir, &name, flags, Mode::empty())
                    .during("cannot open a ghost file", || format!("openat(_, {name:?}, O_PATH)"))?;
                return finish(restore, id, entry, Named { dir, name: Some(name), node, is_dir });
            }
            Err(Errno::EEXIST) => name = format!("{}.ghost-{id}-{attempt}", old.display()).into(),
            Err(errno) => {
                return Err(Error::new("cannot make a ghost file")
                    .call(format!("mknodat(_, {name:?}, {:#o})", entry.mode), errno));
            }
        }
    }
    Err(Error::new("cannot make a ghost file: every name is taken"))
}

/// Makes the empty file; the inner result is the kernel's.
fn create(
    restore: &Restore<'_>,
    dir: &OwnedFd,
    name: &Path,
    entry: &GhostFileEntry,
) -> Result<nix::Result<()>> {
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    Ok(match entry.mode & libc::S_IFMT {
        libc::S_IFDIR => mkdirat(dir, name, Mode::S_IRWXU),
        libc::S_IFREG => mknodat(dir, name, SFlag::S_IFREG, private, 0),
        libc::S_IFIFO => mknodat(dir, name, SFlag::S_IFIFO, private, 0),
        libc::S_IFLNK => {
            let target =
                entry.symlnk_target.as_deref().ok_or_else(|| Error::new("a ghost link has no target"))?;
            nix::unistd::symlinkat(path_of(target), dir, name)
        }
        kind @ (libc::S_IFCHR | libc::S_IFBLK) => {
            let (major, minor) = dev::from_stat(entry.rdev.unwrap_or(0));
            let rdev = makedev(major.into(), minor.into());
            device::permit(&restore.target.spec, entry.mode, rdev, libc::O_RDWR.cast_unsigned())?;
            let kind = if kind == libc::S_IFCHR { SFlag::S_IFCHR } else { SFlag::S_IFBLK };
            mknodat(dir, name, kind, private, rdev)
        }
        other => return Err(Error::new(format!("a ghost file is of kind {other:o}"))),
    })
}

/// Gives a new file its contents, owner, mode and times.
fn finish(restore: &Restore<'_>, id: u32, entry: &GhostFileEntry, named: Named) -> Result<Named> {
    if entry.mode & libc::S_IFMT == libc::S_IFREG {
        ghost::restore(restore.images, id, &File::from(reopen(named.node.as_fd(), OFlag::O_RDWR)?))?;
    }
    let set = || -> nix::Result<()> {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        fchownat(&named.node, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
        if entry.mode & libc::S_IFMT == libc::S_IFLNK {
            return Ok(());
        }
        let path = format!("/proc/self/fd/{}", named.node.as_raw_fd());
        let mode = Mode::from_bits_truncate(entry.mode & 0o7777);
        fchmodat(AT_FDCWD, path.as_str(), mode, nix::sys::stat::FchmodatFlags::FollowSymlink)?;
        let time =
            |t: &Timeval| TimeSpec::new(t.tv_sec.cast_signed(), t.tv_usec.cast_signed().saturating_mul(1000));
        if let (Some(atim), Some(mtim)) = (&entry.atim, &entry.mtim) {
            let (atim, mtim) = (time(atim), time(mtim));
            utimensat(AT_FDCWD, path.as_str(), &atim, &mtim, UtimensatFlags::FollowSymlink)?;
        }
        Ok(())
    };
    match set() {
        Ok(()) => Ok(named),
        Err(errno) => {
            if let Some(name) = &named.name {
                let _ = unlink(&named.dir, name, named.is_dir);
            }
            Err(Error::new("cannot give a ghost file its owner, mode and times")
                .call("fchownat/fchmodat/utimensat", errno))
        }
    }
}
