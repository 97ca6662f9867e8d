//! Carrying out the mounts of config.json.
//!
//! ```text
//!   fresh file system: fsopen ── options ── fsmount ──┐
//!   bind mount:        open_tree(CLONE) ── attributes ┴─> detached ── move_mount ─> descriptor of the destination
//!                                                                                   (openat2 in the root)
//! ```
//!
//! The destination is resolved once, to a descriptor, and the mount is attached to that: renaming or linking
//! directories under us can put the mount at another place *inside* the root, never outside (CVE-2021-30465). Where
//! the kernel or a seccomp filter around us denies this interface, mount(2) is used on `/proc/self/fd/N` of a procfs that
//! is proved to be one: the host's, for nothing of the container is the root directory yet.

mod bind;
mod cgroup;
mod copy_up;
mod fresh;
mod idmap;
mod options;

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use libc::{MS_RDONLY, MS_REC};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat};

use crate::sys::mount::{Attributes, attach, clone_tree, set_attributes};
use crate::sys::procfs::Procfs;
use crate::sys::resolve::{make_dir_in_root, open_in_root, parent_in_root};
use crate::sys::stat::place;
use crate::sys::{Context, Error, Result, xattr};

use bind::no_source;
pub(crate) use bind::open_source;
pub(crate) use fresh::{fresh, with_context};
pub use idmap::{Source, open_for_init, source};
pub use options::{IdMapping, Mount, attributes, known_options, propagation};

pub(crate) const DIR_MODE: Mode = Mode::from_bits_truncate(0o755);
const FILE_MODE: Mode = Mode::from_bits_truncate(0o644);

/// What all mounts of a container have in common.
pub struct Mounter<'a> {
    /// The root directory, as the new mount namespace sees it.
    pub root: BorrowedFd<'a>,
    /// Its path.
    pub root_path: &'a Path,
    /// /proc of the current mount namespace.
    pub procfs: &'a Procfs,
    /// SELinux label of the mounts.
    pub label: Option<&'a str>,
    /// The container has a cgroup namespace of its own.
    pub cgroup_namespace: bool,
    /// The container's directory in cgroup v2.
    pub unified: Option<&'a Path>,
}

