//! Making events happen, on files that exist for nothing else.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, mkdirat, mknodat};
use nix::unistd::{UnlinkatFlags, ftruncate, unlinkat};

use super::event::Event;
use crate::checkpoint::error::Context;
use crate::checkpoint::{Error, Result};
use crate::sys::{self, ioctl, mount};

const WHAT: &str = "cannot make an inotify event again";
/// What does not happen to a file on the stage by chance.
const NEUTRAL: u32 = libc::IN_DELETE_SELF;
const DIR: u32 = libc::IN_ISDIR;
/// What is told of directories only.
const OF_DIRECTORIES: u32 =
    libc::IN_ISDIR | libc::IN_CREATE | libc::IN_DELETE | libc::IN_MOVED_FROM | libc::IN_MOVED_TO;
/// A file beside those that are watched.
const ASIDE: &str = "aside";

/// A file system of its own, with a file or a directory for each watch.
pub struct Stage<'a> {
    inotify: BorrowedFd<'a>,
    root: OwnedFd,
    /// Which watches are those of directories.
    watches: BTreeMap<i32, bool>,
}

impl<'a> Stage<'a> {
    /// For the watches of these events.
    pub fn new(inotify: BorrowedFd<'a>, events: &[Event]) -> Result<Self> {
        let make = || mount::FsContext::open(c"tmpfs")?.mount(0);
        let root = make().during(WHAT, || "fsmount(fsopen(\"tmpfs\"))".into())?;
        let mut stage = Self { inotify, root, watches: BTreeMap::new() };
        let mut directories: BTreeMap<i32, bool> = BTreeMap::new();
        for event in events.iter().filter(|event| event.wd >= 0) {
            let is = !event.name.is_empty() || event.is(OF_DIRECTORIES);
            *directories.entry(event.wd).or_default() |= is;
        }
        for (wd, directory) in directories {
            let name = place(wd);
            stage.ensure(stage.root.as_fd(), &name, directory)?;
            let next = || format!("ioctl(_, INOTIFY_IOC_SETNEXTWD, {wd})");
            ioctl::set_inotify_next_wd(inotify, wd).during(WHAT, next)?;
            stage.watches.insert(wd, directory);
            stage.watch(wd, NEUTRAL)?;
        }
        Ok(stage)
    }

    /// Its root directory.
    pub fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// Makes the first of these events happen, and its other half where it is one of two. How many there were.
    pub fn play(&mut self, events: &[Event]) -> Result<usize> {
        let Some((event, rest)) = events.split_first() else { return Ok(0) };
        let other = rest.first().filter(|next| {
            event.is(libc::IN_MOVED_FROM) && next.is(libc::IN_MOVED_TO) && next.cookie == event.cookie
        });
        let done = self.act(event, other);
        let settle = [Some(event), other].into_iter().flatten();
        for event in settle.filter(|event| self.watches.contains_key(&event.wd)) {
            self.watch(event.wd, NEUTRAL)?;
        }
        done.map(|()| 1 + usize::from(other.is_some()))
    }

