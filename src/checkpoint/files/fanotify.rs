//! fanotify(7): a group with marks on files, mounts and file systems.
//!
//! ```text
//!   fanotify flags:201 event-flags:8000                                    faflags, evflags
//!   fanotify ino:2 sdev:1a mflags:0 mask:2 ignored_mask:0 fhandle-...      a file      ──watched.rs──> path
//!   fanotify mnt_id:1f mflags:40 mask:8 ignored_mask:2                     a mount     ──mountinfo──> path
//!   fanotify sdev:1a mflags:0 mask:100 ignored_mask:0                      a file system: CRIU has no record of it
//! ```
//!
//! Events that nobody has read are refused: each holds a file open or a handle of it. So are marks that ask the program
//! for leave: whoever opens a file then waits for it, this command included, while it stands still.
//! Marks are set when everything is open, as inotify's are. A container that could not have made a group with
//! CAP_SYS_ADMIN gets one that was made without: it is not told the processes of others.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability};
use nix::errno::Errno;
use oci_spec::runtime::{Capability as Named, LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::fdinfo::word;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::{Files, Opener};
use crate::checkpoint::files::watched::{self, Wanted, hold};
use crate::checkpoint::files::{Surroundings, external, regular};
use crate::checkpoint::image::{
    FanotifyFileEntry, FanotifyInodeMarkEntry, FanotifyMarkEntry, FanotifyMountMarkEntry, FdTypes, FileEntry,
    MarkType, device, path_of,
};
use crate::checkpoint::namespaces::mountinfo::{self, Mount};
use crate::checkpoint::{Error, Result};
use crate::sys::{self, ioctl, stat};

/// Marks on file systems, by file.
pub const EXTENSION: &str = "fanotify-filesystems";
type Filesystems = BTreeMap<u32, Vec<Filesystem>>;

const WHO: &str = "a fanotify group";
const WHAT: &str = "cannot set a mark of a fanotify group";
/// Events that wait for the program's leave, FAN_PRE_ACCESS among them.
const PERMISSION: u32 =
    (libc::FAN_OPEN_PERM | libc::FAN_ACCESS_PERM | libc::FAN_OPEN_EXEC_PERM) as u32 | 0x0010_0000;
const ON_CHILD: u32 = libc::FAN_EVENT_ON_CHILD as u32;
const EVICTABLE: u32 = 0x200;
const IGNORE: u32 = 0x400;
const SURV_MODIFY: u32 = libc::FAN_MARK_IGNORED_SURV_MODIFY;

/// A mark on the file system that a path lies on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Filesystem {
    path: PathBuf,
    mask: Mask,
}

/// What a mark asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Mask {
    flags: u32,
    events: u32,
    ignored: u32,
}

/// What a mark is set on, and where that is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Marked {
    Inode(Wanted, PathBuf),
    Mount(Mount),
    Filesystem(PathBuf),
}

/// A group.
pub fn is(live: &Live) -> bool {
    live.is_anon("fanotify")
}

/// Refuses unread events, and marks that could not be set again.
pub fn check(live: &Live, around: &Surroundings<'_>) -> Result<()> {
    nothing_unread(live)?;
    marks(live, around).map(drop)
}

fn nothing_unread(live: &Live) -> Result<()> {
    match ioctl::readable(&live.file)
        .during("cannot look for fanotify events", || "ioctl(_, FIONREAD)".into())
    {
        Ok(0) => Ok(()),
        Ok(_) => Err(live
            .name(Error::new("a fanotify group holds events that were not read yet"))
            .remedy("let the program read them, and try again")
            .passing()),
        Err(e) => Err(live.name(e)),
    }
}

/// Refuses unread events of all groups, descriptors of these tasks, before the dump opens files, which may be watched.
pub fn refuse_unread(dump: &Dump<'_>, groups: &[(usize, i32)]) -> Result<()> {
    for (task, fd) in groups.iter().filter_map(|(index, fd)| Some((dump.tasks.get(*index)?, *fd))) {
        if let Some(live) = Live::look(task.pid, task.vpid, task.pidfd.as_fd(), fd)? {
            nothing_unread(&live)?;
        }
    }
    Ok(())
}

/// The marks of a group.
fn marks(live: &Live, around: &Surroundings<'_>) -> Result<Vec<(Marked, Mask)>> {
    let lines: Vec<&str> = live.info.all("fanotify").filter(|l| word(l, "mask", 16).is_ok()).collect();
    if lines.is_empty() {
        return Ok(Vec::new());
    }
    read_marks(live.pid, &lines, around).map_err(|e| live.name(e))
}

