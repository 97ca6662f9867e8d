//! Bind mounts: what is shown, where, and under which flags.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::{MS_BIND, MS_REC, MS_REMOUNT};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};

use super::{DIR_MODE, FILE_MODE, Mount, Mounter, attributes, c_string, classic_mount, is_dir, no_target};
use crate::sys::mount::{Attributes, clone_tree, set_attributes};
use crate::sys::resolve::{make_dir_in_root, make_file_in_root, open_in_root};
use crate::sys::{Context, Result};

impl Mounter<'_> {
    pub(crate) fn bind(&self, m: &Mount, tree: OwnedFd) -> Result<()> {
        let target = self.bind_target(m, &tree).context(|| no_target(m))?;
        set_bind_flags(m, &tree)?;
        self.attach_and_adjust(m, &target, &tree)
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
        Err(Errno::ENOSYS) => {
            let name = format!("/proc/self/fd/{}", tree.as_raw_fd());
            let flags = given | MS_BIND | MS_REMOUNT;
            return classic_mount(None, Path::new(&name), None, flags, None).context(|| "remount bind mount");
        }
        other => return other.context(|| "failed to set user-requested vfs flags on bind-mount"),
    }
    // Symbolic links are not among what can be locked.
    let cleared = (attributes(m.cleared) & all) | (libc::MOUNT_ATTR_NOSYMFOLLOW & !set);
    set &= !cleared;
    let adjust = Attributes { set, clear: cleared | atime, ..Attributes::default() };
    set_attributes(tree, adjust, false)
        .context(|| "failed to set user-requested vfs flags on bind-mount: cannot change locked flags")
}
