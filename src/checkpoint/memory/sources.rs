//! The files that the mappings of a task need, on their way into it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;

use crate::checkpoint::context::NewTask;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::memory::plan::{Plan, Source, Step};
use crate::checkpoint::memory::restore::OpenFile;
use crate::checkpoint::memory::shmem::Shared;
use crate::checkpoint::remote::Conduit;

/// How the executable is asked for: in no mode that a mapping has.
pub const EXECUTABLE: u32 = u32::MAX;

/// The descriptors that a plan's mappings need, opened as they were.
pub struct Sources<'a>(BTreeMap<Source, Held<'a>>);

enum Held<'a> {
    Borrowed(BorrowedFd<'a>),
    Own(OwnedFd),
}

impl Held<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Borrowed(fd) => *fd,
            Self::Own(fd) => fd.as_fd(),
        }
    }
}

impl<'a> Sources<'a> {
    /// Opens what the mappings of a plan need.
    pub fn open<'f: 'a>(plan: &Plan, files: OpenFile<'f>, shared: &'a Shared) -> Result<Self> {
        let mut held = BTreeMap::new();
        for step in &plan.map {
            let Step::Map { source, .. } = step else { continue };
            if held.contains_key(source) {
                continue;
            }
            let file = match *source {
                Source::Nothing | Source::Descriptor(_) => continue,
                Source::File(id, access) => reopened(files(id)?, access)?,
                Source::Shared(id) => Held::Borrowed(
                    shared.get(id).ok_or_else(|| Error::new(format!("there is no shared memory {id}")))?,
                ),
            };
            held.insert(*source, file);
        }
        Ok(Self(held))
    }

    /// Adds the executable.
    pub fn add_executable<'f: 'a>(&mut self, id: u32, files: OpenFile<'f>) -> Result<()> {
        let file = reopened(files(id)?, libc::O_RDONLY.cast_unsigned())?;
        self.0.insert(Source::File(id, EXECUTABLE), file);
        Ok(())
    }

    /// Passes them to the task; their numbers there.
    pub fn send(&self, task: &mut NewTask, conduit: &Conduit) -> Result<BTreeMap<Source, i32>> {
        if self.0.is_empty() {
            return Ok(BTreeMap::new());
        }
        let fds: Vec<BorrowedFd<'_>> = self.0.values().map(Held::as_fd).collect();
        let numbers = conduit.send(&mut task.injection, &fds)?;
        Ok(self.0.keys().copied().zip(numbers).collect())
    }
}

/// The file itself when it is open in this mode, else opened again. The mode decides what mprotect(2) may later do.
fn reopened(file: BorrowedFd<'_>, access: u32) -> Result<Held<'_>> {
    let flags = fcntl(file, FcntlArg::F_GETFL)
        .during("cannot look at a mapped file", || format!("fcntl({}, F_GETFL)", file.as_raw_fd()))?;
    let wanted = OFlag::from_bits_truncate(access.cast_signed()) & OFlag::O_ACCMODE;
    let flags = OFlag::from_bits_truncate(flags);
    if flags & OFlag::O_ACCMODE == wanted && !flags.contains(OFlag::O_PATH) {
        return Ok(Held::Borrowed(file));
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    open(path.as_str(), wanted | OFlag::O_CLOEXEC, Mode::empty())
        .during("cannot open a mapped file again", || format!("open({path:?}, {wanted:?})"))
        .map(Held::Own)
}
