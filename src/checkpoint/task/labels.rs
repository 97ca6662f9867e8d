//! Labels of Linux security modules: the AppArmor profile or the SELinux label under which config.json has its program
//! run, and every restored process too, whatever it had when it was saved.
//!
//! The label of a program that is started takes effect at execve(2). A restored process executes nothing, so each of its
//! threads changes its own label, which nobody else can do for it, when nothing is left to do that the label may deny:
//!
//! ```text
//!   this process    opens /proc/PID/task of the host's procfs, for nothing but paths below it
//!   conduit         gives it to the process
//!   leader          SELinux, and there will be threads: openat(door, "TID/attr/current"), write LABEL. No thread can change
//!                   its label once there are two of them, and new ones have that of their maker
//!   each thread     ... credentials, no_new_privs; AppArmor: "TID/attr/apparmor/current", write "changeprofile NAME";
//!                   SELinux without threads: as above; what the program had asked for what it makes next (`exec`,
//!                   `fscreate`, `keycreate`, `sockcreate`)
//!   the leader      is the last; closes the door
//! ```
//!
//! No path of the container's is used: what is mounted at its /proc need not be a procfs (CVE-2019-19921).
//!
//! A label of a process with threads is there before they are made with their old ids and get their credentials; a policy
//! in force must allow it `capability2 checkpoint_restore`, and what the credentials take.
//!
//! Sockets are made by this process, and have the label that the container's own would have had.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;

use crate::checkpoint::context::{NewTask, Options};
use crate::checkpoint::error::Context;
use crate::checkpoint::image::{CredsEntry, Lsmtype, ThreadExtra, ThreadLabel};
use crate::checkpoint::remote::{Batch, Conduit, Injection};
use crate::checkpoint::{Error, Result};
use crate::init::lsm::has_selinux;
use crate::sys::procfs::read_bytes;

/// Below `/proc/PID/task/TID`, since Linux 5.8; before, the next one.
const APPARMOR: &str = "attr/apparmor/current";
const CURRENT: &str = "attr/current";
/// For the next socket; CRIU's images have a place for this one.
const SOCKCREATE: &str = "sockcreate";
/// For the next program, file and key.
const NEXT: [&str; 3] = ["exec", "fscreate", "keycreate"];
/// What makes SELinux forget an attribute.
const NOTHING: &str = "\n";

/// What a thread writes where.
#[derive(Debug, PartialEq, Eq)]
pub struct Label {
    file: &'static str,
    text: String,
    selinux: bool,
}

/// Whose labels the images of this machine have.
pub fn module() -> Lsmtype {
    if has_selinux() { Lsmtype::Selinux } else { Lsmtype::NoLsm }
}

/// Reads the labels of a thread (by the host's id) into its records: SELinux only, for AppArmor's are not restored.
pub fn read(tid: i32, creds: &mut CredsEntry, extra: &mut ThreadExtra) -> Result<()> {
    if !has_selinux() {
        return Ok(());
    }
    creds.lsm_profile = attribute(tid, "current")?;
    creds.lsm_sockcreate = attribute(tid, SOCKCREATE)?;
    for name in NEXT {
        let label = attribute(tid, name)?.map(|text| ThreadLabel { attribute: name.into(), text });
        extra.labels.extend(label);
    }
    Ok(())
}

