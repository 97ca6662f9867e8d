//! Where a socket is bound.
//!
//! ```text
//!   getsockname(2)   the name, as the program gave it        run/s      /run/s     @s
//!   SIOCUNIXFILE     its file, wherever that is by now       /srv/run/s
//!
//!   the name leads to the file                  nothing more to say
//!   the file's path ends in the name            `name_dir`: the directory the name counted from, or the root of then
//!   it has another path                         renamed: the extension has the path
//!   its path is gone, and it has others         one in the same directory is taken for it (bind, link, unlink)
//!   it has no path any more                     `deleted`
//! ```

use std::borrow::Borrow;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};

use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::image::FilePermsEntry;
use crate::checkpoint::namespaces::mount::nested::Tree;
use crate::checkpoint::{Error, Result};
use crate::sys::{ioctl, resolve, sockopt, stat};

const WHAT: &str = "cannot find out where a unix socket is bound";

/// Where a socket is bound.
#[derive(Debug, Default)]
pub struct Place {
    /// As bind(2) takes it: a path that ends in a nul byte, or a nul byte and an abstract name. Empty: not bound.
    pub name: Vec<u8>,
    /// Directory that a relative path counts from, or root that an absolute one does.
    pub dir: Option<PathBuf>,
    /// Where its file has been moved to.
    pub moved: Option<String>,
    /// Mode and owner of its file.
    pub perms: Option<FilePermsEntry>,
    /// The file has been removed.
    pub deleted: bool,
    /// The mount that it lies on, where that is one of a namespace that the container has made.
    pub mount: Option<i32>,
}

/// Does the name stand for a file?
pub fn is_path(name: &[u8]) -> bool {
    name.first().is_some_and(|b| *b != 0)
}

/// The path in a name.
pub fn path(name: &[u8]) -> &Path {
    let text = name.split(|b| *b == 0).next().unwrap_or_default();
    Path::new(<std::ffi::OsStr as OsStrExt>::from_bytes(text))
}

/// A name as tools print it: `/run/s`, `@abstract`.
pub fn text(name: &[u8]) -> String {
    match name.split_first() {
        Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest)),
        _ => path(name).display().to_string(),
    }
}

/// Adds the name where a file's path would stand in an error.
pub fn named(error: Error, name: &[u8]) -> Error {
    if name.is_empty() { error } else { error.path(text(name)) }
}

/// Looks up where a live socket is bound. `root` is the container's, `trees` are the mount namespaces that it has made.
pub fn find<T: Borrow<Tree>>(live: &Live, root: &OwnedFd, trees: &[T]) -> Result<Place> {
    let bytes = sockopt::name(&live.file).during(WHAT, || "getsockname(_, _, _)".into())?;
    let name = bytes.get(2..).unwrap_or_default().to_vec();
    if !is_path(&name) {
        return Ok(Place { name, ..Place::default() });
    }
    locate(live, root, trees, path(&name).to_owned())
        .map(|place| Place { name: name.clone(), ..place })
        .map_err(|e| named(e, &name))
}

fn locate<T: Borrow<Tree>>(live: &Live, root: &OwnedFd, trees: &[T], name: PathBuf) -> Result<Place> {
    let file = ioctl::unix_socket_file(&live.file)
        .during(WHAT, || "ioctl(_, SIOCUNIXFILE)".into())
        .map_err(|e| e.remedy("this needs CAP_NET_ADMIN"))?;
    let stat = fstat(&file).during(WHAT, || "fstat(_)".into())?;
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let link = std::fs::read_link(&own).during(WHAT, || format!("readlink({own:?})"))?;
    let mount = stat::place(&file).ok().and_then(|place| i32::try_from(place.mount).ok());
    let tree = trees.iter().map(Borrow::borrow).find(|tree| mount.is_some_and(|mount| tree.has(mount)));
    let (root, mount) = tree.map_or((root, None), |tree| (&tree.root, mount));
    let mut place = Place {
        mount,
        perms: Some(FilePermsEntry { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid }),
        ..Place::default()
    };
    let actual = match link.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(path) => {
            let path = PathBuf::from(std::ffi::OsString::from_vec(path.to_vec()));
            match stat.st_nlink {
                0 => {
                    place.deleted = true;
                    path
                }
                _ => sibling(root, &path, &stat)?,
            }
        }
        None => link,
    };
    if name.is_absolute() && (place.deleted || leads_to(root, &name, &stat)?) {
        return Ok(place);
    }
    // The path's own text, `..` and all, at the end of where the file is.
    let from = [b"/", name.as_os_str().as_bytes().strip_prefix(b"/").unwrap_or(name.as_os_str().as_bytes())];
    if let Some(dir) = actual.as_os_str().as_bytes().strip_suffix(from.concat().as_slice()) {
        let dir = if dir.is_empty() { b"/" } else { dir };
        place.dir = Some(PathBuf::from(std::ffi::OsString::from_vec(dir.to_vec())));
        return Ok(place);
    }
    if name.is_absolute() {
        let text = actual.into_os_string().into_string();
        place.moved = Some(text.map_err(|path| {
            Error::new("a unix socket's file has a new path, which is not valid UTF-8")
                .path(path)
                .remedy("rename it")
        })?);
        return Ok(place);
    }
    if place.deleted {
        return Ok(place);
    }
    let cwd = format!("/proc/{}/cwd", live.pid);
    let dir = std::fs::read_link(&cwd).during(WHAT, || format!("readlink({cwd:?})"))?;
    if live.pid != std::process::id().cast_signed() && leads_to(root, &dir.join(&name), &stat)? {
        place.dir = Some(dir);
        return Ok(place);
    }
    Err(Error::new(format!(
        "a unix socket is bound to a relative path that does not lead to its file {} any more",
        actual.display()
    ))
    .remedy("let the program bind it to an absolute path"))
}

