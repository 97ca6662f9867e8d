//! A /proc that is known to be one.
//!
//! Inside a root file system that somebody else made, `/proc/sys/kernel/hostname` may be anything: another file under
//! a bind mount, a tmpfs, a link. Writing a label or a sysctl there would write to the attacker's file, or worse to
//! `/proc/sysrq-trigger` (CVE-2025-31133, CVE-2025-52881). So every write goes through a procfs of our own, mounted
//! nowhere; and where the kernel denies one, through the root of a mounted procfs, every step checked not to cross
//! into another mount.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use super::mount::FsContext;
use super::resolve::open_beneath;
use super::{Context, Error, Result};

/// Reads a small file in as few system calls as it takes: two and the end. The length that a file of procfs, sysfs or a
/// control group claims to have means nothing. Names in it may be any bytes: what is no UTF-8 of them becomes U+FFFD.
pub fn read_text(path: impl AsRef<Path>) -> std::io::Result<String> {
    read_open(&mut File::open(path)?)
}

/// The same of a file that may be no text.
pub fn read_bytes(path: impl AsRef<Path>) -> std::io::Result<Vec<u8>> {
    read_all(&mut File::open(path)?)
}

/// The same of an open file.
pub fn read_open(file: &mut File) -> std::io::Result<String> {
    let bytes = read_all(file)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
}