    fn act(&mut self, event: &Event, other: Option<&Event>) -> Result<()> {
        let (wd, kind) = (event.wd, event.mask & libc::IN_ALL_EVENTS);
        let directory = event.is(DIR);
        if event.is(libc::IN_IGNORED) {
            self.watches.remove(&wd);
            return sys::inotify::remove_watch(self.inotify, wd)
                .during(WHAT, || format!("inotify_rm_watch(_, {wd})"));
        }
        let (holder, name) = match event.name.is_empty() {
            true => (self.directory(c".")?, place(wd)),
            false => (self.directory(&place(wd))?, text(&event.name)?),
        };
        let aside = text(ASIDE.as_bytes())?;
        let (dir, name) = (holder.as_fd(), name.as_c_str());
        match kind {
            libc::IN_CREATE => {
                self.remove(dir, name)?;
                self.watch(wd, kind)?;
                self.ensure(dir, name, directory)
            }
            libc::IN_DELETE => {
                self.ensure(dir, name, directory)?;
                self.watch(wd, kind)?;
                self.remove(dir, name)
            }
            libc::IN_MOVED_FROM => {
                self.ensure(dir, name, directory)?;
                let (to, new) = match other {
                    Some(other) => (self.directory(&place(other.wd))?, text(&other.name)?),
                    None => (self.directory(c".")?, aside),
                };
                self.remove(to.as_fd(), &new)?;
                let same = other.is_some_and(|other| other.wd == wd);
                self.watch(wd, if same { kind | libc::IN_MOVED_TO } else { kind })?;
                if let Some(other) = other.filter(|_| !same) {
                    self.watch(other.wd, libc::IN_MOVED_TO)?;
                }
                rename((dir, name), (to.as_fd(), &new))
            }
            libc::IN_MOVED_TO => {
                self.remove(self.root.as_fd(), &aside)?;
                self.ensure(self.root.as_fd(), &aside, directory)?;
                self.remove(dir, name)?;
                self.watch(wd, kind)?;
                rename((self.root.as_fd(), &aside), (dir, name))
            }
            libc::IN_MOVE_SELF => {
                self.remove(dir, &aside)?;
                self.remove(dir, &aside)?;
                self.watch(wd, kind)?;
                rename((dir, name), (dir, &aside))?;
                self.watch_at(wd, &aside, NEUTRAL)?;
                rename((dir, &aside), (dir, name))
            }
            libc::IN_DELETE_SELF => {
                self.watches.remove(&wd);
                self.empty(wd)?;
                self.remove(dir, name)
            }
            libc::IN_ATTRIB => {
                self.ensure(dir, name, directory)?;
                self.watch(wd, kind)?;
                let flags = FchmodatFlags::FollowSymlink;
                fchmodat(dir, name, Mode::S_IRWXU, flags).during(WHAT, || format!("fchmodat(_, {name:?})"))
            }
            _ => self.visit(event, dir, name),
        }
    }

    /// What happens to a file that is open.
    fn visit(&self, event: &Event, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
        let (wd, kind) = (event.wd, event.mask & libc::IN_ALL_EVENTS);
        if !event.name.is_empty() {
            self.ensure(dir, name, event.is(DIR))?;
        }
        let mode = if event.is(DIR) { OFlag::O_DIRECTORY } else { OFlag::empty() };
        let writes = [libc::IN_CLOSE_WRITE, libc::IN_MODIFY].contains(&kind);
        let mode = mode | if writes { OFlag::O_WRONLY } else { OFlag::O_RDONLY };
        if kind == libc::IN_OPEN {
            self.watch(wd, kind)?;
        }
        let file = File::from(self.open(dir, name, mode)?);
        if kind == libc::IN_OPEN {
            // It is closed when nobody looks any more.
            return self.watch(wd, NEUTRAL);
        }
        self.watch(wd, kind)?;
        match kind {
            libc::IN_CLOSE_WRITE | libc::IN_CLOSE_NOWRITE => {
                drop(file);
                return Ok(());
            }
            libc::IN_MODIFY => file.write_at(b"x", 0).during(WHAT, || "pwrite(_, 1)".into()).map(drop)?,
            libc::IN_ACCESS if event.is(DIR) => {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                let mut entries =
                    Dir::from_fd(file.into()).during(WHAT, || format!("fdopendir({path:?})"))?;
                let _ = entries.iter().next();
                return self.watch(wd, NEUTRAL);
            }
            libc::IN_ACCESS => file.read_at(&mut [0], 0).during(WHAT, || "pread(_, 1)".into()).map(drop)?,
            _ => return Err(Error::new(format!("{WHAT}: the kernel has no event {:#x}", event.mask))),
        }
        // Before it is closed.
        self.watch(wd, NEUTRAL)
    }

    /// Watches the file or directory of a watch for these events alone.
    fn watch(&self, wd: i32, mask: u32) -> Result<()> {
        self.watch_at(wd, &place(wd), mask)
    }

