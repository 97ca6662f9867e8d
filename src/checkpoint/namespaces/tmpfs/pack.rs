//! From a directory into a tar.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use flate2::Compression;
use flate2::write::GzEncoder;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};
use tar::{Builder, EntryType, Header};

use super::records::{Attribute, Record, Socket};
use super::{KEPT, XATTR, magic_path};
use crate::checkpoint::error::{Context, Error, Result};
use crate::sys::{ioctl, stat, xattr};

/// Writes everything below `root`, on its own mount, into `to`.
pub fn pack(root: impl AsFd, to: File) -> Result<()> {
    write(root, to, false)
}

/// The same where other mounts lie on it that cannot be taken away: what is below them nobody will see, either. An empty
/// file stands for each.
pub fn pack_visible(root: impl AsFd, to: File) -> Result<()> {
    write(root, to, true)
}

fn write(root: impl AsFd, to: File, covered: bool) -> Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = openat(&root, ".", flags, Mode::empty())
        .during("cannot read the tmpfs", || "openat(_, \".\")".into())?;
    let mount = stat::place(&root).during("cannot read the tmpfs", || "statx(_)".into())?.mount;
    let gzip = GzEncoder::new(io::BufWriter::new(to), Compression::fast());
    let status =
        fstatat(&root, ".", AtFlags::empty()).during("cannot read the tmpfs", || "fstat(_)".into())?;
    let tar = Builder::new(gzip);
    let covered = covered.then_some(status);
    let mut packer = Packer { tar, links: HashMap::new(), more: Vec::new(), mount, covered };
    packer.entry(&status, b"./", root.as_fd(), c".", None)?;
    packer.flags(root.as_fd(), b"./");
    packer.directory(root, b"./")?;
    packer.more()?;
    let failed =
        |e: io::Result<()>| e.during("cannot write the contents of the tmpfs", || "write(_, _, _)".into());
    let gzip = packer.tar.into_inner();
    failed(gzip.and_then(GzEncoder::finish).and_then(|mut buffer| buffer.flush()))
}

struct Packer<W: Write> {
    tar: Builder<W>,
    /// Where files with several names were first seen, by inode.
    links: HashMap<u64, Vec<u8>>,
    /// What a tar has no place for.
    more: Vec<Record>,
    mount: u64,
    /// Other mounts may lie on files; what their places are taken to be like.
    covered: Option<FileStat>,
}

impl<W: Write> Packer<W> {
    /// Everything in a directory; `path` ends in a slash.
    fn directory(&mut self, dir: OwnedFd, path: &[u8]) -> Result<()> {
        let failed = |e: Error| e.path(OsStr::from_bytes(path));
        let copy = dir.try_clone().during("cannot read the directory", || "dup(_)".into())?;
        let mut listing = Dir::from_fd(copy)
            .during("cannot read the directory", || "fdopendir(_)".into())
            .map_err(failed)?;
        let mut names: Vec<CString> = Vec::new();
        for entry in listing.iter() {
            let entry =
                entry.during("cannot read the directory", || "getdents64(_)".into()).map_err(failed)?;
            names.push(entry.file_name().to_owned());
        }
        names.retain(|name| name.as_bytes() != b"." && name.as_bytes() != b"..");
        // The same contents make the same archive.
        names.sort_unstable();
        for name in names {
            let path = [path, name.as_bytes()].concat();
            self.file(dir.as_fd(), &name, &path).map_err(|e| e.path(OsStr::from_bytes(&path)))?;
        }
        Ok(())
    }

