//! Containers of users without privileges.
//!
//! Such a user may make control groups only where somebody has given him a directory, mostly nowhere. runc's way is to
//! do without them as long as config.json neither names a group nor sets a limit, and so do clients expect it.

use std::path::PathBuf;

use nix::errno::Errno;
use oci_spec::runtime::LinuxResources;

use super::{Cgroup, devices, hierarchy, is_needless};
use crate::sys::{Error, Result};

impl Cgroup {
    /// Makes what this user may make, and forgets the rest where that is permitted.
    pub(super) fn make_allowed(
        &mut self,
        resources: &LinuxResources,
        unnamed: bool,
        made: &mut Vec<PathBuf>,
    ) -> Result<()> {
        if !(self.rootless && unnamed) {
            return self.make(resources, made);
        }
        if self.is_unified() {
            return match self.make(resources, made) {
                Err(e) if forbidden(&e) && limits_something(resources) => Err(e.context(
                    "rootless needs no limits + no cgrouppath when no permission is granted for cgroups",
                )),
                Err(e) if forbidden(&e) => {
                    self.paths.clear();
                    Ok(())
                }
                done => done,
            };
        }
        for controller in hierarchy::CONTROLLERS {
            let Some(dir) = self.paths.get(*controller) else { continue };
            match self.make_v1(controller, dir, resources, made) {
                Err(e) if forbidden(&e) => drop(self.paths.remove(*controller)),
                Err(e) if !is_needless(controller) => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// The device policy, where there is no tree of its own for devices: who may not load the filter is held to the
    /// device nodes by the kernel, since mknod(2) is not for him.
    pub(super) fn set_devices_if_allowed(&self, policy: &devices::Policy) -> Result<()> {
        if !self.is_unified() {
            return Ok(());
        }
        match devices::ebpf::apply(self.unified_dir()?, policy) {
            Err(e) if forbidden(&e) => Ok(()),
            done => done,
        }
    }
}

/// True for what the kernel says to a user who may not.
fn forbidden(e: &Error) -> bool {
    matches!(e.errno(), Some(Errno::EACCES | Errno::EPERM | Errno::EROFS))
}

/// True if there is a limit that needs a directory to be written in.
fn limits_something(resources: &LinuxResources) -> bool {
    resources.memory().is_some()
        || resources.cpu().is_some()
        || resources.pids().is_some()
        || resources.block_io().is_some()
        || resources.hugepage_limits().as_ref().is_some_and(|l| !l.is_empty())
        || resources.rdma().as_ref().is_some_and(|l| !l.is_empty())
        || resources.unified().as_ref().is_some_and(|l| !l.is_empty())
}
