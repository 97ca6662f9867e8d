//! Where a file is whose name is not known: from what the kernel tells of a watch to a path.
//!
//! ```text
//!   sdev, ino, handle ──open_by_handle_at──> a file with a name          ext4, xfs, btrfs, tmpfs
//!        │ a file system that opens no handles (overlay)
//!        ▼
//!   what the process has open, and the directories above it, and the mounts
//!        │ none of these
//!        ▼
//!   every file on the mounts of that device
//! ```
//!
//! A path counts only when a watch of our own, set on it, looks the same: the kernel's inode number of an overlay's
//! file need not be the one that stat(2) gives.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{fstat, fstatat};

use crate::checkpoint::error::Context;
use crate::checkpoint::files::Surroundings;
use crate::checkpoint::files::fdinfo::{Fdinfo, word};
use crate::checkpoint::files::live::descriptors;
use crate::checkpoint::image::{FhEntry, device};
use crate::checkpoint::namespaces::mountinfo::{self, Mount};
use crate::checkpoint::{Error, Result};
use crate::sys::{self, handle, resolve, stat};

const WHAT: &str = "cannot find the files that are watched";
/// The words of a handle in an image: CRIU expects no fewer.
const WORDS: usize = 16;
/// How many names a search may look at.
const LIMIT: usize = 4_000_000;

/// What the kernel tells of a watched file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Device, in the kernel's encoding.
    pub dev: u32,
    /// Inode number.
    pub ino: u64,
    /// Type of its handle.
    pub kind: i32,
    /// Its handle.
    pub handle: Vec<u8>,
}

impl Wanted {
    /// Reads an `inotify` line of fdinfo, without its first word.
    pub fn parse(line: &str) -> Result<Self> {
        let small = |key| word(line, key, 16).map(|n| n as u32);
        let text = line.rsplit_once("f_handle:").map_or("", |(_, h)| h.trim());
        let mut handle = Vec::new();
        for pair in text.as_bytes().chunks(2) {
            let byte = std::str::from_utf8(pair).ok().and_then(|p| u8::from_str_radix(p, 16).ok());
            handle.push(byte.ok_or_else(|| Error::new(format!("a file handle not understood: {text:?}")))?);
        }
        Ok(Self {
            dev: small("sdev")?,
            ino: word(line, "ino", 16)?,
            kind: small("fhandle-type").unwrap_or(0).cast_signed(),
            handle,
        })
    }

    /// Its record, without the path.
    pub fn entry(&self) -> FhEntry {
        let mut bytes = [0; WORDS * 8];
        let length = self.handle.len().min(bytes.len());
        bytes[..length].copy_from_slice(&self.handle[..length]);
        let words = bytes.chunks_exact(8).map(|c| c.try_into().map_or(0, u64::from_ne_bytes));
        FhEntry {
            bytes: length as u32,
            r#type: self.kind.cast_unsigned(),
            handle: words.collect(),
            ..FhEntry::default()
        }
    }

    /// The refusal of one that has no path; `who` watches it.
    pub fn nameless(&self, who: &str) -> Error {
        let (major, minor) = device::from_kernel(self.dev);
        Error::new(format!(
            "{who} watches a file that has no name in the container: inode {} of device {major}:{minor}",
            self.ino
        ))
        .remedy("it was removed, or lies under another mount; let the program remove the watch")
    }

    fn is(&self, other: &Self) -> bool {
        (self.dev, self.ino) == (other.dev, other.ino)
    }
}

/// Where files were found before: what the check has found after a long search is tried first when all are frozen.
static FOUND: Mutex<BTreeMap<(u32, u64), PathBuf>> = Mutex::new(BTreeMap::new());

/// The paths, from the container's root, of files that process `pid` watches; None for one that has none.
pub fn find(around: &Surroundings<'_>, pid: i32, wanted: &[Wanted]) -> Result<Vec<Option<PathBuf>>> {
    let mut mounts = mountinfo::of(&around.init.to_string())?;
    mounts.retain(|m| wanted.iter().any(|w| w.dev == m.dev));
    let probe = new_probe()?;
    let mut search = Search { root: around.root, wanted, found: vec![None; wanted.len()], probe };
    let found = std::thread::scope(|scope| {
        let by_handle = || by_handles(around.root, &mounts, wanted);
        scope.spawn(by_handle).join().unwrap_or_else(|_| Err(Error::new(WHAT)))
    })?;
    search.found = found;
    if !search.is_done() {
        search.try_known(pid, &mounts)?;
    }
    search.try_found_before()?;
    for mount in &mounts {
        let missing = search.missing().any(|w| w.dev == mount.dev);
        if missing && mount.fstype != "proc" {
            search.walk(mount)?;
        }
    }
    search.remember();
    Ok(search.found)
}

