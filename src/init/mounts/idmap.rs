//! Sources of mounts that have to be opened before the container's namespaces exist.
//!
//! Inside a user namespace init has no power over the host's file systems: it can neither map owners of a mount nor
//! reach a source below a directory that its ids may not enter. So the runtime opens such sources as detached mounts
//! beforehand; init inherits the descriptors and attaches them.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};

use super::{IdMapping, Mount, open_source};
use crate::init::credentials::IdMaps;
use crate::sys::mount::{Attributes, set_attributes};
use crate::sys::{Context, Error, Result};

/// Opens the source of `m` if init could not; `None` if it can do so itself. Called by the runtime, in its own
/// namespaces, just before it makes those of the container.
pub fn source(m: &Mount, spec: &Spec) -> Result<Option<OwnedFd>> {
    let linux = spec.linux().as_ref();
    let user = linux
        .and_then(|l| l.namespaces().as_ref())
        .and_then(|all| all.iter().find(|n| n.typ() == LinuxNamespaceType::User));
    if !m.is_bind() || (m.idmap.is_none() && user.is_none()) {
        return Ok(None);
    }
    let tree = match (open_source(m), &m.idmap) {
        (Ok(tree), _) => tree,
        // Without privileges here, init inside its user namespace has more than we have.
        (Err(e), None) if e.errno() == Some(Errno::EPERM) => return Ok(None),
        (Err(e), _) => return Err(e),
    };
    let Some(idmap) = &m.idmap else { return Ok(Some(tree)) };
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
    Ok(Some(tree))
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
