//! Bind mounts: what is shown, where, and under which flags.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use libc::{MS_BIND, MS_REC, MS_REMOUNT};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::mount::MsFlags;
use nix::sys::statfs::fstatfs;

use super::{DIR_MODE, FILE_MODE, Mount, Mounter, attributes, c_string, is_dir, no_target, put};
use crate::sys::mount::{Attributes, clone_tree, set_attributes};
use crate::sys::resolve::{make_dir_in_root, make_file_in_root, open_in_root};
use crate::sys::{Context, Result};

/// Flags that mount(2) may not take away in a user namespace.
const LOCKED: MsFlags =
    MsFlags::MS_RDONLY.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

impl Mounter<'_> {
    pub(crate) fn bind(&self, m: &Mount, tree: OwnedFd) -> Result<()> {
        let target = self.bind_target(m, &tree).context(|| no_target(m))?;
        match set_bind_flags(m, &tree) {
            Err(e) if e.errno() == Some(Errno::ENOSYS) => {
                put(&tree, &target)?;
                self.remount(m, &tree).context(|| "remount bind mount")?;
                self.propagate(m, &tree)
            }
            set => {
                set?;
                self.attach_and_adjust(m, &target, &tree)
            }
        }
    }

    /// The flags of a bind mount by mount(2), which changes only what is attached. Before Linux 5.12 there is nothing else.
    fn remount(&self, m: &Mount, tree: &OwnedFd) -> Result<(), Errno> {
        let descriptors = self.procfs.descriptors().map_err(|e| e.errno().unwrap_or(Errno::EIO))?;
        let given = MsFlags::from_bits_retain(m.flags & !MS_REC) | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        match descriptors.mount(None, tree.as_fd(), given) {
            // Flags that are locked, because the source comes from a more privileged user namespace.
            Err(Errno::EPERM) => {
                let there = MsFlags::from_bits_retain(fstatfs(tree)?.flags().bits()) & LOCKED;
                let kept = there & !MsFlags::from_bits_retain(m.cleared);
                descriptors.mount(None, tree.as_fd(), given | kept)
            }
            done => done,
        }
    }

    /// The destination of a bind mount, made if missing as what its source is.
    fn bind_target(&self, m: &Mount, tree: &OwnedFd) -> Result<OwnedFd> {
        let target = match open_in_root(self.root, &m.destination, OFlag::O_PATH) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => {
                let made = if is_dir(tree).context(|| "fstat source")? {
                    make_dir_in_root(self.root, &m.destination, DIR_MODE)
                } else {
                    make_file_in_root(self.root, &m.destination, DIR_MODE, FILE_MODE)
                };
                made.context(|| format!("make mountpoint {:?}", m.destination))?
            }
            Err(e) => return Err(e).context(|| "lookup mountpoint target"),
        };
        self.check_target(m, &target, Some(tree))?;
        Ok(target)
    }
}

/// A detached copy of what a bind mount shows.
pub(crate) fn open_source(m: &Mount) -> Result<OwnedFd> {
    let path = c_string(m.source.as_os_str().as_bytes())?;
    clone_tree(AT_FDCWD, &path, m.flags & MS_REC != 0).context(|| no_source(m))
}

/// Before why the source of a bind mount cannot be had, in runc's words.
pub(super) fn no_source(m: &Mount) -> String {
    format!("failed to fulfil mount request: open {}", m.source.display())
}

/// The flags of a bind mount. If any are given, they replace those of the source; flags that are locked, because the
/// source comes from a more privileged user namespace, are kept, unless they were asked away explicitly.
fn set_bind_flags(m: &Mount, tree: &OwnedFd) -> Result<()> {
    const PLAIN: u64 = libc::MOUNT_ATTR_RDONLY
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOEXEC
        | libc::MOUNT_ATTR_NOSYMFOLLOW;
    const ATIME: u64 = libc::MS_NOATIME | libc::MS_NODIRATIME | libc::MS_RELATIME | libc::MS_STRICTATIME;
    let given = m.flags & !(MS_BIND | MS_REC | MS_REMOUNT);
    // As with mount(2): what is said about access times stays where nothing is said about them.
    let all = if given & ATIME == 0 { PLAIN } else { PLAIN | libc::MOUNT_ATTR_NODIRATIME };
    if given == 0 && m.cleared == 0 {
        return Ok(());
    }
    let mut set = attributes(given);
    let mut atime = 0;
    if given & ATIME != 0 {
        // `relatime` where only directories are spoken of, as with mount(2).
        atime = libc::MOUNT_ATTR__ATIME;
    }
    let replace = Attributes { set, clear: (all & !set) | atime, ..Attributes::default() };
    match set_attributes(tree, replace, false) {
        Err(Errno::EPERM) => {}
        other => return other.context(|| "failed to set user-requested vfs flags on bind-mount"),
    }
    // Symbolic links are not among what can be locked.
    let cleared = (attributes(m.cleared) & all) | (libc::MOUNT_ATTR_NOSYMFOLLOW & !set);
    set &= !cleared;
    let adjust = Attributes { set, clear: cleared | atime, ..Attributes::default() };
    set_attributes(tree, adjust, false)
        .context(|| "failed to set user-requested vfs flags on bind-mount: cannot change locked flags")
}