impl Mounter<'_> {
    /// Carries out one mount, whose source is as [`source`] has said. `late` has the runtime open it, if it can.
    pub fn mount(&self, m: &Mount, source: Source, late: &dyn Fn() -> Result<Option<OwnedFd>>) -> Result<()> {
        let tree = || match source {
            Source::Ready(tree) => Ok(tree),
            Source::Late => late()?.map_or_else(|| open_source(m), Ok),
            Source::Own => match open_source(m) {
                Err(e) if e.errno() == Some(Errno::EACCES) => match late()? {
                    Some(place) => {
                        clone_tree(place.as_fd(), c"", m.flags & MS_REC != 0).context(|| no_source(m))
                    }
                    None => Err(e),
                },
                opened => opened,
            },
        };
        self.dispatch(m, tree).context(|| {
            format!(
                "error mounting {:?} to rootfs at {:?}",
                m.source.to_string_lossy(),
                m.destination.to_string_lossy()
            )
        })
    }

    fn dispatch(&self, m: &Mount, source: impl FnOnce() -> Result<OwnedFd>) -> Result<()> {
        match m.kind.as_str() {
            "bind" => self.bind(m, source()?),
            "proc" | "sysfs" => {
                let target = self.ordinary_directory(m)?;
                self.place(m, &target, m.flags, &m.data).map(drop)
            }
            "cgroup" => {
                if crate::cgroup::is_unified() {
                    cgroup::mount_v2(self, m)
                } else {
                    cgroup::mount_v1(self, m)
                }
            }
            "tmpfs" => {
                let (target, existed) = self.directory_target(m)?;
                let mut data = m.data.clone();
                if existed {
                    // What was there lends its mode; an explicit mode= comes later and wins.
                    let mode = fstat(&target).context(|| "fstat mountpoint")?.st_mode & 0o7777;
                    data = join_options(&format!("mode={mode:04o}"), &data);
                }
                let data = with_context(&data, self.label);
                let flags = m.flags & !MS_RDONLY;
                if m.copy_up {
                    let tree = fresh("tmpfs", &m.source, flags, &data).context(|| "tmpcopyup")?;
                    copy_up::copy(&target, &tree).context(|| "tmpcopyup")?;
                    self.attach_and_adjust(m, &target, &tree)
                } else {
                    self.place(m, &target, flags, &data).map(drop)
                }
            }
            _ => {
                let (target, _) = self.directory_target(m)?;
                let mut flags = m.flags;
                if clean(&m.destination) == Path::new("/dev") {
                    // Devices are still to be made in it.
                    flags &= !MS_RDONLY;
                }
                // This one has no such option, but attributes.
                if m.kind == "mqueue" {
                    let tree = self.place(m, &target, flags, &m.data)?;
                    return self.relabel(&tree);
                }
                self.place(m, &target, flags, &with_context(&m.data, self.label)).map(drop)
            }
        }
    }

    /// Gives a directory SELinux's label of the mounts.
    fn relabel(&self, dir: &OwnedFd) -> Result<()> {
        let Some(label) = self.label.filter(|l| !l.is_empty()) else { return Ok(()) };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = openat(dir, ".", flags, Mode::empty()).context(|| "open the new mount")?;
        match xattr::set_open(&dir, c"security.selinux", label.as_bytes()) {
            // A kernel without SELinux.
            Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
            Err(e) => Err(e).context(|| format!("setxattr security.selinux {label}")),
        }
    }

    /// proc and sysfs go onto a directory of exactly that name: no link may be followed (CVE-2019-16884).
    fn ordinary_directory(&self, m: &Mount) -> Result<OwnedFd> {
        let (parent, name) =
            parent_in_root(self.root, &m.destination, DIR_MODE).context(|| "make mountpoint")?;
        match mkdirat(&parent, name, DIR_MODE) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(e).context(|| "make mountpoint"),
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&parent, name, flags, Mode::empty()).context(|| "open mountpoint")?;
        if !is_dir(&fd).context(|| "fstat mountpoint")? {
            return Err(Error::new(format!("filesystem {:?} must be mounted on ordinary directory", m.kind)));
        }
        self.check_target(m, &fd, None)?;
        Ok(fd)
    }

    /// The destination as a directory, made if missing; the flag says that it was there.
    pub(crate) fn directory_target(&self, m: &Mount) -> Result<(OwnedFd, bool)> {
        self.existing_or_new(m).context(|| no_target(m))
    }

    fn existing_or_new(&self, m: &Mount) -> Result<(OwnedFd, bool)> {
        let (fd, existed) = match open_in_root(self.root, &m.destination, OFlag::O_PATH) {
            Ok(fd) => (fd, true),
            Err(Errno::ENOENT) => {
                let made = make_dir_in_root(self.root, &m.destination, DIR_MODE);
                (made.context(|| format!("make mountpoint {:?}", m.destination))?, false)
            }
            Err(e) => return Err(e).context(|| "lookup mountpoint target"),
        };
        self.check_target(m, &fd, None)?;
        Ok((fd, existed))
    }

    /// Refuses the root itself, and anything at or below /proc but a procfs and the files that lxcfs emulates.
    fn check_target(&self, m: &Mount, target: &OwnedFd, source: Option<&OwnedFd>) -> Result<()> {
        let path = self.procfs.path_of(target)?;
        let Ok(inside) = path.strip_prefix(self.root_path) else {
            return Err(Error::new(format!("mountpoint {path:?} is outside of rootfs {:?}", self.root_path)));
        };
        if inside.as_os_str().is_empty() || place(target) == place(self.root) {
            return Err(Error::new(format!(
                "mountpoint {path:?} is on the top of rootfs {:?}",
                self.root_path
            )));
        }
        let Ok(below) = inside.strip_prefix("proc") else { return Ok(()) };
        if below.as_os_str().is_empty() {
            use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
            let bound_proc = source
                .is_some_and(|s| fstatfs(s).is_ok_and(|statfs| statfs.filesystem_type() == PROC_SUPER_MAGIC));
            if m.kind == "proc" || bound_proc {
                return Ok(());
            }
            return Err(unsafe_proc(
                m,
                &format!("{path:?} cannot be mounted because it is not of type proc"),
            ));
        }
        const EMULATED: &[&str] = &[
            "cpuinfo",
            "diskstats",
            "meminfo",
            "stat",
            "swaps",
            "uptime",
            "loadavg",
            "slabinfo",
            "sys/kernel/ns_last_pid",
            "sys/crypto/fips_enabled",
        ];
        if EMULATED.iter().any(|name| below == Path::new(name)) {
            return Ok(());
        }
        Err(unsafe_proc(m, &format!("{path:?} cannot be mounted because it is inside /proc")))
    }

    /// Makes a file system and puts it onto `target`; returns the root of the new mount.
    pub(crate) fn place(&self, m: &Mount, target: &OwnedFd, flags: u64, data: &str) -> Result<OwnedFd> {
        let tree = match fresh(&m.kind, &m.source, flags, data) {
            Ok(tree) => {
                put(&tree, target)?;
                tree
            }
            Err(refused) => self.classic(m, target, flags, data).map_err(|e| {
                // mount(2) says less than fsconfig(2): prefer the longer explanation of the same refusal.
                if e.errno() == refused.errno() { refused } else { e }
            })?,
        };
        self.propagate(m, &tree)?;
        Ok(tree)
    }

    /// mount(2) on a descriptor, for kernels, filters and options that the newer interface cannot serve.
    fn classic(&self, m: &Mount, target: &OwnedFd, flags: u64, data: &str) -> Result<OwnedFd> {
        let call =
            || format!("mount src={}, dst={}, data={data}", m.source.display(), m.destination.display());
        let flags = MsFlags::from_bits_retain(flags);
        self.procfs
            .descriptors()?
            .mount_on(Some(&m.source), target.as_fd(), Some(&m.kind), flags, Some(data))
            .context(call)?;
        // The descriptor is below the new mount: look the path up again, and make sure that it is a mount now.
        let path = self.procfs.path_of(target)?;
        let inside = path.strip_prefix(self.root_path).map_err(|_| Error::new("mountpoint moved"))?;
        let top =
            open_in_root(self.root, inside, OFlag::O_PATH).context(|| "reopen mountpoint after mount")?;
        if place(&top).context(|| "statx")? == place(target).context(|| "statx")? {
            return Err(Error::new(format!("mountpoint {:?} was moved while re-opening", m.destination)));
        }
        Ok(top)
    }

    pub(crate) fn attach_and_adjust(&self, m: &Mount, target: &OwnedFd, tree: &OwnedFd) -> Result<()> {
        put(tree, target)?;
        self.propagate(m, tree)
    }

    /// Propagation types, in the order they were given, then the attributes of the whole tree.
    fn propagate(&self, m: &Mount, tree: &OwnedFd) -> Result<()> {
        for flags in &m.propagation {
            set_propagation(self.procfs, tree.as_fd(), *flags)?;
        }
        if let Some(all) = m.recursive {
            set_attributes(tree, all, true).context(|| "mount_setattr (recursive attributes)")?;
        }
        Ok(())
    }
}

