//! How the container's program is scheduled: policy, priority of input and output, processors, memory nodes,
//! personality.

use std::collections::BTreeSet;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxMemoryPolicy, LinuxPersonality, LinuxPersonalityDomain,
    LinuxSchedulerFlag, LinuxSchedulerPolicy, MemoryPolicyFlagType, MemoryPolicyModeType, Scheduler,
};

use crate::sys::sched::{SchedAttr, set_attr, set_io_priority, set_mempolicy};
use crate::sys::{Context, Error, Result};

/// Refuses what makes no sense together, in runc's words.
pub fn validate(s: &Scheduler) -> Result<()> {
    let nice = s.nice().unwrap_or(0);
    let policy = *s.policy();
    let time_sharing = matches!(policy, LinuxSchedulerPolicy::SchedOther | LinuxSchedulerPolicy::SchedBatch);
    if time_sharing && !(-20..=19).contains(&nice) {
        return Err(Error::new(format!("invalid scheduler.nice: {nice} when scheduler.policy is {policy}")));
    }
    let real_time = matches!(policy, LinuxSchedulerPolicy::SchedFifo | LinuxSchedulerPolicy::SchedRr);
    if s.priority().unwrap_or(0) != 0 && !real_time {
        return Err(Error::new("scheduler.priority can only be specified for SchedFIFO or SchedRR policy"));
    }
    let deadline = [s.runtime(), s.deadline(), s.period()].iter().any(|t| t.unwrap_or(0) != 0);
    if deadline && policy != LinuxSchedulerPolicy::SchedDeadline {
        return Err(Error::new(
            "scheduler runtime/deadline/period can only be specified for SchedDeadline policy",
        ));
    }
    Ok(())
}

fn attributes(s: &Scheduler) -> SchedAttr {
    let policy = match s.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let bit = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    SchedAttr {
        size: 0,
        policy,
        flags: s.flags().iter().flatten().map(bit).fold(0, |all, bit| all | bit),
        nice: s.nice().unwrap_or(0),
        priority: u32::try_from(s.priority().unwrap_or(0)).unwrap_or(0),
        runtime: s.runtime().unwrap_or(0),
        deadline: s.deadline().unwrap_or(0),
        period: s.period().unwrap_or(0),
    }
}

/// Sets the policy of this process. `cpuset` says that it is confined to some processors, which SCHED_DEADLINE forbids.
pub fn set_policy(s: &Scheduler, cpuset: bool) -> Result<()> {
    match set_attr(&attributes(s)) {
        Err(Errno::EPERM) if cpuset => {
            Err(Error::new("process scheduler can't be used together with AllowedCPUs"))
        }
        other => other.context(|| "error setting scheduler"),
    }
}

/// Sets the priority of input and output.
pub fn set_io(priority: &LinuxIOPriority) -> Result<()> {
    let level = match u32::try_from(priority.priority()) {
        Ok(level @ 0..=7) => level,
        _ => return Err(Error::new(format!("invalid ioPriority.Priority: {}", priority.priority()))),
    };
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    set_io_priority(class << 13 | level).context(|| "failed to set io priority")
}

/// No processor or memory node has a greater number, as far as runc and we are concerned.
const GREATEST: u32 = 64 << 10;

/// Numbers of a list such as `0-3,7`, in the words of runc and of Go where there is something wrong with it.
pub fn parse_list(list: &str) -> Result<Vec<usize>> {
    let number = |text: &str| -> Result<usize> {
        let wrong = |why: &str| Error::new(format!("strconv.ParseUint: parsing {text:?}: {why}"));
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong("invalid syntax"));
        }
        match text.parse::<u32>() {
            Err(_) => Err(wrong("value out of range")),
            Ok(n) if n > GREATEST => {
                Err(Error::new(format!("values larger than {GREATEST} are not supported")))
            }
            Ok(n) => Ok(n as usize),
        }
    };
    // A set: the same numbers over and over take no more memory.
    let mut all = BTreeSet::new();
    for part in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to) = (number(from)?, number(to)?);
        if from > to {
            return Err(Error::new(format!("invalid range: {part}")));
        }
        all.extend(from..=to);
    }
    if all.is_empty() && !list.is_empty() {
        return Err(Error::new(format!("no members found in set {list:?}")));
    }
    Ok(all.into_iter().collect())
}

/// Confines a process (0: this one) to the processors of a list.
pub fn set_affinity(pid: i32, list: &str) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in parse_list(list)? {
        set.set(cpu).context(|| format!("processor {cpu}"))?;
    }
    sched_setaffinity(Pid::from_raw(pid), &set).context(|| format!("sched_setaffinity {list}"))
}

