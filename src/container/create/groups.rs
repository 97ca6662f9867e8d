//! The control groups of a container that is being made, and what is left of one that was not made to the end.

use std::fs;

use oci_spec::runtime::LinuxResources;

use super::Request;
use crate::container::{Cgroup, Error, Result, store::Dir};
use crate::sys::Context;

/// Before what failed about the control groups.
pub(super) const NO_CGROUP: &str = "unable to start container process: unable to apply cgroup configuration";

/// The control groups of a container that is being made, for whoever finds that it was not to the end.
const MAKING: &str = "making.json";

/// Removes what a killed creation, or a killed restore, has left besides its directory.
pub(in crate::container) fn sweep(dir: &Dir) {
    let Ok(text) = fs::read(dir.path().join(MAKING)) else { return };
    let Ok(paths) = serde_json::from_slice(&text) else { return };
    let cgroup = Cgroup::load(paths);
    // It may have been killed while it froze what it had made.
    let _ = cgroup.thaw();
    let _ = cgroup.kill(libc::SIGKILL);
    let _ = cgroup.delete();
}

/// Whether the control group that this container would get is there already.
pub fn has_control_group(request: &Request) -> Result<bool> {
    let linux = request.bundle.spec.linux().as_ref();
    let path = linux.and_then(|l| l.cgroups_path().as_deref()).filter(|p| !p.as_os_str().is_empty());
    Ok(Cgroup::locate(path, &request.id, request.options.systemd_cgroup)?.exists())
}

/// Makes the control groups, which must not be in use by somebody else.
pub(super) fn control_groups(dir: &Dir, request: &Request) -> Result<Cgroup> {
    let spec = &request.bundle.spec;
    let linux = spec.linux().as_ref();
    let path = linux.and_then(|l| l.cgroups_path().as_deref()).filter(|p| !p.as_os_str().is_empty());
    let systemd = request.options.systemd_cgroup;
    let located = Cgroup::locate(path, &request.id, systemd)?;
    if located.exists() {
        let there = located.all_pids().unwrap_or_default().len();
        if there != 0 {
            return Err(Error::new(format!("container's cgroup is not empty: {there} process(es) found")));
        }
    }
    // The freezer's may be there alone.
    if located.is_frozen().unwrap_or(false) {
        return Err(Error::new("container's cgroup unexpectedly frozen"));
    }
    let none = LinuxResources::default();
    let resources = linux.and_then(|l| l.resources().as_ref()).unwrap_or(&none);
    let text =
        serde_json::to_vec(located.paths()).map_err(|e| Error::new(format!("encoding {MAKING}: {e}")))?;
    let making = dir.path().join(MAKING);
    fs::write(&making, text).context(|| format!("writing {}", making.display()))?;
    let made = located.create(resources, path.is_none(), request.options.rootless_cgroup);
    Ok(made.map_err(|e| e.context(NO_CGROUP))?)
}
