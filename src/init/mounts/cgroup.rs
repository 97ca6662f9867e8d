//! The `cgroup` mount: what the container sees of its control groups.
//!
//! ```text
//!   v1, hybrid   tmpfs ┬ cpu        with a cgroup namespace: a mount of the hierarchy, whose root is the container's
//!                      ├ memory     without:                a bind mount of the container's own directory
//!                      └ ...        cpu -> cpu,cpuacct      links for controllers that share a hierarchy
//!   v2           cgroup2, or where that is denied a bind mount
//! ```

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use libc::{MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REC};
use nix::errno::Errno;
use nix::sys::stat::mkdirat;
use nix::unistd::symlinkat;

use super::{DIR_MODE, Mount, Mounter, open_source};
use crate::cgroup::hierarchy;
use crate::sys::resolve::open_in_root;
use crate::sys::{Context, Result};

const FLAGS: u64 = MS_NOEXEC | MS_NOSUID | MS_NODEV;

pub(super) fn mount_v1(mounter: &Mounter<'_>, m: &Mount) -> Result<()> {
    let own = hierarchy::own_paths()?;
    let tmpfs = Mount {
        kind: "tmpfs".to_owned(),
        source: "tmpfs".into(),
        flags: FLAGS,
        data: "mode=755".to_owned(),
        cleared: 0,
        recursive: None,
        copy_up: false,
        idmap: None,
        ..m.clone()
    };
    let (target, _) = mounter.directory_target(&tmpfs)?;
    let top = mounter.place(&tmpfs, &target, tmpfs.flags, &tmpfs.data)?;
    for hierarchy in hierarchy::v1_mounts(&own) {
        let Some(name) = hierarchy.mount_point.file_name() else { continue };
        let Some(dir) = hierarchy.own_directory(&own) else { continue };
        let one = Mount { destination: m.destination.join(name), ..m.clone() };
        if mounter.cgroup_namespace {
            mkdirat(&top, name, DIR_MODE).context(|| "mkdir")?;
            let target =
                open_in_root(top.as_fd(), Path::new(name), nix::fcntl::OFlag::O_PATH).context(|| "open")?;
            let options = hierarchy.mount_options();
            let source = if options.starts_with("name=") { "systemd" } else { "cgroup" };
            let one = Mount {
                kind: "cgroup".to_owned(),
                source: source.into(),
                propagation: vec![],
                recursive: None,
                ..one
            };
            mounter
                .place(&one, &target, FLAGS | (m.flags & MS_RDONLY), &options)
                .context(|| format!("mount cgroup {options}"))?;
        } else {
            let bind =
                Mount { kind: "bind".to_owned(), source: dir, flags: m.flags | MS_BIND | MS_REC, ..one };
            open_source(&bind)
                .and_then(|tree| mounter.bind(&bind, tree))
                .context(|| format!("bind {}", bind.source.display()))?;
        }
        let name = name.to_string_lossy();
        if name.contains(',') {
            for controller in name.split(',') {
                match symlinkat(OsStr::new(&*name), &top, controller) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(e) => return Err(e).context(|| format!("symlink {controller}")),
                }
            }
        }
    }
    Ok(())
}

pub(super) fn mount_v2(mounter: &Mounter<'_>, m: &Mount) -> Result<()> {
    let (target, _) = mounter.directory_target(m)?;
    let fresh = Mount { kind: "cgroup2".to_owned(), ..m.clone() };
    match mounter.place(&fresh, &target, m.flags, &m.data) {
        Ok(_) => return Ok(()),
        Err(e) if matches!(e.errno(), Some(Errno::EPERM | Errno::EBUSY)) => {}
        Err(e) => return Err(e),
    }
    // In a user namespace without a cgroup namespace the mount is denied. Bind what the container may see.
    let source = match mounter.unified {
        Some(own) if mounter.cgroup_namespace => own.to_owned(),
        _ => PathBuf::from(hierarchy::UNIFIED),
    };
    let bind =
        Mount { kind: "bind".to_owned(), source, flags: m.flags | MS_BIND, data: String::new(), ..m.clone() };
    mounter.bind(&bind, open_source(&bind)?)
}
