//! memfd_create(2): memory with a descriptor.
//!
//! ```text
//!   MemfdFileEntry (one an open file description: flags, offset) ──> MemfdInodeEntry: name, size, seals, owner
//!                                                                        │ shmid
//!                                                                        ▼ pagemap-shmem-N.img (`memory/shmem.rs`)
//! ```

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::{Gid, Uid, fchown, ftruncate};

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::{Live, reopen};
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::regular;
use crate::checkpoint::image::{FdTypes, FileEntry, MemfdFileEntry, MemfdInodeEntry, RegFileEntry, path_of};
use crate::checkpoint::memory::shmem;
use crate::checkpoint::{Error, Result};
use crate::sys::hugetlb;

const PREFIX: &[u8] = b"/memfd:";
/// `MFD_HUGETLB`, and the size of the pages.
const HUGE: u32 = libc::MFD_HUGETLB | (libc::MFD_HUGE_MASK << libc::MFD_HUGE_SHIFT);

/// The kernel's own tmpfs, which no path leads to.
fn internal(dev: u64) -> bool {
    static DEV: OnceLock<Option<u64>> = OnceLock::new();
    let own = DEV.get_or_init(|| {
        let file = memfd_create(c"stasis", MFdFlags::MFD_CLOEXEC).ok()?;
        fstat(&file).ok().map(|s| s.st_dev)
    });
    *own == Some(dev)
}

/// A memfd.
pub fn is(live: &Live) -> bool {
    live.link.as_os_str().as_bytes().starts_with(PREFIX)
        && live.format() == libc::S_IFREG
        && (internal(live.stat.st_dev) || live.fs == hugetlb::MAGIC)
}

/// Records an open memfd and, once for each, its contents.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let key = (live.stat.st_dev, live.stat.st_ino);
    let inode_id = match dump.files.memfds.get(&key) {
        Some(&known) => known,
        None => {
            let inode = inode(dump, live).map_err(|e| live.name(e))?;
            dump.model.memfds.push(inode.1);
            dump.files.memfds.insert(key, inode.0);
            inode.0
        }
    };
    let memfd = MemfdFileEntry {
        id,
        flags: live.info.flags,
        pos: live.info.pos,
        fown: live.fown(&dump.files.pids)?,
        inode_id,
    };
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Memfd as i32,
        id,
        memfd: Some(memfd),
        ..FileEntry::default()
    });
    Ok(())
}

fn inode(dump: &mut Dump<'_>, live: &Live) -> Result<(u32, MemfdInodeEntry)> {
    let (name, _) = live.undeleted();
    let name = name.as_os_str().as_bytes().strip_prefix(PREFIX).unwrap_or_default().to_vec();
    // The descriptor may be write-only.
    let readable = File::from(live.reopen(OFlag::O_RDONLY)?);
    let seals = fcntl(&readable, FcntlArg::F_GET_SEALS)
        .during("cannot read a memfd's seals", || "fcntl(_, F_GET_SEALS)".into())?;
    let page = hugetlb::page_size(&readable).during("cannot look at a memfd", || "fstatfs(_)".into())?;
    let (id, pages) = (dump.new_id(), dump.new_id());
    let shmid = shmem::OWN_ID | u64::from(id);
    shmem::write(dump.images, shmid, pages, &readable)?;
    let entry = MemfdInodeEntry {
        name,
        uid: live.stat.st_uid,
        gid: live.stat.st_gid,
        size: live.stat.st_size.cast_unsigned(),
        shmid: u32::try_from(shmid).map_err(|_| Error::new("too many shared memories"))?,
        seals: seals.cast_unsigned(),
        inode_id: u64::from(id),
        hugetlb_flag: page.map(|page| libc::MFD_HUGETLB | page.ilog2() << libc::MFD_HUGE_SHIFT),
        mode: Some(live.stat.st_mode),
    };
    Ok((id, entry))
}

