//! io_uring_setup(2), io_uring_enter(2), io_uring_register(2) and the memory of a ring, as far as rings of other
//! processes are looked at and made again.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Where mmap(2) finds the two queues.
pub const OFF_QUEUES: i64 = 0;
/// Where mmap(2) finds the requests.
pub const OFF_REQUESTS: i64 = 0x1000_0000;
/// Size of a request.
pub const REQUEST: usize = 64;
/// Size of a completion.
pub const COMPLETION: usize = 16;
const PAGE: usize = 4096;

/// The size of the completion queue is given.
pub const SETUP_CQSIZE: u32 = 1 << 3;
/// One thread submits all.
pub const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
/// Completions are posted when they are waited for.
pub const SETUP_DEFER_TASKRUN: u32 = 1 << 13;
/// The submission queue is the requests, in their order.
pub const SETUP_NO_SQARRAY: u32 = 1 << 16;
/// Completions are waited for.
pub const ENTER_GETEVENTS: u32 = 1 << 0;
/// The wait has a `struct io_uring_getevents_arg`.
pub const ENTER_EXT_ARG: u32 = 1 << 3;
/// Operations of io_uring_register(2).
pub const REGISTER_BUFFERS: u32 = 0;
/// See there.
pub const REGISTER_FILES: u32 = 2;
/// See there.
pub const REGISTER_EVENTFD: u32 = 4;
/// See there. Since Linux 5.18.
pub const REGISTER_RING_FDS: u32 = 20;
/// See there. Since Linux 6.8.
pub const REGISTER_PBUF_STATUS: u32 = 26;
/// See there. Since Linux 6.9.
pub const REGISTER_NAPI: u32 = 27;
/// See there. Since Linux 6.13.
pub const REGISTER_RESIZE_RINGS: u32 = 33;

/// `struct io_uring_params`. The offsets are those of the fields in the memory of the queues.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// Requests that the submission queue holds.
    pub sq_entries: u32,
    /// Completions that the other queue holds.
    pub cq_entries: u32,
    /// `SETUP_*`
    pub flags: u32,
    unused: [u32; 7],
    /// head, tail, mask, entries, flags, dropped, array, unused
    pub sq_off: [u32; 8],
    sq_addr: u64,
    /// head, tail, mask, entries, overflow, completions, flags, unused
    pub cq_off: [u32; 8],
    cq_addr: u64,
}

impl Params {
    /// Asks for queues of these sizes.
    pub fn new(sq_entries: u32, cq_entries: u32, flags: u32) -> Self {
        Self { sq_entries, cq_entries, flags: flags | SETUP_CQSIZE, ..Self::default() }
    }
}

/// Makes a ring of this process's own.
pub fn setup(entries: u32, params: &mut Params) -> nix::Result<OwnedFd> {
    // SAFETY: `params` has the layout of struct io_uring_params; the kernel has just made the descriptor.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_io_uring_setup, entries, std::ptr::from_mut(params)))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Whether the ring has been started: EBADFD if not. Nothing is submitted.
pub fn enter(ring: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: numbers only.
    let done = unsafe {
        libc::syscall(libc::SYS_io_uring_enter, ring.as_raw_fd(), 0, 0, 0, std::ptr::null::<u8>(), 0)
    };
    Errno::result(done).map(drop)
}

/// io_uring_register(2) with one argument: `bytes`, or, without any, an address that nothing is at.
pub fn register(ring: BorrowedFd<'_>, operation: u32, bytes: Option<&mut [u8]>) -> nix::Result<()> {
    let argument = bytes.map_or(NOWHERE as *mut u8, <[u8]>::as_mut_ptr);
    // SAFETY: the kernel reads and writes one structure of the operation, for which the caller gives room, or fails.
    let done =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), operation, argument, 1) };
    Errno::result(done).map(drop)
}

/// An address below all that can be mapped.
pub const NOWHERE: u64 = 8;

/// A part of a ring's memory, mapped here. Its owner may change it at any time.
#[derive(Debug)]
pub struct Region {
    at: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

impl Region {
    /// Maps `len` bytes. None: the ring has less there.
    pub fn map(ring: impl AsFd, offset: i64, len: usize) -> nix::Result<Option<Self>> {
        let len = NonZeroUsize::new(len.next_multiple_of(PAGE)).ok_or(Errno::EINVAL)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other.
        let at = match unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, ring, offset) } {
            Ok(at) => at,
            Err(Errno::EINVAL) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let region = Self { at, len };
        // Some kernels map more than there is. All that there is has been mapped at once.
        let mut there = vec![0u8; len.get() / PAGE];
        // SAFETY: `there` has a byte for each page of the mapping.
        let asked = unsafe { libc::mincore(at.as_ptr(), len.get(), there.as_mut_ptr()) };
        Errno::result(asked)?;
        Ok(there.iter().all(|page| page & 1 == 1).then_some(region))
    }

    /// A copy of the first `len` bytes.
    pub fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len.min(self.len.get())];
        // SAFETY: so many bytes are mapped, and the pages are there. Both have other owners.
        unsafe { std::ptr::copy(self.at.as_ptr().cast::<u8>(), bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    /// Writes from the first byte on.
    pub fn write(&self, bytes: &[u8]) {
        let len = bytes.len().min(self.len.get());
        // SAFETY: as in `bytes`.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.at.as_ptr().cast::<u8>(), len) };
    }

    /// A number of 32 bits. 0 where there is none.
    pub fn word(&self, at: u32) -> u32 {
        // SAFETY: the address is aligned and within the mapping.
        self.place(at).map_or(0, |place| unsafe { place.read_volatile() })
    }

    /// Sets a number of 32 bits, if there is one.
    pub fn set_word(&self, at: u32, value: u32) {
        if let Some(place) = self.place(at) {
            // SAFETY: the address is aligned and within the mapping.
            unsafe { place.write_volatile(value) };
        }
    }

    fn place(&self, at: u32) -> Option<*mut u32> {
        let at = at as usize;
        let fits = at.is_multiple_of(4) && at + 4 <= self.len.get();
        // SAFETY: the offset is within the mapping.
        fits.then(|| unsafe { self.at.as_ptr().byte_add(at).cast() })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nothing has borrowed from it.
        let _ = unsafe { munmap(self.at, self.len.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_has_what_it_says() {
        let mut params = Params { flags: SETUP_CQSIZE, cq_entries: 32, ..Params::default() };
        // Not compiled in, or switched off.
        let Ok(ring) = setup(4, &mut params) else { return };
        assert_eq!((params.sq_entries, params.cq_entries), (4, 32));
        let queues = Region::map(&ring, OFF_QUEUES, PAGE).unwrap().unwrap();
        assert_eq!((queues.word(params.sq_off[2]), queues.word(params.cq_off[3])), (3, 32));
        assert_eq!(queues.word(u32::MAX), 0);
        queues.set_word(params.cq_off[0], 7);
        assert_eq!(queues.bytes(PAGE)[params.cq_off[0] as usize], 7);
        assert!(Region::map(&ring, OFF_REQUESTS, PAGE).unwrap().is_some());
        assert!(Region::map(&ring, OFF_REQUESTS, 2 * PAGE).unwrap().is_none());
        assert_eq!(enter(ring.as_fd()), Ok(()));
        assert_eq!(register(ring.as_fd(), REGISTER_EVENTFD, None), Err(Errno::EFAULT));
    }
}