/// Refuses to cover a part of /proc, in runc's words.
fn unsafe_proc(m: &Mount, why: &str) -> Error {
    Error::new(why).context(format!("check proc-safety of {} mount", m.destination.display()))
}

/// Before why there is nothing to mount onto, in runc's words.
fn no_target(m: &Mount) -> String {
    format!("create mountpoint for {} mount", m.destination.display())
}

/// Attaches a mount. What move_mount(2) says of a directory on something else, and the other way round, is `EINVAL`;
/// clients know the `ENOTDIR` of mount(2).
fn put(tree: &OwnedFd, target: &OwnedFd) -> Result<()> {
    let attached = attach(tree, target).map_err(|errno| match (is_dir(tree), is_dir(target)) {
        (Ok(tree), Ok(target)) if errno == Errno::EINVAL && tree != target => Errno::ENOTDIR,
        _ => errno,
    });
    attached.context(|| "move_mount")
}

fn is_dir(fd: &OwnedFd) -> Result<bool, Errno> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR)
}

/// Changes the propagation of a mount, or with MS_REC of the whole tree.
fn set_propagation(procfs: &Procfs, mount: BorrowedFd<'_>, flags: u64) -> Result<()> {
    let kind = flags & !MS_REC;
    let change = Attributes { propagation: kind, ..Attributes::default() };
    match set_attributes(mount, change, flags & MS_REC != 0) {
        Err(Errno::ENOSYS) => procfs.descriptors()?.mount(None, mount, MsFlags::from_bits_retain(flags)),
        other => other,
    }
    .context(|| "change mount propagation")
}

/// mount(2), with an errno.
pub(crate) fn classic_mount(
    source: Option<&Path>,
    target: &Path,
    kind: Option<&str>,
    flags: u64,
    data: Option<&str>,
) -> Result<(), Errno> {
    let flags = MsFlags::from_bits_retain(flags);
    nix::mount::mount(source, target, kind, flags, data)
}

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::new("mount field contains null byte"))
}

fn join_options(first: &str, second: &str) -> String {
    if first.is_empty() || second.is_empty() {
        format!("{first}{second}")
    } else {
        format!("{first},{second}")
    }
}

/// A destination without `.`, `..` and double slashes, as far as the text goes.
pub(crate) fn clean(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    out
}
