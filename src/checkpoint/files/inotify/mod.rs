//! inotify(7): a queue of what happens to watched files.
//!
//! ```text
//!   dump:     fdinfo: wd, mask, inode ──watched.rs──> path           InotifyFileEntry { wd: [InotifyWdEntry] }
//!   restore:  inotify_init1 with all other files; each watch, last of all: INOTIFY_IOC_SETNEXTWD, inotify_add_watch
//! ```
//!
//! Events that nobody has read yet are taken out of the queue and put back at once, before a dump reads files itself,
//! which may be watched (`queue.rs`); the images have them in an extension. Watches are set when everything is open, for
//! the same reason. CRIU loses such events.

mod event;
mod queue;
mod stage;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::dump::prepare;
use crate::checkpoint::files::fdinfo::word;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::{Files, Opener};
use crate::checkpoint::files::registry::compare;
use crate::checkpoint::files::share::Holder;
use crate::checkpoint::files::watched::{self, Wanted, hold};
use crate::checkpoint::files::{Surroundings, external, regular};
use crate::checkpoint::image::{FdTypes, FileEntry, InotifyFileEntry, InotifyWdEntry, path_of};
use crate::checkpoint::{Error, Result};
use crate::sys::{self, ioctl};
use event::Event;

/// What the kernel adds to a mask, and what only says how to look a path up or to change a watch.
const NOT_KEPT: u32 =
    0x0800_0000 | libc::IN_ONLYDIR | libc::IN_DONT_FOLLOW | libc::IN_MASK_ADD | libc::IN_MASK_CREATE;

/// The name of this room's extension in stasis.img.
const EXTENSION: &str = "inotify-events";
/// Unread events, by file.
type Events = BTreeMap<u32, Vec<Event>>;

/// An inotify instance.
pub fn is(live: &Live) -> bool {
    live.is_anon("inotify")
}

/// Refuses watches of what has no name.
pub fn check(live: &Live, around: &Surroundings<'_>) -> Result<()> {
    watches(live, around).map(drop)
}

/// An instance that holds what nobody has read yet.
#[derive(Debug)]
pub struct Unread {
    live: Live,
    /// The bytes of its events.
    bytes: usize,
    events: Vec<Event>,
    /// Its watches, and the paths of what they watch.
    watches: Vec<(InotifyWdEntry, PathBuf)>,
}

/// Copies the unread events of all instances, descriptors of these tasks, before the dump opens anything. Whoever looks
/// for what is watched may make events himself, which are left out: all are counted first.
pub fn copy_unread(dump: &mut Dump<'_>, instances: &[(usize, i32)]) -> Result<()> {
    let mut all = Vec::new();
    for (task, fd) in instances.iter().filter_map(|(index, fd)| Some((dump.tasks.get(*index)?, *fd))) {
        let Some(live) = Live::look(task.pid, task.vpid, task.pidfd.as_fd(), fd)? else { continue };
        let bytes = event::waiting(live.file.as_fd())?;
        if bytes != 0 && known(&all, &live)?.is_none() {
            all.push(Unread { live, bytes, events: Vec::new(), watches: Vec::new() });
        }
    }
    if all.is_empty() {
        return Ok(());
    }
    prepare(dump)?;
    for unread in &mut all {
        let around = Surroundings::of(dump, unread.live.info.mnt_id)?;
        unread.watches = watches(&unread.live, &around)?;
    }
    for unread in &mut all {
        let around = Surroundings::of(dump, unread.live.info.mnt_id)?;
        unread.copy(around.root).map_err(|e| unread.live.name(e))?;
    }
    dump.files.unread = all;
    Ok(())
}

/// What is known of an instance that has had unread events.
fn known<'a>(all: &'a [Unread], live: &Live) -> Result<Option<&'a Unread>> {
    let own = |live: &Live| Holder { pid: std::process::id().cast_signed(), fd: live.file.as_raw_fd() };
    for unread in all {
        if compare(own(&unread.live), own(live))?.is_eq() {
            return Ok(Some(unread));
        }
    }
    Ok(None)
}

