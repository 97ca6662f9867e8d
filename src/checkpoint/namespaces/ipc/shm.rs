//! Shared memory segments. Their pages are moved as those of other shared memory are, through a file.

use std::fs::File;

use nix::errno::Errno;

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::IpcShmEntry;
use crate::checkpoint::memory::shmem;
use crate::checkpoint::model::IpcNamespace;
use crate::checkpoint::namespaces::enter::{Doors, doors, through};
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::vpid;
use crate::sys::hugetlb::{self, Target};
use crate::sys::sysv::{self, Perm};

/// Marks in the mode of a segment: it goes with its last user; it stays in memory.
const DEST: u32 = 0o1000;
const LOCKED: u32 = 0o2000;

/// In the flags of shmget(2), with the size of the pages.
const SHM_HUGETLB: u32 = 0o4000;
const HUGE: u32 = SHM_HUGETLB | libc::MAP_HUGE_MASK.cast_unsigned() << libc::MAP_HUGE_SHIFT;

/// A segment and its pages.
pub(super) type Contents = (u32, File);

/// Records, with the bytes of those that are not in a file.
pub(super) type Segments = Vec<(IpcShmEntry, Vec<u8>)>;

/// Segments that processes use of an IPC namespace that is not the container's own: others use them too.
pub(super) fn check_joined(init: i32, pids: &[i32]) -> Vec<Error> {
    let uses = |pid: &&i32| {
        let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        maps.split(|b| *b == b'\n').any(|line| line.windows(6).any(|w| w == b" /SYSV"))
    };
    let refusal = |pid: &i32| {
        Error::new(
            "the process uses System V shared memory of an IPC namespace that is not the container's own",
        )
        .pid(vpid(init, *pid))
        .remedy("give the container an IPC namespace of its own")
    };
    pids.iter().filter(uses).map(refusal).collect()
}

pub(super) fn dump() -> Result<(Segments, Vec<Contents>)> {
    let what = "cannot read the shared memory segment";
    let segments = sysv::segments().during(what, || "shmctl(_, SHM_STAT)".into())?;
    let (mut entries, mut files) = (Vec::new(), Vec::new());
    for segment in segments {
        let (id, size) = (segment.id, segment.size);
        let file =
            sysv::open_segment(id, size, false).during(what, || format!("shmat({id}, NULL, SHM_RDONLY)"))?;
        let page = hugetlb::page_size(&file).during(what, || "fstatfs(_)".into())?;
        let hugetlb_flag = page.map(|page| SHM_HUGETLB | page.ilog2() << libc::MAP_HUGE_SHIFT);
        let desc = super::describe(id, &segment.perm);
        files.push((desc.id, file));
        entries.push((IpcShmEntry { desc, size, in_pagemaps: Some(true), hugetlb_flag }, Vec::new()));
    }
    Ok((entries, files))
}

/// Writes the pages of all segments.
pub(super) fn write(dump: &mut Dump<'_>, space: u32, segments: Vec<Contents>) -> Result<()> {
    for (id, file) in segments {
        shmem::write(dump.images, number(space, id), dump.new_id(), &file)?;
    }
    Ok(())
}

pub(super) fn restore(segments: &[(IpcShmEntry, Vec<u8>)]) -> Result<Vec<Contents>> {
    let mut files = Vec::new();
    for (segment, bytes) in segments {
        let (size, huge) = (segment.size, segment.hugetlb_flag.unwrap_or(0));
        if huge & !HUGE != 0 || (huge != 0 && huge & SHM_HUGETLB == 0) {
            let id = segment.desc.id;
            return Err(Error::new(format!(
                "the shared memory segment {id} has the pages {huge:#x}, which are of no size"
            )));
        }
        let id = super::make(&segment.desc, "shm", |perm| make(perm, size, huge))?;
        let what = "cannot fill the shared memory segment";
        let file = sysv::open_segment(id, size, true).during(what, || format!("shmat({id}, NULL, 0)"))?;
        sysv::own_segment(id, &super::perm(&segment.desc))
            .during(what, || format!("shmctl({id}, IPC_SET)"))?;
        if segment.in_pagemaps == Some(true) {
            files.push((segment.desc.id, file));
        } else {
            let target = Target::new(&file).during(what, || "fstatfs(_)".into())?;
            target.write_all_at(bytes, 0).during(what, || format!("pwrite(_, _, {}, 0)", bytes.len()))?;
        }
    }
    Ok(files)
}

/// Huge pages are not for everybody to have.
fn make(perm: &Perm, size: u64, huge: u32) -> Result<i32, Errno> {
    let make = || sysv::make_segment(perm, size, huge.cast_signed());
    if huge == 0 {
        sysv::created_by(perm.cuid, perm.cgid, make)
    } else {
        sysv::created_with_leave(perm.cuid, perm.cgid, make)
    }
}

/// Puts the pages back.
pub(super) fn fill(restore: &Restore<'_>, space: u32, segments: Vec<Contents>) -> Result<()> {
    segments.iter().try_for_each(|(id, file)| shmem::fill(restore.images, number(space, *id), file))
}

/// What the images call the pages of a segment: by its id in the container's own namespace, which may be that of
/// another segment in one that the container has made.
fn number(space: u32, id: u32) -> u64 {
    let made = if space > Kind::Time.id(true) { u64::from(space) << 32 } else { 0 };
    made | u64::from(id)
}

/// Marks segments for removal and locks them, once every process has attached what it had attached.
pub fn finish(restore: &Restore<'_>) -> Result<()> {
    for (id, namespace) in &restore.model.ipcns {
        let doors = match restore.made.door(*id)? {
            Some(door) => vec![(door, Kind::Ipc)],
            None => doors(restore.target.init, &[Kind::Ipc])?,
        };
        mark(namespace, doors)?;
    }
    Ok(())
}

fn mark(namespace: &IpcNamespace, doors: Doors) -> Result<()> {
    let marked: Vec<_> = namespace
        .shm
        .iter()
        .map(|(entry, _)| &entry.desc)
        .filter(|d| d.mode & (DEST | LOCKED) != 0)
        .collect();
    if marked.is_empty() {
        return Ok(());
    }
    through(doors, || {
        for desc in marked {
            let id = desc.id.cast_signed();
            let what = format!("cannot mark the shared memory segment {id}");
            if desc.mode & LOCKED != 0 {
                sysv::mark_segment(id, libc::SHM_LOCK).during(&what, || format!("shmctl({id}, SHM_LOCK)"))?;
            }
            if desc.mode & DEST != 0 {
                sysv::mark_segment(id, libc::IPC_RMID).during(&what, || format!("shmctl({id}, IPC_RMID)"))?;
            }
        }
        Ok(())
    })
}
