//! Which devices a container may use.
//!
//! config.json gives a list of rules, later ones over earlier ones, and the runtime adds a few for the devices that every
//! container has. [`Policy`] is what the list comes to: a default and exceptions from it, all of one kind. A list that no
//! such policy can express (a hole in a wildcard) is refused, for the kernel's v1 controller would silently ignore the
//! hole; so the same config.json means the same on v1 and v2.

pub mod ebpf;
mod v1;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, LinuxResources};

use crate::init::devices::DEFAULT;
use crate::sys::{Error, Result};

pub(super) use v1::apply as apply_v1;

/// Ways to use a device, as bits: mknod(2), read, write. The values are those of eBPF's BPF_DEVCG_ACC_*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access(u8);

impl Access {
    /// All three.
    pub const ALL: Self = Self(7);
    const MKNOD: Self = Self(1);

    fn parse(text: &str) -> Result<Self> {
        let mut bits = 0;
        for letter in text.chars() {
            bits |= match letter {
                'm' => 1,
                'r' => 2,
                'w' => 4,
                // runc gives them no meaning, either.
                _ => 0,
            };
        }
        if bits == 0 {
            return Err(Error::new(format!("device access {text:?} has none of the letters r, w and m")));
        }
        Ok(Self(bits))
    }

    /// The bits.
    pub fn bits(self) -> u8 {
        self.0
    }
    fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bit, letter) in [(2, "r"), (4, "w"), (1, "m")] {
            if self.0 & bit != 0 {
                f.write_str(letter)?;
            }
        }
        Ok(())
    }
}

/// The devices that an exception is about. `None` is any number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Devices {
    /// Major number.
    pub major: Option<u32>,
    /// Minor number.
    pub minor: Option<u32>,
    /// Block devices, else character devices.
    pub block: bool,
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.block { "b " } else { "c " })?;
        for (number, separator) in [(self.major, ":"), (self.minor, "")] {
            match number {
                Some(n) => write!(f, "{n}{separator}")?,
                None => write!(f, "*{separator}")?,
            }
        }
        Ok(())
    }
}

/// A default and the exceptions from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// What is not excepted is allowed.
    pub allow: bool,
    /// The exceptions.
    pub exceptions: BTreeMap<Devices, Access>,
}

impl Policy {
    /// The policy of a container: the rules of config.json, then what every container may use. A default device for
    /// which config.json has an own entry in `devices` gets no rule.
    pub fn of(resources: Option<&LinuxResources>, devices: &[LinuxDevice]) -> Result<Self> {
        let mut policy = Self::default();
        for (i, rule) in resources.and_then(|r| r.devices().as_ref()).into_iter().flatten().enumerate() {
            let access = rule.access().as_deref().unwrap_or_default();
            if access.is_empty() {
                return Err(Error::new(format!("device access at {i} field cannot be empty")));
            }
            let access = Access::parse(access)?;
            let block = match rule.typ() {
                None | Some(LinuxDeviceType::A) => {
                    policy.reset(rule.allow());
                    continue;
                }
                Some(LinuxDeviceType::B) => true,
                Some(LinuxDeviceType::C) => false,
                Some(other) => {
                    return Err(Error::new(format!("invalid cgroup device type {:?}", other.as_str())));
                }
            };
            // A missing number, or -1, is any.
            let number = |n: Option<i64>| match n {
                None | Some(-1) => Ok(None),
                Some(n) => {
                    u32::try_from(n).map(Some).map_err(|_| Error::new(format!("invalid device number {n}")))
                }
            };
            let which = Devices { major: number(rule.major())?, minor: number(rule.minor())?, block };
            policy.apply(which, access, rule.allow())?;
        }
        for (which, access) in defaults(devices) {
            policy.apply(which, access, true)?;
        }
        Ok(policy)
    }

    fn reset(&mut self, allow: bool) {
        *self = Self { allow, exceptions: BTreeMap::new() };
    }

