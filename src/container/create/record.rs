//! What is told and kept of a container that is being made.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use super::Request;
use crate::cgroup::rdt;
use crate::container::hooks::HookState;
use crate::container::launch::Newborn;
use crate::container::proc::Stat;
use crate::container::state::{Config, Namespace, State, labels};
use crate::container::{Error, OCI_VERSION, Result, clock};
use crate::init::namespaces::KINDS;
use crate::sys::Context;

/// What hooks are told.
pub(super) fn hook_state(request: &Request, pid: Option<i32>, status: &'static str) -> HookState {
    let annotations = request.bundle.spec.annotations().clone().unwrap_or_default();
    HookState {
        version: OCI_VERSION.to_owned(),
        id: request.id.clone(),
        status,
        pid,
        bundle: request.bundle.path.clone(),
        annotations: annotations.into_iter().collect(),
    }
}

/// What is kept.
pub(super) fn state(
    request: &Request,
    init: &Newborn,
    cgroup_paths: BTreeMap<String, PathBuf>,
    rdt: rdt::Place,
) -> Result<State> {
    let spec = &request.bundle.spec;
    let stat = Stat::of(init.pid).ok_or_else(|| Error::new("container init has vanished"))?;
    let all = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref()).unwrap_or_default();
    let namespaces = all.iter().filter_map(|n| {
        let kind = KINDS.iter().find(|k| k.kind == n.typ())?;
        Some(Namespace { kind: kind.runc.to_owned(), path: n.path().clone().unwrap_or_default() })
    });
    let namespace_paths = KINDS
        .iter()
        .map(|k| (k.runc.to_owned(), PathBuf::from(format!("/proc/{}/ns/{}", init.pid, k.file))))
        .collect();
    Ok(State {
        id: request.id.clone(),
        init_process_pid: init.pid,
        init_process_start: stat.start,
        created: clock::now_nanos(),
        config: Config {
            version: OCI_VERSION.to_owned(),
            rootfs: request.bundle.rootfs.clone(),
            labels: labels(&request.bundle.path, spec),
            namespaces: namespaces.collect(),
            no_pivot_root: request.options.no_pivot,
            no_new_keyring: request.options.no_new_keyring,
            systemd_cgroup: request.options.systemd_cgroup,
        },
        rootless: !geteuid().is_root() && request.options.rootless_cgroup,
        cgroup_paths,
        rdt,
        namespace_paths,
        external_descriptors: external_descriptors(request.stdio.as_ref()),
    })
}

/// What init's standard descriptors are, as /proc/PID/fd prints them: by these names a restore knows what to
/// put new ones in place of.
fn external_descriptors(stdio: Option<&[OwnedFd; 3]>) -> Vec<String> {
    let number = |i: usize| stdio.map_or(i as i32, |fds| fds[i].as_raw_fd());
    let link = |i| fs::read_link(format!("/proc/self/fd/{}", number(i)));
    (0..3).map(|i| link(i).map_or(String::new(), |p: PathBuf| p.to_string_lossy().into_owned())).collect()
}

/// Writes a pid file such that nobody reads half a number.
pub fn write_pid_file(path: &Path, pid: i32) -> Result<()> {
    let name = path.file_name().ok_or_else(|| Error::new(format!("no pid file: {}", path.display())))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    let tmp = path.with_file_name(hidden);
    let write = || -> std::io::Result<()> {
        fs::write(&tmp, pid.to_string())?;
        fs::rename(&tmp, path)
    };
    Ok(write().context(|| format!("open {}", tmp.display()))?)
}
