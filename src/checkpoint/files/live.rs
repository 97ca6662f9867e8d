//! A descriptor of a live process, read from outside.
//!
//! ```text
//!   /proc/PID/fdinfo/N ──> offset, flags, mount, lines of its kind
//!   pidfd_getfd(2)     ──> a duplicate of it, to fstat(2), tee(2), getsockopt(2), ...
//!   /proc/PID/fd/N     ──> its name
//! ```
//!
//! The duplicate is the same open file description: nothing may be done with it that moves the offset or takes data.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nix::fcntl::{OFlag, readlinkat};
use nix::sys::stat::FileStat;

use crate::checkpoint::error::Context;
use crate::checkpoint::files::fdinfo::Fdinfo;
use crate::checkpoint::files::share::{Holder, Key};
use crate::checkpoint::image::FownEntry;
use crate::checkpoint::pieces;
use crate::checkpoint::{Error, Result};
use crate::sys::procfs::{read_open, read_text};
use crate::sys::{fcntl, pidfd, stat};

/// A descriptor of a live process.
#[derive(Debug)]
pub struct Live {
    /// The process, as a pid of this host.
    pub pid: i32,
    /// The process, as the container knows it.
    pub vpid: i32,
    /// Its descriptor.
    pub fd: i32,
    /// A duplicate.
    pub file: OwnedFd,
    /// What readlink(2) prints of it.
    pub link: PathBuf,
    /// What fdinfo prints of it.
    pub info: Fdinfo,
    /// What fstat(2) says of it.
    pub stat: FileStat,
    /// Magic number of its file system.
    pub fs: i64,
}

/// How pids of this host are called inside the container.
pub type Pids = std::collections::BTreeMap<i32, i32>;

impl Live {
    /// Looks at descriptor `fd` of the process behind `handle`. None: it has been closed meanwhile.
    pub fn look(pid: i32, vpid: i32, handle: BorrowedFd<'_>, fd: i32) -> Result<Option<Self>> {
        Self::look_in(&Table::open(pid), (pid, vpid), handle, fd, None)
    }

