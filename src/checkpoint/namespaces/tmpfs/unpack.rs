//! From a tar into a directory. The archive is hostile input: no name leads out of the directory, no link is
//! followed, and no device appears that the container could not have made.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use flate2::bufread::GzDecoder;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat, mknodat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, linkat, symlinkat, unlinkat};
use tar::{Archive, Entry, EntryType};

use super::attributes::{Meta, set_attribute};
use super::records::{Attribute, Record, Socket};
use super::{KEPT, broken, magic_path};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::user::Owners;
use crate::sys::hugetlb::Target;
use crate::sys::ioctl;
use crate::sys::resolve::open_beneath;

/// More than GNU tar appends to fill its last block.
const PADDING_MAX: u64 = 1 << 20;

/// More than the records of all sockets of a container take.
const GLOBAL_MAX: u64 = 1 << 24;

/// More than the headers of one entry take: its name, its attributes, where its bytes lie.
const HEADERS_MAX: u64 = 1 << 25;

/// What an archive may do.
#[derive(Debug, Default)]
pub struct Policy {
    /// Device files may be made that are not there yet.
    pub devices: bool,
    /// Paths that other mounts lie on. They are neither replaced nor removed: that would take the mounts away.
    pub keep: BTreeSet<PathBuf>,
    /// Whose the files are on this host.
    pub owners: Owners,
}

impl Policy {
    /// Whose it is on this host.
    pub(super) fn owner(&self, uid: u32, gid: u32) -> Result<(Uid, Gid)> {
        Ok((Uid::from_raw(self.owners.user(uid)?), Gid::from_raw(self.owners.group(gid)?)))
    }
}

/// Reads an archive that is not to be unpacked to its end: damage is told even where nothing would come of it.
pub fn verify(from: File) -> Result<()> {
    let mut archive = GzDecoder::new(BufReader::new(from));
    io::copy(&mut archive, &mut io::sink()).map_err(broken)?;
    zeros(archive.into_inner())
}

/// In a user namespace GNU tar fills the last block of what gzip has made, too.
fn zeros(behind: impl Read) -> Result<()> {
    let mut rest = Vec::new();
    behind.take(PADDING_MAX).read_to_end(&mut rest).map_err(broken)?;
    match rest.iter().all(|byte| *byte == 0) && (rest.len() as u64) < PADDING_MAX {
        true => Ok(()),
        false => Err(broken("they go on after their end")),
    }
}

/// Makes what is below `root` equal to the archive.
pub fn unpack(root: impl AsFd, from: File, policy: &Policy) -> Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = openat(&root, ".", flags, Mode::empty())
        .during("cannot fill the tmpfs", || "openat(_, \".\")".into())?;
    let mut unpacker = Unpacker {
        root,
        policy,
        seen: BTreeSet::new(),
        directories: Vec::new(),
        attributes: Vec::new(),
        flags: Vec::new(),
    };
    let left = Cell::new(HEADERS_MAX);
    let mut archive = Archive::new(Rationed { from: GzDecoder::new(BufReader::new(from)), left: &left });
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        left.set(u64::MAX);
        if entry.header().entry_type() == EntryType::XGlobalHeader {
            unpacker.records(&mut entry)?;
        } else {
            let path = inward(&entry.path_bytes())?;
            unpacker.entry(&mut entry, &path).map_err(|e| e.path(&path))?;
            unpacker.seen.insert(path);
        }
        // What nobody wanted to have of it.
        io::copy(&mut entry, &mut io::sink()).map_err(broken)?;
        left.set(HEADERS_MAX);
    }
    // The checksum of the whole stands behind the padding.
    let mut rest = archive.into_inner().from.take(PADDING_MAX);
    if io::copy(&mut rest, &mut io::sink()).map_err(broken)? == PADDING_MAX {
        return Err(broken("they go on after their end"));
    }
    zeros(rest.into_inner().into_inner())?;
    if !unpacker.seen.contains(Path::new("")) {
        return Err(Error::new("the contents of the tmpfs are cut off: they lack their root"));
    }
    let top = unpacker.root.try_clone().during("cannot fill the tmpfs", || "dup(_)".into())?;
    unpacker.remove_others(top.into(), Path::new(""))?;
    // Innermost first: each change in a directory sets its time.
    while let Some((path, meta)) = unpacker.directories.pop() {
        let at = unpacker.open(&path, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        meta.apply(at.as_fd()).map_err(|e| e.path(&path))?;
    }
    while let Some(Attribute { name, path, mut value }) = unpacker.attributes.pop() {
        let path = inward(&path)?;
        let file = unpacker.open(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
        let name = CString::new(name).map_err(|_| broken("an attribute has a zero byte in its name"))?;
        policy.owners.attribute(&name, &mut value).map_err(|e| e.path(&path))?;
        set_attribute(&magic_path(file.as_fd()), &name, &value).map_err(|e| e.path(&path))?;
    }
    while let Some((path, flags)) = unpacker.flags.pop() {
        let file = unpacker.open(&path, OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK)?;
        let now = ioctl::file_flags(&file).unwrap_or(0);
        ioctl::set_file_flags(&file, now & !KEPT | flags & KEPT)
            .during("cannot set the flags of a file", || format!("ioctl(_, FS_IOC_SETFLAGS, {flags:#x})"))
            .map_err(|e| e.path(&path).remedy("this needs CAP_LINUX_IMMUTABLE, and Linux 6.0"))?;
    }
    Ok(())
}

/// Hands on no more of an archive than is left: `tar` keeps the headers of an entry in memory, however long they are.
struct Rationed<'a, R> {
    from: R,
    left: &'a Cell<u64>,
}

