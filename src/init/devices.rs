//! Device nodes in the container's /dev.
//!
//! Nodes are made with mknodat(2) and checked through a descriptor to be what was made; in a user namespace, where that
//! is denied, the host's nodes are bind-mounted onto empty files.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, SFlag, fstat, mknodat};
use nix::unistd::{
    Gid, Uid, UnlinkatFlags, dup2_stderr, dup2_stdin, dup2_stdout, fchownat, symlinkat, unlinkat,
};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::credentials::root_ids;
use super::masked::verify_dev_null;
use super::mounts::{DIR_MODE, clean};
use crate::sys::mount::{attach, clone_tree};
use crate::sys::procfs::Procfs;
use crate::sys::resolve::{make_entry, parent_in_root};
use crate::sys::{Context, Error, Result};

/// The devices of every container: path, major, minor.
pub const DEFAULT: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/random", 1, 8),
    ("/dev/full", 1, 7),
    ("/dev/tty", 5, 0),
    ("/dev/zero", 1, 5),
    ("/dev/urandom", 1, 9),
];

/// One node to make.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    path: PathBuf,
    kind: SFlag,
    device: u64,
    mode: Mode,
    uid: u32,
    gid: u32,
}

/// Default devices, unless config.json has one of the same path, then those of config.json.
fn nodes(spec: &Spec) -> Result<Vec<Node>> {
    let own: &[LinuxDevice] = spec.linux().as_ref().and_then(|l| l.devices().as_deref()).unwrap_or_default();
    let (root_uid, root_gid) = root_ids(spec);
    let defaults = DEFAULT.iter().filter(|(path, ..)| !own.iter().any(|d| d.path() == Path::new(path))).map(
        |(path, major, minor)| Node {
            path: path.into(),
            kind: SFlag::S_IFCHR,
            device: libc::makedev(*major, *minor),
            mode: Mode::from_bits_truncate(0o666),
            uid: root_uid,
            gid: root_gid,
        },
    );
    let mut all: Vec<Node> = defaults.collect();
    for d in own {
        let kind = match d.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
            LinuxDeviceType::B => SFlag::S_IFBLK,
            LinuxDeviceType::P => SFlag::S_IFIFO,
            LinuxDeviceType::A => return Err(Error::new("invalid device type \"a\"")),
        };
        let number = |n: i64| u32::try_from(n).ok();
        let device = match (number(d.major()), number(d.minor())) {
            (Some(major), Some(minor)) => libc::makedev(major, minor),
            _ if kind == SFlag::S_IFIFO => 0,
            _ => {
                let (major, minor) = (d.major(), d.minor());
                return Err(Error::new(format!(
                    "invalid device number {major}:{minor} of {}",
                    d.path().display()
                )));
            }
        };
        all.push(Node {
            path: d.path().clone(),
            kind,
            device,
            mode: Mode::from_bits_truncate(d.file_mode().unwrap_or(0o666) & 0o7777),
            uid: d.uid().unwrap_or(0),
            gid: d.gid().unwrap_or(0),
        });
    }
    Ok(all)
}

/// Makes all devices, the links that programs expect in /dev, and /dev/ptmx. With `bind` nodes are bound, not made.
pub fn create(root: BorrowedFd<'_>, procfs: &Procfs, spec: &Spec, bind: bool) -> Result<()> {
    for node in nodes(spec)? {
        if node.path.as_os_str().is_empty() || clean(&node.path) == Path::new("/dev/ptmx") {
            continue;
        }
        create_node(root, procfs, &node, bind)
            .context(|| format!("error creating device nodes: {}", node.path.display()))?;
    }
    links(root)
}

fn create_node(root: BorrowedFd<'_>, procfs: &Procfs, node: &Node, bind: bool) -> Result<()> {
    let (dir, name) =
        parent_in_root(root, &node.path, DIR_MODE).context(|| "mkdir parent of device inode")?;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    if !bind {
        match mknodat(&dir, name, node.kind, node.mode, node.device) {
            Ok(()) => {
                let made = openat(&dir, name, flags, Mode::empty()).context(|| "open new device inode")?;
                return own(&made, node);
            }
            Err(Errno::EEXIST) => return Ok(()),
            Err(Errno::EPERM | Errno::EACCES) => {}
            Err(e) => return Err(e).context(|| "mknodat"),
        }
    }
    // What the image has there is not opened: a fifo would keep us waiting.
    make_entry(&dir, name, Mode::empty()).context(|| "create device inode")?;
    let target = openat(&dir, name, flags, Mode::empty()).context(|| "open device inode")?;
    let path = std::ffi::CString::new(node.path.as_os_str().as_encoded_bytes())
        .map_err(|_| Error::new("device path contains null byte"))?;
    match clone_tree(AT_FDCWD, &path, false) {
        Ok(tree) => attach(&tree, &target).context(|| "move_mount"),
        Err(Errno::ENOSYS) => {
            let descriptors = procfs.descriptors()?;
            descriptors
                .mount_on(Some(&node.path), target.as_fd(), None, MsFlags::MS_BIND, None)
                .context(|| "bind mount")
        }
        Err(e) => Err(e).context(|| "open_tree"),
    }
}

