//! The destination's config.json wins: what processes of the images may keep.
//!
//! ```text
//!   images ──> admit ──strict──> an error that names both values       (the default)
//!                 └─────clamp──> the same images, with less in them    (--policy clamp)
//!
//!   capabilities      those of process.capabilities
//!   resource limits   the hard ones of process.rlimits          unless CAP_SYS_RESOURCE is granted
//!   oom score         process.oomScoreAdj, or higher            likewise
//!   real time         none                                      unless CAP_SYS_NICE, a limit or process.scheduler
//!   raw sockets       none                                      unless CAP_NET_RAW is granted
//!   nice values, ...  see `privileges`
//!   users, groups     those of process.user                     unless some program of the container can change them
//! ```
//!
//! no_new_privs and the seccomp filter of config.json are simply set, whatever the images say (see `credentials` and
//! `seccomp`); devices, mounts and control groups are judged where they are opened or made.

use std::borrow::Cow;

use oci_spec::runtime::{Capability, PosixRlimitType, Process, Spec};

use super::privileges::Privileges;
use super::process::DEAD;
use super::{credentials, limits};
use crate::checkpoint::image::{CoreEntry, CredsEntry, FileEntry};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::Kind;
use crate::checkpoint::namespaces::nested::user_of;
use crate::checkpoint::{Error, Result};

const SCHED_FIFO: u32 = 1;
const SCHED_RR: u32 = 2;
const SCHED_DEADLINE: u32 = 6;
/// What a policy of the images may have beside it.
const SCHED_RESET_ON_FORK: u32 = 0x4000_0000;

/// The images as they may be restored: unchanged, or clamped where that was asked for.
pub fn admit<'a>(model: &'a Model, spec: &Spec, clamp: bool) -> Result<Cow<'a, Model>> {
    let policy = credentials::Policy::of(spec);
    let judge = Judge { spec, process: spec.process().as_ref(), policy, privileges: Privileges::of(spec) };
    judge.sockets(model)?;
    judge.privileges.sockets(model)?;
    judge.privileges.memory(model)?;
    let remedy = "allow it in config.json, or give restore --policy clamp to leave it out";
    let mut admitted = Cow::Borrowed(model);
    if let Err(error) = judge.privileges.threads(model) {
        if !clamp {
            return Err(error.remedy(remedy));
        }
        judge.privileges.clamp_threads(admitted.to_mut())?;
    }
    for entry in &model.pstree {
        for vtid in &entry.threads {
            let Some(core) = model.cores.get(vtid) else { continue };
            if core.tc.as_ref().is_some_and(|tc| tc.task_state == DEAD) {
                continue;
            }
            judge.ids(core).map_err(|e| e.pid(entry.pid.cast_signed()))?;
            let inside = user_of(model, entry.pid).is_some();
            if let Err(error) = judge.rest(core, inside) {
                if !clamp {
                    return Err(error.pid(entry.pid.cast_signed()).remedy(remedy));
                }
                if let Some(core) = admitted.to_mut().cores.get_mut(vtid) {
                    judge.clamp(core, inside);
                }
            }
        }
    }
    Ok(admitted)
}

/// config.json, as processes are measured by it.
struct Judge<'a> {
    spec: &'a Spec,
    process: Option<&'a Process>,
    policy: credentials::Policy,
    privileges: Privileges<'a>,
}

fn creds(core: &CoreEntry) -> Option<&CredsEntry> {
    core.thread_core.as_ref()?.creds.as_ref()
}