/// A file that is to be watched, for its mark to be set on.
pub fn hold(root: &OwnedFd, path: &Path) -> Result<OwnedFd> {
    resolve::open_in_root(root, path, OFlag::O_PATH | OFlag::O_NOFOLLOW)
        .during("cannot watch a file", || format!("openat2(root, {path:?}, O_PATH, RESOLVE_IN_ROOT)"))
}

/// Another name of an open file, which has lost the one that it was opened by.
pub fn other_name(around: &Surroundings<'_>, file: &OwnedFd) -> Result<Option<PathBuf>> {
    let inotify = new_probe()?;
    let Some(wanted) = probe(&inotify, file)? else { return Ok(None) };
    Ok(find(around, around.init, &[wanted])?.pop().flatten())
}

fn new_probe() -> Result<OwnedFd> {
    sys::inotify::init().during(WHAT, || "inotify_init1(IN_CLOEXEC)".into())
}

/// What the kernel tells of a watch on this file.
fn probe(inotify: &OwnedFd, file: &OwnedFd) -> Result<Option<Wanted>> {
    let Ok(watch) = sys::inotify::add_watch(inotify, file, libc::IN_DELETE_SELF) else {
        return Ok(None);
    };
    let path = format!("/proc/self/fdinfo/{}", inotify.as_raw_fd());
    let text = std::fs::read_to_string(&path).during(WHAT, || format!("open({path:?}, O_RDONLY)"))?;
    let seen = Fdinfo::parse(&text)?.field("inotify").map(Wanted::parse).transpose();
    sys::inotify::remove_watch(inotify, watch).during(WHAT, || format!("inotify_rm_watch(_, {watch})"))?;
    seen
}

/// Opens handles, on a thread that walks from mount to mount: its working directory is where they are looked up.
fn by_handles(root: &OwnedFd, mounts: &[Mount], wanted: &[Wanted]) -> Result<Vec<Option<PathBuf>>> {
    unshare(CloneFlags::CLONE_FS).during(WHAT, || "unshare(CLONE_FS)".into())?;
    let mut found = vec![None; wanted.len()];
    for mount in mounts {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let Ok(point) = resolve::open_in_root(root, &mount.point, flags) else { continue };
        // Another mount may lie on top of it.
        let seen = stat::place(&point).map_or(0, |p| p.mount);
        if seen != 0 && seen != u64::from(mount.id) || nix::unistd::fchdir(&point).is_err() {
            continue;
        }
        for (wanted, found) in wanted.iter().zip(&mut found) {
            if found.is_none() && wanted.dev == mount.dev {
                *found = by_handle(root, wanted);
            }
        }
    }
    Ok(found)
}

fn by_handle(root: &OwnedFd, wanted: &Wanted) -> Option<PathBuf> {
    let file = handle::open_on_current_mount(wanted.kind, &wanted.handle).ok()?;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    let there = resolve::open_in_root(root, &path, OFlag::O_PATH | OFlag::O_NOFOLLOW).ok()?;
    let (is, was) = (fstat(&there).ok()?, fstat(&file).ok()?);
    ((is.st_dev, is.st_ino) == (was.st_dev, was.st_ino) && is.st_nlink > 0).then_some(path)
}

struct Search<'a> {
    root: &'a OwnedFd,
    wanted: &'a [Wanted],
    found: Vec<Option<PathBuf>>,
    /// An inotify instance of our own.
    probe: OwnedFd,
}