/// Checks that the new inode is what was asked for, and gives it its owner.
fn own(made: &OwnedFd, node: &Node) -> Result<()> {
    let stat = fstat(made).context(|| "fstat new device inode")?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind != node.kind || (kind != SFlag::S_IFIFO && stat.st_rdev != node.device) {
        return Err(Error::new("new device inode is not what was made"));
    }
    let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
    fchownat(made, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH).context(|| "update device inode owner")
}

fn links(root: BorrowedFd<'_>) -> Result<()> {
    let link = |target: &str, name: &str| -> Result<()> {
        let (dir, name) = parent_in_root(root, Path::new(name), DIR_MODE).context(|| "open /dev")?;
        match symlinkat(target, &dir, name) {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(e) => Err(e).context(|| format!("symlink {target}")),
        }
    };
    let (dir, ptmx) = parent_in_root(root, Path::new("/dev/ptmx"), DIR_MODE).context(|| "open /dev")?;
    match unlinkat(&dir, ptmx, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(e) => return Err(e).context(|| "error setting up ptmx: unlink /dev/ptmx"),
    }
    link("pts/ptmx", "/dev/ptmx").context(|| "error setting up ptmx")?;
    let mut wanted = vec![
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ];
    // The host's /proc: the container's has the same files.
    if Path::new("/proc/kcore").exists() {
        wanted.push(("/proc/kcore", "/dev/core"));
    }
    for (target, name) in wanted {
        link(target, name).context(|| "error setting up /dev symlinks")?;
    }
    Ok(())
}

/// Standard descriptors that are the host's /dev/null become the container's. Runs after the step into the root.
pub fn reopen_dev_null() -> Result<()> {
    let null =
        open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).context(|| "open /dev/null")?;
    verify_dev_null(&null)?;
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    if verify_dev_null(stdin.as_fd()).is_ok() {
        dup2_stdin(&null).context(|| "dup2 0")?;
    }
    if verify_dev_null(stdout.as_fd()).is_ok() {
        dup2_stdout(&null).context(|| "dup2 1")?;
    }
    if verify_dev_null(stderr.as_fd()).is_ok() {
        dup2_stderr(&null).context(|| "dup2 2")?;
    }
    Ok(())
}

/// Puts the container's terminal at /dev/console, whatever is there (CVE-2025-52565). Runs inside.
pub fn mount_console(slave: BorrowedFd<'_>) -> Result<()> {
    let root = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).context(|| "open /")?;
    let (dir, name) = parent_in_root(&root, Path::new("/dev/console"), DIR_MODE).context(|| "open /dev")?;
    let mode = Mode::from_bits_truncate(0o666);
    make_entry(&dir, name, mode).context(|| "create mount target /dev/console")?;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let target = openat(&dir, name, flags, Mode::empty()).context(|| "open /dev/console")?;
    match clone_tree(slave, c"", false) {
        Ok(tree) => attach(&tree, &target).context(|| "bind mount console: move_mount"),
        Err(Errno::ENOSYS | Errno::EPERM) => {
            // The container's /proc may be anything by now.
            let descriptors = Procfs::open()?.descriptors()?;
            descriptors.mount(Some(slave), target.as_fd(), MsFlags::MS_BIND).context(|| "bind mount console")
        }
        Err(e) => Err(e).context(|| "bind mount console: open_tree"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::mkfifo;

    #[test]
    fn what_was_exchanged_for_a_new_node_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, device) = (dir.path().join("fifo"), dir.path().join("device"));
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        nix::sys::stat::mknod(&device, SFlag::S_IFCHR, Mode::S_IRWXU, libc::makedev(1, 5)).unwrap();
        let node = |kind, minor| Node {
            path: "/dev/null".into(),
            kind,
            device: libc::makedev(1, minor),
            mode: Mode::S_IRWXU,
            uid: 7,
            gid: 8,
        };
        let owned = |path: &Path, node: &Node| own(&open(path, OFlag::O_PATH, Mode::empty()).unwrap(), node);
        for (path, kind, minor) in
            [(&fifo, SFlag::S_IFCHR, 3), (&device, SFlag::S_IFCHR, 3), (&device, SFlag::S_IFBLK, 5)]
        {
            let e = owned(path, &node(kind, minor)).unwrap_err().to_string();
            assert!(e.contains("not what was made"), "{e}");
        }
        owned(&device, &node(SFlag::S_IFCHR, 5)).unwrap();
        owned(&fifo, &node(SFlag::S_IFIFO, 0)).unwrap();
    }
}