    fn file(&mut self, dir: BorrowedFd<'_>, name: &CStr, path: &[u8]) -> Result<()> {
        let status = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .during("cannot read the tmpfs", || format!("newfstatat(_, {name:?}, AT_SYMLINK_NOFOLLOW)"))?;
        let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
        if let Some(mut place) = self.covered.filter(|_| kind != SFlag::S_IFDIR)
            && self.is_covered(dir, name)?
        {
            place.st_mode = libc::S_IFREG | 0o644;
            return self.append(header(&place), path, None, 0, &mut io::empty());
        }
        if kind == SFlag::S_IFSOCK {
            self.more.push(Record::Socket(Socket {
                mode: status.st_mode & 0o7777,
                uid: status.st_uid,
                gid: status.st_gid,
                seconds: u32::try_from(status.st_mtime).unwrap_or(0),
                path: path.to_vec(),
            }));
            for (name, value) in attributes(dir, name)? {
                self.attribute(name, path, value);
            }
            return Ok(());
        }
        if kind != SFlag::S_IFDIR && status.st_nlink > 1 {
            if let Some(first) = self.links.get(&status.st_ino) {
                let target = first.clone();
                let mut header = header(&status);
                header.set_entry_type(EntryType::Link);
                return self.append(header, path, Some(&target), 0, &mut io::empty());
            }
            self.links.insert(status.st_ino, path.to_vec());
        }
        match kind {
            SFlag::S_IFREG => {
                let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NOATIME | OFlag::O_CLOEXEC;
                let file = openat(dir, name, flags, Mode::empty())
                    .during("cannot read the file", || format!("openat(_, {name:?}, O_RDONLY|O_NOFOLLOW)"))?;
                self.flags(file.as_fd(), path);
                self.entry(&status, path, dir, name, Some(File::from(file)))
            }
            SFlag::S_IFDIR => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let child = openat(dir, name, flags, Mode::empty())
                    .during("cannot read the directory", || format!("openat(_, {name:?}, O_DIRECTORY)"))?;
                let path = [path, b"/"].concat();
                let place = stat::place(&child).during("cannot read the directory", || "statx(_)".into())?;
                self.entry(&status, &path, dir, name, None)?;
                if place.mount != self.mount {
                    return Ok(());
                }
                self.flags(child.as_fd(), &path);
                self.directory(child, &path)
            }
            _ => self.entry(&status, path, dir, name, None),
        }
    }

    fn is_covered(&self, dir: BorrowedFd<'_>, name: &CStr) -> Result<bool> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(dir, name, flags, Mode::empty())
            .during("cannot read the tmpfs", || format!("openat(_, {name:?}, O_PATH|O_NOFOLLOW)"))?;
        let place = stat::place(&file).during("cannot read the tmpfs", || "statx(_)".into())?;
        Ok(place.mount != self.mount)
    }

    /// Notes the flags of a file or directory, where the kernel keeps some in a tmpfs.
    fn flags(&mut self, file: BorrowedFd<'_>, path: &[u8]) {
        let flags = ioctl::file_flags(file).unwrap_or(0) & KEPT;
        if flags != 0 {
            self.more.push(Record::Flags(flags, path.to_vec()));
        }
    }

    fn attribute(&mut self, name: CString, path: &[u8], value: Vec<u8>) {
        let path = path.to_vec();
        self.more.push(Record::Attribute(Attribute { name: name.into_bytes(), path, value }));
    }

    /// A global header: what does not know the records in it passes over them.
    fn more(&mut self) -> Result<()> {
        if self.more.is_empty() {
            return Ok(());
        }
        let records: Vec<u8> = self.more.iter().flat_map(Record::encode).collect();
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XGlobalHeader);
        header.set_mode(0o644);
        header.set_size(records.len() as u64);
        self.append(header, b"sockets", None, records.len() as u64, &mut records.as_slice())
    }

    /// One entry with its attributes, and with the bytes of `file`.
    fn entry(
        &mut self,
        status: &FileStat,
        path: &[u8],
        dir: BorrowedFd<'_>,
        name: &CStr,
        file: Option<File>,
    ) -> Result<()> {
        self.records(status, path, dir, name)?;
        let header = header(status);
        match (header.entry_type(), file) {
            (EntryType::Symlink, _) => {
                let target = readlinkat(dir, name)
                    .during("cannot read the link", || format!("readlinkat(_, {name:?})"))?
                    .into_vec();
                self.append(header, path, Some(&target), 0, &mut io::empty())
            }
            (EntryType::Regular, Some(file)) => {
                let size = u64::try_from(status.st_size).unwrap_or(0);
                self.append(header, path, None, size, &mut Exactly { file, left: size })
            }
            _ => self.append(header, path, None, 0, &mut io::empty()),
        }
    }

    /// The PAX records that an entry needs.
    fn records(&mut self, status: &FileStat, path: &[u8], dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        if status.st_mtime_nsec != 0 {
            let time = format!("{}.{:09}", status.st_mtime, status.st_mtime_nsec);
            records.push(("mtime".into(), time.into_bytes()));
        }
        for (name, value) in attributes(dir, name)? {
            match key(&name, &value) {
                Some(key) => records.push((key, value)),
                None => self.attribute(name, path, value),
            }
        }
        if records.is_empty() {
            return Ok(());
        }
        self.tar
            .append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
            .during("cannot write the contents of the tmpfs", || "write(_, _, _)".into())
    }

    /// The raw entry. A name or target that the header has no room for goes before it, the way GNU tar does it.
    fn append(
        &mut self,
        mut header: Header,
        path: &[u8],
        target: Option<&[u8]>,
        size: u64,
        data: &mut dyn io::Read,
    ) -> Result<()> {
        let write = || -> io::Result<()> {
            if let Some(ustar) = header.as_ustar_mut() {
                fit(&mut self.tar, &mut ustar.name, path, b'L')?;
            }
            if let Some(gnu) = header.as_gnu_mut() {
                fit(&mut self.tar, &mut gnu.name, path, b'L')?;
                if let Some(target) = target {
                    fit(&mut self.tar, &mut gnu.linkname, target, b'K')?;
                }
            }
            header.set_size(size);
            header.set_cksum();
            self.tar.append(&header, data)
        };
        write().during("cannot write the contents of the tmpfs", || "write(_, _, _)".into())
    }
}

