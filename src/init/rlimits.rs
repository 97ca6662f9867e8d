//! Resource limits, set on the new process from outside: a limit above the hard limit needs CAP_SYS_RESOURCE in the
//! initial user namespace, which init may lack where the runtime does not.

use oci_spec::runtime::{PosixRlimit, PosixRlimitType};

use crate::sys::{Context, Error, Result};

/// RLIMIT_* of a name in config.json.
pub fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

/// Refuses a list that names a limit twice.
pub fn validate(limits: &[PosixRlimit]) -> Result<()> {
    for (i, limit) in limits.iter().enumerate() {
        if limits[..i].iter().any(|l| l.typ() == limit.typ()) {
            return Err(Error::new(format!("duplicate rlimit {}", limit.typ())));
        }
    }
    Ok(())
}

/// Sets the limits on process `pid`, 0 for this one.
pub fn apply(limits: &[PosixRlimit], pid: i32) -> Result<()> {
    for limit in limits {
        let kind = resource(limit.typ());
        crate::sys::prctl::set_limit(pid, kind, limit.soft(), limit.hard())
            .context(|| format!("error setting rlimit type {kind}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;
    use oci_spec::runtime::PosixRlimitBuilder;

    fn limit(kind: PosixRlimitType, soft: u64, hard: u64) -> PosixRlimit {
        PosixRlimitBuilder::default().typ(kind).soft(soft).hard(hard).build().unwrap()
    }

    #[test]
    fn limits_are_set_and_an_impossible_one_is_named() {
        in_child(0, || {
            apply(&[limit(PosixRlimitType::RlimitNofile, 100, 200)], 0).unwrap();
            let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
            let line = limits.lines().find(|l| l.starts_with("Max open files")).unwrap();
            assert_eq!(line.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["100", "200"]);
            let e = apply(&[limit(PosixRlimitType::RlimitNofile, 300, 200)], 0).unwrap_err();
            assert_eq!(e.to_string(), "error setting rlimit type 7: invalid argument");
        });
    }

    #[test]
    fn a_duplicate_is_refused() {
        let one = limit(PosixRlimitType::RlimitCore, 0, 0);
        assert!(validate(&[one]).is_ok());
        assert!(validate(&[one, one]).is_err());
    }
}
