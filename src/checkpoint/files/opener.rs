//! Every open file of the images, opened or made in this process.
//!
//! ```text
//!   images ──> [kinds, in the table's order] ──> id 7: descriptor, id 8: descriptor, ...
//!                                                     │ install.rs: SCM_RIGHTS, dup3
//!                                                     ▼
//!                                                tasks' tables
//! ```
//!
//! Paths are resolved in the root of the new container, sockets are made by a thread that has entered its network
//! namespace; nothing is looked up in this host's own.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::OFlag;

use crate::checkpoint::context::Restore;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::ghost::Ghosts;
use crate::checkpoint::files::live::reopen;
use crate::checkpoint::files::tty::Terminals;
use crate::checkpoint::files::unix::Listener;
use crate::checkpoint::files::{KINDS, external, memfd, regular};
use crate::checkpoint::image::{FdTypes, FileEntry, FownEntry, RegFileEntry, RemapType};
use crate::checkpoint::namespaces::mount;
use crate::checkpoint::{Error, Result};
use crate::sys::resolve;

/// Who is to be told about I/O on a file, once every process exists.
#[derive(Debug, Clone)]
pub struct Owned {
    /// The file.
    pub id: u32,
    /// Who.
    pub fown: FownEntry,
    /// O_ASYNC is among its flags.
    pub r#async: bool,
}

/// The open files of a restore, by id.
pub struct Files<'a> {
    pub(super) restore: &'a Restore<'a>,
    pub(super) opened: BTreeMap<u32, OwnedFd>,
    /// Files that can be opened only when the processes exist: pidfds, and what /proc shows of them.
    pub(super) late: BTreeSet<u32>,
    pub(super) owners: Vec<Owned>,
    /// Files on which a task has asked for signals.
    pub(super) asyncs: BTreeSet<u32>,
    pub(super) seals: Vec<(OwnedFd, u32)>,
    /// Descriptor tables that are in place.
    pub(super) installed: BTreeSet<u32>,
    /// Epoll instances whose targets are in place.
    pub(super) epolls: BTreeSet<u32>,
    /// How many tasks are finished.
    pub(super) finished: usize,
    /// Sessions that have got their terminal.
    pub(super) sessions: BTreeSet<u32>,
    /// TCP connections in repair mode, with SO_REUSEADDR.
    pub(super) connections: Vec<(u32, bool)>,
    /// Terminals for sessions to take.
    pub(super) terminals: Terminals,
    /// Sockets to listen on, by process.
    pub(super) listeners: BTreeMap<i32, Vec<Listener>>,
}

/// The opening of files under way.
pub struct Opener<'f, 'a> {
    /// The restore.
    pub restore: &'a Restore<'a>,
    /// What is open so far.
    pub files: &'f mut Files<'a>,
    /// What descriptors 0, 1 and 2 were called at create.
    pub stdio: Vec<String>,
    ghosts: Ghosts,
    by_id: BTreeMap<u32, &'a FileEntry>,
    /// The paths of tun descriptors, which have their numbers.
    tunnels: BTreeMap<u32, &'a RegFileEntry>,
    remaps: BTreeMap<u32, (RemapType, u32)>,
    numbers: BTreeMap<u32, u32>,
}

impl<'a> Files<'a> {
    /// Opens or makes every open file of the images in this process.
    pub fn open(restore: &'a Restore<'a>) -> Result<Self> {
        let mut files = Files {
            restore,
            opened: BTreeMap::new(),
            late: BTreeSet::new(),
            owners: Vec::new(),
            asyncs: BTreeSet::new(),
            seals: Vec::new(),
            installed: BTreeSet::new(),
            epolls: BTreeSet::new(),
            finished: 0,
            sessions: BTreeSet::new(),
            connections: Vec::new(),
            terminals: Terminals::default(),
            listeners: BTreeMap::new(),
        };
        let stdio = external::read_names(restore.images)?;
        let mut opener = Opener::new(restore, &mut files, stdio)?;
        for kind in KINDS {
            (kind.open)(&mut opener).map_err(|e| e.of(kind.name))?;
        }
        opener.refuse_unknown()?;
        opener.ghosts.unlink()?;
        Ok(files)
    }

    /// The open file with this id, for a mapping or an executable.
    pub fn vma_file(&self, id: u32) -> Result<BorrowedFd<'_>> {
        self.opened
            .get(&id)
            .map(AsFd::as_fd)
            .ok_or_else(|| Error::new(format!("the images use file {id} and do not describe it")))
    }

    /// Seals memfds, when everything is mapped.
    pub(super) fn seal(&mut self) -> Result<()> {
        std::mem::take(&mut self.seals).iter().try_for_each(|(file, seals)| memfd::seal(file, *seals))
    }
}

