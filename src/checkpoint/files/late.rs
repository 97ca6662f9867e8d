//! Files that can be opened only once every process exists: what /proc shows of processes, and pidfds.

use std::collections::BTreeMap;

use crate::checkpoint::files::opener::Files;
use crate::checkpoint::files::regular;
use crate::checkpoint::{Error, Result};

impl Files<'_> {
    /// Opens what had to wait until every process exists. `pids` are the processes by their number inside, with their
    /// pids on this host.
    pub fn open_late(&mut self, pids: &BTreeMap<i32, i32>) -> Result<()> {
        for id in std::mem::take(&mut self.late) {
            let entry = self.restore.model.files.iter().find(|f| f.id == id);
            if let Some(pidfd) = entry.and_then(|f| f.pidfd.as_ref()) {
                self.open_pidfd(pidfd, pids).map_err(|e| e.of("pidfd"))?;
                continue;
            }
            if let Some(space) = entry.and_then(|f| f.nsf.as_ref()) {
                self.open_space(space).map_err(|e| e.of("namespace"))?;
                continue;
            }
            let reg = entry
                .and_then(|f| f.reg.as_ref())
                .ok_or_else(|| Error::new(format!("the images lack file {id}")))?;
            let file = regular::open(self.restore, reg)?;
            self.opened.insert(id, file);
        }
        Ok(())
    }
}
