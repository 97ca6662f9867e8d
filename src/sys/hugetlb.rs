//! Files of hugetlbfs, which read(2) reads and write(2) does not write: memory of huge pages that processes share.
//!
//! Bytes go into them by way of a mapping, with process_vm_writev(2): where the machine runs out of huge pages that is an
//! error, and no SIGBUS.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::statfs::fstatfs;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;

/// The magic number of the file system.
pub const MAGIC: i64 = 0x9584_58f6;

/// Bytes that are gathered before they are written.
const BUFFER: usize = 1 << 20;

/// The size of the pages of a file, if it is one of hugetlbfs.
pub fn page_size(file: impl AsFd) -> nix::Result<Option<u64>> {
    let stat = fstatfs(file)?;
    let size = u64::try_from(stat.block_size()).ok().filter(|size| size.is_power_of_two());
    Ok(size.filter(|_| stat.filesystem_type().0 == MAGIC))
}

/// A file to be filled, whether it is one of hugetlbfs or not.
#[derive(Debug)]
pub struct Target<'f> {
    file: &'f File,
    page: Option<u64>,
}

impl<'f> Target<'f> {
    /// That file, open for reading and writing.
    pub fn new(file: &'f File) -> nix::Result<Self> {
        Ok(Self { file, page: page_size(file)? })
    }

    /// Whether it has huge pages.
    pub fn is_huge(&self) -> bool {
        self.page.is_some()
    }

    /// Writes all of it. A file of hugetlbfs must be large enough.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self.page {
            None => self.file.write_all_at(bytes, offset),
            Some(page) => write_at(self.file, page, bytes, offset).map_err(io::Error::from),
        }
    }

    /// What writes to it from `at` on, and leaves zeros out where they cost huge pages: the file must be new.
    pub fn from(&self, at: u64) -> impl Write {
        io::BufWriter::with_capacity(BUFFER, Filler { target: self, at })
    }
}

struct Filler<'t> {
    target: &'t Target<'t>,
    at: u64,
}

impl Write for Filler<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.target.is_huge() || bytes.iter().any(|byte| *byte != 0) {
            self.target.write_all_at(bytes, self.at)?;
        }
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_at(file: &File, page: u64, bytes: &[u8], offset: u64) -> nix::Result<()> {
    let start = offset / page * page;
    let end = offset.checked_add(bytes.len() as u64).and_then(|end| end.checked_next_multiple_of(page));
    let len = end.ok_or(Errno::EFBIG)? - start;
    let (from, long) = (i64::try_from(start), i64::try_from(len));
    let (Ok(from), Ok(long)) = (from, long) else { return Err(Errno::EFBIG) };
    let Some(len) = usize::try_from(len).ok().and_then(NonZeroUsize::new) else { return Ok(()) };
    // Says by its errno that there are no pages, which a fault would not.
    fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, long)?;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // No reservation is to stay with the file.
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no other, and no reference into it is made.
    let at = unsafe { mmap(None, len, prot, flags, file, from)? };
    let base = at.as_ptr() as usize + usize::try_from(offset - start).unwrap_or(0);
    let to = [RemoteIoVec { base, len: bytes.len() }];
    let written = process_vm_writev(Pid::this(), &[IoSlice::new(bytes)], &to);
    // SAFETY: the mapping is this function's alone.
    let _ = unsafe { munmap(at, len.get()) };
    if written? == bytes.len() { Ok(()) } else { Err(Errno::EFAULT) }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn files_of_huge_pages_are_told_and_filled() {
        let plain = File::from(memfd_create(c"plain", MFdFlags::MFD_CLOEXEC).unwrap());
        assert_eq!(page_size(&plain).unwrap(), None);
        let target = Target::new(&plain).unwrap();
        let mut to = target.from(3);
        to.write_all(b"here").unwrap();
        drop(to);
        assert_eq!(plain.metadata().unwrap().len(), 7);

        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB;
        let Ok(huge) = memfd_create(c"huge", flags).map(File::from) else { return };
        let page = page_size(&huge).unwrap().unwrap();
        huge.set_len(3 * page).unwrap();
        let target = Target::new(&huge).unwrap();
        match target.write_all_at(b"across", 2 * page - 3) {
            Ok(()) => {
                let mut back = [0; 6];
                huge.read_exact_at(&mut back, 2 * page - 3).unwrap();
                assert_eq!(&back, b"across");
            }
            Err(e) => {
                let out = [libc::ENOMEM, libc::ENOSPC];
                assert!(e.raw_os_error().is_some_and(|errno| out.contains(&errno)), "{e}");
            }
        }
    }
}