/// The extended attributes of a file.
fn attributes(dir: BorrowedFd<'_>, name: &CStr) -> Result<Vec<(CString, Vec<u8>)>> {
    let file = openat(dir, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
        .during("cannot read the attributes", || format!("openat(_, {name:?}, O_PATH|O_NOFOLLOW)"))?;
    let file = magic_path(file.as_fd());
    let names = match xattr::list(&file) {
        Err(Errno::EOPNOTSUPP | Errno::EPERM | Errno::EBADF) => Vec::new(),
        names => names.during("cannot list the extended attributes", || format!("listxattr({file:?})"))?,
    };
    let mut attributes = Vec::new();
    for name in names {
        let Ok(key) = CString::new(name) else { continue };
        let value = match xattr::get(&file, &key) {
            // Gone since it was listed, or of a module that denies it.
            Err(Errno::ENODATA | Errno::EOPNOTSUPP) => continue,
            value => value
                .during("cannot read the extended attribute", || format!("getxattr({file:?}, {key:?})"))?,
        };
        attributes.push((key, value));
    }
    Ok(attributes)
}

/// The key of a record for the attribute, if one can hold it so that every reader takes it for what it is: a key
/// ends at its first `=`, and many readers end the value at its first newline.
fn key(name: &CStr, value: &[u8]) -> Option<String> {
    let name = name.to_str().ok().filter(|name| !name.contains(['=', '\n']))?;
    (!value.contains(&b'\n')).then(|| format!("{XATTR}{name}"))
}

/// Puts a name into a header, and the whole of it into an entry of its own where it is too long.
fn fit<W: Write>(tar: &mut Builder<W>, place: &mut [u8], name: &[u8], kind: u8) -> io::Result<()> {
    if name.len() > place.len() {
        let mut long = Header::new_gnu();
        if let Some(gnu) = long.as_gnu_mut() {
            gnu.name[..13].copy_from_slice(b"././@LongLink");
        }
        long.set_entry_type(EntryType::new(kind));
        long.set_mode(0o644);
        long.set_uid(0);
        long.set_gid(0);
        long.set_mtime(0);
        long.set_size(name.len() as u64 + 1);
        long.set_cksum();
        tar.append(&long, [name, b"\0"].concat().as_slice())?;
    }
    let length = name.len().min(place.len());
    place[..length].copy_from_slice(&name[..length]);
    Ok(())
}

fn header(status: &FileStat) -> Header {
    let mut header = Header::new_gnu();
    let kind = match SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFDIR => EntryType::Directory,
        SFlag::S_IFLNK => EntryType::Symlink,
        SFlag::S_IFIFO => EntryType::Fifo,
        SFlag::S_IFCHR => EntryType::Char,
        SFlag::S_IFBLK => EntryType::Block,
        _ => EntryType::Regular,
    };
    header.set_entry_type(kind);
    header.set_mode(status.st_mode & 0o7777);
    header.set_uid(status.st_uid.into());
    header.set_gid(status.st_gid.into());
    header.set_mtime(u64::try_from(status.st_mtime).unwrap_or(0));
    if matches!(kind, EntryType::Char | EntryType::Block) {
        // A GNU header has both fields: neither call can fail.
        let _ = header.set_device_major(libc::major(status.st_rdev));
        let _ = header.set_device_minor(libc::minor(status.st_rdev));
    }
    header
}

/// A file of a size that was promised in the header: longer or shorter would ruin the archive.
struct Exactly {
    file: File,
    left: u64,
}

impl io::Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let n = match want {
            0 => 0,
            _ => self.file.read(&mut buffer[..want])?,
        };
        if n == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(io::Error::other("a file of the tmpfs shrank while it was read"));
        }
        self.left -= n as u64;
        Ok(n)
    }
}
