//! What an image can ask for beside credentials and limits, and the kernel gives to those with a capability only.
//!
//! ```text
//!   nice value below that of a program started here   CAP_SYS_NICE, or RLIMIT_NICE
//!   real-time class of I/O                            CAP_SYS_NICE, CAP_SYS_ADMIN, or process.ioPriority
//!   I/O flusher                                       CAP_SYS_RESOURCE
//!   marks, high priorities, foreign addresses         CAP_NET_ADMIN or CAP_NET_RAW
//!     of sockets
//!   memory below vm.mmap_min_addr                     CAP_SYS_RAWIO
//!   ports below ip_unprivileged_port_start            CAP_NET_BIND_SERVICE: the kernel judges, see [`Unprivileged`]
//! ```

use std::collections::BTreeSet;

use caps::CapSet;
use nix::errno::Errno;
use oci_spec::runtime::{Capability, IOPriorityClass, PosixRlimitType, Spec};

use super::credentials::Policy;
use super::process;
use crate::checkpoint::files::transparent_sockets;
use crate::checkpoint::image::{FileEntry, SkOptsEntry};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::Kind;
use crate::checkpoint::{Error, Result};
use crate::sys;

/// Of `ioprio_set(2)`: the class stands above these bits.
const CLASS_SHIFT: u32 = 13;
const CLASS_REAL_TIME: u32 = 1;
/// The highest SO_PRIORITY that everybody may set.
const PRIORITY_MAX: u32 = 6;

/// What config.json gives, beside capabilities.
pub struct Privileges<'a> {
    spec: &'a Spec,
    policy: Policy,
}

impl<'a> Privileges<'a> {
    /// Those of a container.
    pub fn of(spec: &'a Spec) -> Self {
        Self { spec, policy: Policy::of(spec) }
    }

    fn any(&self, capabilities: &[Capability]) -> bool {
        capabilities.iter().any(|capability| self.policy.grants(*capability))
    }

    /// The lowest nice value that a process could have. It is born with that of the runtime.
    fn least_nice(&self) -> i32 {
        if self.policy.grants(Capability::SysNice) {
            return -20;
        }
        let limits = self.spec.process().as_ref().and_then(|process| process.rlimits().as_ref());
        let limits = limits.into_iter().flatten().filter(|limit| limit.typ() == PosixRlimitType::RlimitNice);
        let limit = limits.map(|limit| 20 - i32::try_from(limit.hard()).unwrap_or(40)).min();
        let scheduler = self.spec.process().as_ref().and_then(|process| process.scheduler().as_ref());
        let given = scheduler.and_then(|scheduler| *scheduler.nice());
        sys::sched::nice().min(0).min(limit.unwrap_or(0)).min(given.unwrap_or(0))
    }

    /// A nice value that is judged.
    pub fn nice(&self, is: i32) -> Result<()> {
        let least = self.least_nice();
        match is < least {
            true => Err(Error::new(format!(
                "the image has a thread with the nice value {is}, under config.json none has less than {least}"
            ))),
            false => Ok(()),
        }
    }

    /// The nearest that is allowed.
    pub fn clamp_nice(&self, is: i32) -> i32 {
        is.max(self.least_nice())
    }

    /// What the extension of tasks asks for.
    pub fn threads(&self, model: &Model) -> Result<()> {
        for thread in process::extra(model)?.threads {
            let first = thread.io_priority.is_some_and(|io| io >> CLASS_SHIFT == CLASS_REAL_TIME);
            let given = self.spec.process().as_ref().and_then(|process| process.io_priority().as_ref());
            let given = given.is_some_and(|io| io.class() == IOPriorityClass::IoprioClassRt);
            if first && !given && !self.any(&[Capability::SysNice, Capability::SysAdmin]) {
                return Err(Error::new(format!(
                    "the image has thread {} in the real-time class of I/O, config.json grants neither \
                     process.ioPriority nor CAP_SYS_NICE",
                    thread.tid
                )));
            }
            if thread.io_flusher == Some(true) && !self.policy.grants(Capability::SysResource) {
                return Err(Error::new(format!(
                    "the image has thread {} as an I/O flusher, config.json does not grant CAP_SYS_RESOURCE",
                    thread.tid
                )));
            }
        }
        Ok(())
    }

