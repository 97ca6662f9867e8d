//! The root file system of a container: mounts first, then the step into it, then what only works from inside.
//!
//! ```text
//!   prepare   / made slave or private; rootfs bound onto itself; mounts; devices
//!             (here the runtime runs hooks that still see the host's paths)
//!   pivot     pivot_root(".", ".") and the old root unmounted   (no_pivot: MS_MOVE; no mount namespace: chroot)
//!   finish    read-only remounts, read-only and masked paths, umask
//! ```

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use libc::{MS_BIND, MS_MOVE, MS_PRIVATE, MS_RDONLY, MS_REC, MS_REMOUNT, MS_SLAVE};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, chroot, fchdir, pivot_root};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::mounts::{Mount, Mounter, Source, classic_mount, clean, propagation};
use super::{devices, masked};
use crate::sys::mount::{Attributes, set_attributes};
use crate::sys::procfs::Procfs;
use crate::sys::{Context, Error, Result};

/// What there is to set up.
pub struct Setup<'a> {
    /// config.json.
    pub spec: &'a Spec,
    /// The root file system on the host: absolute, without links.
    pub rootfs: &'a Path,
    /// The bundle, which relative sources of bind mounts are relative to.
    pub bundle: &'a Path,
    /// In a user namespace, its own or ours, devices cannot be made, only bound.
    pub user_namespace: bool,
    /// MS_MOVE instead of pivot_root(2), for root file systems on a ramdisk.
    pub no_pivot: bool,
    /// The container's directory in cgroup v2, if it has one.
    pub unified: Option<&'a Path>,
    /// One entry for each mount of config.json: what [`super::mounts::source`] says of it.
    pub sources: Vec<Source>,
}

impl Setup<'_> {
    fn has_namespace(&self, kind: LinuxNamespaceType) -> bool {
        has_namespace(self.spec, kind)
    }

    fn mounts(&self) -> Result<Vec<Mount>> {
        parse_mounts(self.spec, self.bundle, self.rootfs)
    }
}

/// The mounts of config.json, understood. Destinations may be written as paths of the host, inside the root file system.
pub fn parse_mounts(spec: &Spec, bundle: &Path, rootfs: &Path) -> Result<Vec<Mount>> {
    let parse = |m| {
        let mut m = Mount::parse(m, bundle)?;
        if let Ok(inside) = clean(&m.destination).strip_prefix(rootfs)
            && rootfs != Path::new("/")
        {
            m.destination = Path::new("/").join(inside);
        }
        Ok(m)
    };
    spec.mounts().iter().flatten().map(parse).collect()
}

/// True if the container has a namespace of that kind, new or joined.
pub fn has_namespace(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    namespaces.is_some_and(|all| all.iter().any(|n| n.typ() == kind))
}

/// A root file system with everything mounted, not yet entered.
pub struct Root {
    fd: OwnedFd,
    mounts: Vec<Mount>,
    own_dev: bool,
}

