//! Hearing of processes that the kernel has killed for want of memory.
//!
//! ```text
//!   v1   an eventfd registered with cgroup.event_control for memory.oom_control; also told when the group is removed
//!   v2   inotify on memory.events (oom_kill counts up) and cgroup.events (populated 0: the last process is gone)
//! ```

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::Cgroup;
use super::file::{read_key, write};
use crate::sys::{Context, Result};

/// What has been heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// So many times the memory was not enough.
    Oom(u64),
    /// The group is empty or gone: there will be no more.
    Over,
}

/// An ear on a control group.
#[derive(Debug)]
pub struct Watch {
    dir: PathBuf,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// The counter, and the file it stands for.
    V1(EventFd, #[expect(dead_code, reason = "open as long as the counter")] File),
    /// What has been counted.
    V2(Inotify, u64),
}

impl Watch {
    /// Nothing where the memory controller isn't there.
    pub(super) fn open(cgroup: &Cgroup) -> Result<Option<Self>> {
        if cgroup.is_unified() {
            let dir = cgroup.unified_dir()?;
            return dir.join("memory.events").exists().then(|| Self::v2(dir)).transpose();
        }
        cgroup.paths().get("memory").map(|dir| Self::v1(dir)).transpose()
    }

    fn v1(dir: &Path) -> Result<Self> {
        let control = dir.join("memory.oom_control");
        let control = File::open(&control).context(|| format!("open {}", control.display()))?;
        let counter = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let counter = counter.context(|| "eventfd")?;
        let line = format!("{} {}", counter.as_fd().as_raw_fd(), control.as_raw_fd());
        write(dir, "cgroup.event_control", &line)?;
        Ok(Self { dir: dir.to_owned(), source: Source::V1(counter, control) })
    }

    fn v2(dir: &Path) -> Result<Self> {
        let inotify =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context(|| "inotify_init1")?;
        for name in ["memory.events", "cgroup.events"] {
            let path = dir.join(name);
            inotify
                .add_watch(&path, AddWatchFlags::IN_MODIFY)
                .context(|| format!("inotify_add_watch {}", path.display()))?;
        }
        let seen = kills(dir)?;
        Ok(Self { dir: dir.to_owned(), source: Source::V2(inotify, seen) })
    }

    /// Readable when there may be news.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.source {
            Source::V1(counter, _) => counter.as_fd(),
            Source::V2(inotify, _) => inotify.as_fd(),
        }
    }

    /// What is new, without waiting.
    pub fn news(&mut self) -> Result<Option<News>> {
        match &mut self.source {
            Source::V1(counter, _) => match counter.read() {
                Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
                Err(errno) => Err(errno).context(|| "read eventfd"),
                // The removal of the group counts, too.
                Ok(_) if !self.dir.join("cgroup.event_control").exists() => Ok(Some(News::Over)),
                Ok(count) => Ok(Some(News::Oom(count))),
            },
            Source::V2(inotify, seen) => {
                match inotify.read_events() {
                    Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
                    read => read.context(|| "read inotify")?,
                };
                let now = kills(&self.dir).unwrap_or(*seen);
                let more = now.saturating_sub(*seen);
                *seen = now;
                if more > 0 {
                    return Ok(Some(News::Oom(more)));
                }
                let populated = read_key(&self.dir, "cgroup.events", "populated").ok().flatten();
                Ok((populated.unwrap_or(0) == 0).then_some(News::Over))
            }
        }
    }
}

fn kills(dir: &Path) -> Result<u64> {
    Ok(read_key(dir, "memory.events", "oom_kill")?.unwrap_or(0))
}