impl<'f, 'a> Opener<'f, 'a> {
    fn new(restore: &'a Restore<'a>, files: &'f mut Files<'a>, stdio: Vec<String>) -> Result<Self> {
        let model = restore.model;
        let (mut by_id, mut tunnels) = (BTreeMap::new(), BTreeMap::new());
        let of = |kind| model.files.iter().filter(move |e| e.r#type() == kind);
        let tuns: BTreeSet<u32> = of(FdTypes::Tunf).map(|e| e.id).collect();
        for entry in &model.files {
            let doubled = match &entry.reg {
                Some(path) if entry.r#type() == FdTypes::Reg && tuns.contains(&entry.id) => {
                    tunnels.insert(entry.id, path).is_some()
                }
                _ => by_id.insert(entry.id, entry).is_some(),
            };
            if doubled {
                return Err(Error::new(format!("the images describe file {} twice", entry.id)));
            }
        }
        let mut remaps = BTreeMap::new();
        for remap in &model.remaps {
            let kind = remap.remap_type.unwrap_or(RemapType::Linked as i32);
            let kind = RemapType::try_from(kind).map_err(|_| {
                Error::new(format!("the images remap file {} in an unknown way {kind}", remap.orig_id))
            })?;
            remaps.insert(remap.orig_id, (kind, remap.remap_id));
        }
        let mut numbers = BTreeMap::new();
        for fd in model.fdinfo.values().flatten() {
            numbers.entry(fd.id).and_modify(|n: &mut u32| *n = fd.fd.min(*n)).or_insert(fd.fd);
        }
        Ok(Self { restore, files, stdio, ghosts: Ghosts::default(), by_id, tunnels, remaps, numbers })
    }

    /// The entries of one kind.
    pub fn of(&self, kind: FdTypes) -> impl Iterator<Item = &'a FileEntry> + use<'a> {
        self.restore.model.files.iter().filter(move |e| e.r#type == kind as i32)
    }

    /// The entry with this id.
    pub fn entry(&self, id: u32) -> Option<&'a FileEntry> {
        self.by_id.get(&id).copied()
    }

