//! The network lock: from before the first connection is read until the restored processes run, no packet of a kept
//! connection passes. The peer sees a pause; a packet that found no socket would be answered by a reset.
//!
//! ```text
//!   dump        lock ── read ── ... ── leave running: unlock      stop: left in place (with a private network it goes)
//!   restore     lock, before anything attaches the network ── ... ── unlock ── repair off
//! ```
//!
//! The lock is a table of nftables, called as CRIU would call its own, by the run's id that stands in the inventory:
//! each of the two undoes what the other has left.

use std::collections::BTreeSet;

use nix::errno::Errno;

use crate::checkpoint::context::{NetworkLock, Options};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::inside::in_network;
use crate::checkpoint::files::tcp::nftables::{self, Way};
use crate::checkpoint::model::Model;
use crate::checkpoint::{Error, Result};

/// Letters of a run's id: a UUID has as many.
const ID: usize = 36;

/// A new id.
pub fn new_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/uuid";
    let text = std::fs::read_to_string(path)
        .during("cannot make a name for the network lock", || format!("open({path:?}, O_RDONLY)"))?;
    Ok(text.trim().to_owned())
}

/// The table of a run.
pub fn table(id: &str) -> String {
    format!("CRIU-{id}")
}

/// Refuses where a lock is wanted and the kernel has none, in the network namespace of that process.
pub fn check(options: &Options, pid: i32) -> Result<()> {
    if options.network_lock == NetworkLock::Skip {
        return Ok(());
    }
    in_network(pid, || named(nftables::available(), "NFT_MSG_GETGEN"))
}

fn named(result: nix::Result<()>, call: &str) -> Result<()> {
    result.during("cannot lock the network", || format!("sendmsg(netfilter, {call})")).map_err(|e| {
        match e.errno() {
            Some(Errno::EPERM) => e.remedy("this needs CAP_NET_ADMIN over the network namespace"),
            _ => e.remedy(
                "the kernel must have nf_tables (modprobe nf_tables), or leave the network open: --network-lock skip",
            ),
        }
    })
}

/// The lock of a dump.
#[derive(Debug)]
pub struct Lock {
    id: String,
    pid: i32,
    locked: BTreeSet<Way>,
}

impl Lock {
    /// A lock of this run, in the network namespace of that process, on nothing yet.
    pub fn new(id: String, pid: i32) -> Self {
        Self { id, pid, locked: BTreeSet::new() }
    }

    /// Drops the packets of these connections too, in both directions.
    pub fn add(&mut self, connections: &[Way]) -> Result<()> {
        let both = connections.iter().flat_map(|&(a, b)| [(a, b), (b, a)]);
        let new: Vec<Way> = both.filter(|way| self.locked.insert(*way)).collect();
        if new.is_empty() {
            return Ok(());
        }
        set(&self.id, self.pid, &new).map(drop)
    }

    /// Lets everything pass.
    pub fn remove(self) -> Result<()> {
        remove(&self.id, self.pid)
    }
}

/// Locks, in the network namespace of that process. Says whether nothing was locked under this name before.
pub fn set(id: &str, pid: i32, ways: &[Way]) -> Result<bool> {
    in_network(pid, || {
        let table = table(id);
        let new = nftables::exists(&table).map(|there| !there);
        named(new.and_then(|_| nftables::lock(&table, ways)), "NFT_MSG_NEWTABLE")?;
        Ok(new == Ok(true))
    })
}

/// Unlocks, in the network namespace of that process. Nothing to do is not an error.
pub fn remove(id: &str, pid: i32) -> Result<()> {
    in_network(pid, || match nftables::unlock(&table(id)) {
        // Without nftables there is no lock.
        Err(Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT) => Ok(()),
        other => other.during("cannot unlock the network", || "sendmsg(netfilter, NFT_MSG_DELTABLE)".into()),
    })
}

/// The id of the run that made the images, if it is one.
pub fn id_of(model: &Model) -> Result<Option<&str>> {
    let Some(id) = model.inventory.dump_criu_run_id.as_deref() else { return Ok(None) };
    let fine = id.len() <= ID && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if fine { Ok(Some(id)) } else { Err(Error::new("the images' dump_criu_run_id is no such id")) }
}