    fn look_in(
        table: &Table,
        (pid, vpid): (i32, i32),
        handle: BorrowedFd<'_>,
        fd: i32,
        known: Option<&OsStr>,
    ) -> Result<Option<Self>> {
        let name = |e: Error| e.pid(vpid).fd(fd);
        let file = match pidfd::getfd(handle, fd) {
            Err(nix::errno::Errno::EBADF) => return Ok(None),
            other => other
                .during("cannot fetch the descriptor", || format!("pidfd_getfd(pidfd of {pid}, {fd}, 0)"))
                .map_err(name)?,
        };
        let text = match table.info(fd) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other
                .during("cannot read fdinfo", || format!("open(\"/proc/{pid}/fdinfo/{fd}\", O_RDONLY)"))
                .map_err(name)?,
        };
        let info = Fdinfo::parse(&text).map_err(name)?;
        let link = match known {
            Some(known) => known.into(),
            // Not by our duplicate, for which the kernel would have to make an entry first.
            None => match table.name(fd) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                other => other
                    .during("cannot read the descriptor's name", || {
                        format!("readlink(\"/proc/{pid}/fd/{fd}\")")
                    })
                    .map_err(name)?,
            },
        };
        Self::with_link(table, pid, vpid, fd, file, info, link).map(Some).map_err(name)
    }

    /// Looks at a file that this process itself holds, such as one that was found in a socket's queue.
    pub fn own(file: OwnedFd, vpid: i32) -> Result<Self> {
        let fd = file.as_raw_fd();
        let path = format!("/proc/self/fdinfo/{fd}");
        let text = read_text(&path).during("cannot read fdinfo", || format!("open({path:?}, O_RDONLY)"))?;
        let pid = std::process::id().cast_signed();
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}"))
            .during("cannot read the descriptor's name", || format!("readlink(\"/proc/self/fd/{fd}\")"))?;
        Self::with_link(&Table::default(), pid, vpid, fd, file, Fdinfo::parse(&text)?, link)
    }

    /// Looks at a file that was opened by its `name` in `/proc`, maybe with O_PATH: an executable, a directory, a mapping.
    /// `flags`: how it is to be opened. fdinfo would say no more of it, and costs more.
    pub fn named(file: OwnedFd, name: &Path, flags: u32) -> Result<Self> {
        let place =
            stat::place(&file).during("cannot stat the file", || format!("statx({})", file.as_raw_fd()))?;
        let mnt_id = i32::try_from(place.mount)
            .map_err(|_| Error::new("the file's mount has a number that no record can hold").path(name))?;
        let info = Fdinfo { flags, mnt_id, ..Fdinfo::default() };
        let pid = std::process::id().cast_signed();
        Self::with_link(&Table::default(), pid, 0, file.as_raw_fd(), file, info, name.to_owned())
    }

    fn with_link(
        table: &Table,
        pid: i32,
        vpid: i32,
        fd: i32,
        file: OwnedFd,
        info: Fdinfo,
        link: PathBuf,
    ) -> Result<Self> {
        let own = file.as_raw_fd();
        let stat =
            nix::sys::stat::fstat(&file).during("cannot stat the descriptor", || format!("fstat({own})"))?;
        let fs = table.file_system(&file, (info.mnt_id, stat.st_dev))?;
        Ok(Self { pid, vpid, fd, file, link, info, stat, fs })
    }

    /// S_IFREG and so on.
    pub fn format(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// What two descriptors of one open file description agree on.
    pub fn key(&self) -> Key {
        Key { dev: self.stat.st_dev, ino: self.stat.st_ino, flags: self.info.flags, pos: self.info.pos }
    }

    /// This descriptor.
    pub fn holder(&self) -> Holder {
        Holder { pid: self.pid, fd: self.fd }
    }

    /// Is it a file of the anonymous inode file system with this name, as in `anon_inode:[eventfd]`?
    pub fn is_anon(&self, name: &str) -> bool {
        let link = self.link.as_os_str().as_bytes();
        link.strip_prefix(b"anon_inode:").is_some_and(|l| {
            l.strip_prefix(b"[").and_then(|l| l.strip_suffix(b"]")).unwrap_or(l) == name.as_bytes()
        })
    }

    /// Its name without the mark of a removed file, and whether it had the mark.
    pub fn undeleted(&self) -> (PathBuf, bool) {
        let bytes = self.link.as_os_str().as_bytes();
        match bytes.strip_suffix(b" (deleted)") {
            Some(name) => (PathBuf::from(OsString::from_vec(name.to_vec())), true),
            None => (self.link.clone(), false),
        }
    }

    /// Names this descriptor in an error.
    pub fn name(&self, e: Error) -> Error {
        let e = e.pid(self.vpid).fd(self.fd);
        if self.link.is_absolute() { e.path(&self.link) } else { e }
    }

    /// Who is told about I/O on it.
    pub fn fown(&self, pids: &Pids) -> Result<FownEntry> {
        let none = FownEntry { uid: 0, euid: 0, signum: 0, pid_type: 0, pid: 0 };
        if self.info.flags & libc::O_PATH as u32 != 0 {
            return Ok(none);
        }
        let read = || -> nix::Result<_> {
            let owner = fcntl::owner(&self.file)?;
            let signum = fcntl::signal(&self.file)?;
            Ok((owner, signum, if owner.pid == 0 { [0, 0] } else { fcntl::owner_uids(&self.file)? }))
        };
        let told = read();
        if told == Err(nix::errno::Errno::EBADF) {
            // Opened by us with O_PATH, to register a file that is mapped.
            return Ok(none);
        }
        let (owner, signum, [uid, euid]) =
            told.during("cannot read the descriptor's owner", || "fcntl(_, F_GETOWN_EX)".into())?;
        let signum = signum.cast_unsigned();
        if owner.pid == 0 {
            return Ok(FownEntry { signum, ..none });
        }
        // The kernel numbers thread, process, group 0, 1, 2, in this call; images hold its own PIDTYPE_*, which
        // are PID 0, TGID 1, PGID 2, the same numbers.
        match pids.get(&owner.pid) {
            Some(&vpid) => Ok(FownEntry {
                uid,
                euid,
                signum,
                pid_type: owner.kind.cast_unsigned(),
                pid: vpid.cast_unsigned(),
            }),
            // It is gone, or was never inside: nobody inside the container is told any more.
            None => Ok(FownEntry { signum, ..none }),
        }
    }

    /// Opens the same file anew, as an open file description of our own.
    pub fn reopen(&self, flags: OFlag) -> Result<OwnedFd> {
        reopen(self.file.as_fd(), flags).map_err(|e| self.name(e))
    }
}

