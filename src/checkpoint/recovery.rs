//! The recovery record: what an interrupted dump leaves behind, and how the next command undoes it.
//!
//! Threads heal by themselves when their tracer dies (see `remote/`), and the next dump clears a staging directory.
//! Copies of processes (see `memory/snapshot`) die with the dump, but wait to be waited for.
//! What does neither is written down before it is done:
//!
//! ```text
//!  recovery.json   { dumper: pid and start time, paused, inside: what was frozen before, network: what is locked }
//!     written  before the freezer is touched, and again before the network is locked
//!     removed  when the dump has ended, in whatever way
//!     found    by the next command on this container, with the dumper dead:
//!              unlock the network, freeze or thaw to what it was, bury the copies, remove the record
//! ```

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::error::Context;
use crate::checkpoint::memory::snapshot;
use crate::checkpoint::task::freeze::Ice;
use crate::checkpoint::task::status::Stat;
use crate::checkpoint::{Error, Freezer, Result, files};

const NAME: &str = "recovery.json";

#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Contents {
    /// Who dumps; with its start time, so that another process with the same number is not taken for it.
    pid: i32,
    start: i64,
    #[serde(flatten)]
    ice: Ice,
    #[serde(default)]
    network: Option<Network>,
}

/// A network lock, and the TCP connections behind it.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Network {
    /// Name of the run.
    pub id: String,
    /// A process in the network namespace.
    pub pid: i32,
    /// SO_REUSEADDR of sockets, by inode: repair mode overrules it.
    pub reuse: Vec<(u64, i32)>,
}

/// The record of a dump under way.
#[derive(Debug)]
pub struct Record {
    path: Option<PathBuf>,
    ice: Ice,
    network: Option<Network>,
}

impl Record {
    /// Writes the record. Without a state directory nobody would read one.
    pub fn write(state_dir: Option<&Path>, ice: Ice) -> Result<Self> {
        let Some(dir) = state_dir else { return Ok(Self { path: None, ice, network: None }) };
        Self::put(dir, ice, None)
    }

    /// Adds what is about to be done to the network.
    pub fn network(&mut self, network: Network) -> Result<()> {
        if let Some(dir) = self.path.as_deref().and_then(Path::parent) {
            *self = Self::put(dir, self.ice.clone(), Some(network))?;
        }
        Ok(())
    }

    fn put(dir: &Path, ice: Ice, network: Option<Network>) -> Result<Self> {
        let pid = std::process::id().cast_signed();
        let contents = Contents { pid, start: start_time(pid)?, ice, network };
        let text = serde_json::to_string(&contents)
            .map_err(|e| Error::new(format!("cannot write a record: {e}")))?;
        let (path, new) = (dir.join(NAME), dir.join(".recovery.json.new"));
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, &path))
            .during("cannot write the recovery record", || format!("write({})", path.display()))?;
        Ok(Self { path: Some(path), ice: contents.ice, network: contents.network })
    }

    /// From now on the container is to be found frozen, whatever becomes of this dump.
    pub fn hold(&mut self) -> Result<()> {
        self.ice.whole = true;
        if let Some(dir) = self.path.as_deref().and_then(Path::parent) {
            *self = Self::put(dir, self.ice.clone(), self.network.take())?;
        }
        Ok(())
    }

    /// The dump has ended, and left nothing.
    pub fn remove(self) {
        if let Some(path) = self.path {
            let _ = fs::remove_file(path);
        }
    }

    /// The dump ends before anything was stopped for good: the freezer goes back to what it was.
    pub fn undo(self, freezer: &mut dyn Freezer) -> Result<()> {
        self.reset(freezer)?;
        self.remove();
        Ok(())
    }

    fn reset(&self, freezer: &mut dyn Freezer) -> Result<()> {
        let thawed = if self.ice.whole { Ok(()) } else { freezer.thaw() };
        thawed.and(self.ice.freeze(freezer))
    }
}

/// Whether a dump is under way, or was killed.
pub fn is_recorded(state_dir: &Path) -> bool {
    state_dir.join(NAME).exists()
}