fn read_marks(pid: i32, lines: &[&str], around: &Surroundings<'_>) -> Result<Vec<(Marked, Mask)>> {
    let inodes: Vec<&&str> = lines.iter().filter(|l| word(l, "ino", 16).is_ok()).collect();
    let wanted = inodes.iter().map(|l| Wanted::parse(l)).collect::<Result<Vec<_>>>()?;
    let mut paths = wanted.iter().cloned().zip(match wanted.as_slice() {
        [] => Vec::new(),
        _ => watched::find(around, pid, &wanted)?,
    });
    let mounts = mountinfo::of(&around.init.to_string())?;
    let mut marks = Vec::with_capacity(lines.len());
    for line in lines {
        let number = |key| word(line, key, 16).map(|n| n as u32);
        let mask =
            Mask { flags: number("mflags")?, events: number("mask")?, ignored: number("ignored_mask")? };
        refuse_permission(mask)?;
        let marked = if word(line, "ino", 16).is_ok() {
            let (wanted, path) = paths.next().ok_or_else(|| Error::new("a mark without its file"))?;
            let path = path.ok_or_else(|| wanted.nameless(WHO))?;
            Marked::Inode(wanted, path)
        } else if let Ok(id) = number("mnt_id") {
            let mount =
                mounts.iter().find(|m| m.id == id && is_reached(around.root, m)).ok_or_else(|| {
                    Error::new(format!("{WHO} watches a mount that the container does not see: {id}")).remedy(
                        "it was unmounted, or lies under another mount; let the program remove the mark",
                    )
                })?;
            Marked::Mount(mount.clone())
        } else {
            let dev = number("sdev").map_err(|_| Error::new(format!("a mark not understood: {line:?}")))?;
            let mount =
                mounts.iter().find(|m| m.dev == dev && is_reached(around.root, m)).ok_or_else(|| {
                    let (major, minor) = device::from_kernel(dev);
                    Error::new(format!(
                        "{WHO} watches a file system of which the container sees no mount: {major}:{minor}"
                    ))
                    .remedy("let the program remove the mark")
                })?;
            Marked::Filesystem(mount.point.clone())
        };
        marks.push((marked, mask));
    }
    Ok(marks)
}

/// Does the path of a mount lead to it?
fn is_reached(root: &OwnedFd, mount: &Mount) -> bool {
    let place = hold(root, &mount.point).ok().and_then(|point| stat::place(&point).ok());
    place.is_some_and(|p| p.mount == 0 || p.mount == u64::from(mount.id))
}

fn refuse_permission(mask: Mask) -> Result<()> {
    if (mask.events | mask.ignored) & PERMISSION == 0 {
        return Ok(());
    }
    Err(Error::new("a fanotify group gives others leave to open or read files (permission events)")
        .remedy("let the program remove such marks: nobody could open these files while it stands still"))
}

