//! `tmpcopyup`: a tmpfs starts with a copy of what it hides.
//!
//! Both ends are descriptors, and the walk never follows a link, so a hostile tree can make the copy strange but
//! cannot make it read or write elsewhere. Owners, modes, times of directories and files are kept; devices and sockets
//! are left out, as they cannot matter to a tmpfs that starts a container.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat, fstatat, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

use crate::sys::{Context, Result};

/// Copies the contents of directory `from` into the detached mount `to`.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd) -> Result<()> {
    copy_directory(from.as_fd(), to.as_fd())
}

fn copy_directory(from: impl AsFd, to: impl AsFd) -> Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut dir = Dir::from_fd(openat(&from, ".", flags, Mode::empty()).context(|| "open directory")?)
        .context(|| "read directory")?;
    let names: Vec<_> = dir
        .iter()
        .map(|entry| entry.map(|e| e.file_name().to_owned()))
        .collect::<nix::Result<_>>()
        .context(|| "read directory")?;
    for name in names.iter().filter(|n| !matches!(n.to_bytes(), b"." | b"..")) {
        let shown = || name.to_string_lossy().into_owned();
        copy_entry(&from, &to, name).context(shown)?;
    }
    Ok(())
}

fn copy_entry(from: impl AsFd, to: impl AsFd, name: &std::ffi::CStr) -> Result<()> {
    let stat = fstatat(&from, name, AtFlags::AT_SYMLINK_NOFOLLOW).context(|| "fstatat")?;
    let mode = Mode::from_bits_truncate(stat.st_mode);
    let read = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFDIR => {
            mkdirat(&to, name, mode).context(|| "mkdirat")?;
            let from = openat(&from, name, read | OFlag::O_DIRECTORY, Mode::empty()).context(|| "openat")?;
            let into = openat(&to, name, read | OFlag::O_DIRECTORY, Mode::empty()).context(|| "openat")?;
            copy_directory(from, into)?;
        }
        SFlag::S_IFREG => {
            let mut from = File::from(openat(&from, name, read, Mode::empty()).context(|| "openat")?);
            let write = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
            let mut into = File::from(openat(&to, name, write, mode).context(|| "openat")?);
            // What is there may have been replaced since the fstatat above.
            if fstat(&from).context(|| "fstat")?.st_ino == stat.st_ino {
                io::copy(&mut from, &mut into).context(|| "copy")?;
            }
        }
        SFlag::S_IFLNK => {
            let target = readlinkat(&from, name).context(|| "readlinkat")?;
            symlinkat(target.as_os_str(), &to, name).context(|| "symlinkat")?;
        }
        SFlag::S_IFIFO => mknodat(&to, name, SFlag::S_IFIFO, mode, 0).context(|| "mknodat")?,
        _ => return Ok(()),
    }
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    match fchownat(&to, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW) {
        // An owner that is not mapped in our user namespace.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(e) => return Err(e).context(|| "fchownat"),
    }
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFLNK {
        fchmodat(&to, name, mode, FchmodatFlags::FollowSymlink).context(|| "fchmodat")?;
    }
    Ok(())
}