    fn watch_at(&self, wd: i32, name: &CStr, mask: u32) -> Result<()> {
        let node = self.open(self.root.as_fd(), name, OFlag::O_PATH)?;
        let got = sys::inotify::add_watch(self.inotify, &node, mask)
            .during(WHAT, || format!("inotify_add_watch(_, {name:?}, {mask:#x})"))?;
        if got == wd {
            Ok(())
        } else {
            Err(Error::new(format!("{WHAT}: as watch {wd}, the kernel gave {got}")))
        }
    }

    /// A directory of the stage, held in a way of which no watch hears.
    fn directory(&self, name: &CStr) -> Result<OwnedFd> {
        self.open(self.root.as_fd(), name, OFlag::O_DIRECTORY | OFlag::O_PATH)
    }

    fn open(&self, dir: BorrowedFd<'_>, name: &CStr, flags: OFlag) -> Result<OwnedFd> {
        openat(dir, name, flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())
            .during(WHAT, || format!("openat(_, {name:?}, {flags:?})"))
    }

    /// Makes a directory, or a file with a byte in it, unless it is there.
    fn ensure(&self, dir: BorrowedFd<'_>, name: &CStr, directory: bool) -> Result<()> {
        let made = match directory {
            true => mkdirat(dir, name, Mode::S_IRWXU),
            false => mknodat(dir, name, SFlag::S_IFREG, Mode::S_IRWXU, 0),
        };
        match made {
            Err(Errno::EEXIST) => Ok(()),
            Ok(()) if !directory => {
                let file = self.open(dir, name, OFlag::O_WRONLY)?;
                ftruncate(&file, 1).during(WHAT, || "ftruncate(_, 1)".into())
            }
            made => made.during(WHAT, || format!("mknodat(_, {name:?})")),
        }
    }

    fn remove(&self, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
        for flags in [UnlinkatFlags::NoRemoveDir, UnlinkatFlags::RemoveDir] {
            match unlinkat(dir, name, flags) {
                Ok(()) | Err(Errno::ENOENT) => return Ok(()),
                Err(Errno::EISDIR) => {}
                done => return done.during(WHAT, || format!("unlinkat(_, {name:?})")),
            }
        }
        Ok(())
    }

    /// Takes everything out of a directory.
    fn empty(&self, wd: i32) -> Result<()> {
        let Ok(dir) = self.open(self.root.as_fd(), &place(wd), OFlag::O_DIRECTORY) else { return Ok(()) };
        let holder = self.directory(&place(wd))?;
        let mut listing = Dir::from_fd(dir).during(WHAT, || "fdopendir(_)".into())?;
        for entry in listing.iter() {
            let entry = entry.during(WHAT, || "getdents64(_)".into())?;
            if ![c".", c".."].contains(&entry.file_name()) {
                self.remove(holder.as_fd(), entry.file_name())?;
            }
        }
        Ok(())
    }

    /// Ends the watches that are left. The queue must be full: nobody is to hear of it.
    pub fn leave(self) -> Result<()> {
        for wd in self.watches.keys() {
            sys::inotify::remove_watch(self.inotify, *wd)
                .during(WHAT, || format!("inotify_rm_watch(_, {wd})"))?;
        }
        Ok(())
    }
}

fn rename(from: (BorrowedFd<'_>, &CStr), to: (BorrowedFd<'_>, &CStr)) -> Result<()> {
    renameat(from.0, from.1, to.0, to.1).during(WHAT, || format!("renameat(_, {:?}, _, {:?})", from.1, to.1))
}

/// Where the file or directory of a watch stands.
fn place(wd: i32) -> CString {
    text(format!("watch{wd}").as_bytes()).unwrap_or_default()
}

fn text(name: &[u8]) -> Result<CString> {
    CString::new(name).map_err(|_| Error::new(format!("{WHAT}: a name contains a zero byte")))
}
