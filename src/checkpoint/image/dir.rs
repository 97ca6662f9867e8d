//! The directory of a checkpoint.
//!
//! Callers pass directories that exist, are not empty, or are mount points. So images are written into a directory
//! beside the final ones, and moved up when all of them are there; inventory.img comes last and says so.
//!
//! ```text
//!   DIR/                       create: make it, clear what dead dumps left
//!   ├── .stasis-1234/          write:  all new images
//!   │   ├── inventory.img
//!   │   └── ...                publish: 1 flush them   2 unlink the old inventory.img, then the other old images
//!   ├── inventory.img                   3 move up      4 inventory.img last
//!   └── ...                    at no moment is there an inventory.img beside a mixture of images
//! ```
//!
//! Everything is relative to descriptors: the directory may belong to somebody who changes it under our hands. What is
//! made while the container stands still may stand in memory first (`desk`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, fsync, symlinkat, unlinkat};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::desk::Desk;
use crate::checkpoint::image::kind::Kind;
use crate::checkpoint::image::record::Record;
use crate::checkpoint::image::stream::{Reader, Writer};

/// Name of the image that completes a set.
pub const INVENTORY: &str = "inventory.img";
/// Name of the link to the set that this one builds on.
pub(super) const PARENT: &str = "parent";
/// Name of the record of what was touched first, which is about one set and no part of it.
pub const TOUCHED: &str = "stasis-touched.json";
/// How staging directories begin.
const STAGING: &str = ".stasis-";

/// A directory of images, being read or being written.
#[derive(Debug)]
pub struct ImageDir {
    path: PathBuf,
    pub(super) dir: OwnedFd,
    staging: Option<Staging>,
    pub(super) desk: Option<Desk>,
    /// Nothing is made on the desk any more.
    pub(super) settled: AtomicBool,
    /// What compressed images hold, in memory, by name.
    pub(in crate::checkpoint) expanded: Mutex<BTreeMap<String, File>>,
}

#[derive(Debug)]
pub(super) struct Staging {
    name: String,
    /// Locked, so that other dumps know that this one lives.
    dir: Flock<OwnedFd>,
    over: AtomicBool,
}