    /// The path entry with this id.
    pub fn regular(&self, id: u32) -> Option<&'a RegFileEntry> {
        self.entry(id).and_then(|e| e.reg.as_ref())
    }

    /// The path of a tun descriptor.
    pub fn tunnel_path(&self, id: u32) -> Option<&'a RegFileEntry> {
        self.tunnels.get(&id).copied()
    }

    /// The lowest number under which any process has this file.
    pub fn lowest_number(&self, id: u32) -> Option<u32> {
        self.numbers.get(&id).copied()
    }

    /// Sockets by the network namespace that they are in, each with a door to it where it is not that of init.
    pub fn by_network<T>(
        &self,
        all: Vec<T>,
        network: impl Fn(&T) -> Option<u32>,
    ) -> Result<Vec<(Option<OwnedFd>, Vec<T>)>> {
        let mut groups: BTreeMap<u32, Vec<T>> = BTreeMap::new();
        for one in all {
            groups.entry(network(&one).unwrap_or(0)).or_default().push(one);
        }
        groups.into_iter().map(|(id, some)| Ok((self.restore.made.door(id)?, some))).collect()
    }

    /// Keeps an open file.
    pub fn put(&mut self, id: u32, file: OwnedFd) {
        self.files.opened.insert(id, file);
    }

    /// Keeps an open file, and who is told about I/O on it.
    pub fn put_owned(&mut self, id: u32, file: OwnedFd, fown: &FownEntry, flags: u32) {
        self.own(id, fown, flags);
        self.put(id, file);
    }

    /// Keeps who is told about I/O on a file.
    pub fn own(&mut self, id: u32, fown: &FownEntry, flags: u32) {
        let r#async = flags & libc::O_ASYNC.cast_unsigned() != 0;
        if fown.pid != 0 || fown.signum != 0 || r#async {
            self.files.owners.push(Owned { id, fown: fown.clone(), r#async });
        }
    }

    /// An O_PATH descriptor of what a path entry leads to: the path, its ghost, or its other link.
    pub fn node(&mut self, reg: &RegFileEntry) -> Result<OwnedFd> {
        let lookup = |name: &Path| {
            resolve::open_in_root(self.restore.root_of(reg)?, name, OFlag::O_PATH | OFlag::O_NOFOLLOW)
                .during("cannot open a file", || format!("openat2(root, {name:?}, O_PATH, RESOLVE_IN_ROOT)"))
                .map_err(|e| e.path(name))
        };
        match self.remaps.get(&reg.id) {
            None => lookup(reg.path()),
            Some((RemapType::Ghost, ghost)) => {
                let node = self.ghosts.node(self.restore, *ghost, reg)?;
                node.try_clone()
                    .during("cannot duplicate a ghost file", || "fcntl(_, F_DUPFD_CLOEXEC, 0)".into())
            }
            Some((RemapType::Linked, link)) => match self.regular(*link) {
                Some(other) => lookup(other.path()),
                None => {
                    Err(Error::new(format!("the images lack file {link}, the other link")).path(reg.path()))
                }
            },
            Some((RemapType::Procfs, _)) => {
                Err(Error::new("a file of a process that was gone cannot be restored").path(reg.path()))
            }
        }
    }

    fn is_remapped(&self, id: u32) -> bool {
        self.remaps.contains_key(&id)
    }

    /// An image may hold what this table has no line for.
    fn refuse_unknown(&self) -> Result<()> {
        for entry in &self.restore.model.files {
            if !KINDS.iter().any(|k| k.r#type as i32 == entry.r#type) {
                let name = FdTypes::try_from(entry.r#type)
                    .map_or_else(|_| entry.r#type.to_string(), |t| format!("{t:?}"));
                return Err(Error::new(format!(
                    "the images hold an open file of kind {name}, which is not supported"
                )));
            }
        }
        Ok(())
    }
}

/// Opens files by path: all that no other kind uses for its own.
pub fn open_regular(opener: &mut Opener<'_, '_>) -> Result<()> {
    let model = opener.restore.model;
    let used: BTreeSet<u32> = model
        .files
        .iter()
        .flat_map(|e| [e.fifo.as_ref().and_then(|f| f.regf_id), e.tty.as_ref().and_then(|t| t.regf_id)])
        .flatten()
        .chain(
            model.remaps.iter().filter(|r| r.remap_type != Some(RemapType::Ghost as i32)).map(|r| r.remap_id),
        )
        .collect();
    let waiting = mount::late::all_waiting(model)?;
    for reg in opener.of(FdTypes::Reg).filter_map(|e| e.reg.as_ref()) {
        if used.contains(&reg.id) || opener.tunnels.contains_key(&reg.id) {
            continue;
        }
        let file = if let Some(index) = external_index(opener, reg) {
            external::attach(opener.restore, index, reg.flags)?
        } else if opener.is_remapped(reg.id) {
            let node = opener.node(reg)?;
            let flags = regular::open_flags(reg.flags);
            if flags.contains(OFlag::O_PATH) {
                node
            } else {
                // Only the open file description that made a file without a name says so.
                let made = regular::is_tmpfile(reg.flags) && is_made_without_name(&node)?;
                let file =
                    if made { node } else { reopen(node.as_fd(), flags).map_err(|e| e.path(reg.path()))? };
                regular::seek(&file, reg).map_err(|e| e.path(reg.path()))?;
                file
            }
        } else if is_of_a_process(reg.path()) || waiting.contains(&reg.mnt_id.unwrap_or(0).cast_unsigned()) {
            opener.files.late.insert(reg.id);
            continue;
        } else {
            regular::open(opener.restore, reg)?
        };
        opener.put_owned(reg.id, file, &reg.fown, reg.flags);
    }
    Ok(())
}

fn is_made_without_name(node: &OwnedFd) -> Result<bool> {
    let flags = nix::fcntl::fcntl(node, nix::fcntl::FcntlArg::F_GETFL)
        .during("cannot read the flags of a file", || "fcntl(_, F_GETFL)".into())?;
    Ok(regular::is_tmpfile(flags.cast_unsigned()))
}

/// Which of the descriptors of create a path entry is.
fn external_index(opener: &Opener<'_, '_>, reg: &RegFileEntry) -> Option<usize> {
    if reg.ext != Some(true) {
        return None;
    }
    opener.stdio.iter().take(3).position(|s| s.as_bytes() == reg.name)
}

/// Below /proc/PID, which appears when the process does.
fn is_of_a_process(name: &Path) -> bool {
    let below = name.as_os_str().as_bytes().strip_prefix(b"/proc/");
    below.is_some_and(|below| below.first().is_some_and(u8::is_ascii_digit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_processes_wait() {
        assert!(is_of_a_process(Path::new("/proc/12/status")));
        assert!(!is_of_a_process(Path::new("/proc/sys/kernel/pid_max")));
        assert!(!is_of_a_process(Path::new("/process/1")));
    }
}
