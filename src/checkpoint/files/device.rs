//! Character and block devices.
//!
//! The engine opens devices from outside the container's device cgroup, so it asks that list itself: an image must
//! not open what the container could not.

use nix::sys::stat::{major, minor};
use oci_spec::runtime::{LinuxDeviceType, Spec};

use crate::checkpoint::files::live::Live;
use crate::checkpoint::{Error, Result};

/// Devices whose open file has no state of its own: /dev/mem's relatives (null, zero, full, random, ...), and disks.
fn stateless(live: &Live) -> bool {
    major(live.stat.st_rdev) == 1
}

/// `/dev/null`, which is the same everywhere.
pub fn is_null(live: &Live) -> bool {
    live.format() == libc::S_IFCHR && (major(live.stat.st_rdev), minor(live.stat.st_rdev)) == (1, 3)
}

/// `/dev/net/tun`, which has a room of its own.
pub fn is_tun(live: &Live) -> bool {
    live.format() == libc::S_IFCHR && (major(live.stat.st_rdev), minor(live.stat.st_rdev)) == (10, 200)
}

/// Refuses devices that keep a state per open file, which nobody can read back.
pub fn check(live: &Live) -> Result<()> {
    if stateless(live) || is_tun(live) {
        return Ok(());
    }
    let (major, minor) = (major(live.stat.st_rdev), minor(live.stat.st_rdev));
    Err(live.name(Error::new(format!("an open device ({major}:{minor}) cannot be checkpointed"))).remedy(
        "let the program close it; null, zero, full, random, urandom, kmsg, net/tun and terminals can be open",
    ))
}

/// Devices that every container may open, as runc allows them: major, minor (any), of type c.
const DEFAULT: [(u64, Option<u64>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// Refuses to open a device that config.json's device list does not allow.
pub fn permit(spec: &Spec, mode: u32, rdev: u64, flags: u32) -> Result<()> {
    let block = mode & libc::S_IFMT == libc::S_IFBLK;
    let (major, minor) = (major(rdev), minor(rdev));
    let mut allowed = !block && DEFAULT.iter().any(|(a, b)| *a == major && b.is_none_or(|b| b == minor));
    let wanted = match flags as i32 & libc::O_ACCMODE {
        libc::O_RDONLY => "r",
        libc::O_WRONLY => "w",
        _ => "rw",
    };
    let rules = spec.linux().as_ref().and_then(|l| l.resources().as_ref()).and_then(|r| r.devices().as_ref());
    let nodes = spec.linux().as_ref().and_then(|l| l.devices().as_ref());
    for rule in rules.into_iter().flatten() {
        let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::B => block,
            LinuxDeviceType::C | LinuxDeviceType::U => !block,
            LinuxDeviceType::A | LinuxDeviceType::P => true,
        };
        let number = |rule: Option<i64>, is: u64| rule.is_none_or(|n| n < 0 || n.cast_unsigned() == is);
        let access = rule.access().as_deref().unwrap_or("rwm");
        let applies = kind && number(rule.major(), major) && number(rule.minor(), minor);
        if applies && rule.allow() && wanted.chars().all(|c| access.contains(c)) {
            allowed = true;
        } else if applies && !rule.allow() && wanted.chars().any(|c| access.contains(c)) {
            // The rules begin with "deny all", and the default devices are added after them.
            allowed =
                allowed && !block && DEFAULT.iter().any(|(a, b)| *a == major && b.is_none_or(|b| b == minor));
        }
    }
    allowed |= nodes.into_iter().flatten().any(|d| {
        d.major().cast_unsigned() == major
            && d.minor().cast_unsigned() == minor
            && (d.typ() == LinuxDeviceType::B) == block
    });
    if allowed {
        return Ok(());
    }
    Err(Error::new(format!(
        "the images open device {}{major}:{minor} for {wanted}, which this container may not",
        if block { "b " } else { "c " }
    ))
    .remedy("allow it in config.json (linux.resources.devices) if it is meant to have it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxBuilder, LinuxDeviceCgroupBuilder, LinuxResourcesBuilder, SpecBuilder};

    fn spec(rules: &[(bool, LinuxDeviceType, i64, i64, &str)]) -> Spec {
        let devices: Vec<_> = rules
            .iter()
            .map(|&(allow, typ, major, minor, access)| {
                LinuxDeviceCgroupBuilder::default()
                    .allow(allow)
                    .typ(typ)
                    .major(major)
                    .minor(minor)
                    .access(access)
                    .build()
                    .unwrap()
            })
            .collect();
        let resources = LinuxResourcesBuilder::default().devices(devices).build().unwrap();
        SpecBuilder::default()
            .linux(LinuxBuilder::default().resources(resources).build().unwrap())
            .build()
            .unwrap()
    }

    #[test]
    fn the_list_of_the_destination_decides() {
        let dev = |a, b| nix::sys::stat::makedev(a, b);
        let deny = (false, LinuxDeviceType::A, -1, -1, "rwm");
        let none = spec(&[deny]);
        permit(&none, libc::S_IFCHR, dev(1, 3), libc::O_RDWR as u32).unwrap();
        assert!(permit(&none, libc::S_IFBLK, dev(8, 0), 0).is_err());
        assert!(permit(&none, libc::S_IFCHR, dev(1, 1), 0).is_err(), "/dev/mem");
        let some = spec(&[deny, (true, LinuxDeviceType::C, 10, 229, "r")]);
        permit(&some, libc::S_IFCHR, dev(10, 229), 0).unwrap();
        assert!(permit(&some, libc::S_IFCHR, dev(10, 229), libc::O_RDWR as u32).is_err());
        assert!(permit(&some, libc::S_IFBLK, dev(10, 229), 0).is_err());
        permit(&spec(&[(true, LinuxDeviceType::A, -1, -1, "rwm")]), libc::S_IFBLK, dev(8, 0), 0).unwrap();
    }
}