    /// The same images without that.
    pub fn clamp_threads(&self, model: &mut Model) -> Result<()> {
        let mut extra = process::extra(model)?;
        let (io, flusher) = (
            self.any(&[Capability::SysNice, Capability::SysAdmin]),
            self.policy.grants(Capability::SysResource),
        );
        for thread in &mut extra.threads {
            thread.io_priority =
                thread.io_priority.filter(|priority| io || priority >> CLASS_SHIFT != CLASS_REAL_TIME);
            thread.io_flusher = thread.io_flusher.filter(|_| flusher);
        }
        process::set_extra(model, &extra);
        Ok(())
    }

    /// Sockets that pass where others do not. In a network namespace that the container has made, that is its own affair.
    pub fn sockets(&self, model: &Model) -> Result<()> {
        if self.any(&[Capability::NetAdmin, Capability::NetRaw]) {
            return Ok(());
        }
        let own = Kind::Net.inits(model);
        let transparent: BTreeSet<u32> = transparent_sockets(model)?;
        let inside = |space: Option<u32>| space.is_none_or(|id| id == own);
        let options = |file: &FileEntry| -> Option<(u32, SkOptsEntry)> {
            let inet = file.isk.as_ref().filter(|s| inside(s.ns_id)).map(|s| (s.id, s.opts.clone()));
            inet.or_else(|| file.usk.as_ref().filter(|s| inside(s.ns_id)).map(|s| (s.id, s.opts.clone())))
        };
        for (id, options) in model.files.iter().filter_map(options) {
            let mark = options.so_mark.filter(|mark| *mark != 0).map(|mark| format!("the mark {mark:#x}"));
            let priority = options.so_priority.filter(|priority| *priority > PRIORITY_MAX);
            let priority = priority.map(|priority| format!("the priority {priority}"));
            let foreign = transparent.contains(&id).then(|| "foreign addresses (IP_TRANSPARENT)".to_owned());
            if let Some(what) = mark.or(priority).or(foreign) {
                return Err(Error::new(format!(
                    "the image has a socket with {what}, config.json grants neither CAP_NET_ADMIN nor CAP_NET_RAW"
                ))
                .remedy("grant one of them in config.json"));
            }
        }
        Ok(())
    }

    /// Memory where a null pointer leads.
    pub fn memory(&self, model: &Model) -> Result<()> {
        let text = std::fs::read_to_string("/proc/sys/vm/mmap_min_addr").unwrap_or_default();
        let least: u64 = text.trim().parse().unwrap_or(0);
        if self.policy.grants(Capability::SysRawio) {
            return Ok(());
        }
        for (pid, mm) in &model.mm {
            if let Some(vma) = mm.vmas.iter().find(|vma| vma.start < least) {
                return Err(Error::new(format!(
                    "the image has memory at {:#x}, this machine allows none below {least:#x} (vm.mmap_min_addr), and \
                     config.json does not grant CAP_SYS_RAWIO",
                    vma.start
                ))
                .pid(pid.cast_signed()));
            }
        }
        Ok(())
    }
}

/// While it lives, this thread, and those that it starts, has the right to low ports only if the container has.
pub struct Unprivileged(bool);

impl Unprivileged {
    /// For a container of that config.json.
    pub fn as_in(spec: &Spec) -> Result<Self> {
        if Policy::of(spec).grants(Capability::NetBindService) {
            return Ok(Self(false));
        }
        let capability = caps::Capability::CAP_NET_BIND_SERVICE;
        let has = caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
        if has {
            caps::drop(None, CapSet::Effective, capability)
                .map_err(|e| Error::new(format!("cannot do without CAP_NET_BIND_SERVICE: {e}")))?;
        }
        Ok(Self(has))
    }
}

impl Unprivileged {
    /// What is said of a socket that could not be bound for it.
    pub fn explain(&self, error: Error) -> Error {
        let bind = error.fields().call.as_ref().is_some_and(|call| call.starts_with("bind("));
        match self.0 && bind && error.errno() == Some(Errno::EACCES) {
            true => error.remedy("such a port takes CAP_NET_BIND_SERVICE, which config.json does not grant"),
            false => error,
        }
    }
}

