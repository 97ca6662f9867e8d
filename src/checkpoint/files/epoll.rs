//! epoll(7): a set of watched files.
//!
//! A watch is a pair of an open file description and the number it had when it was added. The number may have been
//! closed or given to another file since; kcmp(2) with KCMP_EPOLL_TFD tells which file it is.
//!
//! ```text
//!   watch (file, 5)   5 is still that file         EventpollTfdEntry tfd 5
//!                     the process has it as 9      EventpollTfdEntry tfd 9, as CRIU does
//!                     only another process has it  extension `epoll`: CRIU can't say that
//! ```
//!
//! Watches are added by the task itself: a signalfd wakes the one who added it.

use nix::sys::epoll::{Epoll, EpollCreateFlags};
use serde::{Deserialize, Serialize};

use crate::checkpoint::context::{Dump, NewTask};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::fdinfo::word;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::{Files, Opener};
use crate::checkpoint::files::share::Holder;
use crate::checkpoint::image::{EventpollFileEntry, EventpollTfdEntry, FdTypes, FdinfoEntry, FileEntry};
use crate::checkpoint::remote::Batch;
use crate::checkpoint::{Error, Result};
use crate::sys::kcmp;

/// Name of the extension in stasis.img.
pub const EXTENSION: &str = "epoll";

/// A watch whose file the process itself does not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreign {
    /// The epoll instance.
    pub epoll: u32,
    /// The watched file.
    pub file: u32,
    /// The number it was added under.
    pub tfd: u32,
    /// What is waited for.
    pub events: u32,
    /// What the program gets.
    pub data: u64,
}

/// An epoll instance.
pub fn is(live: &Live) -> bool {
    live.is_anon("eventpoll")
}

/// Records the instance; its targets are looked up by [`resolve`], when all files are known.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let tfd =
        live.info.all("tfd").map(|line| watch(id, line)).collect::<Result<_>>().map_err(|e| live.name(e))?;
    let epoll = EventpollFileEntry { id, flags: live.info.flags, fown: live.fown(&dump.files.pids)?, tfd };
    dump.files.epolls.push((dump.model.files.len(), live.holder()));
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Eventpoll as i32,
        id,
        epfd: Some(epoll),
        ..FileEntry::default()
    });
    Ok(())
}

/// `5 events: 19 data: a  pos:0 ino:3d sdev:5`
fn watch(id: u32, line: &str) -> Result<EventpollTfdEntry> {
    let number = line.split_whitespace().next().and_then(|n| n.parse().ok());
    let small = |key| word(line, key, 16).map(|n| n as u32);
    Ok(EventpollTfdEntry {
        id,
        tfd: number.ok_or_else(|| Error::new(format!("fdinfo of an epoll not understood: {line:?}")))?,
        events: small("events")?,
        data: word(line, "data", 16)?,
        dev: small("sdev").ok(),
        inode: word(line, "ino", 16).ok(),
        pos: word(line, "pos", 10).ok(),
    })
}

/// Looks up the files of all watches.
pub fn resolve(dump: &mut Dump<'_>) -> Result<Vec<Foreign>> {
    let mut foreign = Vec::new();
    for (index, holder) in std::mem::take(&mut dump.files.epolls) {
        let shared = &dump.files.shared;
        let vpid = dump.files.pids.get(&holder.pid).copied().unwrap_or(0);
        let Some(epoll) = dump.model.files.get_mut(index).and_then(|f| f.epfd.as_mut()) else { continue };
        let mut kept = Vec::with_capacity(epoll.tfd.len());
        for (n, mut entry) in epoll.tfd.iter().cloned().enumerate() {
            let before = epoll.tfd.iter().take(n).filter(|e| e.tfd == entry.tfd).count();
            let toff = u32::try_from(before).unwrap_or(u32::MAX);
            let found = target(shared, holder, &entry, toff).map_err(|e| e.pid(vpid).fd(holder.fd))?;
            match found {
                (at, _) if at.pid == holder.pid => {
                    entry.tfd = at.fd.cast_unsigned();
                    kept.push(entry);
                }
                (_, Some(file)) => foreign.push(Foreign {
                    epoll: epoll.id,
                    file,
                    tfd: entry.tfd,
                    events: entry.events,
                    data: entry.data,
                }),
                (_, None) => {}
            }
        }
        epoll.tfd = kept;
    }
    Ok(foreign)
}

