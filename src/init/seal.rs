//! Keeping the container's hands off the runtime's own program file (CVE-2019-5736).
//!
//! A process of ours inside a container can be looked at through /proc/PID/exe, and a program called
//! `/proc/self/exe` is ours again. Whoever opens that link for writing must find nothing worth writing to. So a
//! command that will put a process into a container first executes itself again from
//!
//! 1. a read-only overlay file system that exists only as a descriptor: nothing is copied, pages are shared, and
//!    there is no way from it to the file below; or
//! 2. a sealed memory file with a copy, where the kernel or the privileges do not give us the first.
//!
//! The first is tried before anything else happens at all: see `seal/entry_x86_64.rs`.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::fcntl::{AtFlags, FcntlArg, OFlag, SealFlag, fcntl, openat};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, fstatvfs};

#[cfg(target_arch = "x86_64")]
mod entry_x86_64;

use crate::sys::mount::FsContext;
use crate::sys::{Context, Error, Result};

const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_NOSUID: u64 = 2;
const MOUNT_ATTR_NODEV: u64 = 4;

/// Returns at once in a program file that cannot be written through; otherwise executes it again from one.
///
/// `scratch` is a directory of ours, only there to be the second layer that a read-only overlay needs.
pub fn ensure(scratch: &Path) -> Result<()> {
    let exe = File::open("/proc/self/exe").context(|| "open /proc/self/exe")?;
    if sealed(&exe) {
        return Ok(());
    }
    let copy = match overlay(scratch) {
        Ok(copy) => copy,
        Err(_) => memory_copy(&exe)?,
    };
    let args = std::env::args_os().map(|a| c_string(a.into_vec())).collect::<Result<Vec<_>>>()?;
    let env = std::env::vars_os().map(|(mut k, v)| {
        k.push("=");
        k.push(v);
        c_string(k.into_vec())
    });
    let env = env.collect::<Result<Vec<_>>>()?;
    match nix::unistd::execveat(&copy, c"", &args, &env, AtFlags::AT_EMPTY_PATH) {
        Ok(never) => match never {},
        Err(errno) => Err(Error::call("execveat of our own program", errno)),
    }
}

fn c_string(bytes: Vec<u8>) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::new("an argument contains a nul byte"))
}

const SEALS: SealFlag = SealFlag::F_SEAL_SEAL
    .union(SealFlag::F_SEAL_SHRINK)
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_WRITE);

/// True for a memory file that nobody can change, and for a file of a read-only overlay that has no name.
fn sealed(exe: &File) -> bool {
    if let Ok(seals) = fcntl(exe, FcntlArg::F_GET_SEALS) {
        return SealFlag::from_bits_truncate(seals).contains(SEALS);
    }
    // A mount without a place in any namespace is shown as if it were the root of the tree.
    let nameless = std::fs::read_link("/proc/self/exe").is_ok_and(|p| p.parent() == Some(Path::new("/")));
    let read_only = fstatvfs(exe).is_ok_and(|s| s.flags().contains(FsFlags::ST_RDONLY));
    let overlay =
        nix::sys::statfs::fstatfs(exe).is_ok_and(|s| s.filesystem_type().0 == OVERLAYFS_SUPER_MAGIC);
    nameless && read_only && overlay
}

const OVERLAYFS_SUPER_MAGIC: i64 = 0x794c_7630;

fn overlay(scratch: &Path) -> Result<OwnedFd> {
    let exe = std::fs::read_link("/proc/self/exe").context(|| "readlink /proc/self/exe")?;
    let (dir, name) = exe.parent().zip(exe.file_name()).ok_or_else(|| Error::new("no path of our own"))?;
    let overlay = FsContext::open(c"overlay").context(|| "fsopen overlay")?;
    let layers = c_string([escape(dir), escape(scratch)].join(&b':'))?;
    let set = |key: &CStr, value: &CStr| overlay.string(key, value).context(|| "fsconfig overlay");
    set(c"lowerdir", &layers)?;
    // Saves a line in the kernel's log where the layers are on different file systems.
    let _ = set(c"xino", c"off");
    let mount = overlay
        .mount(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
        .context(|| "mount a read-only overlay")?;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(&mount, name, flags, Mode::empty()).context(|| "open our own program in the overlay")
}

/// Overlayfs separates layers by colons.
fn escape(path: &Path) -> Vec<u8> {
    let mut out = vec![];
    for &b in path.as_os_str().as_bytes() {
        if matches!(b, b':' | b'\\') {
            out.push(b'\\');
        }
        out.push(b);
    }
    out
}

fn memory_copy(exe: &File) -> Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // Newer kernels warn of, or even refuse, a memory file that doesn't say whether it is executable.
    let memory = memfd_create(c"stasis", flags | MFdFlags::from_bits_retain(libc::MFD_EXEC))
        .or_else(|_| memfd_create(c"stasis", flags))
        .context(|| "memfd_create")?;
    let mut file = File::from(memory);
    io::copy(&mut exe.as_fd().try_clone_to_owned().map(File::from).context(|| "dup")?, &mut file)
        .context(|| "copying our own program")?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS)).context(|| "fcntl(F_ADD_SEALS)")?;
    // A descriptor open for writing makes execveat(2) fail with ETXTBSY.
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(File::open(&name).context(|| format!("open {name}"))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_copy_cannot_be_written() {
        let exe = File::open("/proc/self/exe").unwrap();
        assert!(!sealed(&exe), "an ordinary program file is not sealed");
        let copy = memory_copy(&exe).unwrap();
        assert!(sealed(&File::from(copy.try_clone().unwrap())));
        let tmp = tempfile::tempdir().unwrap();
        let writable = |fd: &OwnedFd| {
            File::options().write(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd())).and_then(|mut f| {
                use std::io::Write;
                f.write_all(b"x")
            })
        };
        assert!(writable(&copy).is_err());
        match overlay(tmp.path()) {
            Ok(copy) => {
                let e = writable(&copy).unwrap_err();
                assert_eq!(e.raw_os_error(), Some(libc::EROFS));
            }
            Err(e) => eprintln!("no overlay here: {e}"),
        }
    }

    #[test]
    fn colons_do_not_split_layers() {
        assert_eq!(escape(Path::new("/a:b\\c")), b"/a\\:b\\\\c");
    }
}
