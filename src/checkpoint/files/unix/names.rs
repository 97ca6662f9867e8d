//! Giving sockets their names again.
//!
//! ```text
//!   abstract                     bind(2): the namespace of the network is what matters
//!   a path that is there         in the container's root, or the root or directory that `name_dir` says
//!   a path that is gone,         in an empty file system that nobody else sees: the name is the same, and nothing
//!   or somebody else's           in the container is touched
//! ```
//!
//! A bound socket is reached by its file, whatever has become of the path: connect(2) to the number of an O_PATH
//! descriptor, with /proc/self/fd as the working directory.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};

use super::more::{Credentials, More};
use super::place::{is_path, path, text};
use crate::checkpoint::error::Context;
use crate::checkpoint::image::{UnixSkEntry, path_of};
use crate::checkpoint::{Error, Result};
use crate::sys::{credentials, mount, sockopt};

const WHAT: &str = "cannot make a unix socket";

/// How a bound socket is reached.
#[derive(Debug)]
pub enum Reach {
    /// By its abstract name, as bind(2) takes it.
    Name(Vec<u8>),
    /// By its file, opened with O_PATH.
    File(OwnedFd),
}

/// A thread that has its root, its working directory and its ids to itself, in the container's network namespace.
pub struct Names<'a> {
    root: BorrowedFd<'a>,
    descriptors: OwnedFd,
    scratch: Option<OwnedFd>,
    ids: (u32, u32),
}

fn directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, Mode::empty())
        .during(WHAT, || format!("open({path:?}, O_PATH|O_DIRECTORY)"))
}

fn chdir(path: &Path) -> Result<()> {
    nix::unistd::chdir(path).during(WHAT, || format!("chdir({path:?})"))
}

fn enter(root: BorrowedFd<'_>) -> Result<()> {
    nix::unistd::fchdir(root).during(WHAT, || "fchdir(_)".into())?;
    nix::unistd::chroot(".").during(WHAT, || "chroot(\".\")".into())
}

impl<'a> Names<'a> {
    /// Takes the calling thread for it. `root` is the container's.
    pub fn on_this_thread(root: BorrowedFd<'a>) -> Result<Self> {
        let descriptors = directory(Path::new("/proc/self/fd"))?;
        unshare(CloneFlags::CLONE_FS).during(WHAT, || "unshare(CLONE_FS)".into())?;
        let ids = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        Ok(Self { root, descriptors, scratch: None, ids })
    }

    /// Looks paths up from here.
    pub fn in_root(&mut self, root: BorrowedFd<'a>) {
        self.root = root;
    }

    /// Does something that others are to see as done by that user.
    pub fn as_user<T>(&self, who: Option<Credentials>, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let (uid, gid) = who.map_or(self.ids, |who| (who.uid, who.gid));
        if (uid, gid) == self.ids {
            return work();
        }
        let set = |uid, gid| {
            credentials::set_thread_ids(uid, gid)
                .during(WHAT, || format!("setresuid(-1, {uid}, -1), setresgid(-1, {gid}, -1)"))
        };
        credentials::keep_capabilities()
            .during(WHAT, || "prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)".into())?;
        set(uid, gid)?;
        let result = work();
        set(self.ids.0, self.ids.1)?;
        result
    }

    /// Binds a socket as it was bound.
    pub fn bind(&mut self, fd: &OwnedFd, e: &UnixSkEntry, more: Option<&More>) -> Result<Reach> {
        if !is_path(&e.name) || e.deleted == Some(true) {
            return self.bind_unseen(fd, &e.name);
        }
        enter(self.root)?;
        if let Some(dir) = &e.name_dir {
            let dir = path_of(dir);
            if path(&e.name).is_absolute() {
                enter(directory(dir)?.as_fd())?;
            } else {
                chdir(dir)?;
            }
        }
        let path = path(&e.name);
        remove(path)?;
        call(fd, &e.name).map_err(|e| match e.errno() {
            Some(Errno::EADDRINUSE) => e.remedy("something that is no socket has this path; move it away"),
            Some(Errno::ENOENT) => e.remedy("the new root file system needs its directory"),
            _ => e,
        })?;
        if let Some(perms) = &e.file_perms {
            nix::unistd::fchownat(
                AT_FDCWD,
                path,
                Some(perms.uid.into()),
                Some(perms.gid.into()),
                nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
            )
            .during(WHAT, || format!("lchown({path:?}, {}, {})", perms.uid, perms.gid))?;
            let mode = Mode::from_bits_truncate(perms.mode & 0o7777);
            fchmodat(AT_FDCWD, path, mode, FchmodatFlags::FollowSymlink)
                .during(WHAT, || format!("chmod({path:?}, {mode:?})"))?;
        }
        let file = hold(path)?;
        if let Some(now) = more.and_then(|more| more.file.as_ref()) {
            remove(Path::new(now))?;
            std::fs::rename(path, now).during(WHAT, || format!("rename({path:?}, {now:?})"))?;
        }
        Ok(Reach::File(file))
    }

