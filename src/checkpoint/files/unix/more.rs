//! What CRIU's records have no place for, kept in the extension `unix`. CRIU restores without it, less exactly.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::checkpoint::Result;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::user::Owners;

/// Name of the extension in stasis.img.
pub const EXTENSION: &str = "unix";

/// Who somebody is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Process id inside the container; 0 for one that is not there.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Who sent a packet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sender {
    /// Its address, as bind(2) takes it; empty for a sender without a name.
    pub address: Vec<u8>,
    /// What the packet says of its sender.
    pub credentials: Option<Credentials>,
}

/// What is known of a socket beside its record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct More {
    /// The socket.
    pub id: u32,
    /// SO_PEERCRED.
    pub peer: Option<Credentials>,
    /// Whose it is, for a connection that was not accepted: the other end is to know.
    pub owner: Option<Credentials>,
    /// Where its file is, when it was renamed after bind(2).
    pub file: Option<String>,
    /// Inodes of the sockets whose connections were not accepted, in their order.
    pub waiting: Vec<u32>,
    /// A datagram socket that is connected to one that is gone.
    pub orphan: bool,
    /// Its peer went without reading everything: ECONNRESET is to be reported.
    pub reset: bool,
    /// SO_PEEK_OFF.
    pub peek_offset: Option<i32>,
    /// Further options of SOL_SOCKET.
    pub options: Vec<(i32, i32)>,
    /// Senders of what waits, in its order; empty, or as many as there are packets.
    pub senders: Vec<Sender>,
}

impl More {
    /// Is there anything to keep?
    pub fn is_empty(&self) -> bool {
        *self == Self { id: self.id, ..Self::default() }
    }
}

/// The extension of these images, by id, with users and groups of this host.
pub fn read(model: &Model, owners: &Owners) -> Result<BTreeMap<u32, More>> {
    let mut all: Vec<More> = model.extension(EXTENSION)?;
    for more in &mut all {
        let senders = more.senders.iter_mut().filter_map(|sender| sender.credentials.as_mut());
        for who in senders.chain(&mut more.peer).chain(&mut more.owner) {
            owners.both(&mut who.uid, &mut who.gid)?;
        }
    }
    Ok(all.into_iter().map(|more| (more.id, more)).collect())
}
