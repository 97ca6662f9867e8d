//! Read-only and masked paths: what of /proc and /sys the container may not write, or not see.
//!
//! A file is masked by the container's /dev/null, after proving that it is the null device (CVE-2025-31133), a
//! directory by an empty read-only tmpfs of which one is made and bound to all. Everything is attached to descriptors
//! that were opened once.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use libc::{MS_BIND, MS_RDONLY, MS_REMOUNT};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::statfs::{fstatfs, statfs};
use oci_spec::runtime::Spec;

use super::mounts::{classic_mount, clean, fresh, with_context};
use crate::sys::mount::{Attributes, attach, clone_tree, set_attributes};
use crate::sys::procfs::Procfs;
use crate::sys::stat::place;
use crate::sys::{Context, Error, Result};

const PATH: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC);
const READ_ONLY: Attributes =
    Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, user_namespace: 0 };

/// Makes `readonlyPaths` read-only and hides `maskedPaths`. Runs inside, with the container's root as `/`.
pub fn apply(spec: &Spec) -> Result<()> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    for path in linux.readonly_paths().iter().flatten() {
        read_only(Path::new(path)).context(|| format!("can't make {path:?} read-only"))?;
    }
    let masked: Vec<&str> = linux.masked_paths().iter().flatten().map(String::as_str).collect();
    mask(&masked, linux.mount_label().as_deref())
}

fn read_only(path: &Path) -> Result<()> {
    let target = match open(path, PATH, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other.context(|| format!("open {}", path.display()))?,
    };
    match clone_tree(target.as_fd(), c"", true) {
        Ok(tree) => match set_attributes(&tree, READ_ONLY, false) {
            // Linux 5.12 has it.
            Err(Errno::ENOSYS) => read_only_by_mount(path, &target),
            set => {
                set.context(|| "mount_setattr")?;
                attach(&tree, &target).context(|| "move_mount")
            }
        },
        // No such interface, or a filter that denies it.
        Err(Errno::ENOSYS | Errno::EPERM) => read_only_by_mount(path, &target),
        Err(e) => Err(e).context(|| "open_tree"),
    }
}

/// The same with mount(2), which the container's /proc has no part in.
fn read_only_by_mount(path: &Path, target: &OwnedFd) -> Result<()> {
    let descriptors = Procfs::open()?.descriptors()?;
    descriptors
        .mount(Some(target.as_fd()), target.as_fd(), MsFlags::MS_BIND | MsFlags::MS_REC)
        .context(|| "bind mount")?;
    // The descriptor is below the new mount: look the path up again, and make sure that it is there.
    let top = open(path, PATH, Mode::empty()).context(|| "reopen after mount")?;
    let (above, below) = (place(&top).context(|| "statx")?, place(target).context(|| "statx")?);
    if above.mount == below.mount || (above.device, above.inode) != (below.device, below.inode) {
        return Err(Error::new("it was moved while it was mounted"));
    }
    let locked = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let kept = MsFlags::from_bits_truncate(fstatfs(&top).context(|| "fstatfs")?.flags().bits()) & locked;
    let flags = kept | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    descriptors.mount(None, top.as_fd(), flags).context(|| "remount")
}

/// Hides each path that exists.
fn mask(paths: &[&str], label: Option<&str>) -> Result<()> {
    if paths.is_empty() {
        return Ok(());
    }
    let null = open("/dev/null", PATH, Mode::empty()).context(|| "can't mask paths: open /dev/null")?;
    verify_dev_null(&null).context(|| "can't mask paths")?;
    let mut empty: Option<OwnedFd> = None;
    let mut done: Vec<std::path::PathBuf> = Vec::with_capacity(paths.len());
    for path in paths {
        let clean = clean(Path::new(path));
        if done.contains(&clean) {
            continue;
        }
        let shown = || format!("can't mask path {path:?}");
        let target = match open(*path, PATH, Mode::empty()) {
            Err(Errno::ENOENT) => continue,
            other => other.context(shown)?,
        };
        done.push(clean);
        let kind = SFlag::from_bits_truncate(fstat(&target).context(shown)?.st_mode) & SFlag::S_IFMT;
        let put = |cover: OwnedFd| attach(&cover, &target).map(|()| cover).context(shown);
        if kind != SFlag::S_IFDIR {
            put(clone_tree(null.as_fd(), c"", false).context(shown)?)?;
        } else if let Some(first) = &empty {
            put(clone_tree(first.as_fd(), c"", false).context(shown)?)?;
        } else {
            // Older kernels copy only what is attached, so the first one goes to its place itself.
            empty = Some(put(empty_directory(label).context(shown)?)?);
        }
    }
    Ok(())
}

/// An empty read-only tmpfs, mounted nowhere.
fn empty_directory(label: Option<&str>) -> Result<OwnedFd> {
    let data = with_context("nr_blocks=1,nr_inodes=1", label);
    fresh("tmpfs", Path::new("tmpfs"), MS_RDONLY, &data)
}

/// Proves that a descriptor is the null device.
pub fn verify_dev_null(fd: impl AsFd) -> Result<()> {
    let stat = fstat(&fd).context(|| "fstat /dev/null")?;
    let is_device = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
    if is_device && stat.st_rdev == libc::makedev(1, 3) {
        Ok(())
    } else {
        Err(Error::new("container's /dev/null is invalid"))
    }
}

/// Makes the root mount read-only, keeping flags that a user namespace may not change.
pub(super) fn remount_root_read_only() -> Result<()> {
    let root = open("/", PATH, Mode::empty()).context(|| "open /")?;
    match set_attributes(&root, READ_ONLY, false) {
        Err(Errno::ENOSYS) => {
            let flags = MS_BIND | MS_REMOUNT | MS_RDONLY;
            let kept = statfs("/").context(|| "statfs /")?.flags().bits();
            classic_mount(None, Path::new("/"), None, flags | kept, None)
        }
        other => other,
    }
    .context(|| "mount_setattr /")
}
