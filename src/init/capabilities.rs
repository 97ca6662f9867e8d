//! The five capability sets.
//!
//! ```text
//!   drop_bounding   while still root       what can never come back, by set-user-id programs or file capabilities
//!   apply           after setuid(2)        permitted, effective, inheritable; then ambient
//! ```
//!
//! Capabilities that this kernel does not know are left out, as are those of the ambient set that cannot be raised:
//! config.json files are written for many kernels. A permitted capability that the runtime itself lacks is an error.

use caps::{CapSet, CapsHashSet};
use nix::errno::Errno;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use crate::sys::{Context, Error, Result, prctl};

/// The highest capability number ever, plus one: prctl(2) tells which exist.
const END: u8 = 64;

fn to_caps(set: Option<&Capabilities>) -> CapsHashSet {
    set.into_iter().flatten().filter_map(known).collect()
}

/// The capability in the other crate's words, if this kernel has it.
fn known(capability: &Capability) -> Option<caps::Capability> {
    let cap: caps::Capability = format!("CAP_{capability}").parse().ok()?;
    prctl::bounding_has(cap.index()).is_ok().then_some(cap)
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
    let keep: u64 = to_caps(capabilities.bounding().as_ref()).iter().map(caps::Capability::bitmask).sum();
    for number in 0..END {
        match prctl::bounding_has(number) {
            Err(Errno::EINVAL) => break,
            Ok(true) if keep & (1 << number) == 0 => {
                prctl::drop_from_bounding(number).context(|| "unable to apply bounding set")?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Sets the other four sets to exactly what config.json lists.
pub fn apply(capabilities: &LinuxCapabilities) -> Result<()> {
    let bits = |set: Option<&Capabilities>| -> u64 {
        to_caps(set).iter().map(caps::Capability::bitmask).fold(0, |all, bit| all | bit)
    };
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
    for cap in to_caps(capabilities.ambient().as_ref()) {
        // As runc does: what cannot be raised is left out.
        let _ = caps::raise(None, CapSet::Ambient, cap);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;
    use oci_spec::runtime::LinuxCapabilitiesBuilder;

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