    fn apply(&mut self, which: Devices, access: Access, allow: bool) -> Result<()> {
        if allow != self.allow {
            let old = self.exceptions.entry(which).or_insert(Access(0));
            *old = old.with(access);
            return Ok(());
        }
        // The exception is taken back. A wider one that overlaps would stay in force.
        for wider in [
            Devices { major: None, ..which },
            Devices { minor: None, ..which },
            Devices { major: None, minor: None, ..which },
        ] {
            let overlaps = self.exceptions.get(&wider).is_some_and(|a| a.0 & access.0 != 0);
            if wider != which && overlaps {
                return Err(Error::new(format!(
                    "requested rule [{which} {access}] not supported by devices cgroupv1 \
                     (cannot punch hole in existing wildcard rule [{wider}])"
                )));
            }
        }
        if let Some(old) = self.exceptions.get_mut(&which) {
            *old = old.without(access);
            if old.is_empty() {
                self.exceptions.remove(&which);
            }
        }
        Ok(())
    }
}

/// What every container may use: mknod of anything, the default devices, terminals, and tun.
fn defaults(own: &[LinuxDevice]) -> Vec<(Devices, Access)> {
    let chars = |major: u32, minor: Option<u32>| Devices { major: Some(major), minor, block: false };
    let mut all = vec![
        (Devices { major: None, minor: None, block: false }, Access::MKNOD),
        (Devices { major: None, minor: None, block: true }, Access::MKNOD),
    ];
    for (path, major, minor) in DEFAULT {
        if !own.iter().any(|d| d.path() == Path::new(path)) {
            all.push((chars(*major, Some(*minor)), Access::ALL));
        }
    }
    all.extend([
        (chars(136, None), Access::ALL),
        (chars(5, Some(2)), Access::ALL),
        (chars(10, Some(200)), Access::ALL),
    ]);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(&format!("{{\"devices\":{json}}}")).unwrap()
    }

    #[test]
    fn deny_all_leaves_the_defaults() {
        let policy = Policy::of(Some(&resources(r#"[{"allow":false,"access":"rwm"}]"#)), &[]).unwrap();
        assert!(!policy.allow);
        let null = Devices { major: Some(1), minor: Some(3), block: false };
        assert_eq!(policy.exceptions[&null], Access::ALL);
        assert_eq!(policy, Policy::of(None, &[]).unwrap());
    }

    #[test]
    fn allow_all_is_no_exceptions() {
        let policy =
            Policy::of(Some(&resources(r#"[{"allow":true,"access":"rwm","type":"a"}]"#)), &[]).unwrap();
        assert_eq!(policy, Policy { allow: true, exceptions: BTreeMap::new() });
    }

    #[test]
    fn a_hole_in_a_wildcard_is_refused() {
        let rules = r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":8,"access":"rwm"},
            {"allow":false,"type":"c","major":8,"minor":1,"access":"w"}]"#;
        let e = Policy::of(Some(&resources(rules)), &[]).unwrap_err().to_string();
        assert!(e.contains("cannot punch hole"), "{e}");
    }

    #[test]
    fn taking_back_an_exception_removes_it() {
        let rules = r#"[{"allow":true,"type":"b","major":8,"minor":1,"access":"rw"},
            {"allow":false,"type":"b","major":8,"minor":1,"access":"w"}]"#;
        let policy = Policy::of(Some(&resources(rules)), &[]).unwrap();
        let disk = Devices { major: Some(8), minor: Some(1), block: true };
        assert_eq!(policy.exceptions[&disk].to_string(), "r");
    }

    #[test]
    fn rules_without_access_or_with_a_wrong_one_are_refused() {
        assert!(Policy::of(Some(&resources(r#"[{"allow":true}]"#)), &[]).is_err());
        assert!(Policy::of(Some(&resources(r#"[{"allow":true,"access":"x"}]"#)), &[]).is_err());
        let odd = r#"[{"allow":true,"type":"c","major":1,"minor":11,"access":"rwa"}]"#;
        let kmsg = Devices { major: Some(1), minor: Some(11), block: false };
        assert_eq!(Policy::of(Some(&resources(odd)), &[]).unwrap().exceptions[&kmsg].to_string(), "rw");
    }
}