/// An attribute that is set.
fn attribute(tid: i32, name: &str) -> Result<Option<String>> {
    let path = format!("/proc/{tid}/attr/{name}");
    let bytes = read_bytes(&path).map_err(|e| Error::new(format!("cannot read the label {path}: {e}")))?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_end_matches(['\0', '\n']);
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

/// Puts the labels that the caller has named into config.json, which may not have others.
pub fn name(options: &Options, spec: &mut Spec) -> Result<()> {
    if let Some(given) = &options.lsm_profile {
        let process = spec.process_mut().as_mut().ok_or_else(|| Error::new("config.json has no process"))?;
        match given.split_once(':') {
            Some(("selinux", label)) => {
                let label = agreed("--lsm-profile", label, "process.selinuxLabel", process.selinux_label())?;
                process.set_selinux_label(Some(label));
            }
            Some(("apparmor", profile)) => {
                let key = "process.apparmorProfile";
                let profile = agreed("--lsm-profile", profile, key, process.apparmor_profile())?;
                process.set_apparmor_profile(Some(profile));
            }
            _ if given == "none" => {}
            _ => {
                return Err(Error::new(format!("invalid --lsm-profile {given:?}"))
                    .remedy("say selinux:LABEL, apparmor:PROFILE or none"));
            }
        }
    }
    if let Some(given) = &options.lsm_mount_context {
        let linux = spec.linux_mut().get_or_insert_default();
        let label = agreed("--lsm-mount-context", given, "linux.mountLabel", linux.mount_label())?;
        linux.set_mount_label(Some(label));
    }
    Ok(())
}

fn agreed(flag: &str, given: &str, key: &str, config: &Option<String>) -> Result<String> {
    match config.as_deref() {
        Some(own) if !own.is_empty() && own != given => {
            Err(Error::new(format!("{flag} names {given:?}, and {key} of config.json is {own:?}"))
                .remedy("leave the flag out, or change config.json"))
        }
        _ => Ok(given.to_owned()),
    }
}

impl Label {
    /// That of config.json, where it has one.
    pub fn of(spec: &Spec) -> Option<Self> {
        let process = spec.process().as_ref()?;
        if let Some(label) = process.selinux_label().as_deref().filter(|l| !l.is_empty()) {
            return Some(Self { file: CURRENT, text: label.to_owned(), selinux: true });
        }
        let profile = process.apparmor_profile().as_deref()?;
        if profile.is_empty() || profile == "unconfined" {
            return None;
        }
        let own = Path::new("/proc/self").join(APPARMOR).exists();
        let file = if own { APPARMOR } else { CURRENT };
        Some(Self { file, text: format!("changeprofile {profile}"), selinux: false })
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

    /// Changes the label of a process that is to have threads, and has none yet. `door` is its own.
    pub fn restore_before_threads(&self, leader: &mut Injection, door: i32) -> Result<()> {
        if !self.selinux {
            return Ok(());
        }
        let (mut batch, tid) = (Batch::new(), leader.thread().tid());
        self.restore(&mut batch, door, tid);
        leader.run(&batch).map(drop)
    }

    /// Changes the label of the thread `tid` (of the host), which got `door`. `alone`: no other thread is there.
    pub fn restore_in_thread(&self, batch: &mut Batch, door: i32, tid: i32, alone: bool) {
        if alone || !self.selinux {
            self.restore(batch, door, tid);
        }
    }

    fn restore(&self, batch: &mut Batch, door: i32, tid: i32) {
        write(batch, door, &format!("{tid}/{}", self.file), &self.text);
    }

    /// Gives a thread back what the program had asked for what it makes next. The label that it has by now must allow it.
    pub fn restore_next(
        &self,
        batch: &mut Batch,
        door: i32,
        tid: i32,
        (creds, extra): (Option<&CredsEntry>, Option<&ThreadExtra>),
    ) {
        if !self.selinux {
            return;
        }
        if let Some(text) = creds.and_then(|c| c.lsm_sockcreate.as_ref()) {
            write(batch, door, &format!("{tid}/attr/{SOCKCREATE}"), text);
        }
        let known = extra.iter().flat_map(|e| &e.labels).filter(|l| NEXT.contains(&l.attribute.as_str()));
        for label in known {
            write(batch, door, &format!("{tid}/attr/{}", label.attribute), &label.text);
        }
    }

    /// Lets sockets that this thread makes have the label of the container's, until the result is dropped.
    pub fn of_sockets(&self) -> Result<Option<SocketLabel>> {
        if !self.selinux {
            return Ok(None);
        }
        SocketLabel::set(&self.text).during("cannot give the sockets their label", || {
            format!("write({OWN_SOCKETS}, {:?})", self.text)
        })?;
        Ok(Some(SocketLabel(())))
    }
}

const OWN_SOCKETS: &str = "/proc/thread-self/attr/sockcreate";

/// While it lives, sockets of this thread have another's label.
#[derive(Debug)]
pub struct SocketLabel(());

impl SocketLabel {
    fn set(text: &str) -> nix::Result<()> {
        fs::write(OWN_SOCKETS, text)
            .map_err(|e| nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
    }
}

impl Drop for SocketLabel {
    fn drop(&mut self) {
        let _ = Self::set(NOTHING);
    }
}

fn write(batch: &mut Batch, door: i32, path: &str, text: &str) {
    batch.about(format!("cannot restore the label ({text})"));
    let path = batch.string(path.as_bytes());
    let flags = libc::O_WRONLY | libc::O_CLOEXEC;
    let file = batch.call(libc::SYS_openat, &[door.into(), path, flags.into()]);
    let data = batch.data(text.as_bytes());
    batch.call(libc::SYS_write, &[file.into(), data, text.len().into()]);
    batch.call(libc::SYS_close, &[file.into()]);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(process: serde_json::Value) -> Spec {
        let mut whole = json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["x"]});
        whole.as_object_mut().unwrap().extend(process.as_object().unwrap().clone());
        let spec = json!({"ociVersion": "1.0.2", "process": whole, "root": {"path": "r"}});
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn the_label_is_that_of_config_json() {
        let label = |process| Label::of(&spec(process));
        assert_eq!(label(json!({})), None);
        assert_eq!(label(json!({"apparmorProfile": ""})), None);
        assert_eq!(label(json!({"apparmorProfile": "unconfined", "selinuxLabel": ""})), None);
        assert_eq!(
            label(json!({"apparmorProfile": "docker-default"})).unwrap().text,
            "changeprofile docker-default"
        );
        let label = label(json!({"selinuxLabel": "u:r:t:s0"})).unwrap();
        assert_eq!((label.file, label.text.as_str(), label.selinux), ("attr/current", "u:r:t:s0", true));
    }

    #[test]
    fn what_the_caller_names_fills_config_json_and_does_not_change_it() {
        let options = |profile: &str| Options {
            lsm_profile: Some(profile.into()),
            lsm_mount_context: Some("u:r:f:s0".into()),
            ..Options::default()
        };
        let mut plain = spec(json!({}));
        name(&options("selinux:u:r:t:s0"), &mut plain).unwrap();
        let label = plain.process().as_ref().unwrap().selinux_label().clone();
        assert_eq!(label.as_deref(), Some("u:r:t:s0"));
        assert_eq!(plain.linux().as_ref().unwrap().mount_label().as_deref(), Some("u:r:f:s0"));
        // The same again is no conflict.
        name(&options("selinux:u:r:t:s0"), &mut plain).unwrap();
        let other = name(&options("selinux:u:r:other:s0"), &mut plain).unwrap_err().to_string();
        assert!(other.contains("u:r:other:s0") && other.contains("\"u:r:t:s0\""), "{other}");
        name(&options("apparmor:p"), &mut plain).unwrap();
        assert_eq!(plain.process().as_ref().unwrap().apparmor_profile().as_deref(), Some("p"));
        assert!(name(&options("smack:x"), &mut plain).unwrap_err().to_string().contains("smack:x"));
        name(&options("none"), &mut plain).unwrap();
    }

    #[test]
    fn an_image_names_no_other_file() {
        let selinux = Label { file: CURRENT, text: "u:r:t:s0".into(), selinux: true };
        let label = |attribute: &str| ThreadLabel { attribute: attribute.into(), text: "u:r:x:s0".into() };
        let extra = ThreadExtra { labels: vec![label("../../1/attr/exec")], ..ThreadExtra::default() };
        let mut batch = Batch::new();
        selinux.restore_next(&mut batch, 3, 1, (None, Some(&extra)));
        assert!(batch.is_empty());
        let extra = ThreadExtra { labels: vec![label("exec")], ..ThreadExtra::default() };
        selinux.restore_next(&mut batch, 3, 1, (None, Some(&extra)));
        assert!(!batch.is_empty());
    }
}