    /// Binds a socket to a name whose file nobody shall see.
    pub fn bind_unseen(&mut self, fd: &OwnedFd, name: &[u8]) -> Result<Reach> {
        if !is_path(name) {
            call(fd, name).map_err(|e| match e.errno() {
                Some(Errno::EADDRINUSE) => e.remedy("another program uses this name; stop it first"),
                _ => e,
            })?;
            return Ok(Reach::Name(name.to_vec()));
        }
        let scratch = match self.scratch.take() {
            Some(scratch) => scratch,
            None => empty()?,
        };
        let scratch = self.scratch.insert(scratch);
        enter(scratch.as_fd())?;
        let path = path(name);
        let bytes = path.as_os_str().as_bytes();
        for (at, _) in bytes.iter().enumerate().filter(|(at, byte)| *at > 0 && **byte == b'/') {
            let parent = Path::new(<std::ffi::OsStr as OsStrExt>::from_bytes(&bytes[..at]));
            match nix::unistd::mkdir(parent, Mode::S_IRWXU) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(Error::new(WHAT).call(format!("mkdir({parent:?})"), errno)),
            }
        }
        call(fd, name)?;
        let file = hold(path)?;
        std::fs::remove_file(path).during(WHAT, || format!("unlink({path:?})"))?;
        Ok(Reach::File(file))
    }

    /// The address of a socket, good as long as nothing else is bound.
    pub fn address(&self, to: &Reach) -> Result<Vec<u8>> {
        match to {
            Reach::Name(name) => Ok(name.clone()),
            Reach::File(file) => {
                nix::unistd::fchdir(&self.descriptors).during(WHAT, || "fchdir(/proc/self/fd)".into())?;
                Ok(format!("{}\0", file.as_raw_fd()).into_bytes())
            }
        }
    }

    /// Connects to a socket.
    pub fn connect(&self, from: &OwnedFd, to: &Reach) -> Result<()> {
        let name = self.address(to)?;
        sockopt::connect(from, &address(&name)).during(WHAT, || format!("connect(_, {:?})", text(&name)))
    }

    /// Connects to a name that the container knows, and that is none of its sockets'.
    pub fn connect_out(&self, from: &OwnedFd, name: &[u8]) -> Result<()> {
        enter(self.root)?;
        sockopt::connect(from, &address(name))
            .during(WHAT, || format!("connect(_, {:?})", text(name)))
            .map_err(|e| e.remedy("the socket outside the container must be there, under the same name"))
    }
}

/// An address for bind(2) and connect(2).
fn address(name: &[u8]) -> Vec<u8> {
    [&(libc::AF_UNIX as u16).to_ne_bytes(), name].concat()
}

fn call(fd: &OwnedFd, name: &[u8]) -> Result<()> {
    sockopt::bind(fd, &address(name)).during(WHAT, || format!("bind(_, {:?})", text(name)))
}

fn hold(path: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, Mode::empty()).during(WHAT, || format!("open({path:?}, O_PATH|O_NOFOLLOW)"))
}

/// Removes the file of a socket, which outlived the checkpointed process, and nothing but a socket.
fn remove(path: &Path) -> Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            std::fs::remove_file(path).during(WHAT, || format!("unlink({path:?})"))
        }
        _ => Ok(()),
    }
}

/// An empty file system that is mounted nowhere.
fn empty() -> Result<OwnedFd> {
    let make = || mount::FsContext::open(c"tmpfs")?.mount(0);
    make().during(WHAT, || "fsmount(fsopen(\"tmpfs\"))".into())
}
