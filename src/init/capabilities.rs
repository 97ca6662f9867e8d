//! The five capability sets.
//!
//! ```text
//!   drop_bounding   while still root       what can never come back, by set-user-id programs or file capabilities
//!   apply           after setuid(2)        permitted, effective, inheritable; then ambient
//! ```
//!
//! Capabilities that this kernel does not know are left out, as are those of the ambient set that cannot be raised:
//! config.json files are written for many kernels. A permitted capability that the runtime itself lacks is an error.

use caps::CapSet;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use crate::sys::{Context, Error, Result, prctl};

/// The capabilities of a list, in the other crate's words, that this kernel has.
fn known(set: Option<&Capabilities>, last: u8) -> impl Iterator<Item = caps::Capability> {
    let all = set.into_iter().flatten().filter_map(|c| format!("CAP_{c}").parse::<caps::Capability>().ok());
    all.filter(move |c| c.index() <= last)
}

/// The same as a mask.
fn mask(set: Option<&Capabilities>, last: u8) -> u64 {
    known(set, last).fold(0, |all, cap| all | cap.bitmask())
}

fn call(e: &caps::errors::CapsError) -> Error {
    Error::new(e.to_string())
}

/// Drops everything from the bounding set that config.json does not list. Without CAP_SETPCAP there is nothing that
/// could be dropped, and nothing is.
pub fn drop_bounding(capabilities: &LinuxCapabilities) -> Result<()> {
    let permitted = caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP);
    if !permitted.map_err(|e| call(&e).context("unable to apply bounding set"))? {
        return Ok(());
    }
    let last = prctl::last_capability();
    let keep = mask(capabilities.bounding().as_ref(), last);
    // Dropping one that is not there is no error, and costs no more than asking for it.
    for number in (0..=last).filter(|number| keep & (1 << number) == 0) {
        prctl::drop_from_bounding(number).context(|| "unable to apply bounding set")?;
    }
    Ok(())
}

/// Sets the other four sets to exactly what config.json lists.
pub fn apply(capabilities: &LinuxCapabilities) -> Result<()> {
    let last = prctl::last_capability();
    let bits = |set: Option<&Capabilities>| mask(set, last);
    let sets = prctl::Capabilities {
        effective: bits(capabilities.effective().as_ref()),
        permitted: bits(capabilities.permitted().as_ref()),
        inheritable: bits(capabilities.inheritable().as_ref()),
    };
    prctl::set_capabilities(sets).context(|| "unable to apply caps: can't apply capabilities")?;
    // Kernels before 4.3 have no ambient set.
    if caps::clear(None, CapSet::Ambient).is_err() {
        return Ok(());
    }
    for cap in known(capabilities.ambient().as_ref(), last) {
        // As runc does: what cannot be raised is left out. The command has said so.
        let _ = caps::raise(None, CapSet::Ambient, cap);
    }
    Ok(())
}

/// The ambient capabilities that [`apply`] will leave out, for they are not permitted and inheritable, too.
pub fn unraisable(capabilities: &LinuxCapabilities) -> Vec<String> {
    let has = |set: &Option<Capabilities>, c: &Capability| set.as_ref().is_some_and(|set| set.contains(c));
    let raised = |c| has(capabilities.permitted(), c) && has(capabilities.inheritable(), c);
    let ambient = capabilities.ambient().iter().flatten();
    let mut names: Vec<String> = ambient.filter(|&c| !raised(c)).map(|c| format!("CAP_{c}")).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;
    use nix::errno::Errno;
    use oci_spec::runtime::{Capability, LinuxCapabilitiesBuilder};

    fn sets(all: &[Capability], ambient: &[Capability]) -> LinuxCapabilities {
        let all: Capabilities = all.iter().copied().collect();
        LinuxCapabilitiesBuilder::default()
            .bounding(all.clone())
            .permitted(all.clone())
            .effective(all.clone())
            .inheritable(all)
            .ambient(ambient.iter().copied().collect::<Capabilities>())
            .build()
            .unwrap()
    }

    #[test]
    fn sets_become_exactly_what_is_listed() {
        in_child(0, || {
            let wanted = sets(&[Capability::Kill, Capability::NetBindService], &[Capability::Kill]);
            drop_bounding(&wanted).unwrap();
            apply(&wanted).unwrap();
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            for (field, value) in [
                ("CapBnd", "0000000000000420"),
                ("CapPrm", "0000000000000420"),
                ("CapEff", "0000000000000420"),
                ("CapInh", "0000000000000420"),
                ("CapAmb", "0000000000000020"),
            ] {
                assert!(status.contains(&format!("{field}:\t{value}")), "{field} in {status}");
            }
        });
    }

    #[test]
    fn a_capability_that_we_lack_is_an_error() {
        in_child(0, || {
            apply(&sets(&[Capability::Kill], &[])).unwrap();
            let e = apply(&sets(&[Capability::Kill, Capability::Chown], &[])).unwrap_err();
            assert_eq!(e.errno(), Some(Errno::EPERM));
        });
    }

    #[test]
    fn no_capabilities_means_none() {
        in_child(0, || {
            drop_bounding(&sets(&[], &[])).unwrap();
            apply(&sets(&[], &[])).unwrap();
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            assert!(status.contains("CapEff:\t0000000000000000"));
        });
    }
}
