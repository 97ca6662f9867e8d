//! Files that can be opened only once every process exists: what /proc shows of processes, and pidfds.

use crate::checkpoint::context::NewTask;
use crate::checkpoint::files::opener::Files;
use crate::checkpoint::files::regular;
use crate::checkpoint::{Error, Result};

impl Files<'_> {
    /// Opens what had to wait. The first task that is given descriptors comes when all of them exist.
    pub(super) fn open_late(&mut self, _task: &mut NewTask) -> Result<()> {
        for id in std::mem::take(&mut self.late) {
            let entry = self.restore.model.files.iter().find(|f| f.id == id);
            let reg = entry
                .and_then(|f| f.reg.as_ref())
                .ok_or_else(|| Error::new(format!("the images lack file {id}")))?;
            let file = regular::open(self.restore, reg)?;
            self.opened.insert(id, file);
        }
        Ok(())
    }
}
