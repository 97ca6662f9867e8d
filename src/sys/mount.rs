//! The file-descriptor mount interface: open_tree(2), move_mount(2), fsopen(2), mount_setattr(2).
//!
//! A mount made this way has no name until it is attached, and is attached to a descriptor, not to a path. So no
//! symbolic link or rename inside a hostile root file system can send it elsewhere.

use std::ffi::CStr;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::{check, newborn};

fn owned(ret: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = i32::try_from(check(ret)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A detached copy of the mount at `path` (relative to `dir`; an empty path means `dir` itself), with everything
/// below it if `recursive`.
pub fn clone_tree(dir: BorrowedFd<'_>, path: &CStr, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as libc::c_uint;
    }
    // SAFETY: the kernel reads the path up to its zero byte.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches a detached mount, or moves an attached one, onto what `target` points to.
pub fn attach(tree: impl AsFd, target: impl AsFd) -> Result<(), Errno> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let (tree, target, empty) = (tree.as_fd().as_raw_fd(), target.as_fd().as_raw_fd(), c"".as_ptr());
    // SAFETY: both paths are empty C strings.
    check(unsafe { libc::syscall(libc::SYS_move_mount, tree, empty, target, empty, flags) }).map(drop)
}

/// Brings a private mount into the peer group of another one of the same file system, and makes it a slave of whom that
/// is one. Since Linux 5.15.
pub fn set_group(from: impl AsFd, to: impl AsFd) -> Result<(), Errno> {
    const MOVE_MOUNT_SET_GROUP: libc::c_uint = 0x100;
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH | MOVE_MOUNT_SET_GROUP;
    let (from, to, empty) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd(), c"".as_ptr());
    // SAFETY: both paths are empty C strings.
    check(unsafe { libc::syscall(libc::SYS_move_mount, from, empty, to, empty, flags) }).map(drop)
}

/// What mount_setattr(2) changes: MOUNT_ATTR_* bits, propagation (MS_PRIVATE and so on), an id-mapping namespace.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Bits to set.
    pub set: u64,
    /// Bits to clear first.
    pub clear: u64,
    /// MS_PRIVATE, MS_SLAVE, MS_SHARED or MS_UNBINDABLE, or 0 to leave it.
    pub propagation: u64,
    /// Descriptor of the user namespace for MOUNT_ATTR_IDMAP.
    pub user_namespace: u64,
}

/// Changes the mount that `mount` is the root of, and all below it if `recursive`.
pub fn set_attributes(mount: impl AsFd, attributes: Attributes, recursive: bool) -> Result<(), Errno> {
    let attr = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: attributes.user_namespace,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let (fd, size) = (mount.as_fd().as_raw_fd(), size_of::<libc::mount_attr>());
    // SAFETY: the path is an empty C string, and the kernel reads `size` bytes of the structure.
    check(unsafe { libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), flags, &raw const attr, size) })
        .map(drop)
}

/// A file system being configured: fsopen(2).
#[derive(Debug)]
pub struct FsContext(OwnedFd);

const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