impl Root {
    /// O_PATH descriptor of the root directory in the container's mount namespace.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes the mounts and devices. Runs in the container's namespaces, already in its control groups. `late` has the
/// runtime open the source of the mount with that index, which gives none where it has no more privileges than we.
pub fn prepare(setup: &mut Setup<'_>, late: &dyn Fn(usize) -> Result<Option<OwnedFd>>) -> Result<Root> {
    // Modes of devices and directories are exactly what config.json says.
    umask(Mode::empty());
    let linux = setup.spec.linux().as_ref();
    let wanted = linux.and_then(|l| l.rootfs_propagation().as_deref()).unwrap_or_default();
    let root_propagation = root_propagation(wanted, setup.no_pivot)?;
    if setup.has_namespace(LinuxNamespaceType::Mount) {
        detach_propagation(setup.rootfs, root_propagation).context(|| "error preparing rootfs")?;
    }
    bind_onto_itself(setup.rootfs).context(|| "error preparing rootfs")?;

    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_PATH;
    let fd = open(setup.rootfs, flags, Mode::empty()).context(|| "open rootfs handle")?;
    let procfs = Procfs::mounted()?;
    let mounts = setup.mounts()?;
    let mounter = Mounter {
        root: fd.as_fd(),
        root_path: setup.rootfs,
        procfs: &procfs,
        label: linux.and_then(|l| l.mount_label().as_deref()),
        cgroup_namespace: setup.has_namespace(LinuxNamespaceType::Cgroup),
        unified: setup.unified,
    };
    let mut sources = std::mem::take(&mut setup.sources).into_iter();
    for (index, mount) in mounts.iter().enumerate() {
        mounter.mount(mount, sources.next().unwrap_or(Source::Own), &|| late(index))?;
    }
    let own_dev = !mounts.iter().any(|m| m.kind == "bind" && clean(&m.destination) == Path::new("/dev"));
    if own_dev {
        devices::create(fd.as_fd(), &procfs, setup.spec, setup.user_namespace)
            .context(|| "configuring container /dev")?;
    }
    Ok(Root { fd, mounts, own_dev })
}

fn root_propagation(word: &str, no_pivot: bool) -> Result<u64> {
    if word.is_empty() {
        return Ok(0);
    }
    let flags =
        propagation(word).ok_or_else(|| Error::new(format!("rootfsPropagation={word} is not supported")))?;
    if no_pivot && flags & MS_PRIVATE != 0 {
        return Err(Error::new("rootfsPropagation of [r]private is not safe without pivot_root"));
    }
    Ok(flags)
}

/// Makes the root file system a mount of its own: what is mounted in it is below one point. Without a mount namespace
/// that is the host's table of mounts, where it stays, as with runc, until somebody unmounts it.
fn bind_onto_itself(rootfs: &Path) -> Result<()> {
    classic_mount(Some(rootfs), rootfs, Some("bind"), MS_BIND | MS_REC, None)
        .context(|| format!("mount src={0}, dst={0}, flags=MS_BIND|MS_REC", rootfs.display()))
}

/// Cuts the new mount namespace from the host's. The parent mount of the root file system must not be shared: the bind
/// onto itself would appear on the host, and pivot_root(2) would fail.
fn detach_propagation(rootfs: &Path, root_propagation: u64) -> Result<()> {
    let all = if root_propagation == 0 { MS_SLAVE | MS_REC } else { root_propagation };
    classic_mount(None, Path::new("/"), None, all, None).context(|| "mount dst=/, propagation")?;
    let parent = if root_propagation & MS_SLAVE == 0 { MS_PRIVATE } else { MS_SLAVE };
    let mut path = rootfs;
    loop {
        match classic_mount(None, path, None, parent, None) {
            Ok(()) => break,
            // Not a mount point: its parent may be.
            Err(Errno::EINVAL) if path.parent().is_some() => path = path.parent().unwrap_or(Path::new("/")),
            Err(e) => return Err(e).context(|| format!("remount-propagation dst={}", path.display())),
        }
    }
    Ok(())
}

/// Makes the root file system the root directory, and leaves nothing of the old one behind.
pub fn pivot(setup: &Setup<'_>, root: &Root) -> Result<()> {
    let step = || -> Result<()> {
        fchdir(&root.fd).context(|| format!("chdir {}", setup.rootfs.display()))?;
        if !setup.has_namespace(LinuxNamespaceType::Mount) {
            // The host's mounts stay as they are, and the container's remain where they are among them.
            chroot(".").context(|| "chroot .")?;
            chdir("/").context(|| "chdir /")
        } else if setup.no_pivot {
            move_root(setup.rootfs)
        } else {
            pivot_into_cwd()
        }
    };
    step().context(|| "error jailing process inside rootfs")?;
    let wanted =
        setup.spec.linux().as_ref().and_then(|l| l.rootfs_propagation().as_deref()).unwrap_or_default();
    let flags = propagation(wanted).unwrap_or(0);
    if flags != 0 && flags & (MS_PRIVATE | MS_SLAVE) == 0 && setup.has_namespace(LinuxNamespaceType::Mount) {
        // Only now, that it is the root: before, it would have been the host's mount namespace that was shared with.
        classic_mount(None, Path::new("/"), None, flags, None)
            .context(|| "unable to apply root propagation flags")?;
    }
    if root.own_dev {
        devices::reopen_dev_null().context(|| "error reopening /dev/null inside container")?;
    }
    Ok(())
}

/// Makes the directory that the program is to start in, where the image has none: as root, while the root file system
/// can still be written. What keeps it from being made keeps the program from being started there, and is told then.
pub fn make_working_directory(cwd: &Path) {
    use std::os::unix::fs::DirBuilderExt;
    let _ = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(cwd);
}

/// pivot_root(2) of the working directory onto itself: the old root ends up mounted on top, and is unmounted.
fn pivot_into_cwd() -> Result<()> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
    let old = open("/", flags, Mode::empty()).context(|| "open /")?;
    pivot_root(".", ".").context(|| "pivot_root .")?;
    fchdir(&old).context(|| format!("fchdir fd {}", old.as_raw_fd()))?;
    // Slave, lest the unmounting reaches the host; not private, which would keep mounts of the host busy.
    classic_mount(None, Path::new("."), None, MS_SLAVE | MS_REC, None)
        .context(|| "mount dst=., MS_SLAVE|MS_REC")?;
    umount2(".", MntFlags::MNT_DETACH).context(|| "unmount dst=.")?;
    chdir("/").context(|| "chdir /")
}

