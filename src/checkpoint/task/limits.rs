//! Resource limits, the out-of-memory score, the audit login.
//!
//! Raising a hard limit or lowering the score takes CAP_SYS_RESOURCE, which the runtime may lack (in a container, say):
//! then, as at a container's start, what is allowed is set and the rest stays as it is. A limit that config.json names
//! is another matter: the image may not exceed it.

use oci_spec::runtime::{PosixRlimitType, Spec};

use super::status;
use crate::checkpoint::image::{RlimitEntry, TaskCoreEntry};
use crate::checkpoint::remote::{Batch, Injection, Out, Results};
use crate::checkpoint::{Error, Result};

/// Number of resources.
const RESOURCES: usize = 16;
/// RLIMIT_NOFILE.
const NOFILE: usize = 7;

/// Asks for all limits of a process: itself, as prlimit(2) on a stranger needs CAP_SYS_RESOURCE.
#[derive(Debug)]
pub struct Ask([Out; RESOURCES]);

impl Ask {
    /// Adds the questions to `batch`.
    pub fn new(batch: &mut Batch) -> Self {
        batch.about("cannot read the resource limits");
        Self(std::array::from_fn(|resource| {
            let out = batch.out(16);
            batch.call(libc::SYS_prlimit64, &[0.into(), resource.into(), 0_u64.into(), out.arg()]);
            out
        }))
    }
    /// Takes the answers, in the order of the kernel's numbers.
    pub fn answer(&self, results: &Results) -> Vec<RlimitEntry> {
        self.0
            .iter()
            .map(|out| RlimitEntry { cur: results.u64(*out, 0), max: results.u64(*out, 8) })
            .collect()
    }
}

/// What `/proc` tells: the out-of-memory score and the audit login.
pub fn dump(pid: i32, tc: &mut TaskCoreEntry) -> Result<()> {
    let score = status::read(format!("/proc/{pid}/oom_score_adj"))?;
    tc.oom_score_adj = score.trim().parse().ok();
    // Kernels without audit have no such file; -1 means that nobody has logged in.
    if let Ok(login) = status::read(format!("/proc/{pid}/loginuid")) {
        tc.loginuid = login.trim().parse().ok();
    }
    Ok(())
}

fn number(name: PosixRlimitType) -> usize {
    match name {
        PosixRlimitType::RlimitCpu => 0,
        PosixRlimitType::RlimitFsize => 1,
        PosixRlimitType::RlimitData => 2,
        PosixRlimitType::RlimitStack => 3,
        PosixRlimitType::RlimitCore => 4,
        PosixRlimitType::RlimitRss => 5,
        PosixRlimitType::RlimitNproc => 6,
        PosixRlimitType::RlimitNofile => 7,
        PosixRlimitType::RlimitMemlock => 8,
        PosixRlimitType::RlimitAs => 9,
        PosixRlimitType::RlimitLocks => 10,
        PosixRlimitType::RlimitSigpending => 11,
        PosixRlimitType::RlimitMsgqueue => 12,
        PosixRlimitType::RlimitNice => 13,
        PosixRlimitType::RlimitRtprio => 14,
        PosixRlimitType::RlimitRttime => 15,
    }
}

/// Refuses limits above those that config.json sets.
pub fn check(spec: &Spec, limits: &[RlimitEntry]) -> Result<()> {
    for limit in spec.process().iter().filter_map(|p| p.rlimits().as_ref()).flatten() {
        if let Some(image) = limits.get(number(limit.typ())).filter(|image| image.max > limit.hard()) {
            return Err(Error::new(format!(
                "the image's hard limit {} is {}, config.json allows {}",
                limit.typ(),
                image.max,
                limit.hard()
            )));
        }
    }
    Ok(())
}

/// Lowers limits to those that config.json sets.
pub fn clamp(spec: &Spec, limits: &mut [RlimitEntry]) {
    for limit in spec.process().iter().filter_map(|p| p.rlimits().as_ref()).flatten() {
        if let Some(image) = limits.get_mut(number(limit.typ())) {
            image.max = image.max.min(limit.hard());
            image.cur = image.cur.min(image.max);
        }
    }
}