impl Search<'_> {
    fn missing(&self) -> impl Iterator<Item = &Wanted> {
        self.wanted.iter().zip(&self.found).filter(|(_, f)| f.is_none()).map(|(w, _)| w)
    }

    fn is_done(&self) -> bool {
        self.missing().next().is_none()
    }

    /// Looks whether a path leads to a file that is wanted. False: no.
    fn try_path(&mut self, path: &Path) -> Result<bool> {
        let Ok(file) = resolve::open_in_root(self.root, path, OFlag::O_PATH | OFlag::O_NOFOLLOW) else {
            return Ok(false);
        };
        if fstat(&file).is_ok_and(|s| s.st_nlink == 0) {
            return Ok(false);
        }
        let Some(seen) = probe(&self.probe, &file)? else { return Ok(false) };
        let mut is = false;
        for (wanted, found) in self.wanted.iter().zip(&mut self.found) {
            if found.is_none() && wanted.is(&seen) {
                *found = Some(path.to_owned());
                is = true;
            }
        }
        Ok(is)
    }

    fn try_found_before(&mut self) -> Result<()> {
        let paths: Vec<PathBuf> = match FOUND.lock() {
            Ok(known) => self.missing().filter_map(|w| known.get(&(w.dev, w.ino)).cloned()).collect(),
            Err(_) => Vec::new(),
        };
        paths.iter().try_for_each(|path| self.try_path(path).map(drop))
    }

    fn remember(&self) {
        if let Ok(mut known) = FOUND.lock() {
            for (wanted, found) in self.wanted.iter().zip(&self.found) {
                known.extend(found.iter().map(|path| ((wanted.dev, wanted.ino), path.clone())));
            }
        }
    }

    /// Tries the mounts, what the process has open, where it is, and the directories above.
    fn try_known(&mut self, pid: i32, mounts: &[Mount]) -> Result<()> {
        let mut links: Vec<PathBuf> = mounts.iter().map(|m| m.point.clone()).collect();
        let fds = descriptors(pid).unwrap_or_default();
        let names = fds.iter().map(|fd| format!("fd/{fd}")).chain(["cwd".to_owned(), "root".to_owned()]);
        links.extend(names.filter_map(|n| std::fs::read_link(format!("/proc/{pid}/{n}")).ok()));
        let mut seen = BTreeSet::new();
        for path in links.iter().filter(|l| l.is_absolute()).flat_map(|l| l.ancestors()) {
            if seen.insert(path) {
                self.try_path(path)?;
            }
        }
        Ok(())
    }

    /// Looks at every file of a mount, the nearest first, until all are found. Watched directories are listed last:
    /// whoever watches one may be told that it was.
    fn walk(&mut self, mount: &Mount) -> Result<()> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let Ok(top) = resolve::open_in_root(self.root, &mount.point, flags) else { return Ok(()) };
        let seen = stat::place(&top).map_or(0, |p| p.mount);
        if seen != 0 && seen != u64::from(mount.id) {
            return Ok(());
        }
        let (mut first, mut last) = (VecDeque::from([PathBuf::new()]), VecDeque::new());
        let mut looked = 0;
        while let Some(below) = first.pop_front().or_else(|| last.pop_front()) {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK;
            let Ok(dir) = resolve::open_beneath(&top, &below, flags) else { continue };
            let Ok(mut dir) = Dir::from_fd(dir) else { continue };
            let mut names = Vec::new();
            for name in dir.iter().flatten() {
                let name = name.file_name().to_owned();
                if !matches!(name.to_bytes(), b"." | b"..") {
                    names.push(name);
                }
            }
            looked += names.len();
            if looked > LIMIT {
                return Ok(());
            }
            for name in names {
                let Ok(stat) = fstatat(&dir, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
                let path = below.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
                let likely = self.missing().any(|w| w.ino == stat.st_ino);
                let found = likely && self.try_path(&mount.point.join(&path))?;
                if found && self.is_done() {
                    return Ok(());
                }
                if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
                    if found { &mut last } else { &mut first }.push_back(path);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::files::live::Pids;

    /// What the kernel tells of a watch on this path.
    fn wanted(path: &Path) -> Wanted {
        let inotify = sys::inotify::init().unwrap();
        sys::inotify::add_watch(&inotify, std::fs::File::open(path).unwrap(), libc::IN_OPEN).unwrap();
        let fd = inotify.as_raw_fd();
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        Wanted::parse(Fdinfo::parse(&text).unwrap().field("inotify").unwrap()).unwrap()
    }

    fn look(wanted: &[Wanted]) -> Vec<Option<PathBuf>> {
        let root: OwnedFd = std::fs::File::open("/").unwrap().into();
        let pids = Pids::new();
        let here = Surroundings::here(&root, &pids);
        find(&here, here.init, wanted).unwrap()
    }

    #[test]
    fn a_line_is_parsed() {
        let line = "wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 \
            f_handle:7e9e0000640d1b6d";
        let w = Wanted::parse(line).unwrap();
        assert_eq!((w.dev, w.ino, w.kind), (0x0080_0013, 0x9e7e, 1));
        assert_eq!(w.handle, [0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d]);
        assert!(Wanted::parse("ino:1 sdev:1 fhandle-type:1 f_handle:xy").is_err());
    }

    #[test]
    fn files_are_found_by_handle_or_by_looking_everywhere() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // A small file system of its own: the walk goes over all of it.
        let outer = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = outer.path().join("a/b");
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("c");
        std::fs::write(&file, "").unwrap();
        let both = [wanted(&dir), wanted(&file)];
        assert_eq!(look(&both), [Some(dir.clone()), Some(file.clone())]);
        let without = both.clone().map(|w| Wanted { kind: 0x7f, ..w });
        assert_eq!(look(&without), [Some(dir), Some(file.clone())]);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(look(&both)[1], None);
        assert_eq!(look(&without)[1], None);
    }
}