/// Records a group.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let header = live.info.all("fanotify").find(|l| word(l, "event-flags", 16).is_ok());
    let header = header.ok_or_else(|| live.name(Error::new("fdinfo has no flags of a fanotify group")))?;
    let number = |key| word(header, key, 16).map(|n| n as u32);
    let (mut mark, mut whole) = (Vec::new(), Vec::new());
    for (marked, mask) in marks(live, &Surroundings::of(dump, live.info.mnt_id)?)? {
        let entry = FanotifyMarkEntry {
            id,
            mflags: mask.flags,
            mask: mask.events,
            ignored_mask: mask.ignored,
            ..FanotifyMarkEntry::default()
        };
        mark.push(match marked {
            Marked::Filesystem(path) => {
                whole.push(Filesystem { path, mask });
                continue;
            }
            Marked::Inode(wanted, path) => {
                let mut f_handle = wanted.entry();
                f_handle.path = Some(regular::bytes(&path));
                let ie = Some(FanotifyInodeMarkEntry { i_ino: wanted.ino, f_handle });
                FanotifyMarkEntry { r#type: MarkType::Inode as i32, s_dev: wanted.dev, ie, ..entry }
            }
            Marked::Mount(mount) => {
                let path = mount.point.to_str().map(str::to_owned).ok_or_else(|| {
                    Error::new("a group of fanotify watches a mount whose name is not UTF-8")
                        .path(&mount.point)
                        .remedy("the images have no place for it; mount it elsewhere")
                })?;
                let me = Some(FanotifyMountMarkEntry { mnt_id: mount.id, path: Some(path) });
                FanotifyMarkEntry { r#type: MarkType::Mount as i32, s_dev: mount.dev, me, ..entry }
            }
        });
    }
    if !whole.is_empty() {
        let mut all: Filesystems = dump.model.extension(EXTENSION)?;
        all.insert(id, whole);
        dump.model.set_critical_extension(EXTENSION, &all)?;
    }
    let ffy = FanotifyFileEntry {
        id,
        flags: live.info.flags,
        fown: live.fown(&dump.files.pids)?,
        faflags: number("flags")?,
        evflags: number("event-flags")?,
        mark,
    };
    let r#type = FdTypes::Fanotify as i32;
    dump.model.files.push(FileEntry { r#type, id, ffy: Some(ffy), ..FileEntry::default() });
    Ok(())
}

/// Makes groups without marks.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let plain = is_plain(&opener.restore.target.spec);
    for e in opener.of(FdTypes::Fanotify).filter_map(|e| e.ffy.as_ref()) {
        let group = make(plain, e.faflags, e.evflags)?;
        external::set_flags(&group, e.flags & !libc::O_ASYNC.cast_unsigned())?;
        opener.put_owned(e.id, group, &e.fown, e.flags);
    }
    Ok(())
}

/// Can nobody in the container have CAP_SYS_ADMIN in the initial user namespace?
fn is_plain(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let user = namespaces.is_some_and(|all| all.iter().any(|n| n.typ() == LinuxNamespaceType::User));
    let capabilities = spec.process().as_ref().and_then(|p| p.capabilities().as_ref());
    let bounding = capabilities.and_then(|c| c.bounding().as_ref());
    user || !bounding.is_some_and(|set| set.contains(&Named::SysAdmin))
}

/// A group; on a thread of its own without CAP_SYS_ADMIN, for the kernel remembers that.
fn make(plain: bool, flags: u32, events: u32) -> Result<OwnedFd> {
    let call = || format!("fanotify_init({flags:#x}, {events:#x})");
    let make = move || {
        if plain {
            caps::drop(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).map_err(|_| Errno::EPERM)?;
        }
        sys::fanotify::init(flags, events)
    };
    let made = std::thread::spawn(make).join().unwrap_or(Err(Errno::EIO));
    made.during("cannot make a fanotify group", call).map_err(|e| match e.errno() {
        Some(Errno::EMFILE) => e.remedy("raise fs.fanotify.max_user_groups"),
        Some(Errno::EPERM) => {
            e.remedy("such a group takes CAP_SYS_ADMIN, which this container does not have")
        }
        _ => e,
    })
}

impl Files<'_> {
    /// Sets the marks. Nothing may be opened after that.
    pub(super) fn mark(&self) -> Result<()> {
        let root = &self.restore.target.root;
        for e in self.restore.model.files.iter().filter_map(|f| f.ffy.as_ref()) {
            let group = self.vma_file(e.id)?;
            for mark in &e.mark {
                let mask = Mask { flags: mark.mflags, events: mark.mask, ignored: mark.ignored_mask };
                let (kind, path) = if mark.r#type == MarkType::Mount as i32 {
                    (libc::FAN_MARK_MOUNT, mark.me.as_ref().and_then(|me| me.path.as_deref().map(Path::new)))
                } else {
                    (
                        libc::FAN_MARK_INODE,
                        mark.ie.as_ref().and_then(|ie| ie.f_handle.path.as_deref().map(path_of)),
                    )
                };
                let path = path.ok_or_else(|| {
                    Error::new("the images do not tell the path of a mark of a fanotify group")
                        .remedy("they were made by CRIU without --force-irmap")
                })?;
                add(group, root, kind, path, mask)?;
            }
        }
        let whole: Filesystems = self.restore.model.extension(EXTENSION)?;
        for (id, marks) in &whole {
            let group = self.vma_file(*id)?;
            for mark in marks {
                add(group, root, libc::FAN_MARK_FILESYSTEM, &mark.path, mark.mask)?;
            }
        }
        Ok(())
    }
}

fn add(group: BorrowedFd<'_>, root: &OwnedFd, kind: u32, path: &Path, mask: Mask) -> Result<()> {
    refuse_permission(mask)?;
    let node = hold(root, path).map_err(|e| e.path(path))?;
    // The kernel adds ON_CHILD by itself to marks on what is no directory.
    let is_dir = nix::sys::stat::fstat(&node).is_ok_and(|s| s.st_mode & libc::S_IFMT == libc::S_IFDIR);
    let keep = if kind == libc::FAN_MARK_INODE && is_dir { u32::MAX } else { !ON_CHILD };
    let evictable = mask.flags & EVICTABLE;
    let how = if mask.flags & IGNORE == 0 { libc::FAN_MARK_IGNORED_MASK } else { IGNORE };
    let parts = [
        (kind | evictable, mask.events & keep),
        (kind | evictable | how | mask.flags & SURV_MODIFY, mask.ignored & keep),
    ];
    for (flags, events) in parts.into_iter().filter(|(_, events)| *events != 0) {
        sys::fanotify::add_mark(group, flags, events.into(), &node)
            .during(WHAT, || format!("fanotify_mark(_, FAN_MARK_ADD|{flags:#x}, {events:#x})"))
            .map_err(|e| match e.errno() {
                Some(Errno::ENOSPC) => e.remedy("raise fs.fanotify.max_user_marks"),
                _ => e,
            })
            .map_err(|e| e.path(path))?;
    }
    Ok(())
}
