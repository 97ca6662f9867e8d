//! Open files into the tables of the tasks that have them.
//!
//! ```text
//!   this process            conduit (SCM_RIGHTS)          task
//!   id 7, id 8, cwd  ────────────────────────────────>  3 4 5  (lowest free numbers)
//!                                                        │ one batch: fchdir, umask, dup3, F_SETFD, close
//!                                                        ▼
//!                                                       0 1 2 7 (final numbers)
//! ```

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use crate::checkpoint::context::NewTask;
use crate::checkpoint::files::moves::{self, Move};
use crate::checkpoint::files::opener::Files;
use crate::checkpoint::files::uring;
use crate::checkpoint::image::{FdinfoEntry, FsEntry};
use crate::checkpoint::remote::{Batch, Conduit};
use crate::checkpoint::{Error, Result};

/// Most descriptors that one message carries: SCM_MAX_FD.
const AT_ONCE: usize = 253;

impl<'a> Files<'a> {
    /// Gives a task its descriptors, working directory, root and umask. The number of the conduit itself must be
    /// above all of them.
    pub fn install(&mut self, task: &mut NewTask, conduit: &Conduit) -> Result<()> {
        let vpid = task.vpid;
        self.place(task, conduit).map_err(|e| e.pid(vpid))
    }

    fn place(&mut self, task: &mut NewTask, conduit: &Conduit) -> Result<()> {
        let model = self.restore.model;
        let vpid = task.vpid.cast_unsigned();
        let new = model.ids.get(&vpid).is_none_or(|ids| self.installed.insert(ids.files_id));
        let table = if new { self.table(task.vpid) } else { &[] };
        let rings = uring::numbers(model, table)?;
        let order = sorted(table.iter().filter(|entry| !rings.contains_key(&entry.id)))?;
        let fs = model.fs.get(&vpid);
        let mut sent: Vec<BorrowedFd<'_>> = Vec::new();
        for (id, _) in &order {
            sent.push(self.vma_file(*id)?);
        }
        let extra = fs.map(|fs| self.directories(fs)).transpose()?;
        if let Some([cwd, root]) = extra {
            sent.extend([cwd, root]);
        }
        let mut received = Vec::with_capacity(sent.len());
        for part in sent.chunks(AT_ONCE) {
            received.extend(conduit.send(&mut task.injection, part)?);
        }
        if received.len() != sent.len() {
            return Err(Error::new(format!(
                "of {} descriptors sent, {} arrived",
                sent.len(),
                received.len()
            )));
        }
        let mut batch = Batch::new();
        batch.about("putting descriptors in place");
        let spare = &received[order.len()..];
        if let (Some(fs), [cwd, root]) = (fs, spare) {
            if self.is_chrooted(fs) {
                batch.call(libc::SYS_fchdir, &[(*root).into()]);
                let dot = batch.string(b".");
                batch.call(libc::SYS_chroot, &[dot]);
            }
            batch.call(libc::SYS_fchdir, &[(*cwd).into()]);
            if let Some(umask) = fs.umask {
                batch.call(libc::SYS_umask, &[umask.into()]);
            }
        }
        let mut wanted = Vec::new();
        for (n, (_, finals)) in order.iter().enumerate() {
            wanted.extend(finals.iter().map(|&(to, cloexec)| (received[n], to, cloexec)));
        }
        let highest = wanted.iter().flat_map(|w| [w.0, w.1]).chain(spare.iter().copied()).max().unwrap_or(0);
        for step in moves::plan(&wanted, spare, highest + 1) {
            match step {
                Move::Dup { from, to, cloexec } => {
                    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
                    batch.call(libc::SYS_dup3, &[from.into(), to.into(), flags.into()]);
                }
                Move::Flag { fd, cloexec } => {
                    let flags = if cloexec { libc::FD_CLOEXEC } else { 0 };
                    batch.call(libc::SYS_fcntl, &[fd.into(), libc::F_SETFD.into(), flags.into()]);
                }
                Move::Close { fd } => {
                    batch.call(libc::SYS_close, &[fd.into()]);
                }
            }
        }
        if !batch.is_empty() {
            task.injection.run(&batch)?;
        }
        self.make_rings(task, table)?;
        self.add_watches(task, table)
    }

    /// The descriptors of a task.
    pub(super) fn table(&self, vpid: i32) -> &'a [FdinfoEntry] {
        let model = self.restore.model;
        let vpid = vpid.cast_unsigned();
        // Without an ids image every process has a table of its own, numbered as the process is.
        model.ids.get(&vpid).and_then(|ids| model.fdinfo.get(&ids.files_id)).map_or(&[], Vec::as_slice)
    }

    /// Working directory and root.
    fn directories(&self, fs: &FsEntry) -> Result<[BorrowedFd<'_>; 2]> {
        Ok([self.vma_file(fs.cwd_id)?, self.vma_file(fs.root_id)?])
    }

    /// Is the task's root another than the container's?
    fn is_chrooted(&self, fs: &FsEntry) -> bool {
        let root = self.restore.model.files.iter().find(|f| f.id == fs.root_id).and_then(|f| f.reg.as_ref());
        root.is_some_and(|r| r.name != b"/")
    }
}

/// A file, and the numbers a table has it under, with FD_CLOEXEC.
type Numbers = (u32, Vec<(i32, bool)>);

/// The files of a table in ascending order of their lowest numbers.
fn sorted<'e>(table: impl IntoIterator<Item = &'e FdinfoEntry>) -> Result<Vec<Numbers>> {
    let mut entries: Vec<_> = table.into_iter().collect();
    entries.sort_by_key(|e| e.fd);
    let mut order: Vec<Numbers> = Vec::new();
    let mut places = BTreeMap::new();
    let mut last = None;
    for e in entries {
        if last == Some(e.fd) {
            return Err(Error::new(format!("the images give descriptor {} twice", e.fd)));
        }
        last = Some(e.fd);
        let fd =
            i32::try_from(e.fd).map_err(|_| Error::new(format!("the images have a descriptor {}", e.fd)))?;
        let number = (fd, e.flags & libc::FD_CLOEXEC.cast_unsigned() != 0);
        let place = *places.entry(e.id).or_insert(order.len());
        match order.get_mut(place) {
            Some(known) => known.1.push(number),
            None => order.push((e.id, vec![number])),
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: u32, fd: u32, flags: u32) -> FdinfoEntry {
        FdinfoEntry { id, fd, flags, ..FdinfoEntry::default() }
    }

    #[test]
    fn one_file_is_sent_once() {
        let order = sorted(&[entry(7, 5, 0), entry(9, 0, 1), entry(7, 2, 0)]).unwrap();
        assert_eq!(order, [(9, vec![(0, true)]), (7, vec![(2, false), (5, false)])]);
    }

    #[test]
    fn a_number_given_twice_is_refused() {
        assert!(sorted(&[entry(7, 5, 0), entry(9, 5, 0)]).is_err());
        assert!(sorted(&[entry(7, u32::MAX, 0)]).is_err());
    }
}
