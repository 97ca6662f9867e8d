//! Opening the sources of mounts for init, which may not get to them itself.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use nix::unistd::geteuid;
use oci_spec::runtime::Spec;

use crate::bundle::Bundle;
use crate::container::launch::{Birth, launch};
use crate::container::{Error, Result};
use crate::init::channel::Message;
use crate::init::mounts::{self, Mount, Source};
use crate::init::rootfs::parse_mounts;
use crate::sys::{self, Context};

/// Sources of bind mounts that only we, outside, can open.
pub(super) fn sources(bundle: &Bundle) -> Result<Vec<Source>> {
    let mounts = parse_mounts(&bundle.spec, &bundle.path, &bundle.rootfs)?;
    Ok(mounts.iter().map(|m| mounts::source(m, &bundle.spec, &bundle.rootfs)).collect::<sys::Result<_>>()?)
}

/// Opens the source of a mount in init's mount namespace, with our privileges; none where we have no more than init.
pub(super) fn late_source(mount: &Mount, spec: &Spec, pid: i32) -> Result<Option<OwnedFd>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let name = format!("/proc/{pid}/ns/mnt");
    let namespace = fs::File::open(&name).context(|| format!("open {name}"))?;
    let helper = launch(&Birth::default(), &|channel| {
        let opened = sys::process::setns(namespace.as_fd(), libc::CLONE_NEWNS)
            .context(|| format!("setns to {name}"))
            .and_then(|()| mounts::open_for_init(mount, spec));
        let answer = match opened {
            Ok(source) => Message::Descriptor(source),
            Err(e) => Message::Failed(e.to_string()),
        };
        // Nobody is left to hear of a failure.
        let _ = channel.tell(&answer);
    })?;
    let answer = helper.channel.listen();
    let _ = sys::process::wait_child(helper.pid, true);
    match answer? {
        Some(Message::Descriptor(tree)) => Ok(Some(tree)),
        Some(Message::Failed(text)) => Err(Error::new(text)),
        _ => Ok(None),
    }
}
