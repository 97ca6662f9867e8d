//! Network namespaces. What is in a private one belongs to whoever attached it (Docker, CNI, a hook): it is attached
//! anew by the hooks of the restored container, so the image says "empty", as runc has CRIU do it. One that config.json
//! joins goes on by itself; CRIU is told so by the key that runc uses.

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Result;
use crate::checkpoint::image::{NdType, NetDeviceEntry, NetnsEntry};
use crate::checkpoint::model::NetNamespace;
use crate::checkpoint::namespaces::kind::Kind;

/// The key of a joined network namespace.
pub const JOINED: &str = "extRootNetNS";

/// Notes which of the two it is; nothing where the container uses the host's.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    if Kind::Net.private(dump.source.init)? {
        let joined = Kind::Net.joined(&dump.source.spec).is_some();
        let entry = NetnsEntry { ext_key: joined.then(|| JOINED.into()), ..NetnsEntry::default() };
        let devices = if joined { vec![] } else { vec![loopback()] };
        dump.model.netns.insert(Kind::Net.id(true), NetNamespace { entry, devices });
    }
    Ok(())
}

/// What every network namespace has; CRIU leaves it down unless the images say otherwise.
fn loopback() -> NetDeviceEntry {
    let flags = libc::IFF_UP | libc::IFF_LOOPBACK | libc::IFF_RUNNING;
    NetDeviceEntry {
        r#type: NdType::Loopback.into(),
        ifindex: 1,
        mtu: 65536,
        flags: flags.unsigned_abs(),
        name: "lo".into(),
        ..NetDeviceEntry::default()
    }
}