/// The first 64 processors that a process may run on, as bits; none if it has gone.
pub fn affinity_mask(pid: i32) -> u64 {
    let set = nix::sched::sched_getaffinity(Pid::from_raw(pid)).unwrap_or_default();
    (0..64).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).map(|cpu| 1 << cpu).sum()
}

/// Lets a process run on every processor of its control group, whatever it was born with. Where that is forbidden it
/// stays as it is.
pub fn reset_affinity(pid: i32) {
    let mut all = CpuSet::new();
    for cpu in 0..CpuSet::count() {
        // Every number below the count fits.
        let _ = all.set(cpu);
    }
    let _ = sched_setaffinity(Pid::from_raw(pid), &all);
}

/// The mode number, with its flags.
fn mode(policy: &LinuxMemoryPolicy) -> i32 {
    let mode = match policy.mode() {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    };
    let bit = |flag: &MemoryPolicyFlagType| match flag {
        MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
        MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
        MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
    };
    policy.flags().iter().flatten().map(bit).fold(mode, |all, bit| all | bit)
}

/// Sets the NUMA policy.
pub fn set_memory_policy(policy: &LinuxMemoryPolicy) -> Result<()> {
    let nodes = parse_list(policy.nodes().as_deref().unwrap_or_default())
        .context(|| "invalid memory policy nodes")?;
    let mut mask = vec![0u64; nodes.iter().max().map_or(0, |n| n / 64 + 1)];
    for node in nodes {
        mask[node / 64] |= 1 << (node % 64);
    }
    set_mempolicy(mode(policy), &mask).context(|| "set_mempolicy")
}

/// Sets the execution domain. Flags of the spec are ignored, as runc does.
pub fn set_personality(personality: &LinuxPersonality) -> Result<()> {
    let domain = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => nix::sys::personality::Persona::empty(),
        LinuxPersonalityDomain::PerLinux32 => nix::sys::personality::Persona::from_bits_retain(0x0008),
    };
    nix::sys::personality::set(domain).map(drop).context(|| "personality")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;

    #[test]
    fn lists_are_read_and_bounded() {
        assert_eq!(parse_list("0-2, 5,").unwrap(), [0, 1, 2, 5]);
        assert!(parse_list("").unwrap().is_empty());
        for (list, said) in [
            ("3-1", "invalid range: 3-1"),
            ("x", "strconv.ParseUint: parsing \"x\": invalid syntax"),
            ("1-", "strconv.ParseUint: parsing \"\": invalid syntax"),
            (
                "0-99999999999999999999",
                "strconv.ParseUint: parsing \"99999999999999999999\": value out of range",
            ),
            ("65537", "values larger than 65536 are not supported"),
            (",", "no members found in set \",\""),
        ] {
            assert_eq!(parse_list(list).unwrap_err().to_string(), said, "{list}");
        }
    }

    #[test]
    fn settings_reach_the_process() {
        in_child(0, || {
            set_policy(&serde_json::from_str(r#"{"policy":"SCHED_BATCH","nice":5}"#).unwrap(), false)
                .unwrap();
            set_io(&serde_json::from_str(r#"{"class":"IOPRIO_CLASS_BE","priority":6}"#).unwrap()).unwrap();
            set_affinity(0, "0").unwrap();
            set_personality(&serde_json::from_str(r#"{"domain":"LINUX32"}"#).unwrap()).unwrap();
            let read = |file: &str| std::fs::read_to_string(format!("/proc/self/{file}")).unwrap();
            let stat = read("stat");
            let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
            assert_eq!((fields[16], fields[38]), ("5", "3"));
            assert!(read("status").contains("Cpus_allowed_list:\t0\n"));
            assert_eq!(read("personality").trim(), "00000008");
            // SAFETY: numbers only.
            assert_eq!(unsafe { libc::syscall(libc::SYS_ioprio_get, 1, 0) }, 2 << 13 | 6);
        });
    }

    #[test]
    fn nonsense_is_refused() {
        for (json, words) in [
            (r#"{"policy":"SCHED_OTHER","nice":20}"#, "invalid scheduler.nice: 20"),
            (r#"{"policy":"SCHED_OTHER","priority":1}"#, "scheduler.priority"),
            (r#"{"policy":"SCHED_FIFO","runtime":1}"#, "runtime/deadline/period"),
        ] {
            let e = validate(&serde_json::from_str(json).unwrap()).unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        }
    }
}