/// Who has the file of a watch, and its id where it isn't simply the number of the watch.
fn target(
    shared: &crate::checkpoint::files::share::Shared,
    epoll: Holder,
    watch: &EventpollTfdEntry,
    toff: u32,
) -> Result<(Holder, Option<u32>)> {
    let compare =
        |known: Holder| match kcmp::epoll_target(known.pid, known.fd, epoll.pid, epoll.fd, watch.tfd, toff) {
            Err(nix::errno::Errno::EBADF) => Ok(std::cmp::Ordering::Less),
            other => other.during("cannot find what an epoll watches", || {
                format!(
                    "kcmp({}, {}, KCMP_EPOLL_TFD, {}, {{{}, {}, {toff}}})",
                    known.pid, epoll.pid, known.fd, epoll.fd, watch.tfd
                )
            }),
        };
    let same = Holder { pid: epoll.pid, fd: watch.tfd.cast_signed() };
    if compare(same)?.is_eq() {
        return Ok((same, None));
    }
    let ino = watch.inode.unwrap_or_default();
    shared.find(None, ino, compare)?.map(|(at, id)| (at, Some(id))).ok_or_else(|| {
        Error::new(format!("an epoll watches a file, added as {}, that no process has open", watch.tfd))
            .remedy("it may be on its way through a socket; try again when it has arrived")
            .passing()
    })
}

/// Makes empty instances.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    for e in opener.of(FdTypes::Eventpoll).filter_map(|e| e.epfd.as_ref()) {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .during("cannot make an epoll instance", || "epoll_create1(EPOLL_CLOEXEC)".into())?;
        opener.put_owned(e.id, epoll.0, &e.fown, e.flags);
    }
    Ok(())
}

/// `struct epoll_event`, which is packed.
fn event(events: u32, data: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&events.to_ne_bytes());
    bytes[4..].copy_from_slice(&data.to_ne_bytes());
    bytes
}

impl Files<'_> {
    /// Adds the watches of those instances that this task is the first to have.
    pub(super) fn add_watches(&mut self, task: &mut NewTask, table: &[FdinfoEntry]) -> Result<()> {
        let mut batch = Batch::new();
        batch.about("cannot add what an epoll watches");
        for epfd in table.iter().filter(|e| e.r#type == FdTypes::Eventpoll as i32) {
            if !self.epolls.insert(epfd.id) {
                continue;
            }
            let entry =
                self.restore.model.files.iter().find(|f| f.id == epfd.id).and_then(|f| f.epfd.as_ref());
            for watch in entry.into_iter().flat_map(|e| &e.tfd) {
                let event = batch.data(&event(watch.events, watch.data));
                batch.call(
                    libc::SYS_epoll_ctl,
                    &[epfd.fd.into(), libc::EPOLL_CTL_ADD.into(), watch.tfd.into(), event],
                );
            }
            for watch in foreign(self.restore.model)?.iter().filter(|w| w.epoll == epfd.id) {
                self.add_foreign(watch)?;
            }
        }
        if !batch.is_empty() {
            task.injection.run(&batch)?;
        }
        Ok(())
    }

    /// Every instance must have found its process.
    pub(super) fn check_watches(&self) -> Result<()> {
        let watching = |e: &&EventpollFileEntry| !e.tfd.is_empty() && !self.epolls.contains(&e.id);
        match self.restore.model.files.iter().filter_map(|f| f.epfd.as_ref()).find(watching) {
            Some(e) => {
                Err(Error::new(format!("no process has all files that epoll instance {} watches", e.id)))
            }
            None => Ok(()),
        }
    }

    /// Adds a watch under a number that no task has it under: a thread of ours with a table of its own has.
    fn add_foreign(&self, watch: &Foreign) -> Result<()> {
        let (epoll, file) = (self.vma_file(watch.epoll)?, self.vma_file(watch.file)?);
        let number = watch.tfd.cast_signed();
        let what = "cannot add what an epoll watches";
        std::thread::scope(|scope| {
            let add = || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES)
                    .during(what, || "unshare(CLONE_FILES)".into())?;
                let result = crate::sys::epoll::add_under(epoll, file, number, watch.events, watch.data)
                    .during(what, || format!("epoll_ctl(_, EPOLL_CTL_ADD, {number}, {:#x})", watch.events));
                // Before this thread is joined: what it holds must not outlive it.
                let _ = crate::sys::fd::close_from(0);
                result
            };
            scope.spawn(add).join().unwrap_or_else(|_| Err(Error::new(what)))
        })
    }
}