impl ImageDir {
    /// Opens a directory to read images from.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let dir = open_directory(nix::fcntl::AT_FDCWD, &path)?;
        Ok(Self::of(path, dir, None))
    }

    pub(super) fn of(path: PathBuf, dir: OwnedFd, staging: Option<Staging>) -> Self {
        let (settled, expanded) = (AtomicBool::new(false), Mutex::default());
        Self { path, dir, staging, desk: None, settled, expanded }
    }

    /// Makes a directory to write images to, with its parents, and a staging directory in it.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        std::fs::create_dir_all(&path)
            .during("cannot make the image directory", || format!("mkdir({path:?}, 0777)"))?;
        let dir = open_directory(nix::fcntl::AT_FDCWD, &path)?;
        clear_leftovers(dir.as_fd());
        for attempt in 0u32.. {
            let name = format!("{STAGING}{}-{attempt}", std::process::id());
            match mkdirat(&dir, name.as_str(), Mode::S_IRWXU) {
                Err(Errno::EEXIST) if attempt < 1000 => {}
                Err(errno) => {
                    return Err(Error::new("cannot make the staging directory")
                        .call(format!("mkdirat({path:?}, {name:?}, 0700)"), errno)
                        .path(path));
                }
                Ok(()) => {
                    let staging = open_directory(dir.as_fd(), Path::new(&name))?;
                    let staging =
                        Flock::lock(staging, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
                            Error::new("cannot lock the staging directory")
                                .call("flock(_, LOCK_EX|LOCK_NB)", errno)
                        })?;
                    let staging = Staging { name, dir: staging, over: AtomicBool::new(false) };
                    return Ok(Self::of(path, dir, Some(staging)));
                }
            }
        }
        Err(Error::new("cannot make the staging directory").path(path))
    }

    /// The directory, as the caller named it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory itself.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Where files are at the moment.
    pub(super) fn place(&self) -> BorrowedFd<'_> {
        match &self.staging {
            Some(staging) if !staging.over.load(Ordering::Acquire) => staging.dir.as_fd(),
            _ => self.dir.as_fd(),
        }
    }

    /// Creates a file, which must not exist, for raw bytes.
    pub fn raw_create(&self, name: &str) -> Result<File> {
        self.raw_create_in(self.desk().map_or_else(|| self.place(), Desk::as_fd), name)
    }

    /// As [`Self::raw_create`], for more than one wants to have in memory twice.
    pub fn raw_create_large(&self, name: &str) -> Result<File> {
        self.raw_create_in(self.place(), name)
    }

    fn raw_create_in(&self, place: BorrowedFd<'_>, name: &str) -> Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(place, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map(File::from)
            .during("cannot create the image", || format!("openat(_, {name:?}, O_CREAT|O_EXCL, 0600)"))
            .map_err(|e| e.path(self.path.join(name)))
    }

    /// Opens a file to read raw bytes. Only a regular file will do: a fifo would keep us waiting.
    pub fn raw_open(&self, name: &str) -> Result<File> {
        let flags =
            OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let at = |e: Error| e.path(self.path.join(name));
        let on_desk = self.desk().and_then(|desk| openat(desk, name, flags, Mode::empty()).ok());
        let file = on_desk
            .map_or_else(|| openat(self.place(), name, flags, Mode::empty()), Ok)
            .during("cannot open the image", || format!("openat(_, {name:?}, O_RDONLY|O_NOFOLLOW)"))
            .map_err(at)?;
        let stat = fstat(&file).during("cannot open the image", || "fstat(_)".into()).map_err(at)?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(at(Error::new("the image is not a regular file")));
        }
        Ok(File::from(file))
    }

    /// How long a file is. Only a regular file will do.
    pub fn length(&self, name: &str) -> Result<u64> {
        let at = |e: Error| e.path(self.path.join(name));
        let stat = |place: BorrowedFd<'_>| fstatat(place, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        let on_desk = self.desk().and_then(|desk| stat(desk.as_fd()).ok());
        let stat = on_desk
            .map_or_else(|| stat(self.place()), Ok)
            .during("cannot measure the image", || format!("fstatat(_, {name:?}, AT_SYMLINK_NOFOLLOW)"))
            .map_err(at)?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(at(Error::new("the image is not a regular file")));
        }
        Ok(stat.st_size.cast_unsigned())
    }

    /// Removes a file that is not published yet.
    pub fn remove(&self, name: &str) -> Result<()> {
        remove(self.place(), name).map_err(|e| e.path(self.path.join(name)))
    }

    /// Whether there is such a file.
    pub fn exists(&self, name: &str) -> bool {
        let exists = |place: BorrowedFd<'_>| fstatat(place, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok();
        exists(self.place()) || self.desk().is_some_and(|desk| exists(desk.as_fd()))
    }

    /// Names of all files, in no order.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut all = names(self.place()).map_err(|e| e.path(&self.path))?;
        if let Some(desk) = self.desk() {
            all.extend(names(desk.as_fd()).map_err(|e| e.path(&self.path))?);
        }
        Ok(all)
    }

    /// The set that this one builds on, if the link `parent` leads to one.
    pub fn parent(&self) -> Result<Option<Self>> {
        let at = |e: Error| e.path(self.path.join(PARENT));
        let target = match readlinkat(&self.dir, PARENT) {
            Ok(target) => PathBuf::from(target),
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => {
                let call = format!("readlinkat(_, {PARENT:?})");
                return Err(at(Error::new("cannot find the earlier images").call(call, errno)));
            }
        };
        if target.is_absolute() {
            return Err(at(Error::new("the link to the earlier images is absolute")));
        }
        let dir = open_directory(self.dir.as_fd(), &target)?;
        Ok(Some(Self::of(self.path.join(target), dir, None)))
    }

    /// Makes the link to the set that this one builds on, relative to this directory.
    pub fn link_parent(&self, target: &Path) -> Result<()> {
        symlinkat(target, self.place(), PARENT)
            .during("cannot make the link to the earlier images", || {
                format!("symlinkat({target:?}, _, {PARENT:?})")
            })
            .map_err(|e| e.path(self.path.join(PARENT)))
    }

    /// Begins an image.
    pub fn writer(&self, kind: Kind, name: &str) -> Result<Writer> {
        Writer::new(self.raw_create(name)?, self.path.join(name), kind)
    }

    /// Begins to read an image.
    pub fn reader(&self, kind: Kind, name: &str) -> Result<Reader<BufReader<File>>> {
        Reader::new(self.raw_open(name)?, self.path.join(name), kind)
    }

    /// Writes an image of plain records.
    pub fn write<T: Record>(&self, kind: Kind, name: &str, records: &[T]) -> Result<()> {
        let mut writer = self.writer(kind, name)?;
        records.iter().try_for_each(|record| writer.record(record))?;
        writer.finish().map(drop)
    }

    /// Writes an image anew, in one step.
    pub fn rewrite<T: Record>(&self, kind: Kind, name: &str, records: &[T]) -> Result<()> {
        let new = format!("{name}.new");
        remove(self.place(), &new)?;
        self.write(kind, &new, records)?;
        renameat(self.place(), new.as_str(), self.place(), name)
            .during("cannot replace the image", || format!("renameat(_, {new:?}, _, {name:?})"))
            .map_err(|e| e.path(self.path.join(name)))
    }

    /// Reads an image of plain records.
    pub fn read<T: Record>(&self, kind: Kind, name: &str) -> Result<Vec<T>> {
        self.reader(kind, name)?.records()
    }

    /// Reads an image of one record.
    pub fn read_one<T: Record>(&self, kind: Kind, name: &str) -> Result<T> {
        self.reader(kind, name)?.only()
    }

    /// Puts the new images in the place of those that were there. `sync` waits until they are on the disk.
    pub fn publish(&self, sync: bool) -> Result<()> {
        let Some(staging) = &self.staging else { return Ok(()) };
        self.settle()?;
        let new = names(staging.dir.as_fd()).map_err(|e| e.path(&self.path))?;
        let flush = |fd: BorrowedFd<'_>| match sync {
            true => fsync(fd).during("cannot flush the images", || "fsync(_)".into()),
            false => Ok(()),
        };
        let run = || -> Result<()> {
            if sync {
                self.flush_all(&new)?;
            }
            if self.is_complete() {
                remove(self.dir.as_fd(), INVENTORY)?;
                flush(self.dir.as_fd())?;
            }
            let replaced = |old: &&String| old.ends_with(".img") || [PARENT, TOUCHED].contains(&old.as_str());
            for old in names(self.dir.as_fd())?.iter().filter(replaced) {
                remove(self.dir.as_fd(), old)?;
            }
            for name in new.iter().filter(|name| *name != INVENTORY) {
                self.move_up(staging, name)?;
            }
            if new.iter().any(|name| name == INVENTORY) {
                flush(self.dir.as_fd())?;
                self.move_up(staging, INVENTORY)?;
            }
            flush(self.dir.as_fd())
        };
        run().map_err(|e| e.path(&self.path))?;
        staging.over.store(true, Ordering::Release);
        let _ = unlinkat(&self.dir, staging.name.as_str(), UnlinkatFlags::RemoveDir);
        Ok(())
    }

    /// Waits until a set that was published without that is on the disk.
    pub fn sync(&self) -> Result<()> {
        let images = self.names()?.into_iter().filter(|name| name.ends_with(".img"));
        self.flush_all(&images.collect::<Vec<_>>())?;
        fsync(&self.dir)
            .during("cannot flush the images", || "fsync(_)".into())
            .map_err(|e| e.path(&self.path))
    }

    /// Whether there is a whole set of images outside of the staging directory.
    fn is_complete(&self) -> bool {
        fstatat(&self.dir, INVENTORY, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
    }

    fn move_up(&self, staging: &Staging, name: &str) -> Result<()> {
        renameat(staging.dir.as_fd(), name, &self.dir, name)
            .during("cannot publish the image", || format!("renameat(_, {name:?}, _, {name:?})"))
    }

    /// Removes what has been written and not been published. Dropping does the same.
    pub fn abort(&self) {
        if let Some(staging) = &self.staging {
            if !staging.over.swap(true, Ordering::AcqRel) {
                clear(self.dir.as_fd(), &staging.name, staging.dir.as_fd());
            }
        }
    }
}