/// Moves the root file system over `/`. The host's full procfs and sysfs would stay reachable underneath and allow new
/// ones without masks to be mounted, so they are unmounted, or covered, first.
fn move_root(rootfs: &Path) -> Result<()> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").context(|| "open /proc/self/mountinfo")?;
    for line in text.lines() {
        let mut fields = line.split(' ');
        let (Some(inner), Some(point)) = (fields.nth(3), fields.next()) else { continue };
        let kind = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
        let point = Path::new(point);
        if inner != "/" || !matches!(kind, "proc" | "sysfs") || point.starts_with(rootfs) {
            continue;
        }
        match classic_mount(None, point, None, MS_SLAVE | MS_REC, None) {
            // Below something that is already gone.
            Err(Errno::ENOENT | Errno::EINVAL) => continue,
            other => other.context(|| format!("mount dst={}, MS_SLAVE|MS_REC", point.display()))?,
        }
        match umount2(point, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::EPERM) => {
                classic_mount(Some(Path::new("tmpfs")), point, Some("tmpfs"), 0, None)
                    .context(|| format!("mount src=tmpfs, dst={}", point.display()))?;
            }
            Err(e) => return Err(e).context(|| format!("unmount dst={}", point.display())),
        }
    }
    classic_mount(Some(rootfs), Path::new("/"), None, MS_MOVE, None)
        .context(|| format!("mount src={}, dst=/, flags=MS_MOVE", rootfs.display()))?;
    chroot(".").context(|| "chroot .")?;
    chdir("/").context(|| "chdir /")
}

/// What is left to do inside: read-only remounts and the umask. Paths are masked after sysctls are written, by
/// [`masked::apply`].
pub fn finish(setup: &Setup<'_>, root: &Root) -> Result<()> {
    for m in &root.mounts {
        let late = m.kind == "tmpfs" || clean(&m.destination) == Path::new("/dev");
        if late && m.kind != "bind" && m.flags & MS_RDONLY != 0 {
            remount_read_only(&m.destination, m.flags)?;
        }
    }
    if setup.spec.root().as_ref().is_some_and(|r| r.readonly().unwrap_or(false)) {
        masked::remount_root_read_only().context(|| "error setting rootfs as readonly")?;
    }
    let user = setup.spec.process().as_ref().map(|p| p.user());
    let mask = user.and_then(|u| u.umask()).unwrap_or(0o022);
    umask(Mode::from_bits_truncate(mask));
    Ok(())
}

fn remount_read_only(destination: &Path, flags: u64) -> Result<()> {
    let root = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).context(|| "open /")?;
    let call = || format!("remount {} read-only", destination.display());
    let mount = crate::sys::resolve::open_in_root(&root, destination, OFlag::O_PATH).context(call)?;
    let read_only = Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
    match set_attributes(&mount, read_only, false) {
        Err(Errno::ENOSYS) => {
            let flags = MsFlags::from_bits_retain(flags | MS_REMOUNT | MS_BIND | MS_RDONLY);
            Procfs::open()?.descriptors()?.mount(None, mount.as_fd(), flags)
        }
        other => other,
    }
    .context(call)
}