/// The watches that only the extension has.
fn foreign(model: &crate::checkpoint::model::Model) -> Result<Vec<Foreign>> {
    model.extension(EXTENSION)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::files::registry::compare;
    use crate::checkpoint::files::share::Shared;
    use nix::sys::epoll::{EpollEvent, EpollFlags};
    use std::os::fd::AsRawFd;

    #[test]
    fn watches_are_read_and_their_files_found() {
        let (a, b) = nix::unistd::pipe().unwrap();
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        let moved = a.try_clone().unwrap();
        epoll.add(&a, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, u64::MAX)).unwrap();
        epoll.add(&b, EpollEvent::new(EpollFlags::EPOLLOUT, 2)).unwrap();
        let number = a.as_raw_fd();
        drop(a);
        let me = std::process::id().cast_signed();
        let mut shared = Shared::default();
        for (n, fd) in [&moved, &b].iter().enumerate() {
            let live = Live::own(fd.try_clone().unwrap(), 1).unwrap();
            let holder = Holder { pid: me, fd: fd.as_raw_fd() };
            shared.classify(live.key(), holder, || 70 + n as u32, compare).unwrap();
        }
        let holder = Holder { pid: me, fd: epoll.0.as_raw_fd() };
        let live = Live::own(epoll.0.try_clone().unwrap(), 1).unwrap();
        assert!(is(&live));
        let mut watches: Vec<_> = live.info.all("tfd").map(|l| watch(3, l).unwrap()).collect();
        watches.sort_by_key(|w| w.data);
        assert_eq!((watches[0].data, watches[1].data), (2, u64::MAX));
        assert_eq!(watches[1].events & libc::EPOLLET as u32, libc::EPOLLET as u32);
        let found = target(&shared, holder, &watches[0], 0).unwrap();
        assert_eq!(found.0.fd, b.as_raw_fd());
        assert_eq!(watches[1].tfd, number.cast_unsigned());
        let (at, id) = target(&shared, holder, &watches[1], 0).unwrap();
        // Another test may have been given the number meanwhile, with another file.
        assert_eq!((at.fd, id), (moved.as_raw_fd(), Some(70)));
        drop(moved);
    }

    #[test]
    fn a_lost_file_is_an_error() {
        let (a, _b) = nix::unistd::pipe().unwrap();
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        epoll.add(&a, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
        let live = Live::own(epoll.0.try_clone().unwrap(), 1).unwrap();
        let w = watch(1, live.info.all("tfd").next().unwrap()).unwrap();
        let _kept = a.try_clone().unwrap();
        drop(a);
        let holder = Holder { pid: std::process::id().cast_signed(), fd: epoll.0.as_raw_fd() };
        let e = target(&Shared::default(), holder, &w, 0).unwrap_err();
        assert!(e.to_string().contains("no process has open"), "{e}");
    }
}