fn read_all(file: &mut File) -> std::io::Result<Vec<u8>> {
    let (mut text, mut filled) = (vec![0; 4096], 0);
    loop {
        match file.read(&mut text[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if filled == text.len() {
            text.resize(2 * filled, 0);
        }
    }
    text.truncate(filled);
    Ok(text)
}

/// [`Procfs::open`] once it is needed: most processes write no label and no sysctl, and taking a mount away again makes
/// the kernel wait.
#[derive(Debug, Default)]
pub struct Later(std::cell::OnceCell<Procfs>);

impl Later {
    /// The procfs, opened now if it has not been.
    pub fn get(&self) -> Result<&Procfs> {
        if let Some(procfs) = self.0.get() {
            return Ok(procfs);
        }
        let procfs = Procfs::open()?;
        Ok(self.0.get_or_init(|| procfs))
    }
}

/// The inode number of the root of every procfs.
const ROOT_INODE: u64 = 1;

/// The root directory of a procfs.
#[derive(Debug)]
pub struct Procfs {
    root: OwnedFd,
    /// What `self` means in this procfs.
    pid: String,
}

impl Procfs {
    /// A procfs of the current pid namespace: a private one, or, if the kernel denies that, the one at /proc.
    pub fn open() -> Result<Self> {
        match FsContext::open(c"proc").and_then(|context| context.mount(0)) {
            Ok(root) => Self::from_root(root),
            Err(_) => Self::mounted(),
        }
    }

    /// The procfs mounted at /proc, after proving that it is one.
    pub fn mounted() -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open("/proc", flags, Mode::empty()).context(|| "open /proc")?;
        Self::from_root(root)
    }

    fn from_root(root: OwnedFd) -> Result<Self> {
        let kind = fstatfs(&root).context(|| "fstatfs /proc")?.filesystem_type();
        let inode = fstat(&root).context(|| "fstat /proc")?.st_ino;
        if kind != PROC_SUPER_MAGIC || inode != ROOT_INODE {
            return Err(Error::new("/proc is not the root of a procfs"));
        }
        let pid = readlinkat(&root, "self").context(|| "readlink /proc/self")?;
        let pid = pid.into_string().ok().filter(|p| p.bytes().all(|b| b.is_ascii_digit()));
        let pid = pid.ok_or_else(|| Error::new("/proc/self is not a process"))?;
        Ok(Self { root, pid })
    }

    /// Opens a file of the procfs; `self/...` is this process.
    pub fn file(&self, path: impl AsRef<Path>, flags: OFlag) -> Result<File, Errno> {
        let path = path.as_ref();
        let fd = match path.strip_prefix("self") {
            Ok(rest) => open_beneath(&self.root, Path::new(&self.pid).join(rest), flags)?,
            Err(_) => open_beneath(&self.root, path, flags)?,
        };
        Ok(File::from(fd))
    }

    /// Reads a whole (small) file.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String> {
        let path = path.as_ref();
        let name = || format!("open /proc/{}", path.display());
        let mut file = self.file(path, OFlag::O_RDONLY).context(name)?;
        read_open(&mut file).context(|| format!("read /proc/{}", path.display()))
    }

    /// Writes a file in one write(2), as procfs wants it.
    pub fn write(&self, path: impl AsRef<Path>, value: impl AsRef<[u8]>) -> Result<()> {
        let path = path.as_ref();
        let mut file =
            self.file(path, OFlag::O_WRONLY).context(|| format!("open /proc/{}", path.display()))?;
        file.write_all(value.as_ref()).context(|| format!("write /proc/{}", path.display()))
    }

    /// The path that a descriptor of this process has, as the kernel prints it.
    pub fn path_of(&self, fd: impl AsFd) -> Result<std::path::PathBuf> {
        use std::os::fd::AsRawFd;
        let name = format!("{}/fd/{}", self.pid, fd.as_fd().as_raw_fd());
        readlinkat(&self.root, name.as_str()).map(Into::into).context(|| format!("readlink /proc/{name}"))
    }

    /// The descriptors of this process.
    pub fn descriptors(&self) -> Result<Descriptors> {
        let directory = self.file("self/fd", OFlag::O_PATH | OFlag::O_DIRECTORY);
        directory.map(|d| Descriptors(d.into())).context(|| "open /proc/self/fd")
    }

    /// The root directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// `/proc/self/fd` of a procfs that is one.
#[derive(Debug)]
pub struct Descriptors(OwnedFd);

impl Descriptors {
    /// Opens anew what a descriptor is, which may be one with O_PATH. Takes no call that a seccomp filter may not know.
    pub fn reopen(&self, fd: impl AsFd, flags: OFlag) -> Result<File> {
        use std::os::fd::AsRawFd;
        let name = fd.as_fd().as_raw_fd().to_string();
        let opened = openat(&self.0, name.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty());
        opened.map(File::from).context(|| format!("open /proc/self/fd/{name}"))
    }

    /// mount(2) onto what a descriptor is, for kernels and filters without the newer interface; with a source, that
    /// descriptor bound there.
    pub fn mount(
        &self,
        source: Option<BorrowedFd<'_>>,
        target: BorrowedFd<'_>,
        flags: nix::mount::MsFlags,
    ) -> Result<(), Errno> {
        use std::os::fd::AsRawFd;
        let source = source.map(|fd| fd.as_raw_fd().to_string());
        self.mount_on(source.as_deref().map(Path::new), target, None, flags, None)
    }

    /// mount(2) onto what a descriptor is, with all that the call takes. The working directory is this one meanwhile: the
    /// call takes paths, and only one that begins here is proved. So a source with a place must be absolute.
    pub fn mount_on(
        &self,
        source: Option<&Path>,
        target: BorrowedFd<'_>,
        kind: Option<&str>,
        flags: nix::mount::MsFlags,
        data: Option<&str>,
    ) -> Result<(), Errno> {
        use std::os::fd::AsRawFd;
        let target = target.as_raw_fd().to_string();
        // One that its user may not enter is not come back to.
        let before = match open(".", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) {
            Err(Errno::EACCES) => {
                open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?
            }
            before => before?,
        };
        nix::unistd::fchdir(&self.0)?;
        let mounted = nix::mount::mount(source, target.as_str(), kind, flags, data);
        nix::unistd::fchdir(&before)?;
        mounted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;
    use nix::mount::{MsFlags, mount};

    const NONE: Option<&str> = None;

    #[test]
    fn a_private_procfs_does_not_see_what_is_mounted_over_proc() {
        in_child(libc::CLONE_NEWNS, || {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), "forged").unwrap();
            mount(Some(file.path()), "/proc/self/status", NONE, MsFlags::MS_BIND, NONE).unwrap();
            assert_eq!(std::fs::read_to_string("/proc/self/status").unwrap(), "forged");
            assert!(Procfs::open().unwrap().read("self/status").unwrap().starts_with("Name:"));
        });
    }

    #[test]
    fn the_mounted_one_refuses_what_is_mounted_over_it() {
        in_child(libc::CLONE_NEWNS, || {
            let file = tempfile::NamedTempFile::new().unwrap();
            mount(Some(file.path()), "/proc/sys/kernel/hostname", NONE, MsFlags::MS_BIND, NONE).unwrap();
            let e = Procfs::mounted().unwrap().write("sys/kernel/hostname", "x").unwrap_err();
            assert_eq!(e.errno(), Some(Errno::EXDEV));
        });
    }

    #[test]
    fn a_descriptor_is_opened_anew_whatever_covers_proc() {
        in_child(libc::CLONE_NEWNS, || {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), "meant").unwrap();
            let only = open(file.path(), OFlag::O_PATH, Mode::empty()).unwrap();
            mount(Some("none"), "/proc", Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
            let descriptors = Procfs::open().unwrap().descriptors().unwrap();
            let mut again = descriptors.reopen(&only, OFlag::O_RDONLY).unwrap();
            assert_eq!(read_open(&mut again).unwrap(), "meant");
        });
    }

    #[test]
    fn a_descriptor_is_mounted_onto_whatever_covers_proc() {
        in_child(libc::CLONE_NEWNS, || {
            let dir = tempfile::tempdir().unwrap();
            let (meant, other) = (dir.path().join("meant"), dir.path().join("other"));
            std::fs::create_dir(&meant).unwrap();
            std::fs::create_dir(&other).unwrap();
            mount(Some("none"), &meant, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
            let target = open(&meant, OFlag::O_PATH, Mode::empty()).unwrap();
            let source = open(&other, OFlag::O_PATH, Mode::empty()).unwrap();
            // A false /proc/self/fd whose entry of that number is another directory.
            let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&target));
            mount(Some("none"), "/proc", Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
            std::fs::create_dir_all("/proc/self/fd").unwrap();
            std::os::unix::fs::symlink(&other, &name).unwrap();
            std::env::set_current_dir(dir.path()).unwrap();
            let descriptors = Procfs::open().unwrap().descriptors().unwrap();
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
            descriptors.mount(None, target.as_fd(), flags).unwrap();
            assert_eq!(std::fs::write(meant.join("x"), "x").unwrap_err().raw_os_error(), Some(libc::EROFS));
            std::fs::write(other.join("x"), "x").unwrap();
            descriptors.mount(Some(source.as_fd()), target.as_fd(), MsFlags::MS_BIND).unwrap();
            assert!(meant.join("x").exists() && std::path::Path::new("meant").exists());
        });
    }

    #[test]
    fn a_proc_that_is_none_is_refused() {
        in_child(libc::CLONE_NEWNS, || {
            mount(Some("none"), "/proc", Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
            assert!(Procfs::mounted().is_err());
            // Nor with what a procfs has in it.
            let name = std::process::id().to_string();
            std::os::unix::fs::symlink(&name, "/proc/self").unwrap();
            std::fs::create_dir(format!("/proc/{name}")).unwrap();
            let e = Procfs::mounted().unwrap_err().to_string();
            assert!(e.contains("not the root of a procfs"), "{e}");
            // A directory of a real procfs is not its root either.
            let private = Procfs::open().unwrap();
            let sys = private.file("sys", OFlag::O_PATH | OFlag::O_DIRECTORY).unwrap();
            assert!(Procfs::from_root(sys.into()).is_err());
        });
    }
}
