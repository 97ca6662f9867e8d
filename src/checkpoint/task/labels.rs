//! Labels of Linux security modules: the AppArmor profile under which config.json has its program run, and every restored
//! process too, whatever it had when it was saved.
//!
//! The label of a program that is started takes effect at execve(2). A restored process executes nothing, so each of its
//! threads changes its own label, which nobody else can do for it, when nothing is left to do that the label may deny:
//!
//! ```text
//!   this process    opens /proc/PID/task of the host's procfs, for nothing but paths below it
//!   conduit         gives it to the process
//!   each thread     ... credentials, no_new_privs; openat(door, "TID/attr/apparmor/current"), write "changeprofile NAME"
//!   the leader      is the last; closes the door
//! ```
//!
//! No path of the container's is used: what is mounted at its /proc need not be a procfs (CVE-2019-19921).
//!
//! Not so with SELinux, which lets nobody change the label of a process with threads, and under whose label no thread could
//! be made with its old id: that label is lost.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;

use crate::checkpoint::Result;
use crate::checkpoint::context::NewTask;
use crate::checkpoint::error::Context;
use crate::checkpoint::remote::{Batch, Conduit};

/// Below `/proc/PID/task/TID`, since Linux 5.8; before, the next one.
const APPARMOR: &str = "attr/apparmor/current";
const CURRENT: &str = "attr/current";

/// What a thread writes where.
#[derive(Debug, PartialEq, Eq)]
pub struct Label {
    file: &'static str,
    text: String,
}

impl Label {
    /// The profile of config.json, where it has one.
    pub fn of(spec: &Spec) -> Option<Self> {
        let profile = spec.process().as_ref()?.apparmor_profile().as_deref()?;
        if profile.is_empty() || profile == "unconfined" {
            return None;
        }
        let own = Path::new("/proc/self").join(APPARMOR).exists();
        let file = if own { APPARMOR } else { CURRENT };
        Some(Self { file, text: format!("changeprofile {profile}") })
    }

    /// Gives every task a door to its own attributes: the numbers of the descriptors, by process.
    pub fn hand(
        tree: &mut BTreeMap<i32, NewTask>,
        live: &[i32],
        conduit: &Conduit,
    ) -> Result<BTreeMap<i32, i32>> {
        let mut numbers = BTreeMap::new();
        for vpid in live {
            let Some(task) = tree.get_mut(vpid) else { continue };
            let path = format!("/proc/{}/task", task.pid);
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let door = open(path.as_str(), flags, Mode::empty())
                .during("cannot restore the label of the process", || format!("open({path:?}, O_PATH)"))
                .map_err(|e| e.pid(*vpid))?;
            let sent = conduit.send(&mut task.injection, &[door.as_fd()]).map_err(|e| e.pid(*vpid))?;
            numbers.extend(sent.first().map(|number| (*vpid, *number)));
        }
        Ok(numbers)
    }

    /// Changes the label of the thread `tid` (of the host), which got `door`.
    pub fn restore(&self, batch: &mut Batch, door: i32, tid: i32) {
        batch.about(format!("cannot restore the label ({})", self.text));
        let path = batch.string(format!("{tid}/{}", self.file).as_bytes());
        let flags = libc::O_WRONLY | libc::O_CLOEXEC;
        let file = batch.call(libc::SYS_openat, &[door.into(), path, flags.into()]);
        let text = batch.data(self.text.as_bytes());
        batch.call(libc::SYS_write, &[file.into(), text, self.text.len().into()]);
        batch.call(libc::SYS_close, &[file.into()]);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_label_is_that_of_config_json() {
        let label = |process: serde_json::Value| {
            let mut whole = json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["x"]});
            whole.as_object_mut().unwrap().extend(process.as_object().unwrap().clone());
            let spec = json!({"ociVersion": "1.0.2", "process": whole, "root": {"path": "r"}});
            Label::of(&serde_json::from_value(spec).unwrap())
        };
        assert_eq!(label(json!({})), None);
        assert_eq!(label(json!({"apparmorProfile": ""})), None);
        assert_eq!(label(json!({"apparmorProfile": "unconfined"})), None);
        assert_eq!(
            label(json!({"apparmorProfile": "docker-default"})).unwrap().text,
            "changeprofile docker-default"
        );
    }
}