/// Removes the record of a container that has ended: nothing is to be undone in it.
pub fn forget(state_dir: &Path) {
    let _ = fs::remove_file(state_dir.join(NAME));
}

/// Undoes what a dump left that was killed in the middle. Says whether there was something to undo.
/// Cheap when there was not: one failed open(2).
pub fn heal(state_dir: &Path, freezer: &mut dyn Freezer) -> Result<bool> {
    let path = state_dir.join(NAME);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(e) => {
            return Err(e).during("cannot read the recovery record", || format!("open({})", path.display()));
        }
    };
    // Renamed into place when it was complete; anything else in it is not ours to act on.
    let contents: Contents = serde_json::from_str(&text)
        .map_err(|e| Error::new(format!("the recovery record is damaged: {e}")).path(&path))?;
    if start_time(contents.pid).is_ok_and(|start| start == contents.start) {
        return Ok(false);
    }
    if let Some(network) = &contents.network {
        files::heal_network(network, &freezer.pids()?)?;
    }
    let record = Record { path: Some(path), ice: contents.ice, network: None };
    record.reset(freezer)?;
    // Nobody makes copies where something is frozen. What cannot be waited for now is in nobody's way.
    if !record.ice.any() {
        let _ = snapshot::bury(&freezer.pids()?, contents.start);
    }
    record.remove();
    Ok(true)
}

fn start_time(pid: i32) -> Result<i64> {
    Ok(Stat::of(pid)?.field(22))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Switch {
        frozen: bool,
        used: u32,
    }
    impl Freezer for Switch {
        fn freeze(&mut self) -> Result<()> {
            (self.frozen, self.used) = (true, self.used + 1);
            Ok(())
        }
        fn thaw(&mut self) -> Result<()> {
            (self.frozen, self.used) = (false, self.used + 1);
            Ok(())
        }
        fn is_frozen(&self) -> Result<bool> {
            Ok(self.frozen)
        }
        fn pids(&self) -> Result<Vec<i32>> {
            Ok(Vec::new())
        }
    }

    fn ice(whole: bool) -> Ice {
        Ice { whole, ..Ice::default() }
    }

    fn leave(dir: &Path, pid: i32, start: i64, paused: bool) {
        fs::write(
            dir.join(NAME),
            serde_json::to_string(&Contents { pid, start, ice: ice(paused), network: None }).unwrap(),
        )
        .unwrap();
    }

    #[test]
    fn a_dead_dumper_is_cleared_up_after() {
        let dir = tempfile::tempdir().unwrap();
        let mut freezer = Switch { frozen: true, used: 0 };
        // Nobody has this number.
        leave(dir.path(), i32::MAX, 1, false);
        assert!(heal(dir.path(), &mut freezer).unwrap());
        assert!(!freezer.frozen);
        assert!(!heal(dir.path(), &mut freezer).unwrap(), "once is enough");
        leave(dir.path(), std::process::id().cast_signed(), 1, true);
        assert!(heal(dir.path(), &mut freezer).unwrap(), "another process has the number now");
        assert!(freezer.frozen, "it was paused before");
    }

    #[test]
    fn a_living_dumper_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut freezer = Switch::default();
        let record = Record::write(Some(dir.path()), Ice::default()).unwrap();
        assert!(!heal(dir.path(), &mut freezer).unwrap());
        record.remove();
        assert_eq!(freezer.used, 0);
        assert!(!dir.path().join(NAME).exists());
    }

    #[test]
    fn what_is_held_stays_frozen() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::write(Some(dir.path()), Ice::default()).unwrap();
        record.hold().unwrap();
        let text = fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert!(serde_json::from_str::<Contents>(&text).unwrap().ice.whole);
    }

    #[test]
    fn nonsense_is_not_acted_on() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(NAME), "{").unwrap();
        let mut freezer = Switch::default();
        assert!(heal(dir.path(), &mut freezer).is_err());
        assert_eq!(freezer.used, 0);
    }
}