impl Unread {
    /// Takes the events out and puts them back. The watches are as they were, whatever comes of it.
    fn copy(&mut self, root: &OwnedFd) -> Result<()> {
        let (file, flags) = (&self.live.file, self.live.info.flags);
        let nodes = self.watches.iter().map(|(_, path)| hold(root, path).map_err(|e| e.path(path)));
        let nodes = nodes.collect::<Result<Vec<_>>>()?;
        let is_async = flags & libc::O_ASYNC.cast_unsigned() != 0;
        if is_async {
            external::set_flags(file, flags & !libc::O_ASYNC.cast_unsigned())?;
        }
        let numbers: Vec<i32> = self.watches.iter().map(|(watch, _)| watch.wd.cast_signed()).collect();
        let cleared = queue::clear(file.as_fd(), self.bytes, &numbers);
        let filled = cleared.and_then(|events| queue::fill(file.as_fd(), &events).map(|()| events));
        let watched = self.watches.iter().zip(&nodes);
        let watched =
            watched.map(|((watch, path), node)| add(file.as_fd(), watch, node).map_err(|e| e.path(path)));
        let watched = watched.fold(Ok(()), Result::and);
        if is_async {
            external::set_flags(file, flags)?;
        }
        self.events = filled?;
        watched
    }
}

/// The watches of an instance, with the paths of what they watch, in ascending order.
fn watches(live: &Live, around: &Surroundings<'_>) -> Result<Vec<(InotifyWdEntry, PathBuf)>> {
    let lines: Vec<&str> = live.info.all("inotify").collect();
    if lines.is_empty() {
        return Ok(Vec::new());
    }
    let wanted = lines.iter().map(|l| Wanted::parse(l)).collect::<Result<Vec<_>>>();
    let wanted = wanted.map_err(|e| live.name(e))?;
    let paths = watched::find(around, live.pid, &wanted).map_err(|e| live.name(e))?;
    let mut watches = Vec::with_capacity(lines.len());
    for ((line, wanted), path) in lines.iter().zip(&wanted).zip(paths) {
        let path = path.ok_or_else(|| live.name(wanted.nameless("an inotify instance")))?;
        watches.push((watch(line, wanted).map_err(|e| live.name(e))?, path));
    }
    watches.sort_by_key(|w| w.0.wd);
    Ok(watches)
}

fn watch(line: &str, wanted: &Wanted) -> Result<InotifyWdEntry> {
    let small = |key| word(line, key, 16).map(|n| n as u32);
    Ok(InotifyWdEntry {
        id: 0,
        i_ino: wanted.ino,
        mask: small("mask")?,
        ignored_mask: small("ignored_mask")?,
        s_dev: wanted.dev,
        wd: small("wd")?,
        f_handle: wanted.entry(),
    })
}

fn refuse_unread(file: BorrowedFd<'_>) -> Result<()> {
    match event::waiting(file)? {
        0 => Ok(()),
        n => Err(Error::new(format!(
            "an inotify instance that is under way in a socket holds {n} bytes of events that were not read yet"
        ))
        .remedy("let the program receive it, and try again")
        .passing()),
    }
}

/// Records an instance.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let watches = match known(&dump.files.unread, live)? {
        Some(unread) => {
            let mut all: Events = dump.model.extension(EXTENSION)?;
            all.insert(id, unread.events.clone());
            let watches = unread.watches.clone();
            dump.model.set_extension(EXTENSION, &all)?;
            watches
        }
        None => {
            if live.pid == std::process::id().cast_signed() {
                // Found in a socket's queue.
                refuse_unread(live.file.as_fd())?;
            }
            watches(live, &Surroundings::of(dump, live.info.mnt_id)?)?
        }
    };
    let mut wd = Vec::new();
    for (mut entry, path) in watches {
        entry.id = id;
        entry.f_handle.path = Some(regular::bytes(&path));
        wd.push(entry);
    }
    let ify = InotifyFileEntry { id, flags: live.info.flags, fown: live.fown(&dump.files.pids)?, wd };
    let r#type = FdTypes::Inotify as i32;
    dump.model.files.push(FileEntry { r#type, id, ify: Some(ify), ..FileEntry::default() });
    Ok(())
}

/// Makes instances that watch nothing yet, with the events that they had.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let unread: Events = opener.restore.model.extension(EXTENSION)?;
    unread.values().flatten().try_for_each(event::validate)?;
    for e in opener.of(FdTypes::Inotify).filter_map(|e| e.ify.as_ref()) {
        let file = sys::inotify::init()
            .during("cannot make an inotify instance", || "inotify_init1(IN_CLOEXEC)".into())
            .map_err(|e| match e.errno() {
                Some(Errno::EMFILE) => e.remedy("raise fs.inotify.max_user_instances"),
                _ => e,
            })?;
        if let Some(events) = unread.get(&e.id) {
            queue::fill(file.as_fd(), events)?;
        }
        external::set_flags(&file, e.flags & !libc::O_ASYNC.cast_unsigned())?;
        opener.put_owned(e.id, file, &e.fown, e.flags);
    }
    Ok(())
}

