//! Anonymous memory of this process, page aligned: mmap(2).

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::slice;

use nix::fcntl::{OFlag, open};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::sys::stat::Mode;

/// A mapping that is this value's alone, zero at first, unmapped when it is dropped.
#[derive(Debug)]
pub struct Anonymous {
    at: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

// SAFETY: the mapping belongs to the value as the memory of a boxed slice does.
unsafe impl Send for Anonymous {}

impl Anonymous {
    /// Private memory of `len` bytes.
    pub fn private(len: NonZeroUsize) -> nix::Result<Self> {
        Self::map(len, MapFlags::MAP_PRIVATE)
    }

    /// Private memory of `len` bytes in huge pages where the kernel has them: cheaper to fill for the first time.
    pub fn buffer(len: NonZeroUsize) -> nix::Result<Self> {
        let buffer = Self::private(len)?;
        // SAFETY: the range is one mapping of this value; the advice changes nothing but its page size.
        let _ = unsafe { madvise(buffer.at, len.get(), MmapAdvise::MADV_HUGEPAGE) };
        Ok(buffer)
    }

    fn map(len: NonZeroUsize, kind: MapFlags) -> nix::Result<Self> {
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other.
        let at = unsafe { mmap_anonymous(None, len, prot, kind)? };
        Ok(Self { at, len })
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    /// Its contents.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` bytes at `at` are mapped, initialised, and borrowed with `self`.
        unsafe { slice::from_raw_parts(self.at.as_ptr().cast(), self.len.get()) }
    }

    /// Its contents, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.at.as_ptr().cast(), self.len.get()) }
    }

    /// Gives pages back, for tests of what notices.
    #[cfg(test)]
    pub fn give_back(&mut self, offset: usize, len: usize) {
        assert!(offset + len <= self.len.get());
        // SAFETY: the range is within the mapping, borrowed mutably, and reads as zeros afterwards.
        let done = unsafe { madvise(self.at.byte_add(offset), len, MmapAdvise::MADV_DONTNEED) };
        assert_eq!(done, Ok(()));
    }

    /// Installs guard pages, for tests of what finds them. Touching them afterwards kills the test.
    #[cfg(test)]
    pub fn guard(&self, offset: usize, len: usize) -> bool {
        const MADV_GUARD_INSTALL: i32 = 102;
        assert!(offset + len <= self.len.get());
        // SAFETY: the range is within the mapping.
        unsafe { libc::madvise(self.at.as_ptr().byte_add(offset), len, MADV_GUARD_INSTALL) == 0 }
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nothing can borrow it any more.
        let _ = unsafe { munmap(self.at, self.len.get()) };
    }
}

/// A descriptor of new shared anonymous memory, the same thing that `mmap(MAP_SHARED | MAP_ANONYMOUS)` makes, by which
/// several processes can map it. Needs CAP_CHECKPOINT_RESTORE. `huge`: `MAP_HUGETLB` and the size of its pages, of which
/// `len` is a multiple; 0 for ordinary ones.
pub fn shared_anonymous(len: NonZeroUsize, huge: i32) -> nix::Result<OwnedFd> {
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE | MapFlags::from_bits_retain(huge);
    let mapping = Anonymous::map(len, flags)?;
    let end = mapping.address() + len.get().next_multiple_of(4096) as u64;
    let path = format!("/proc/self/map_files/{:x}-{end:x}", mapping.address());
    open(path.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn shared_anonymous_memory_is_what_mmap_makes() {
        let file = File::from(shared_anonymous(NonZeroUsize::new(3 * 4096).unwrap(), 0).unwrap());
        assert_eq!(file.metadata().unwrap().size(), 3 * 4096);
        file.write_all_at(b"kept", 8192).unwrap();
        let mut back = [0; 4];
        file.read_exact_at(&mut back, 8192).unwrap();
        assert_eq!(&back, b"kept");
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        assert_eq!(link.to_str(), Some("/dev/zero (deleted)"));
    }
}