impl Drop for Unprivileged {
    fn drop(&mut self) {
        if self.0 {
            // It is permitted still.
            let _ = caps::raise(None, CapSet::Effective, caps::Capability::CAP_NET_BIND_SERVICE);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::checkpoint::image::{InetSkEntry, MmEntry, TaskExtra, ThreadExtra, VmaEntry};

    fn spec(capabilities: &[&str], more: &Value) -> Spec {
        let mut process = json!({"cwd": "/", "user": {"uid": 5, "gid": 6}, "args": ["x"],
            "capabilities": {"bounding": capabilities}});
        for (key, value) in more.as_object().unwrap() {
            process[key] = value.clone();
        }
        serde_json::from_value(json!({"ociVersion": "1.0.2", "process": process})).unwrap()
    }

    #[test]
    fn nobody_is_nicer_to_himself_than_config_json() {
        let check = |capabilities: &[&str], more: Value, nice| {
            Privileges::of(&spec(capabilities, &more)).nice(nice).map_err(|e| e.to_string())
        };
        check(&[], json!({}), 0).unwrap();
        check(&[], json!({}), 19).unwrap();
        let error = check(&[], json!({}), -19).unwrap_err();
        assert!(error.contains("-19") && error.contains("config.json"), "{error}");
        check(&["CAP_SYS_NICE"], json!({}), -20).unwrap();
        let limits = |hard| json!({"rlimits": [{"type": "RLIMIT_NICE", "soft": 0, "hard": hard}]});
        check(&[], limits(39), -19).unwrap();
        check(&[], limits(25), -19).unwrap_err();
        assert_eq!(Privileges::of(&spec(&[], &limits(25))).clamp_nice(-19), sys::sched::nice().min(-5));
    }

    #[test]
    fn what_threads_may_not_be_is_refused_or_left_out() {
        let thread = |io_priority, io_flusher| ThreadExtra {
            tid: 7,
            io_priority,
            io_flusher,
            ..ThreadExtra::default()
        };
        let model = |thread| {
            let mut model = Model::default();
            process::set_extra(&mut model, &TaskExtra { threads: vec![thread], ..TaskExtra::default() });
            model
        };
        let first = Some(CLASS_REAL_TIME << CLASS_SHIFT | 4);
        for (thread, word, capability) in [
            (thread(first, None), "ioPriority", "CAP_SYS_NICE"),
            (thread(None, Some(true)), "flusher", "CAP_SYS_RESOURCE"),
        ] {
            let (mut model, none) = (model(thread), spec(&[], &json!({})));
            let judge = Privileges::of(&none);
            let error = judge.threads(&model).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(capability), "{error}");
            Privileges::of(&spec(&[capability], &json!({}))).threads(&model).unwrap();
            judge.clamp_threads(&mut model).unwrap();
            judge.threads(&model).unwrap();
        }
        let best_effort = model(thread(Some(2 << CLASS_SHIFT), None));
        Privileges::of(&spec(&[], &json!({}))).threads(&best_effort).unwrap();
        let given = json!({"ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 4}});
        Privileges::of(&spec(&[], &given)).threads(&model(thread(first, None))).unwrap();
    }

    #[test]
    fn sockets_and_memory_are_judged() {
        let with = |opts| {
            let isk = InetSkEntry { id: 3, opts, ..InetSkEntry::default() };
            Model { files: vec![FileEntry { isk: Some(isk), ..FileEntry::default() }], ..Model::default() }
        };
        let refused = |model: &Model, word: &str| {
            let error = Privileges::of(&spec(&[], &json!({}))).sockets(model).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("CAP_NET_RAW"), "{error}");
            Privileges::of(&spec(&["CAP_NET_RAW"], &json!({}))).sockets(model).unwrap();
        };
        refused(&with(SkOptsEntry { so_mark: Some(7), ..SkOptsEntry::default() }), "0x7");
        refused(&with(SkOptsEntry { so_priority: Some(7), ..SkOptsEntry::default() }), "priority 7");
        let plain = with(SkOptsEntry { so_priority: Some(6), so_mark: Some(0), ..SkOptsEntry::default() });
        Privileges::of(&spec(&[], &json!({}))).sockets(&plain).unwrap();
        let mut transparent = plain.clone();
        transparent.set_extension("inet", &json!([{"id": 3, "options": [[0, 19, 1]]}])).unwrap();
        refused(&transparent, "IP_TRANSPARENT");
        let low = |start| {
            let vmas = vec![VmaEntry { start, end: 0x1_0000_0000, ..VmaEntry::default() }];
            Model { mm: [(1, MmEntry { vmas, ..MmEntry::default() })].into(), ..Model::default() }
        };
        Privileges::of(&spec(&[], &json!({}))).memory(&low(0x1000_0000)).unwrap();
        if std::fs::read_to_string("/proc/sys/vm/mmap_min_addr").is_ok_and(|text| text.trim() != "0") {
            let error = Privileges::of(&spec(&[], &json!({}))).memory(&low(0)).unwrap_err().to_string();
            assert!(error.contains("mmap_min_addr") && error.contains("0x0"), "{error}");
            Privileges::of(&spec(&["CAP_SYS_RAWIO"], &json!({}))).memory(&low(0)).unwrap();
        }
    }
}