impl Drop for ImageDir {
    fn drop(&mut self) {
        self.abort();
    }
}

fn open_directory(at: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    openat(at, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .during("cannot open the image directory", || format!("openat(_, {path:?}, O_RDONLY|O_DIRECTORY)"))
        .map_err(|e| e.path(path))
}

/// Names in a directory, apart from `.` and `..`, and those that no image has.
pub(super) fn names(dir: BorrowedFd<'_>) -> Result<Vec<String>> {
    let read = || -> nix::Result<Vec<String>> {
        let mut dir =
            Dir::openat(dir, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut found = Vec::new();
        for entry in dir.iter() {
            if let Ok(name) = entry?.file_name().to_str() {
                if name != "." && name != ".." {
                    found.push(name.to_owned());
                }
            }
        }
        Ok(found)
    };
    read().during("cannot list the image directory", || "getdents64(_, _, _)".into())
}

/// Removes a file that need not be there.
fn remove(dir: BorrowedFd<'_>, name: &str) -> Result<()> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT | Errno::EISDIR) => Ok(()),
        Err(errno) => {
            Err(Error::new("cannot remove the older image").call(format!("unlinkat(_, {name:?}, 0)"), errno))
        }
    }
}

/// Removes the staging directories of dumps that are dead. Their own lock tells the living ones.
fn clear_leftovers(dir: BorrowedFd<'_>) {
    for name in names(dir).unwrap_or_default().iter().filter(|name| name.starts_with(STAGING)) {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(left) = openat(dir, name.as_str(), flags, Mode::empty()) else { continue };
        if let Ok(left) = Flock::lock(left, FlockArg::LockExclusiveNonblock) {
            clear(dir, name, left.as_fd());
        }
    }
}

fn clear(dir: BorrowedFd<'_>, name: &str, staging: BorrowedFd<'_>) {
    for file in names(staging).unwrap_or_default() {
        let _ = unlinkat(staging, file.as_str(), UnlinkatFlags::NoRemoveDir);
    }
    let _ = unlinkat(dir, name, UnlinkatFlags::RemoveDir);
}