/// Sets the limits from inside. Where the hard limit may not be raised, the soft one is set as high as it goes.
pub fn restore(injection: &mut Injection, limits: &[RlimitEntry]) -> Result<()> {
    let mut batch = Batch::new();
    batch.about("cannot set the resource limits");
    let mut calls = Vec::new();
    for (resource, limit) in limits.iter().take(RESOURCES).enumerate() {
        let old = batch.out(16);
        let new = batch.words(&[limit.cur, limit.max]);
        batch.call(libc::SYS_prlimit64, &[0.into(), resource.into(), 0_u64.into(), old.arg()]);
        let set = batch.call(libc::SYS_prlimit64, &[0.into(), resource.into(), new, 0_u64.into()]);
        batch.tolerate(set);
        calls.push((resource, limit, old, set));
    }
    let results = injection.run(&batch)?;
    let mut again = Batch::new();
    again.about("cannot set the resource limits");
    for (resource, limit, old, set) in calls {
        if results.ret(set) < 0 {
            let max = results.u64(old, 8).min(limit.max);
            let new = again.words(&[limit.cur.min(max), max]);
            again.call(libc::SYS_prlimit64, &[0.into(), resource.into(), new, 0_u64.into()]);
        }
    }
    if again.is_empty() { Ok(()) } else { injection.run(&again).map(|_| ()) }
}

/// Lets the task have descriptors up to `wanted` while it is being put together; its own limit is set at the end.
/// Where the hard limit may not be raised, up to that: the highest number is returned, which lies above `highest`.
pub fn make_room(injection: &mut Injection, highest: u64, wanted: u64) -> Result<u64> {
    let mut batch = Batch::new();
    batch.about("cannot read the limit of open files");
    let old = batch.out(16);
    batch.call(libc::SYS_prlimit64, &[0.into(), NOFILE.into(), 0_u64.into(), old.arg()]);
    let results = injection.run(&batch)?;
    let (soft, hard) = (results.u64(old, 0), results.u64(old, 8));
    if soft > wanted {
        return Ok(wanted);
    }
    let mut batch = Batch::new();
    let new = batch.words(&[wanted + 1, hard.max(wanted + 1)]);
    let set = batch.call(libc::SYS_prlimit64, &[0.into(), NOFILE.into(), new, 0_u64.into()]);
    batch.tolerate(set);
    if injection.run(&batch)?.ret(set) >= 0 {
        return Ok(wanted);
    }
    if hard <= highest + LEAST_ROOM {
        return Err(Error::new(format!(
            "descriptor {highest} of the images is too close to the limit of open files, {hard}, which may not be raised"
        ))
        .remedy("raise RLIMIT_NOFILE of config.json, or give the runtime CAP_SYS_RESOURCE"));
    }
    let mut batch = Batch::new();
    batch.about("cannot raise the limit of open files");
    let new = batch.words(&[hard, hard]);
    batch.call(libc::SYS_prlimit64, &[0.into(), NOFILE.into(), new, 0_u64.into()]);
    injection.run(&batch).map(|_| hard - 1)
}

/// Numbers above those of the images that a task needs at least while it is put together.
const LEAST_ROOM: u64 = 20;

/// Sets what is set through `/proc`; a refusal leaves what the runtime gave the container.
pub fn restore_files(pid: i32, tc: &TaskCoreEntry) {
    if let Some(score) = tc.oom_score_adj {
        let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
    }
    if let Some(login) = tc.loginuid.filter(|login| *login != u32::MAX) {
        let _ = std::fs::write(format!("/proc/{pid}/loginuid"), login.to_string());
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{PosixRlimitBuilder, ProcessBuilder, SpecBuilder};

    use super::*;

    #[test]
    fn config_json_bounds_the_hard_limits() {
        let nofile = PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .soft(10_u64)
            .hard(20_u64)
            .build();
        let process = ProcessBuilder::default().rlimits(vec![nofile.unwrap()]).build().unwrap();
        let spec = SpecBuilder::default().process(process).build().unwrap();
        let mut limits = vec![RlimitEntry { cur: 1, max: u64::MAX }; 16];
        let error = check(&spec, &limits).unwrap_err().to_string();
        assert!(error.contains("RLIMIT_NOFILE") && error.contains("20"), "{error}");
        limits[7].max = 20;
        check(&spec, &limits).unwrap();
    }
}
