//! Network devices of the host that config.json gives to a container.
//!
//! A device takes its permanent, global addresses along, and is switched on inside. It comes back by itself when the
//! container's network namespace goes, if it is a physical one.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;

use nix::sched::CloneFlags;
use oci_spec::runtime::LinuxNetDevice;

use super::Result;
use crate::sys::route::{Route, index};
use crate::sys::{self, Context};

/// True for what the kernel takes as the name of a device.
pub fn is_valid(name: &str) -> bool {
    let fits = |c: char| c != '/' && c != ':' && !c.is_whitespace();
    !name.is_empty() && name.len() < libc::IFNAMSIZ && name != "." && name != ".." && name.chars().all(fits)
}

/// Moves the devices into the network namespace of a process.
pub fn hand_over(devices: &HashMap<String, LinuxNetDevice>, pid: i32) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let path = format!("/proc/{pid}/ns/net");
    let namespace = File::open(&path).context(|| format!("open {path}"))?;
    let here = Route::open().context(|| "socket(AF_NETLINK)")?;
    // In the order of their names, as config.json has none.
    let mut names: Vec<_> = devices.iter().collect();
    names.sort_unstable_by_key(|(name, _)| *name);
    for (name, device) in names {
        let new = device.name().as_deref().filter(|n| !n.is_empty()).unwrap_or(name);
        one(&here, name, new, (&namespace, &path))
            .context(|| format!("move netDevice {name} to namespace {path}"))?;
    }
    Ok(())
}

fn one(here: &Route, name: &str, new: &str, (namespace, path): (&File, &str)) -> sys::Result<()> {
    let device = index(name)
        .context(|| format!("link not found for interface {name} on runtime namespace: if_nametoindex"))?;
    let was_on = here.is_on(device).context(|| "fail to look at link")?;
    here.switch(device, false).context(|| "fail to set link down")?;
    let addresses = here.addresses(device).context(|| "fail to get ip addresses")?;
    let moved = here.relocate(device, new, namespace.as_fd());
    if moved.is_err() && was_on {
        // It stays with the host, some of whose devices nobody can move.
        let _ = here.switch(device, true);
    }
    moved.context(|| format!("fail to move network device {name} to network namespace {path}"))?;
    inside(namespace, || {
        let there = Route::open().context(|| "socket(AF_NETLINK)")?;
        // The number may have been taken in there.
        let device = index(new).context(|| format!("link not found for interface {new}"))?;
        for address in &addresses {
            there.add_address(device, address).context(|| "fail to set up address")?;
        }
        there.switch(device, true).context(|| format!("fail to set up interface {new}"))
    })?
}

/// Does something in another network namespace, and comes back.
fn inside<T>(namespace: &File, work: impl FnOnce() -> T) -> sys::Result<T> {
    let own = File::open("/proc/self/ns/net").context(|| "open /proc/self/ns/net")?;
    nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET).context(|| "setns to the container's network")?;
    let done = work();
    nix::sched::setns(&own, CloneFlags::CLONE_NEWNET).context(|| "setns back to our network")?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::network::{loopback_is_up, loopback_up};
    use crate::sys::testing::in_child;

    #[test]
    fn what_cannot_be_moved_stays_on() {
        in_child(libc::CLONE_NEWNET, || {
            let other = File::open("/proc/self/ns/net").unwrap();
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            loopback_up().unwrap();
            let error = one(&Route::open().unwrap(), "lo", "lo", (&other, "there")).unwrap_err().to_string();
            assert!(error.contains("fail to move network device lo"), "{error}");
            assert!(loopback_is_up().unwrap());
        });
    }

    #[test]
    fn names_are_the_kernels() {
        for good in ["eth0", "a.b", "fifteen_letters"] {
            assert!(is_valid(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "sixteen__letters"] {
            assert!(!is_valid(bad), "{bad}");
        }
    }
}
