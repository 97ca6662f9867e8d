//! Network namespaces. What is in a private one belongs to whoever attached it (Docker, CNI, a hook): it is attached
//! anew by the hooks of the restored container, so the image says "empty", as runc has CRIU do it. One that config.json
//! joins goes on by itself; CRIU is told so by the key that runc uses.
//!
//! One that the container has made itself comes back with its loopback device, up or down; others are refused.

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{NdType, NetDeviceEntry, NetnsEntry};
use crate::checkpoint::model::NetNamespace;
use crate::checkpoint::namespaces::enter::{Doors, through};
use crate::checkpoint::namespaces::kind::Kind;
use crate::sys::network::{loopback_is_up, loopback_up};
use crate::sys::route::{Route, index};

/// The key of a joined network namespace.
pub const JOINED: &str = "extRootNetNS";

/// Notes which of the two it is; nothing where the container uses the host's.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    if Kind::Net.private(dump.source.init)? {
        let joined = Kind::Net.joined(&dump.source.spec).is_some();
        let entry = NetnsEntry { ext_key: joined.then(|| JOINED.into()), ..NetnsEntry::default() };
        let devices = if joined { vec![] } else { vec![loopback(true)] };
        dump.model.netns.insert(Kind::Net.id(true), NetNamespace { entry, devices });
    }
    Ok(())
}

/// Devices that a new network namespace has by itself, as far as the kernel's modules are there.
const NEW: [&str; 11] = [
    "lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0", "teql0",
];

/// Refuses what cannot be kept of a network namespace that the container has made. Runs inside; tells whether the
/// loopback device is up.
fn look() -> Result<bool> {
    let what = "cannot list the network devices";
    let devices = nix::net::if_::if_nameindex().during(what, || "if_nameindex()".into())?;
    let names = devices.iter().map(|device| device.name().to_string_lossy().into_owned());
    if let Some(name) = names.into_iter().find(|name| !NEW.contains(&name.as_str())) {
        return Err(Error::new(format!(
            "a network namespace that the container has made has the device {name}, which cannot be checkpointed yet"
        ))
        .remedy("remove the device, or end what is in the namespace"));
    }
    let addresses = Route::open().and_then(|route| route.addresses(index("lo")?));
    if !addresses.during("cannot list the addresses", || "RTM_GETADDR".into())?.is_empty() {
        return Err(Error::new(
            "the loopback device of a network namespace that the container has made has an address of its own",
        )
        .remedy("remove the address"));
    }
    loopback_is_up().during(what, || "ioctl(_, SIOCGIFFLAGS, lo)".into())
}

/// Refuses what cannot be kept of a network namespace that the container has made.
pub fn check_inside(doors: Doors) -> Result<()> {
    through(doors, || look().map(drop))
}

/// Saves what is in a network namespace that the container has made.
pub fn save(dump: &mut Dump<'_>, id: u32, doors: Doors) -> Result<()> {
    let up = through(doors, look)?;
    let devices = vec![loopback(up)];
    dump.model.netns.insert(id, NetNamespace { entry: NetnsEntry::default(), devices });
    Ok(())
}

/// Brings the loopback device up, where it was.
pub fn put_back(restore: &Restore<'_>, id: u32, doors: Doors) -> Result<()> {
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
