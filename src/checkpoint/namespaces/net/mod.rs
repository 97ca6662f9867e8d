//! Network namespaces. What is in a private one belongs to whoever attached it (Docker, CNI, a hook): it is attached
//! anew by the hooks of the restored container, so the image says "empty", as runc has CRIU do it. One that config.json
//! joins goes on by itself; CRIU is told so by the key that runc uses.
//!
//! One that the container has made itself comes back with its loopback device, up or down; others are refused.
//!
//! `checkpoint --keep-network` keeps all that is in them, and a restore puts it back:
//!
//! ```text
//!   devices, for CRIU, too   netdev-N, conf of each        what CRIU has no place for: extension `network`, critical if
//!   sysctls                  netns-N                       CRIU would restore it wrong
//!   addresses, routes, rules ifaddr-N, route-N, route6-N, rule-N, as iproute2 saves them
//!   tracked connections      netns-ct-N
//!
//!   restore, of all namespaces   devices, down ── filters ── sysctls ── addresses ── up ── routes, rules, neighbours
//! ```
//!
//! What has its other end outside is removed with a container that is stopped: its name is free for the restore.

mod conntrack;
mod inet;
mod keep;
mod link;
mod make;
mod nftables;
mod peers;
mod refuse;
mod sysctl;
mod tun;

pub use keep::{EXTENSION, Hold, check, given, keep, open_sysctls, restore, validate};
pub use nftables::is_lock;
pub use peers::External;
pub use sysctl::Files as Sysctls;
pub use tun::{TunLink, tun_link};

use std::collections::BTreeSet;

use crate::checkpoint::context::{Dump, Options, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{NdType, NetDeviceEntry, NetnsEntry};
use crate::checkpoint::model::NetNamespace;
use crate::checkpoint::namespaces::enter::{Doors, through};
use crate::checkpoint::namespaces::kind::Kind;
use crate::sys::network::{loopback_is_up, loopback_up};
use crate::sys::route::{Route, index};

use link::NEW;

/// The key of a joined network namespace.
pub const JOINED: &str = "extRootNetNS";

/// Notes which of the two it is; nothing where the container uses the host's.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    if dump.options.keep_network {
        return keep::permitted(dump.source);
    }
    if Kind::Net.private(dump.source.init)? {
        let joined = Kind::Net.joined(&dump.source.spec).is_some();
        let entry = NetnsEntry { ext_key: joined.then(|| JOINED.into()), ..NetnsEntry::default() };
        let devices = if joined { vec![] } else { vec![loopback(true)] };
        dump.model
            .netns
            .insert(Kind::Net.id(true), NetNamespace { entry, devices, ..NetNamespace::default() });
    }
    Ok(())
}

/// Refuses what cannot be kept of a network namespace that the container has made. Runs inside; tells whether the
/// loopback device is up.
fn look() -> Result<bool> {
    let what = "cannot list the network devices";
    let devices = nix::net::if_::if_nameindex().during(what, || "if_nameindex()".into())?;
    let names = devices.iter().map(|device| device.name().to_string_lossy().into_owned());
    if let Some(name) = names.into_iter().find(|name| !NEW.contains(&name.as_str())) {
        return Err(Error::new(format!(
            "a network namespace that the container has made has the device {name}, which is not kept"
        ))
        .remedy("keep it with --keep-network, remove the device, or end what is in the namespace"));
    }
    let addresses = Route::open().and_then(|route| route.addresses(index("lo")?));
    if !addresses.during("cannot list the addresses", || "RTM_GETADDR".into())?.is_empty() {
        return Err(Error::new(
            "the loopback device of a network namespace that the container has made has an address of its own",
        )
        .remedy("keep it with --keep-network, or remove the address"));
    }
    loopback_is_up().during(what, || "ioctl(_, SIOCGIFFLAGS, lo)".into())
}

/// Refuses what cannot be kept of a network namespace that the container has made.
pub fn check_inside(options: &Options, doors: Doors) -> Vec<Error> {
    match options.keep_network {
        true => keep::look(doors, &BTreeSet::new()),
        false => through(doors, || look().map(drop)).err().into_iter().collect(),
    }
}

/// Saves what is in a network namespace that the container has made.
pub fn save(dump: &mut Dump<'_>, id: u32, doors: Doors) -> Result<()> {
    if dump.options.keep_network {
        // At the end, when all of them are known.
        return Ok(());
    }
    let up = through(doors, look)?;
    let devices = vec![loopback(up)];
    dump.model.netns.insert(id, NetNamespace { devices, ..NetNamespace::default() });
    Ok(())
}

/// Brings the loopback device up, where it was.
pub fn put_back(restore: &Restore<'_>, id: u32, doors: Doors) -> Result<()> {
    if restore.model.netns.get(&id).is_some_and(NetNamespace::is_kept) {
        // When all of them are there.
        return Ok(());
    }
    let devices = restore.model.netns.get(&id).map_or(&[][..], |net| &net.devices);
    if let Some(other) = devices.iter().find(|d| !NEW.contains(&d.name.as_str())) {
        return Err(Error::new(format!(
            "the images have the device {} in network namespace {id}, which cannot be restored yet",
            other.name
        )));
    }
    let up = libc::IFF_UP.unsigned_abs();
    if devices.iter().any(|device| device.name == "lo" && device.flags & up != 0) {
        through(doors, || {
            loopback_up().during("cannot bring lo up", || "ioctl(_, SIOCSIFFLAGS, lo)".into())
        })?;
    }
    Ok(())
}

/// What every network namespace has; CRIU leaves it down unless the images say otherwise.
fn loopback(up: bool) -> NetDeviceEntry {
    let up = if up { libc::IFF_UP | libc::IFF_RUNNING } else { 0 };
    let flags = up | libc::IFF_LOOPBACK;
    NetDeviceEntry {
        r#type: NdType::Loopback.into(),
        ifindex: 1,
        mtu: 65536,
        flags: flags.unsigned_abs(),
        name: "lo".into(),
        ..NetDeviceEntry::default()
    }
}
