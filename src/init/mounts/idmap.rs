//! Sources of bind mounts: who opens them, and when.
//!
//! ```text
//!                        no user namespace       user namespace
//!   plain                init                    init; where its ids may not go, the runtime finds the place for it
//!   with mapped owners   the runtime, before     the runtime, in init's mount namespace
//! ```
//!
//! Inside a user namespace init has no power over the host's file systems: it can neither map owners of a mount nor
//! reach a source below a directory that its ids may not enter. The runtime can. It looks from init's mount namespace,
//! where the flags of the host's mounts are locked: the container must not clear `ro` or `nosuid`. The mount itself is
//! init's to make. A source inside the root file system may come from an earlier mount, so its turn comes later.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespace, LinuxNamespaceType, Spec};

use super::{IdMapping, Mount, open_source};
use crate::init::credentials::IdMaps;
use crate::sys::mount::{Attributes, set_attributes};
use crate::sys::{Context, Error, Result};

/// Where the source of a mount comes from.
#[derive(Debug)]
pub enum Source {
    /// Init opens it, or asks the runtime where it may not.
    Own,
    /// The runtime has opened it.
    Ready(OwnedFd),
    /// The runtime opens it when the mount's turn has come.
    Late,
}

/// Says where the source of `m` comes from, and opens it if it is to be ready. Called by the runtime, in its own
/// namespaces, just before it makes those of the container.
pub fn source(m: &Mount, spec: &Spec, rootfs: &Path) -> Result<Source> {
    if m.idmap.is_none() || !m.is_bind() {
        Ok(Source::Own)
    } else if user_namespace(spec).is_some() || m.source.starts_with(rootfs) {
        Ok(Source::Late)
    } else {
        Ok(Source::Ready(open_mapped(m, spec)?))
    }
}

fn user_namespace(spec: &Spec) -> Option<&LinuxNamespace> {
    let all = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    all.and_then(|all| all.iter().find(|n| n.typ() == LinuxNamespaceType::User))
}

/// What the runtime can give init for a source, in the mount namespace that it is in: a finished mount with mapped
/// owners, or else the place itself.
pub fn open_for_init(m: &Mount, spec: &Spec) -> Result<OwnedFd> {
    if m.idmap.is_some() {
        return open_mapped(m, spec);
    }
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    open(&m.source, flags, Mode::empty()).context(|| format!("open {}", m.source.display()))
}

fn open_mapped(m: &Mount, spec: &Spec) -> Result<OwnedFd> {
    let tree = open_source(m)?;
    let Some(idmap) = &m.idmap else { return Ok(tree) };
    let linux = spec.linux().as_ref();
    let user = user_namespace(spec);
    let maps = |own: &[LinuxIdMapping], container: Option<&Vec<LinuxIdMapping>>| {
        if own.is_empty() { container.cloned().unwrap_or_default() } else { own.to_vec() }
    };
    let namespace = match user.and_then(|u| u.path().as_deref()) {
        Some(path) if idmap.uids.is_empty() => joined(path)?,
        _ => made(
            &maps(&idmap.uids, linux.and_then(|l| l.uid_mappings().as_ref())),
            &maps(&idmap.gids, linux.and_then(|l| l.gid_mappings().as_ref())),
        )?,
    };
    map(&tree, idmap, &namespace)
        .context(|| format!("failed to set MOUNT_ATTR_IDMAP on {}", m.source.display()))?;
    Ok(tree)
}

fn map(tree: &OwnedFd, idmap: &IdMapping, namespace: &File) -> Result<()> {
    let attributes = Attributes {
        set: libc::MOUNT_ATTR_IDMAP,
        user_namespace: namespace.as_raw_fd() as u64,
        ..Attributes::default()
    };
    set_attributes(tree, attributes, idmap.recursive).map_err(|errno| {
        let e = Error::call("mount_setattr", errno);
        match errno {
            Errno::EINVAL => {
                e.context("maybe the filesystem used doesn't support idmap mounts on this kernel?")
            }
            _ => e,
        }
    })
}

fn joined(path: &Path) -> Result<File> {
    File::open(path)
        .context(|| format!("failed to open existing userns for id-mapping: open {}", path.display()))
}

/// A user namespace with these mappings that nobody lives in.
fn made(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<File> {
    if uids.is_empty() || gids.is_empty() {
        return Err(Error::new("id-mapped mounts must have both uid and gid mappings specified"));
    }
    let maps = IdMaps { uids, gids };
    crate::sys::namespace::with_idle_child(libc::CLONE_NEWUSER, |pid| {
        maps.write(pid)?;
        let path = format!("/proc/{pid}/ns/user");
        File::open(&path).context(|| format!("open {path}"))
    })
    .context(|| "failed to create userns for id-mapping")?
}
