//! Who owns what the images have.

use super::Model;
use crate::checkpoint::error::Result;

impl Model {
    /// Every user and group that owns a file, a terminal or an object of System V IPC, with the kind of the thing.
    pub(in crate::checkpoint) fn each_owner(
        &mut self,
        own: &mut dyn FnMut(&'static str, &mut u32, &mut u32) -> Result<()>,
    ) -> Result<()> {
        for ghost in self.ghosts.values_mut() {
            own("removed file", &mut ghost.uid, &mut ghost.gid)?;
        }
        for memfd in &mut self.memfds {
            own("memfd", &mut memfd.uid, &mut memfd.gid)?;
        }
        for tty in &mut self.tty_info {
            if let (Some(uid), Some(gid)) = (&mut tty.uid, &mut tty.gid) {
                own("terminal", uid, gid)?;
            }
        }
        for ipc in self.ipcns.values_mut() {
            let shm = ipc.shm.iter_mut().map(|(shm, _)| ("shared memory segment", &mut shm.desc));
            let sem = ipc.sem.iter_mut().map(|(sem, _)| ("semaphore set", &mut sem.desc));
            let msg = ipc.msg.iter_mut().map(|(msg, _)| ("message queue", &mut msg.desc));
            for (what, desc) in shm.chain(sem).chain(msg) {
                own(what, &mut desc.uid, &mut desc.gid)?;
                own(what, &mut desc.cuid, &mut desc.cgid)?;
            }
        }
        for socket in self.files.iter_mut().filter_map(|file| file.usk.as_mut()) {
            if let Some(perms) = &mut socket.file_perms {
                own("unix socket", &mut perms.uid, &mut perms.gid)?;
            }
        }
        Ok(())
    }
}
