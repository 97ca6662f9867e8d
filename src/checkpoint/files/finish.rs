//! What is done when every task has its descriptors and its memory.

use crate::checkpoint::Result;
use crate::checkpoint::context::NewTask;
use crate::checkpoint::files::opener::Files;
use crate::checkpoint::remote::Conduit;

impl Files<'_> {
    /// Finishes one task, once all of them have descriptors, sessions, process groups and mappings. The last call
    /// also does what concerns all.
    pub fn finish(&mut self, task: &mut NewTask, conduit: &Conduit) -> Result<()> {
        self.set_foreground(task, conduit)?;
        self.set_async(task)?;
        self.lock(task)?;
        self.listen(task)?;
        self.register_with_rings(task)?;
        self.finished += 1;
        if self.finished < self.restore.model.fs.len() {
            return Ok(());
        }
        self.check_watches()?;
        self.check_sessions()?;
        self.seal()?;
        // Last: what is opened on the way must not be taken for the program's doing.
        self.watch()?;
        self.mark()
    }
}