/// Makes memfds and fills them. Seals come last, when nothing has to be written any more.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let mut made: BTreeMap<u64, OwnedFd> = BTreeMap::new();
    for e in opener.of(FdTypes::Memfd).filter_map(|e| e.memfd.as_ref()) {
        let inode = u64::from(e.inode_id);
        if let std::collections::btree_map::Entry::Vacant(slot) = made.entry(inode) {
            let entry = opener.restore.model.memfds.iter().find(|m| m.inode_id == inode);
            let entry = entry.ok_or_else(|| Error::new(format!("the images lack memfd {inode}")))?;
            let file =
                slot.insert(make(opener.restore, entry).map_err(|err| err.path(path_of(&entry.name)))?);
            let file = file
                .try_clone()
                .during("cannot duplicate a memfd", || "fcntl(_, F_DUPFD_CLOEXEC, 0)".into())?;
            opener.files.seals.push((file, entry.seals));
        }
        let Some(memory) = made.get(&inode) else { continue };
        let file = reopen(memory.as_fd(), regular::open_flags(e.flags))?;
        regular::seek(&file, &RegFileEntry { pos: e.pos, flags: e.flags, ..RegFileEntry::default() })?;
        opener.put_owned(e.id, file, &e.fown, e.flags);
    }
    Ok(())
}

fn make(restore: &Restore<'_>, entry: &MemfdInodeEntry) -> Result<OwnedFd> {
    let what = "cannot make a memfd";
    let huge = entry.hugetlb_flag.unwrap_or(0);
    if huge & !HUGE != 0 || (huge != 0 && huge & libc::MFD_HUGETLB == 0) {
        return Err(Error::new(format!("a memfd has the pages {huge:#x}, which are of no size")));
    }
    let name =
        CString::new(entry.name.as_slice()).map_err(|_| Error::new("a memfd's name contains a zero byte"))?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | MFdFlags::from_bits_retain(huge);
    let file =
        memfd_create(name.as_c_str(), flags).during(what, || format!("memfd_create({name:?}, {flags:?})"))?;
    let size =
        i64::try_from(entry.size).map_err(|_| Error::new(format!("a memfd of {} bytes", entry.size)))?;
    ftruncate(&file, size).during(what, || format!("ftruncate(_, {size})"))?;
    let file = File::from(file);
    if restore.images.exists(&format!("pagemap-shmem-{}.img", entry.shmid)) {
        shmem::fill(restore.images, u64::from(entry.shmid), &file)?;
    }
    if let Some(mode) = entry.mode {
        fchmod(&file, Mode::from_bits_truncate(mode & 0o7777))
            .during(what, || format!("fchmod(_, {mode:o})"))?;
    }
    fchown(&file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
        .during(what, || format!("fchown(_, {}, {})", entry.uid, entry.gid))?;
    Ok(file.into())
}

/// Seals a memfd, once everything that wrote into it or mapped it writable has done so.
pub fn seal(file: &OwnedFd, seals: u32) -> Result<()> {
    if seals == 0 {
        return Ok(());
    }
    let flags = SealFlag::from_bits_retain(seals.cast_signed());
    fcntl(file, FcntlArg::F_ADD_SEALS(flags))
        .during("cannot seal a memfd", || format!("fcntl(_, F_ADD_SEALS, {flags:?})"))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memfd_is_told_from_a_file_of_that_name() {
        let file = memfd_create(c"some name", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let mut live = Live::own(file, 1).unwrap();
        assert!(is(&live));
        assert_eq!(live.undeleted().0.to_str(), Some("/memfd:some name"));
        live.stat.st_dev += 1;
        assert!(!is(&live));
    }

    #[test]
    fn seals_are_put_on() {
        let file = memfd_create(c"x", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        seal(&file, libc::F_SEAL_GROW as u32).unwrap();
        assert_eq!(fcntl(&file, FcntlArg::F_GET_SEALS).unwrap(), libc::F_SEAL_GROW);
        assert!(ftruncate(&file, 5).is_err());
    }
}
