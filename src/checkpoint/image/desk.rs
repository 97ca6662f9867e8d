//! A place in memory for images that are made while a container stands still.
//!
//! ```text
//!   stands still   small images ──> desk (a tmpfs of its own, mounted nowhere)     large ones ──> staging directory
//!   runs again     desk ──> staging directory
//! ```
//!
//! To make a file on a disk may take longer than to write it, above all on a disk that is busy with the memory of the
//! same container.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;

use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::dir::{ImageDir, PARENT, names};
use crate::sys::mount::FsContext;

/// Such a place. It is gone when it is dropped.
#[derive(Debug)]
pub struct Desk(OwnedFd);

impl Desk {
    /// None where the kernel has no detached mounts, or this process may make none: then there is no haste.
    pub fn new() -> Option<Self> {
        let context = FsContext::open(c"tmpfs").ok()?;
        context.string(c"mode", c"700").ok()?;
        let root = context.mount(libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC);
        Some(Self(root.ok()?))
    }

    /// A file on it.
    pub fn open(&self, name: &str) -> nix::Result<File> {
        openat(&self.0, name, OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
            .map(File::from)
    }
}

impl From<Desk> for OwnedFd {
    fn from(desk: Desk) -> Self {
        desk.0
    }
}

impl AsFd for Desk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl ImageDir {
    /// As [`Self::create`]; images are made in memory until [`Self::settle`] is called.
    pub fn create_in_haste(path: impl AsRef<Path>) -> Result<Self> {
        let mut images = Self::create(path)?;
        images.desk = Desk::new();
        Ok(images)
    }

    /// A set of its own in memory, called by the path to which it will be copied. None where that cannot be had.
    pub fn in_memory(path: impl AsRef<Path>) -> Option<Self> {
        Some(Self::of(path.as_ref().to_owned(), Desk::new()?.into(), None))
    }

    /// Copies all of a set in memory to where it belongs, without waiting for the disk.
    pub fn copy_out(&self) -> Result<()> {
        let to = Self::create(self.path())?;
        for name in self.names()?.iter().filter(|name| *name != PARENT) {
            let file = to.raw_create(name)?;
            copy(self.raw_open(name)?, file).map_err(|e| e.path(self.path().join(name)))?;
        }
        if let Ok(parent) = readlinkat(&self.dir, PARENT) {
            to.link_parent(Path::new(&parent))?;
        }
        to.publish(false)
    }

    /// Where images are made for the time being, if not in their place.
    pub(super) fn desk(&self) -> Option<&Desk> {
        self.desk.as_ref().filter(|_| !self.settled.load(Ordering::Acquire))
    }

    /// Moves what is still in memory to where it belongs.
    pub fn settle(&self) -> Result<()> {
        let Some(desk) = self.desk() else { return Ok(()) };
        let names = names(desk.as_fd()).map_err(|e| e.path(self.path()))?;
        self.settled.store(true, Ordering::Release);
        names.iter().try_for_each(|name| {
            let to = self.raw_create(name)?;
            desk.open(name)
                .during("cannot open the image", || format!("openat(_, {name:?}, O_RDONLY|O_NOFOLLOW)"))
                .and_then(|from| copy(from, to))
                .map_err(|e| e.path(self.path().join(name)))
        })
    }
}

fn copy(mut from: File, mut to: File) -> Result<()> {
    std::io::copy(&mut from, &mut to).during("cannot write the image", || "write(_, _, _)".into()).map(drop)
}