/// Another name of a file whose name was removed, in the same directory.
fn sibling(root: &OwnedFd, path: &Path, file: &FileStat) -> Result<PathBuf> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let names = match resolve::open_in_root(root, parent, flags).and_then(nix::dir::Dir::from_fd) {
        Ok(mut dir) => dir.iter().filter_map(|entry| Some(entry.ok()?.file_name().to_owned())).collect(),
        Err(_) => Vec::new(),
    };
    for name in names {
        let other = parent.join(<std::ffi::OsStr as OsStrExt>::from_bytes(name.to_bytes()));
        if leads_to(root, &other, file).unwrap_or(false) {
            return Ok(other);
        }
    }
    Err(Error::new("a unix socket's file was removed under this name, and has another in another directory")
        .remedy("let the program bind it again"))
}

/// Is this file at that path?
fn leads_to(root: &OwnedFd, path: &Path, file: &FileStat) -> Result<bool> {
    let Ok(there) = resolve::open_in_root(root, path, OFlag::O_PATH | OFlag::O_NOFOLLOW) else {
        return Ok(false);
    };
    let there = fstat(&there).during(WHAT, || "fstat(_)".into())?;
    Ok((there.st_dev, there.st_ino) == (file.st_dev, file.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn root() -> OwnedFd {
        std::fs::File::open("/").unwrap().into()
    }

    fn place(listener: UnixListener) -> Place {
        find::<Tree>(&Live::own(listener.into(), 1).unwrap(), &root(), &[]).unwrap()
    }

    #[test]
    fn a_path_that_is_still_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("s");
        let place = place(UnixListener::bind(&file).unwrap());
        assert_eq!(path(&place.name), file);
        assert!(place.dir.is_none() && place.moved.is_none() && !place.deleted);
        assert_eq!(place.perms.unwrap().mode & libc::S_IFMT, libc::S_IFSOCK);
    }

    #[test]
    fn a_path_that_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("s");
        let listener = UnixListener::bind(&file).unwrap();
        std::fs::rename(&file, dir.path().join("t")).unwrap();
        let moved = place(listener);
        assert_eq!(moved.moved.as_deref(), dir.path().join("t").to_str());
        assert!(!moved.deleted);
        let listener = UnixListener::bind(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        // Another one has the path now.
        let _other = UnixListener::bind(&file).unwrap();
        let gone = place(listener);
        assert!(gone.deleted && gone.moved.is_none());
    }

    #[test]
    fn a_path_that_was_linked_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let [file, other] = ["s.1", "s"].map(|name| dir.path().join(name));
        let listener = UnixListener::bind(&file).unwrap();
        std::fs::hard_link(&file, &other).unwrap();
        std::fs::remove_file(&file).unwrap();
        let linked = place(listener.try_clone().unwrap());
        assert_eq!(linked.moved.as_deref(), other.to_str());
        assert!(!linked.deleted);
        let away = tempfile::tempdir_in(dir.path()).unwrap();
        std::fs::rename(&other, away.path().join("s")).unwrap();
        let live = Live::own(listener.into(), 1).unwrap();
        let refused = find::<Tree>(&live, &root(), &[]).unwrap_err().to_string();
        assert!(refused.contains("in another directory"), "{refused}");
    }

    #[test]
    fn names_are_printed_as_tools_do() {
        assert_eq!(text(b"/run/s\0"), "/run/s");
        assert_eq!(text(b"\0abc"), "@abc");
        assert_eq!(text(b""), "");
        assert!(!is_path(b"") && !is_path(b"\0a") && is_path(b"a"));
    }
}
