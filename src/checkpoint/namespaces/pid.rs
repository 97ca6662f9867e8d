//! Pid namespaces. The container's own one is made by its init; one that it joined is named by the key that runc uses.

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Result;
use crate::checkpoint::image::PidnsEntry;
use crate::checkpoint::namespaces::kind::Kind;

/// The key of a joined pid namespace.
pub const JOINED: &str = "extRootPidNS";

/// Notes a joined one.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    if Kind::Pid.private(dump.source.init)? && Kind::Pid.joined(&dump.source.spec).is_some() {
        let entry = PidnsEntry { ext_key: Some(JOINED.into()) };
        dump.model.pidns.insert(Kind::Pid.id(true), entry);
    }
    Ok(())
}