impl Files<'_> {
    /// Sets the watches. Nothing may be opened after that.
    pub(super) fn watch(&self) -> Result<()> {
        for e in self.restore.model.files.iter().filter_map(|f| f.ify.as_ref()) {
            let inotify = self.vma_file(e.id)?;
            let mut watches: Vec<&InotifyWdEntry> = e.wd.iter().collect();
            watches.sort_by_key(|w| w.wd);
            for watch in watches {
                let path = watch.f_handle.path.as_deref().map(path_of).ok_or_else(|| {
                    Error::new(format!("the images do not tell the path of watch {} of an inotify", watch.wd))
                        .remedy("they were made by CRIU without --force-irmap")
                })?;
                let node = hold(&self.restore.target.root, path);
                node.and_then(|node| add(inotify, watch, &node)).map_err(|e| e.path(path))?;
            }
        }
        Ok(())
    }
}

fn add(inotify: BorrowedFd<'_>, watch: &InotifyWdEntry, node: &OwnedFd) -> Result<()> {
    let what = "cannot watch a file";
    let wd = watch.wd.cast_signed();
    ioctl::set_inotify_next_wd(inotify, wd)
        .during(what, || format!("ioctl(_, INOTIFY_IOC_SETNEXTWD, {wd})"))
        .map_err(|e| e.remedy("the kernel must be built with CONFIG_CHECKPOINT_RESTORE"))?;
    let mask = watch.mask & !NOT_KEPT;
    let got = sys::inotify::add_watch(inotify, node, mask)
        .during(what, || format!("inotify_add_watch(_, _, {mask:#x})"))
        .map_err(|e| match e.errno() {
            Some(Errno::ENOSPC) => e.remedy("raise fs.inotify.max_user_watches"),
            _ => e,
        })?;
    if got == wd { Ok(()) } else { Err(Error::new(format!("{what}: as {wd}, the kernel gave {got}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::files::live::Pids;

    fn live(inotify: &OwnedFd) -> Live {
        Live::own(inotify.try_clone().unwrap(), 7).unwrap()
    }

    #[test]
    fn watches_come_back_under_their_numbers() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let root: OwnedFd = std::fs::File::open("/").unwrap().into();
        let pids = Pids::new();
        let around = Surroundings::here(&root, &pids);
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "").unwrap();
        let inotify = sys::inotify::init().unwrap();
        let node = |p: &std::path::Path| std::fs::File::open(p).unwrap();
        ioctl::set_inotify_next_wd(&inotify, 300).unwrap();
        let mask = libc::IN_MODIFY | libc::IN_ONESHOT;
        assert_eq!(sys::inotify::add_watch(&inotify, node(&file), mask).unwrap(), 300);
        ioctl::set_inotify_next_wd(&inotify, 17).unwrap();
        let mask = libc::IN_CREATE | libc::IN_EXCL_UNLINK | libc::IN_ONLYDIR;
        assert_eq!(sys::inotify::add_watch(&inotify, node(dir.path()), mask).unwrap(), 17);
        let was = live(&inotify);
        assert!(is(&was));
        let watches = watches(&was, &around).unwrap();
        assert_eq!((watches[0].0.wd, &*watches[0].1), (17, dir.path()));
        assert_eq!((watches[1].0.wd, &watches[1].1), (300, &file));

        let again = sys::inotify::init().unwrap();
        for (watch, path) in &watches {
            add(again.as_fd(), watch, &hold(&root, path).unwrap()).unwrap();
        }
        let marks = |live: &Live| {
            let mut lines: Vec<String> = live.info.all("inotify").map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(marks(&live(&again)), marks(&was));
    }

    #[test]
    fn lost_names_are_refused() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let root: OwnedFd = std::fs::File::open("/").unwrap().into();
        let pids = Pids::new();
        let around = Surroundings::here(&root, &pids);
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("f");
        let open = std::fs::File::create(&path).unwrap();
        let inotify = sys::inotify::init().unwrap();
        sys::inotify::add_watch(&inotify, &open, libc::IN_MODIFY).unwrap();
        check(&live(&inotify), &around).unwrap();
        std::fs::remove_file(&path).unwrap();
        let e = check(&live(&inotify), &around).unwrap_err().to_string();
        assert!(e.contains("no name in the container"), "{e}");
    }
}