impl FsContext {
    /// Starts to configure a file system of that type.
    pub fn open(kind: &CStr) -> Result<Self, Errno> {
        const FSOPEN_CLOEXEC: libc::c_uint = 1;
        // SAFETY: the kernel reads the name up to its zero byte.
        owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) }).map(Self)
    }

    /// The same by a child of this thread: a proc file system shows the pid namespace of whoever begins it.
    pub fn open_by_child(kind: &CStr) -> Result<Self, Errno> {
        const FSOPEN_CLOEXEC: libc::c_long = 1;
        let args = [kind.as_ptr() as libc::c_long, FSOPEN_CLOEXEC, 0, 0];
        // SAFETY: the kernel reads the name up to its zero byte.
        owned(unsafe { newborn::call(libc::SYS_fsopen, args) }?).map(Self)
    }

    /// Opens the file system of a mount for a change; options are those that change.
    pub fn pick(mount: impl AsFd) -> Result<Self, Errno> {
        const FSPICK_CLOEXEC: libc::c_uint = 1;
        const FSPICK_EMPTY_PATH: libc::c_uint = 8;
        let (fd, flags) = (mount.as_fd().as_raw_fd(), FSPICK_CLOEXEC | FSPICK_EMPTY_PATH);
        // SAFETY: the path is an empty C string.
        owned(unsafe { libc::syscall(libc::SYS_fspick, fd, c"".as_ptr(), flags) }).map(Self)
    }

    /// Makes the change.
    pub fn reconfigure(&self) -> Result<(), Errno> {
        const FSCONFIG_CMD_RECONFIGURE: libc::c_uint = 7;
        self.config(FSCONFIG_CMD_RECONFIGURE, std::ptr::null(), std::ptr::null())
    }

    fn config(
        &self,
        command: libc::c_uint,
        key: *const libc::c_char,
        value: *const libc::c_char,
    ) -> Result<(), Errno> {
        let fd = self.0.as_raw_fd();
        // SAFETY: key and value are null or C strings, as the command wants them.
        check(unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) }).map(drop)
    }

    /// Sets an option without value.
    pub fn flag(&self, key: &CStr) -> Result<(), Errno> {
        self.config(FSCONFIG_SET_FLAG, key.as_ptr(), std::ptr::null())
    }

    /// Sets an option to a value, of at most 255 bytes.
    pub fn string(&self, key: &CStr, value: &CStr) -> Result<(), Errno> {
        self.config(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())
    }

    /// Makes the file system, and a detached mount of it with the MOUNT_ATTR_* bits.
    pub fn mount(&self, attributes: u64) -> Result<OwnedFd, Errno> {
        const FSMOUNT_CLOEXEC: libc::c_uint = 1;
        self.config(FSCONFIG_CMD_CREATE, std::ptr::null(), std::ptr::null())?;
        // SAFETY: numbers only.
        owned(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
    }

    /// What the file system had to say about a failure, lines joined, without their severity.
    pub fn complaints(&self) -> String {
        let mut lines = Vec::new();
        if let Ok(copy) = self.0.try_clone() {
            let mut file = std::fs::File::from(copy);
            let mut buffer = [0u8; 1024];
            while let Ok(len @ 1..) = file.read(&mut buffer) {
                let line = String::from_utf8_lossy(&buffer[..len]);
                lines.push(line.trim_end().trim_start_matches(['e', 'w', 'i']).trim_start().to_owned());
            }
        }
        lines.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;
    use std::fs;

    #[test]
    fn a_file_system_can_be_made_and_attached_without_a_path() {
        in_child(libc::CLONE_NEWNS, || {
            let dir = tempfile::tempdir().unwrap();
            let context = FsContext::open(c"tmpfs").unwrap();
            context.string(c"mode", c"0711").unwrap();
            let tree = context.mount(libc::MOUNT_ATTR_NOSUID).unwrap();
            attach(&tree, fs::File::open(dir.path()).unwrap()).unwrap();
            fs::write(dir.path().join("file"), b"x").unwrap();
            set_attributes(&tree, Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() }, false)
                .unwrap();
            assert!(fs::write(dir.path().join("other"), b"x").is_err());
            let copy = clone_tree(tree.as_fd(), c"", true).unwrap();
            drop(copy);
            let change = FsContext::pick(&tree).unwrap();
            change.flag(c"ro").unwrap();
            change.reconfigure().unwrap();
            let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let line = table.lines().find(|l| l.contains(dir.path().to_str().unwrap())).unwrap();
            assert!(line.split(" - ").nth(1).unwrap().contains(" ro,"), "{line}");
        });
    }

    #[test]
    fn an_unknown_option_is_explained() {
        in_child(libc::CLONE_NEWNS, || {
            let context = FsContext::open(c"tmpfs").unwrap();
            assert_eq!(context.string(c"nonsense", c"1"), Err(Errno::EINVAL));
            assert!(context.complaints().contains("nonsense"), "{}", context.complaints());
        });
    }
}
