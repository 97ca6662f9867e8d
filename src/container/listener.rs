//! Handing a seccomp listener to the agent that config.json names.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use oci_spec::runtime::Spec;
use serde::Serialize;

use super::hooks::HookState;
use super::launch::Newborn;
use super::{Error, Result};
use crate::init::console;
use crate::sys::{Context, pidfd};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerProcessState<'a> {
    oci_version: &'a str,
    fds: [&'a str; 1],
    pid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a str>,
    state: &'a HookState,
}

/// Fetches the listener, descriptor `fd` of the new process, and sends it with the state to the agent's socket.
pub fn hand_over(spec: &Spec, process: &Newborn, fd: i32, state: &HookState, pid: i32) -> Result<()> {
    let seccomp = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let path = seccomp.and_then(|s| s.listener_path().as_ref());
    let path = path.ok_or_else(|| Error::new("seccomp listenerPath is not set"))?;
    let listener =
        pidfd::getfd(process.pidfd.as_fd(), fd).context(|| "pidfd_getfd of the seccomp listener")?;
    let metadata = seccomp.and_then(|s| s.listener_metadata().as_deref());
    let message =
        ContainerProcessState { oci_version: super::OCI_VERSION, fds: ["seccompFd"], pid, metadata, state };
    let text = serde_json::to_vec(&message).map_err(|e| Error::new(format!("encoding the state: {e}")))?;
    let socket = UnixStream::connect(path)
        .context(|| "failed to connect with seccomp agent specified in the seccomp profile")?;
    Ok(console::send(socket.as_fd(), &text, listener.as_fd())?)
}