impl<R: Read> Read for Rationed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left.get()).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 && !buffer.is_empty() {
            return Err(io::Error::other("a header goes on and on"));
        }
        let n = self.from.read(&mut buffer[..most])?;
        self.left.set(self.left.get() - n as u64);
        Ok(n)
    }
}

/// The path of an entry below the root, without `.`; one that would leave the root is refused.
fn inward(bytes: &[u8]) -> Result<PathBuf> {
    let mut inner = PathBuf::new();
    for part in Path::new(OsStr::from_bytes(bytes)).components() {
        match part {
            Component::Normal(name) => inner.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Error::new("the contents of the tmpfs name a file outside of it")
                    .path(OsStr::from_bytes(bytes)));
            }
        }
    }
    Ok(inner)
}

struct Unpacker<'a> {
    root: OwnedFd,
    policy: &'a Policy,
    seen: BTreeSet<PathBuf>,
    directories: Vec<(PathBuf, Meta)>,
    /// Attributes that stand behind all entries.
    attributes: Vec<Attribute>,
    /// Flags of chattr(1), which are set when nothing is to be written any more.
    flags: Vec<(PathBuf, u32)>,
}

impl Unpacker<'_> {
    fn open(&self, path: &Path, flags: OFlag) -> Result<OwnedFd> {
        open_beneath(&self.root, path, flags)
            .during("cannot fill the tmpfs", || format!("openat2(_, {path:?}, {flags:?}, RESOLVE_BENEATH)"))
            .map_err(|e| e.path(path))
    }

    fn entry<R: Read>(&mut self, entry: &mut Entry<'_, R>, path: &Path) -> Result<()> {
        let meta = Meta::of(entry, self.policy)?;
        let Some(name) = path.file_name() else {
            self.directories.push((PathBuf::new(), meta));
            return Ok(());
        };
        let parent = self.open(path.parent().unwrap_or(Path::new("")), OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        let parent = parent.as_fd();
        let mounted = self.policy.keep.contains(path);
        match entry.header().entry_type() {
            EntryType::Directory => {
                if !mounted && self.settle(parent, name, path, SFlag::S_IFDIR)?.is_none() {
                    mkdirat(parent, name, Mode::S_IRWXU)
                        .during("cannot fill the tmpfs", || format!("mkdirat({path:?})"))?;
                }
                self.directories.push((path.to_owned(), meta));
                return Ok(());
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                if !mounted {
                    self.settle(parent, name, path, SFlag::S_IFREG)?;
                }
                write_file(parent, name, entry, mounted)?;
            }
            EntryType::Symlink => {
                let target = OsStr::from_bytes(&entry.link_name_bytes().unwrap_or_default()).to_owned();
                let there = self.settle(parent, name, path, SFlag::S_IFLNK)?;
                let same = there.is_some() && readlinkat(parent, name).is_ok_and(|t| t == target);
                if there.is_some() && !same {
                    self.remove(parent, name, path)?;
                }
                if !same {
                    symlinkat(target.as_os_str(), parent, name)
                        .during("cannot fill the tmpfs", || format!("symlinkat({target:?}, _, {path:?})"))?;
                }
            }
            EntryType::Link => {
                let target = inward(&entry.link_name_bytes().unwrap_or_default())?;
                let from =
                    self.open(target.parent().unwrap_or(Path::new("")), OFlag::O_PATH | OFlag::O_DIRECTORY)?;
                let first = target.file_name().unwrap_or_default();
                self.remove(parent, name, path)?;
                return linkat(&from, first, parent, name, LinkatFlags::empty())
                    .during("cannot fill the tmpfs", || format!("linkat(_, {target:?}, _, {path:?}, 0)"));
            }
            EntryType::Fifo => self.special(entry, parent, name, path, SFlag::S_IFIFO)?,
            EntryType::Char => self.special(entry, parent, name, path, SFlag::S_IFCHR)?,
            EntryType::Block => self.special(entry, parent, name, path, SFlag::S_IFBLK)?,
            other => {
                return Err(Error::new(format!(
                    "the contents of the tmpfs have an entry of the type {other:?}"
                )));
            }
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(parent, name, flags, Mode::empty())
            .during("cannot fill the tmpfs", || format!("openat(_, {name:?}, O_PATH|O_NOFOLLOW)"))?;
        meta.apply(file.as_fd())
    }

    /// What is there of the right kind; anything else in its place is removed.
    fn settle(
        &self,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        path: &Path,
        kind: SFlag,
    ) -> Result<Option<FileStat>> {
        match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(there) if SFlag::from_bits_truncate(there.st_mode) & SFlag::S_IFMT == kind => Ok(Some(there)),
            Ok(_) => self.remove(dir, name, path).map(|()| None),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e).during("cannot fill the tmpfs", || format!("newfstatat(_, {name:?})")),
        }
    }

    /// What the global header tells of. Attributes and flags are set when everything is in place.
    fn records<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<()> {
        let mut header = Vec::new();
        if entry.take(GLOBAL_MAX).read_to_end(&mut header).map_err(broken)? as u64 == GLOBAL_MAX {
            return Err(broken("a header goes on and on"));
        }
        for record in Record::decode(&header)? {
            match record {
                Record::Socket(socket) => self.socket(&socket)?,
                Record::Flags(flags, path) => self.flags.push((inward(&path)?, flags)),
                Record::Attribute(attribute) => self.attributes.push(attribute),
            }
        }
        Ok(())
    }

    /// Whoever is bound to it makes it anew.
    fn socket(&mut self, socket: &Socket) -> Result<()> {
        let path = inward(&socket.path)?;
        let name = path.file_name().ok_or_else(|| broken("a socket has no name"))?;
        let parent = self.open(path.parent().unwrap_or(Path::new("")), OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        if self.settle(parent.as_fd(), name, &path, SFlag::S_IFSOCK)?.is_none() {
            mknodat(&parent, name, SFlag::S_IFSOCK, Mode::S_IRUSR, 0)
                .during("cannot fill the tmpfs", || format!("mknodat(_, {name:?}, S_IFSOCK)"))?;
        }
        let file = self.open(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
        let (uid, gid) = self.policy.owner(socket.uid, socket.gid)?;
        let meta = Meta {
            uid,
            gid,
            mode: Mode::from_bits_truncate(socket.mode),
            modified: TimeSpec::new(socket.seconds.into(), 0),
            xattrs: Vec::new(),
        };
        meta.apply(file.as_fd()).map_err(|e| e.path(&path))?;
        self.seen.insert(path);
        Ok(())
    }

    fn special<R: Read>(
        &self,
        entry: &Entry<'_, R>,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        path: &Path,
        kind: SFlag,
    ) -> Result<()> {
        let number = |n: io::Result<Option<u32>>| n.ok().flatten().unwrap_or(0);
        let (major, minor) = (number(entry.header().device_major()), number(entry.header().device_minor()));
        let dev = if kind == SFlag::S_IFIFO { 0 } else { libc::makedev(major, minor) };
        if let Some(there) = self.settle(dir, name, path, kind)? {
            if there.st_rdev == dev {
                return Ok(());
            }
            self.remove(dir, name, path)?;
        }
        // What everybody may make, as a layer's mark of a removed file.
        let whiteout = kind == SFlag::S_IFCHR && dev == 0;
        if kind != SFlag::S_IFIFO && !whiteout && !self.policy.devices {
            return Err(Error::new(format!(
                "the checkpoint has the device {major}:{minor}, which config.json does not give"
            ))
            .remedy("give the container that device, or the capability CAP_MKNOD"));
        }
        mknodat(dir, name, kind, Mode::S_IRUSR, dev)
            .during("cannot fill the tmpfs", || format!("mknodat(_, {name:?}, {kind:?}, {major}:{minor})"))
    }

    /// Removes a name, whatever it is, unless a mount lies on it or below.
    fn remove(&self, dir: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<()> {
        if self.policy.keep.range(path.to_owned()..).next().is_some_and(|kept| kept.starts_with(path)) {
            return Err(Error::new(
                "config.json mounts something where the checkpoint has another kind of file",
            )
            .path(path));
        }
        match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            Err(Errno::EISDIR) => {}
            Err(e) => return Err(e).during("cannot fill the tmpfs", || format!("unlinkat(_, {name:?}, 0)")),
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let inner = openat(dir, name, flags, Mode::empty())
            .during("cannot fill the tmpfs", || format!("openat(_, {name:?}, O_DIRECTORY)"))?;
        for child in names(&inner)? {
            self.remove(inner.as_fd(), &child, &path.join(&child))?;
        }
        unlinkat(dir, name, UnlinkatFlags::RemoveDir)
            .during("cannot fill the tmpfs", || format!("unlinkat(_, {name:?}, AT_REMOVEDIR)"))
    }

    /// Removes what the archive does not have.
    fn remove_others(&self, dir: File, path: &Path) -> Result<()> {
        for name in names(dir.as_fd())? {
            let path = path.join(&name);
            let mounted =
                self.policy.keep.range(path.clone()..).next().is_some_and(|kept| kept.starts_with(&path));
            if !self.seen.contains(&path) {
                if !mounted {
                    self.remove(dir.as_fd(), &name, &path)?;
                }
                continue;
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            match openat(&dir, name.as_os_str(), flags, Mode::empty()) {
                Ok(inner) => self.remove_others(inner.into(), &path)?,
                Err(Errno::ENOTDIR | Errno::ELOOP | Errno::ENXIO) => {}
                Err(e) => {
                    return Err(e)
                        .during("cannot fill the tmpfs", || format!("openat(_, {path:?}, O_DIRECTORY)"));
                }
            }
        }
        Ok(())
    }
}

fn names(dir: impl AsFd) -> Result<Vec<std::ffi::OsString>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let list = || -> nix::Result<Vec<std::ffi::OsString>> {
        let mut listing = Dir::openat(dir, ".", flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in listing.iter() {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(std::ffi::OsString::from_vec(name));
            }
        }
        Ok(names)
    };
    list().during("cannot read the directory", || "getdents64(_)".into())
}

/// Writes the bytes of an entry; zeros become holes, which cost the tmpfs nothing.
fn write_file<R: Read>(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    entry: &mut Entry<'_, R>,
    mounted: bool,
) -> Result<()> {
    let create = if mounted { OFlag::empty() } else { OFlag::O_CREAT };
    let flags =
        OFlag::O_RDWR | create | OFlag::O_TRUNC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = openat(dir, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
        .during("cannot fill the tmpfs", || format!("openat(_, {name:?}, {flags:?})"))?;
    let file = File::from(file);
    let target = Target::new(&file).during("cannot fill the tmpfs", || "fstatfs(_)".into())?;
    if target.is_huge() {
        let size = entry.size();
        file.set_len(size).during("cannot fill the hugetlbfs", || format!("ftruncate(_, {size})"))?;
    }
    let mut buffer = vec![0; if target.is_huge() { 1 << 20 } else { 1 << 16 }];
    let mut at = 0;
    loop {
        let n = entry.read(&mut buffer).map_err(broken)?;
        if n == 0 {
            break;
        }
        if buffer[..n].iter().any(|byte| *byte != 0) {
            target
                .write_all_at(&buffer[..n], at)
                .during("cannot fill the tmpfs", || format!("pwrite64(_, _, {n}, {at})"))?;
        }
        at += n as u64;
    }
    file.set_len(at).during("cannot fill the tmpfs", || format!("ftruncate(_, {at})"))
}
