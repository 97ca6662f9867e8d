//! Paths inside a directory that belongs to somebody else: openat2(2) and nothing before it.
//!
//! ```text
//!     root ──/a/b/c──>  openat2(root, "a/b/c", RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
//! ```
//!
//! Symbolic links, absolute or full of `..`, end inside `root`, whatever is renamed meanwhile. What was resolved is
//! a descriptor, and everything later is done through it; a path is never resolved twice.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{Mode, mkdirat};

/// How often a lookup is tried again while somebody renames directories under it.
const TRIES: usize = 128;

/// How many symbolic links a path may lead through, as in the kernel.
const LINKS: usize = 40;

fn how(flags: OFlag, resolve: ResolveFlag) -> OpenHow {
    OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

fn open(dir: impl AsFd, path: &Path, how: OpenHow) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    for _ in 0..TRIES {
        match openat2(&dir, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

/// Opens `path` as a process with `root` as its root directory would.
pub fn open_in_root(root: impl AsFd, path: impl AsRef<Path>, flags: OFlag) -> Result<OwnedFd, Errno> {
    open(root, path.as_ref(), how(flags, ResolveFlag::RESOLVE_IN_ROOT))
}

/// Opens `path` below `dir`, refusing symbolic links, `..` and other mounts altogether.
pub fn open_beneath(dir: impl AsFd, path: impl AsRef<Path>, flags: OFlag) -> Result<OwnedFd, Errno> {
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    open(dir, path.as_ref(), how(flags, resolve))
}

/// Opens a name of a directory, which must not be a symbolic link.
fn open_entry(dir: impl AsFd, name: &OsStr, flags: OFlag) -> Result<OwnedFd, Errno> {
    openat(dir, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

/// The components of a path below the root, `.` left out; `..` is kept for the kernel to resolve.
fn components(path: &Path) -> Vec<&OsStr> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name),
            Component::ParentDir => Some(OsStr::new("..")),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

/// Opens the longest part of a path that is there, by cutting from the end, and says how many components it has.
fn longest(root: impl AsFd, names: &[&OsStr]) -> Result<(OwnedFd, usize), Errno> {
    let mut there = names.len();
    loop {
        there = there.checked_sub(1).ok_or(Errno::ENOENT)?;
        let part = names[..there].iter().collect::<PathBuf>();
        match open_in_root(&root, part, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(Errno::ENOENT) => {}
            other => return Ok((other?, there)),
        }
    }
}

/// A path whose missing part does not lead through symbolic links any more: images have links to files of /run, which
/// are to be made where the links point, inside the root. Where a link changes meanwhile, it leads to another place
/// inside.
fn through_links(root: impl AsFd, path: &Path) -> Result<PathBuf, Errno> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match open_in_root(&root, &path, OFlag::O_PATH) {
            Err(Errno::ENOENT) => {}
            _ => return Ok(path),
        }
        let names = components(&path);
        let (dir, there) = longest(&root, &names)?;
        let Ok(target) = readlinkat(&dir, names[there]) else { return Ok(path) };
        // An absolute target replaces what is before it.
        let parts =
            [names[..there].iter().collect(), PathBuf::from(target), names[there + 1..].iter().collect()];
        path = parts.iter().filter(|p| !p.as_os_str().is_empty()).collect();
    }
    Err(Errno::ELOOP)
}

/// Opens the directory `path` inside `root` (O_PATH), making what is missing with `mode`. A missing part may not
/// contain `..`.
pub fn make_dir_in_root(root: impl AsFd, path: impl AsRef<Path>, mode: Mode) -> Result<OwnedFd, Errno> {
    let path = path.as_ref();
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    match open_in_root(&root, path, flags) {
        Err(Errno::ENOENT) => {}
        other => return other,
    }
    let path = through_links(&root, path)?;
    let names = components(&path);
    let (mut current, there) = longest(&root, &names)?;
    for name in &names[there..] {
        if name.as_bytes() == b".." {
            return Err(Errno::ENOENT);
        }
        match mkdirat(&current, *name, mode) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(e),
        }
        current = open_entry(&current, name, flags)?;
    }
    Ok(current)
}

/// Splits off the last component and opens (making it) the directory before it.
pub fn parent_in_root(root: impl AsFd, path: &Path, mode: Mode) -> Result<(OwnedFd, &OsStr), Errno> {
    // `file_name` is none for `..` and `/`, neither of which can be made.
    let name = path.file_name().ok_or(Errno::EINVAL)?;
    let parent = path.parent().unwrap_or(Path::new(""));
    Ok((make_dir_in_root(root, parent, mode)?, name))
}

/// Makes an empty file where there is none, with the directories before it, and opens it (O_PATH).
pub fn make_file_in_root(root: impl AsFd, path: &Path, dir_mode: Mode, mode: Mode) -> Result<OwnedFd, Errno> {
    let path = through_links(&root, path)?;
    let (dir, name) = parent_in_root(root, &path, dir_mode)?;
    make_entry(&dir, name, mode)?;
    open_entry(&dir, name, OFlag::O_PATH)
}

/// Makes an empty file, unless there is anything of that name already: what is there is neither opened nor followed.
pub fn make_entry(dir: impl AsFd, name: &OsStr, mode: Mode) -> Result<(), Errno> {
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(dir, name, flags, mode) {
        Ok(_) | Err(Errno::EEXIST) => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, fs::File, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root");
        fs::create_dir(&path).unwrap();
        let fd = fs::File::open(&path).unwrap();
        (dir, fd, path)
    }
    const DIR: Mode = Mode::from_bits_truncate(0o755);

    #[test]
    fn links_cannot_lead_out() {
        let (outer, fd, path) = root();
        fs::write(outer.path().join("secret"), b"outside").unwrap();
        symlink("../secret", path.join("up")).unwrap();
        symlink(outer.path().join("secret"), path.join("absolute")).unwrap();
        for name in ["up", "absolute", "../secret", "/../../secret"] {
            assert_eq!(open_in_root(&fd, name, OFlag::O_PATH).unwrap_err(), Errno::ENOENT, "{name}");
        }
    }

    #[test]
    fn directories_are_made_inside_only() {
        let (outer, fd, path) = root();
        symlink("/", path.join("slash")).unwrap();
        symlink(outer.path(), path.join("escape")).unwrap();
        make_dir_in_root(&fd, "/slash/a/b", DIR).unwrap();
        assert!(path.join("a/b").is_dir());
        // A dangling link leads to where it would in a root of its own.
        make_dir_in_root(&fd, "/escape/c", DIR).unwrap();
        assert!(!outer.path().join("c").exists());
        assert!(path.join(outer.path().strip_prefix("/").unwrap()).join("c").is_dir());
        symlink("loop", path.join("loop")).unwrap();
        assert!(make_dir_in_root(&fd, "/loop/c", DIR).is_err());
        assert!(make_dir_in_root(&fd, "/missing/../d", DIR).is_err());
        make_dir_in_root(&fd, "../../e", DIR).unwrap();
        assert!(path.join("e").is_dir());
    }

    #[test]
    fn files_are_made_inside_only() {
        let (outer, fd, path) = root();
        symlink("../../run/made", path.join("link")).unwrap();
        fs::create_dir(path.join("run")).unwrap();
        make_file_in_root(&fd, Path::new("/x/y"), DIR, DIR).unwrap();
        assert!(path.join("x/y").is_file());
        make_file_in_root(&fd, Path::new("/link"), DIR, DIR).unwrap();
        assert!(path.join("run/made").is_file());
        assert!(!outer.path().join("run").exists());
    }

    #[test]
    fn an_entry_that_was_made_meanwhile_is_not_followed() {
        let (outer, fd, path) = root();
        symlink(outer.path(), path.join("link")).unwrap();
        let e = open_entry(&fd, OsStr::new("link"), OFlag::O_PATH | OFlag::O_DIRECTORY).unwrap_err();
        assert_eq!(e, Errno::ENOTDIR);
        let link = open_entry(&fd, OsStr::new("link"), OFlag::O_PATH).unwrap();
        assert_eq!(nix::sys::stat::fstat(&link).unwrap().st_mode & libc::S_IFMT, libc::S_IFLNK);
        symlink(outer.path().join("new"), path.join("dangling")).unwrap();
        make_entry(&fd, OsStr::new("dangling"), DIR).unwrap();
        assert!(!outer.path().join("new").exists());
    }

    #[test]
    fn beneath_refuses_links_and_mounts() {
        let proc = fs::File::open("/proc").unwrap();
        assert!(open_beneath(&proc, "self/status", OFlag::O_RDONLY).is_err());
        let pid = std::process::id();
        assert!(open_beneath(&proc, format!("{pid}/status"), OFlag::O_RDONLY).is_ok());
        assert!(open_beneath(&proc, "../etc/passwd", OFlag::O_RDONLY).is_err());
    }
}