impl Judge<'_> {
    fn grants(&self, capability: Capability) -> bool {
        self.policy.grants(capability)
    }

    fn limits_bind(&self) -> bool {
        !self.grants(Capability::SysResource)
    }

    /// The lowest oom score that a process could have given itself.
    fn oom_score(&self) -> Option<i32> {
        self.process.and_then(Process::oom_score_adj).filter(|_| self.limits_bind())
    }

    fn real_time(&self) -> bool {
        let limit = |p: &Process| {
            let limits = p.rlimits().iter().flatten();
            limits.into_iter().any(|l| l.typ() == PosixRlimitType::RlimitRtprio && l.hard() > 0)
        };
        self.grants(Capability::SysNice) || self.process.is_some_and(|p| p.scheduler().is_some() || limit(p))
    }

    /// Sockets that see or make packets of others. In a network namespace that the container has made, that is its own
    /// affair.
    fn sockets(&self, model: &Model) -> Result<()> {
        let own = Kind::Net.inits(model);
        let raw = |file: &FileEntry| {
            let ip = file.isk.as_ref().filter(|s| s.r#type == libc::SOCK_RAW.cast_unsigned());
            let packets = file.psk.as_ref();
            ip.map(|s| ("raw", s.ns_id)).or(packets.map(|s| ("packet", s.ns_id)))
        };
        let found = model.files.iter().filter_map(raw).find(|(_, space)| space.is_none_or(|id| id == own));
        let attached = model.files.iter().filter_map(|file| file.tunf.as_ref());
        let attached = attached.filter(|tun| tun.ns_id.is_none_or(|id| id == own));
        if let Some(name) = attached.filter_map(|tun| tun.netdev.as_ref()).next()
            && !self.grants(Capability::NetAdmin)
        {
            return Err(Error::new(format!(
                "the image has a descriptor of the network device {name:?}, config.json does not grant CAP_NET_ADMIN"
            ))
            .remedy("grant it in config.json"));
        }
        match found {
            Some((what, _)) if !self.grants(Capability::NetRaw) => Err(Error::new(format!(
                "the image has a {what} socket, config.json does not grant CAP_NET_RAW"
            ))
            .remedy("grant it in config.json")),
            _ => Ok(()),
        }
    }

    /// What can be refused only: nobody knows which user a process should be instead.
    fn ids(&self, core: &CoreEntry) -> Result<()> {
        let (Some(creds), Some(process)) = (creds(core), self.process) else { return Ok(()) };
        // Programs with the set-user-ID bit make anybody of anyone.
        if !self.policy.no_new_privs {
            return Ok(());
        }
        let user = process.user();
        let wrong = |what: &str, is: u32, may: u32| {
            Err(Error::new(format!(
                "the image has a process of {what} {is}, config.json has {may} and lets nobody change it"
            ))
            .remedy("set process.user of config.json, or grant the capability to change ids"))
        };
        if !self.grants(Capability::Setuid) {
            for id in [creds.uid, creds.euid, creds.suid, creds.fsuid] {
                if id != user.uid() {
                    return wrong("user", id, user.uid());
                }
            }
        }
        if !self.grants(Capability::Setgid) {
            let more = user.additional_gids().iter().flatten();
            let own: Vec<u32> = more.copied().chain([user.gid()]).collect();
            let ids = [creds.gid, creds.egid, creds.sgid, creds.fsgid];
            if let Some(id) = ids.iter().chain(&creds.groups).find(|id| !own.contains(id)) {
                return wrong("group", *id, user.gid());
            }
        }
        Ok(())
    }

    /// What can be clamped.
    /// `inside`: the process is in a user namespace that the container has made, its capabilities count only there.
    fn rest(&self, core: &CoreEntry, inside: bool) -> Result<()> {
        if let Some(creds) = creds(core).filter(|_| !inside) {
            self.policy.check(creds)?;
        }
        if let Some(tc) = &core.tc {
            if let (true, Some(own)) = (self.limits_bind(), &tc.rlimits) {
                limits::check(self.spec, &own.rlimits)?;
            }
            if let (Some(least), Some(score)) = (self.oom_score(), tc.oom_score_adj) {
                if score < least {
                    return Err(Error::new(format!(
                        "the image has a process with oom_score_adj {score}, config.json gives {least}"
                    )));
                }
            }
        }
        if let Some(nice) = core.thread_core.as_ref().and_then(|thread| thread.sched_nice) {
            self.privileges.nice(nice)?;
        }
        match core.thread_core.as_ref().and_then(|t| t.sched_policy.map(|p| p & !SCHED_RESET_ON_FORK)) {
            Some(policy @ (SCHED_FIFO | SCHED_RR | SCHED_DEADLINE)) if !self.real_time() => {
                Err(Error::new(format!(
                    "the image has a thread with the real-time scheduling policy {policy}, config.json has neither \
                     process.scheduler nor CAP_SYS_NICE"
                )))
            }
            _ => Ok(()),
        }
    }

    fn clamp(&self, core: &mut CoreEntry, inside: bool) {
        let real_time = self.real_time();
        if let Some(thread) = &mut core.thread_core {
            if let (Some(creds), false) = (&mut thread.creds, inside) {
                self.policy.clamp(creds);
            }
            thread.sched_nice = thread.sched_nice.map(|nice| self.privileges.clamp_nice(nice));
            let policy = thread.sched_policy.map(|p| p & !SCHED_RESET_ON_FORK);
            if !real_time && matches!(policy, Some(SCHED_FIFO | SCHED_RR | SCHED_DEADLINE)) {
                (thread.sched_policy, thread.sched_prio) = (Some(0), Some(0));
            }
        }
        if let Some(tc) = &mut core.tc {
            if let (true, Some(own)) = (self.limits_bind(), &mut tc.rlimits) {
                limits::clamp(self.spec, &mut own.rlimits);
            }
            if let (Some(least), Some(score)) = (self.oom_score(), &mut tc.oom_score_adj) {
                *score = (*score).max(least);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::checkpoint::image::{RlimitEntry, TaskRlimitsEntry};
    use crate::checkpoint::model::tests::small;

    fn spec(process: Value) -> Spec {
        let mut whole = json!({"cwd": "/", "user": {"uid": 5, "gid": 6}, "args": ["x"]});
        for (key, value) in process.as_object().unwrap() {
            whole[key] = value.clone();
        }
        serde_json::from_value(json!({"ociVersion": "1.0.2", "process": whole, "root": {"path": "r"}}))
            .unwrap()
    }

    /// An image with one process that asks for nothing, and then for what `change` gives it.
    fn crafted(change: impl FnOnce(&mut CoreEntry)) -> Model {
        let mut model = small();
        model.pstree.truncate(1);
        model.pstree[0].threads = vec![1];
        model.files.clear();
        let core = model.cores.get_mut(&1).unwrap();
        core.tc.as_mut().unwrap().task_state = 1;
        core.tc.as_mut().unwrap().rlimits = None;
        core.tc.as_mut().unwrap().oom_score_adj = Some(0);
        let thread = core.thread_core.as_mut().unwrap();
        (thread.sched_policy, thread.sched_prio, thread.sched_nice) = (Some(0), Some(0), Some(0));
        thread.creds = Some(CredsEntry { uid: 5, euid: 5, suid: 5, fsuid: 5, ..CredsEntry::default() });
        let creds = thread.creds.as_mut().unwrap();
        (creds.gid, creds.egid, creds.sgid, creds.fsgid) = (6, 6, 6, 6);
        change(core);
        model
    }

    fn refused(process: &Value, change: impl Fn(&mut CoreEntry), words: &[&str]) -> Model {
        let model = crafted(&change);
        let error = admit(&model, &spec(process.clone()), false).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word}: {error}");
        }
        let clamped = admit(&model, &spec(process.clone()), true).unwrap().into_owned();
        // What was clamped is within what is allowed.
        assert_eq!(*admit(&clamped, &spec(process.clone()), false).unwrap(), clamped);
        clamped
    }

    fn creds_of(core: &mut CoreEntry) -> &mut CredsEntry {
        core.thread_core.as_mut().unwrap().creds.as_mut().unwrap()
    }

    #[test]
    fn an_image_that_asks_for_nothing_passes_unchanged() {
        let model = crafted(|_| {});
        assert!(matches!(admit(&model, &spec(json!({})), false).unwrap(), Cow::Borrowed(_)));
    }

    #[test]
    fn capabilities_are_not_smuggled_in() {
        let process = json!({"capabilities": {"bounding": ["CAP_KILL"]}});
        let wide = |core: &mut CoreEntry| {
            let creds = creds_of(core);
            creds.cap_bnd = vec![1 << 21 | 1 << 5, 0];
            creds.cap_amb = vec![1 << 21, 0];
        };
        let clamped = refused(&process, wide, &["CAP_SYS_ADMIN", "0x200020", "0x20)"]);
        let creds = clamped.cores[&1].thread_core.as_ref().unwrap().creds.as_ref().unwrap();
        assert_eq!((creds.cap_bnd.clone(), creds.cap_amb.clone()), (vec![1 << 5, 0], vec![0, 0]));
    }

    #[test]
    fn limits_are_not_raised() {
        let process = json!({"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}]});
        let wide = |core: &mut CoreEntry| {
            let rlimits = vec![RlimitEntry { cur: 500, max: 1000 }; 16];
            core.tc.as_mut().unwrap().rlimits = Some(TaskRlimitsEntry { rlimits });
        };
        let clamped = refused(&process, wide, &["RLIMIT_NOFILE", "1000", "20"]);
        let limits = &clamped.cores[&1].tc.as_ref().unwrap().rlimits.as_ref().unwrap().rlimits;
        assert_eq!((limits[7].cur, limits[7].max, limits[6].max), (20, 20, 1000));
        let trusted =
            json!({"rlimits": process["rlimits"], "capabilities": {"bounding": ["CAP_SYS_RESOURCE"]}});
        admit(&crafted(wide), &spec(trusted), false).unwrap();
    }

    #[test]
    fn nobody_hides_from_the_oom_killer_or_gets_the_processor_first() {
        let hide = |core: &mut CoreEntry| core.tc.as_mut().unwrap().oom_score_adj = Some(-1000);
        let clamped = refused(&json!({"oomScoreAdj": 100}), hide, &["-1000", "100"]);
        assert_eq!(clamped.cores[&1].tc.as_ref().unwrap().oom_score_adj, Some(100));
        let first = |core: &mut CoreEntry| {
            let thread = core.thread_core.as_mut().unwrap();
            (thread.sched_policy, thread.sched_prio) = (Some(SCHED_RESET_ON_FORK | SCHED_FIFO), Some(50));
        };
        let clamped = refused(&json!({}), first, &["real-time", "CAP_SYS_NICE"]);
        assert_eq!(clamped.cores[&1].thread_core.as_ref().unwrap().sched_policy, Some(0));
        let trusted = json!({"capabilities": {"bounding": ["CAP_SYS_NICE"]}});
        admit(&crafted(first), &spec(trusted), false).unwrap();
    }

    #[test]
    fn nobody_is_nicer_to_himself() {
        let nice = |core: &mut CoreEntry| core.thread_core.as_mut().unwrap().sched_nice = Some(-20);
        let clamped = refused(&json!({}), nice, &["nice value -20"]);
        assert!(clamped.cores[&1].thread_core.as_ref().unwrap().sched_nice > Some(-20));
    }

    #[test]
    fn nobody_becomes_another_user_where_nobody_can() {
        let root = |core: &mut CoreEntry| creds_of(core).suid = 0;
        let group = |core: &mut CoreEntry| creds_of(core).groups = vec![6, 42];
        let process = json!({"noNewPrivileges": true});
        for (change, words) in [(&root as &dyn Fn(&mut CoreEntry), "user 0"), (&group, "group 42")] {
            for clamp in [false, true] {
                let error = admit(&crafted(change), &spec(process.clone()), clamp).unwrap_err().to_string();
                assert!(error.contains(words) && error.contains("config.json"), "{error}");
            }
            admit(&crafted(change), &spec(json!({})), false).unwrap();
        }
    }
}