/// Opens the file behind a descriptor anew.
///
/// Flags may be as F_GETFL tells them: that keeps O_NOFOLLOW and O_TMPFILE, which are about how it was found.
pub fn reopen(fd: BorrowedFd<'_>, mut flags: OFlag) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    flags.remove(OFlag::O_NOFOLLOW);
    if flags.contains(OFlag::O_TMPFILE) {
        flags.remove(OFlag::O_TMPFILE);
    }
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty())
        .during("cannot open the file anew", || format!("open({path:?}, {flags:?})"))
}

/// The numbers of all descriptors of a process, ascending.
pub fn descriptors(pid: i32) -> Result<Vec<i32>> {
    let path = format!("/proc/{pid}/fd");
    let list = || -> std::io::Result<Vec<i32>> {
        let mut fds = Vec::new();
        for entry in std::fs::read_dir(&path)? {
            if let Some(fd) = entry?.file_name().to_str().and_then(|n| n.parse().ok()) {
                fds.push(fd);
            }
        }
        Ok(fds)
    };
    let mut fds = list().during("cannot list the descriptors", || format!("getdents64({path:?})"))?;
    fds.sort_unstable();
    Ok(fds)
}

/// Looks at descriptors of the process behind `handle`, one after the other, until `found` says false. Of many, a second
/// thread looks at some: a piece at a time, whoever is free. Those of which the names are known are not asked for them.
pub fn look_at_all(
    pid: i32,
    vpid: i32,
    handle: BorrowedFd<'_>,
    fds: &[(i32, Option<OsString>)],
    found: &mut dyn FnMut(Result<Option<Live>>) -> Result<bool>,
) -> Result<()> {
    let table = Table::open(pid);
    let pieces: Vec<&[(i32, Option<OsString>)]> = fds.chunks(pieces::LENGTH).collect();
    pieces::in_order(
        &pieces,
        |piece| {
            let look = |(fd, name): &(i32, Option<OsString>)| {
                Live::look_in(&table, (pid, vpid), handle, *fd, name.as_deref())
            };
            piece.iter().map(look).collect()
        },
        |lives: Vec<_>| {
            for live in lives {
                if !found(live)? {
                    return Ok(false);
                }
            }
            Ok(true)
        },
    )
}

/// Where a process's descriptors are looked up, so that not every one begins at the root.
#[derive(Default)]
struct Table {
    pid: i32,
    /// `/proc/PID/fdinfo`.
    infos: Option<OwnedFd>,
    /// `/proc/PID/fd`.
    names: Option<OwnedFd>,
    /// The magic numbers of file systems, by mount and device.
    known: Mutex<BTreeMap<(i32, u64), i64>>,
}

impl Table {
    fn open(pid: i32) -> Self {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let open = |path: &str| nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty()).ok();
        Self {
            pid,
            infos: open(&format!("/proc/{pid}/fdinfo")),
            names: open(&format!("/proc/{pid}/fd")),
            known: Mutex::default(),
        }
    }

    fn info(&self, fd: i32) -> std::io::Result<String> {
        let Some(infos) = &self.infos else { return read_text(format!("/proc/{}/fdinfo/{fd}", self.pid)) };
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = nix::fcntl::openat(infos, fd.to_string().as_str(), flags, nix::sys::stat::Mode::empty())?;
        read_open(&mut file.into())
    }

    /// What `file` lies on, which all files of a mount do.
    fn file_system(&self, file: &OwnedFd, place: (i32, u64)) -> Result<i64> {
        let known = |all: &BTreeMap<(i32, u64), i64>| all.get(&place).copied().filter(|_| place.0 >= 0);
        if let Some(fs) = self.known.lock().ok().and_then(|all| known(&all)) {
            return Ok(fs);
        }
        let told = nix::sys::statfs::fstatfs(file)
            .during("cannot stat the descriptor's file system", || {
                format!("fstatfs({})", file.as_raw_fd())
            })?;
        let fs = told.filesystem_type().0 as i64;
        if let Ok(mut all) = self.known.lock() {
            all.insert(place, fs);
        }
        Ok(fs)
    }

    fn name(&self, fd: i32) -> std::io::Result<PathBuf> {
        match &self.names {
            Some(dir) => Ok(readlinkat(dir, fd.to_string().as_str())?.into()),
            None => std::fs::read_link(format!("/proc/{}/fd/{fd}", self.pid)),
        }
    }
}

/// The descriptors of a process with their names, as far as they can be read.
pub fn names(pid: i32) -> Result<Vec<(i32, OsString)>> {
    let path = format!("/proc/{pid}/fd");
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty())
        .during("cannot list the descriptors", || format!("open({path:?})"))?;
    let name = |fd: i32| Some((fd, readlinkat(&dir, fd.to_string().as_str()).ok()?));
    Ok(descriptors(pid)?.into_iter().filter_map(name).collect())
}

#[cfg(test)]
mod tests {
    #[test]
    fn flags_of_how_a_file_was_found_are_no_hindrance() {
        use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
        let dir = tempfile::tempdir().unwrap();
        let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
        let file = dir.path().join("file");
        for (path, how) in
            [(dir.path(), OFlag::O_TMPFILE), (file.as_path(), OFlag::O_CREAT | OFlag::O_NOFOLLOW)]
        {
            let first = open(path, how | OFlag::O_RDWR | OFlag::O_APPEND, mode).unwrap();
            let told = OFlag::from_bits_retain(fcntl(&first, FcntlArg::F_GETFL).unwrap());
            let again = super::reopen(std::os::fd::AsFd::as_fd(&first), told).unwrap();
            let flags = OFlag::from_bits_retain(fcntl(&again, FcntlArg::F_GETFL).unwrap());
            assert!(flags.contains(OFlag::O_RDWR | OFlag::O_APPEND), "{flags:?}");
            assert!(told.intersects(how - OFlag::O_CREAT), "the kernel has forgotten {how:?}");
        }
    }

    use super::*;

    fn mine(file: OwnedFd) -> Live {
        Live::own(file, 7).unwrap()
    }

    #[test]
    fn a_file_is_described() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let live = mine(file.into());
        assert_eq!(live.link, PathBuf::from("/dev/null"));
        assert_eq!(live.format(), libc::S_IFCHR);
        assert!(!live.undeleted().1);
        assert_eq!(live.fown(&Pids::new()).unwrap().pid, 0);
        let me = std::process::id().cast_signed();
        assert!(descriptors(me).unwrap().contains(&live.fd));
        assert!(names(me).unwrap().contains(&(live.fd, "/dev/null".into())));
        let handle = pidfd::open(me, 0).unwrap();
        let again = Live::look(me, 7, handle.as_fd(), live.fd).unwrap().unwrap();
        assert_eq!(again.key(), live.key());
        assert!(Live::look(me, 7, handle.as_fd(), 99_999).unwrap().is_none());
    }

    #[test]
    fn anonymous_inodes_are_told_by_name() {
        let e = nix::sys::eventfd::EventFd::from_value(3).unwrap();
        let live = mine(e.into());
        assert!(live.is_anon("eventfd"));
        assert!(!live.is_anon("timerfd"));
        assert_eq!(live.info.number("eventfd-count", 16).unwrap(), 3);
    }

    #[test]
    fn an_owner_outside_the_container_is_dropped() {
        let (r, _w) = nix::unistd::pipe().unwrap();
        let me = std::process::id().cast_signed();
        fcntl::set_owner(&r, fcntl::Owner { kind: 1, pid: me }).unwrap();
        fcntl::set_signal(&r, 40).unwrap();
        let live = mine(r);
        let f = live.fown(&Pids::from([(me, 5)])).unwrap();
        assert_eq!((f.pid, f.pid_type, f.signum), (5, 1, 40));
        let f = live.fown(&Pids::new()).unwrap();
        assert_eq!((f.pid, f.signum), (0, 40));
    }
}
