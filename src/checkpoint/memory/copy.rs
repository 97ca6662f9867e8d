//! Moving pages between a process and a file, in large pieces and, where there is enough to do, on two threads.
//!
//! ```text
//!   ranges of the process  ██ ███ █ ████ ...      cut into pieces of at most 512 KiB
//!                           │   │ │   │
//!                  process_vm_readv (to a buffer that stays in the cache)
//!                           ▼   ▼ ▼   ▼
//!   pages-N.img            █████████████ ...      one after the other
//! ```

use std::fs::File;
use std::io::IoSliceMut;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::memory::pages::PAGE;
use crate::checkpoint::progress::Bar;
use crate::sys::fcntl::begin_writing;
use crate::sys::memory::Anonymous;

/// Bytes moved at once: two buffers of this size, and what the kernel touches besides, stay in the processors' caches.
pub const PIECE: usize = 512 << 10;
/// Ranges read at once: `IOV_MAX` is 1024.
const RANGES: usize = 512;
/// From how many bytes on a second thread pays.
const LARGE: u64 = 16 << 20;

/// A part of the work: some ranges, and where in the file their bytes go.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Addresses in the process.
    pub ranges: Vec<Range<u64>>,
    /// Position in the file.
    pub offset: u64,
    /// Sum of the ranges.
    pub len: usize,
}

/// A range of addresses, and where in the file its bytes go.
pub type Placed = (Range<u64>, u64);

/// Places ranges one behind the other, the first at `offset`.
pub fn place(ranges: impl IntoIterator<Item = Range<u64>>, mut offset: u64) -> impl Iterator<Item = Placed> {
    ranges.into_iter().map(move |range| {
        let at = offset;
        offset += range.end - range.start;
        (range, at)
    })
}

/// Cuts ranges into pieces. A piece goes on only where the file does.
pub fn pieces(ranges: impl IntoIterator<Item = Placed>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (mut range, mut offset) in ranges {
        while range.start < range.end {
            let goes_on = |last: &Piece| {
                let end = last.offset + last.len as u64;
                last.len < PIECE && last.ranges.len() < RANGES && end == offset
            };
            if !pieces.last().is_some_and(goes_on) {
                pieces.push(Piece { ranges: Vec::new(), offset, len: 0 });
            }
            let Some(piece) = pieces.last_mut() else { break };
            let room = PIECE - piece.len;
            let part = usize::try_from(range.end - range.start).unwrap_or(PIECE).min(room);
            piece.ranges.push(range.start..range.start + part as u64);
            piece.len += part;
            offset += part as u64;
            range.start += part as u64;
        }
    }
    pieces
}

/// Runs `work` on every piece, on two threads when there are two processors and much to do. Each thread has a buffer
/// of at most [`PIECE`] bytes. The first error ends both.
pub fn each(pieces: &[Piece], work: impl Fn(&Piece, &mut [u8]) -> Result<()> + Sync) -> Result<()> {
    let total: u64 = pieces.iter().map(|p| p.len as u64).sum();
    let next = AtomicUsize::new(0);
    let bar = Bar::new(total);
    let run = || -> Result<()> {
        let longest = pieces.iter().map(|piece| piece.len).max().and_then(NonZeroUsize::new);
        let Some(size) = longest else { return Ok(()) };
        let mut buffer = Anonymous::buffer(size)
            .during("cannot allocate a buffer", || format!("mmap(NULL, {size}, ...)"))?;
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(piece, &mut buffer.as_mut_slice()[..piece.len]).inspect_err(|_| {
                next.store(pieces.len(), Ordering::Relaxed);
            })?;
            if let Some(bar) = &bar {
                bar.add(piece.len);
            }
        }
        Ok(())
    };
    if total < LARGE || thread::available_parallelism().is_ok_and(|n| n.get() < 2) {
        return run();
    }
    thread::scope(|scope| {
        let other = scope.spawn(run);
        let mine = run();
        let theirs =
            other.join().unwrap_or_else(|_| Err(Error::new("a thread that copied pages has failed")));
        mine.and(theirs)
    })
}

/// The memory of a process, for reading. Without PROT_READ the quick way fails, and `/proc/PID/mem` serves.
pub struct Memory {
    pid: i32,
    mem: File,
    sharing: Sharing,
}

/// Whether the pages of a process are those of another one, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// They are its own.
    Own,
    /// It is a copy. process_vm_readv(2) pins pages, and since Linux 5.19 pinning a page that is shared by
    /// copy-on-write copies it first: ten times the work, and twice the memory. `/proc/PID/mem` only looks.
    Shared,
    /// They are its own, and it runs: what it unmaps meanwhile reads as zeros.
    Running,
}

impl Memory {
    /// The memory of a process that this one traces.
    pub fn open(pid: i32, sharing: Sharing) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        let mem = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .during("cannot open the memory", || format!("open({path:?}, O_RDWR)"))?;
        Ok(Self { pid, mem, sharing })
    }

    /// The memory of a process that runs; None when it has ended.
    pub fn of_running(pid: i32) -> Result<Option<Self>> {
        match Self::open(pid, Sharing::Running) {
            Err(e) if matches!(e.errno(), Some(Errno::ENOENT | Errno::ESRCH)) => Ok(None),
            opened => opened.map(Some),
        }
    }

    /// Reads all of the ranges, one after the other, into `buffer`, which is exactly as large.
    pub fn read(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<()> {
        let remote: Vec<RemoteIoVec> = ranges.iter().filter_map(remote).collect();
        let local = &mut [IoSliceMut::new(buffer)];
        // A short read says nothing: it ends where the first page cannot be read this way.
        let mut done = match self.sharing {
            Sharing::Own | Sharing::Running => {
                process_vm_readv(Pid::from_raw(self.pid), local, &remote).unwrap_or(0)
            }
            Sharing::Shared => 0,
        };
        let mut rest = buffer;
        for range in ranges {
            let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX).min(rest.len());
            let (part, others) = rest.split_at_mut(len);
            rest = others;
            let have = done.min(len);
            done -= have;
            if have < len {
                let at = range.start + have as u64;
                self.read_slowly(at, &mut part[have..])?;
            }
        }
        Ok(())
    }

    fn read_slowly(&self, at: u64, part: &mut [u8]) -> Result<()> {
        let len = part.len();
        if self.sharing != Sharing::Running {
            return self
                .mem
                .read_exact_at(part, at)
                .during("cannot read the memory", || format!("pread(mem, {len}, {at:#x})"));
        }
        for (page, at) in part.chunks_mut(PAGE as usize).zip((at..).step_by(PAGE as usize)) {
            if self.mem.read_exact_at(page, at).is_err() {
                page.fill(0);
            }
        }
        Ok(())
    }

    /// Writes `bytes` at `address`, whatever the protection there, as long as the mapping is private.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.mem
            .write_all_at(bytes, address)
            .during("cannot write the memory", || format!("pwrite(mem, {}, {address:#x})", bytes.len()))
    }
}

fn remote(range: &Range<u64>) -> Option<RemoteIoVec> {
    Some(RemoteIoVec {
        base: usize::try_from(range.start).ok()?,
        len: usize::try_from(range.end - range.start).ok()?,
    })
}

/// When what is written begins to go to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// At once, while the next piece is copied: somebody will wait until all of it is there, and waits for less. It is no
    /// gain otherwise, for the copy then goes no faster than the disk.
    Now,
    /// When the kernel thinks fit.
    Later,
}

impl Disk {
    /// `sync`: whether somebody will wait for it.
    pub fn of(sync: bool) -> Self {
        if sync { Self::Now } else { Self::Later }
    }
}

/// Copies ranges of a process's memory to their places in `file`.
pub fn to_file(
    pid: i32,
    sharing: Sharing,
    ranges: impl IntoIterator<Item = Placed>,
    file: &File,
    disk: Disk,
) -> Result<()> {
    let memory = Memory::open(pid, sharing)?;
    each(&pieces(ranges), |piece, buffer| {
        memory.read(&piece.ranges, buffer)?;
        file.write_all_at(buffer, piece.offset).during("cannot write the pages", || {
            format!("pwrite(pages, {}, {})", buffer.len(), piece.offset)
        })?;
        if disk == Disk::Now {
            begin_writing(file, piece.offset, buffer.len());
        }
        Ok(())
    })
}

/// As [`to_file`] for a process that runs: it may end at any moment.
pub fn from_running(
    pid: i32,
    ranges: impl IntoIterator<Item = Placed>,
    file: &File,
    disk: Disk,
) -> Result<()> {
    match to_file(pid, Sharing::Running, ranges, file, disk) {
        Err(e) if matches!(e.errno(), Some(Errno::ENOENT | Errno::ESRCH)) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_all_ranges_in_order() {
        let big = 0x10_0000..0x10_0000 + 2 * PIECE as u64 + 4096;
        let cut = pieces(place([0x1000..0x2000, big.clone(), 0x9000_0000..0x9000_1000], 8192));
        let total: usize = cut.iter().map(|p| p.len).sum();
        assert_eq!(total, 2 * PIECE + 3 * 4096);
        let mut offset = 8192;
        for piece in &cut {
            assert_eq!(piece.offset, offset);
            assert!(piece.len <= PIECE);
            assert_eq!(piece.len as u64, piece.ranges.iter().map(|r| r.end - r.start).sum::<u64>());
            offset += piece.len as u64;
        }
        assert_eq!(cut.len(), 3);
        assert_eq!(cut[0].ranges, [0x1000..0x2000, big.start..big.start + PIECE as u64 - 4096]);
    }

    #[test]
    fn many_small_ranges_fit_one_call() {
        let cut = pieces(place((0..1500u64).map(|n| n * 8192..n * 8192 + 4096), 0));
        assert!(cut.iter().all(|p| p.ranges.len() <= RANGES));
        assert_eq!(cut.iter().map(|p| p.ranges.len()).sum::<usize>(), 1500 + 5 - 5);
    }

    #[test]
    fn pieces_end_where_the_file_is_interrupted() {
        let cut = pieces([(0x1000..0x2000, 0), (0x3000..0x4000, 4096), (0x5000..0x6000, 12288)]);
        let found: Vec<_> = cut.iter().map(|p| (p.offset, p.len)).collect();
        assert_eq!(found, [(0, 8192), (12288, 4096)]);
    }

    #[test]
    fn memory_of_this_process_reaches_a_file() {
        let size = NonZeroUsize::new(20 << 20).unwrap();
        let mut memory = Anonymous::private(size).unwrap();
        for (n, page) in memory.as_mut_slice().chunks_mut(4096).enumerate() {
            page[0] = n as u8;
            page[4095] = (n >> 8) as u8;
        }
        let file = tempfile::tempfile().unwrap();
        let (start, end) = (memory.address(), memory.address() + size.get() as u64);
        let ranges = [start..start + 4096, start + 8192..end];
        to_file(std::process::id().cast_signed(), Sharing::Own, place(ranges, 0), &file, Disk::Now).unwrap();
        assert_eq!(file.metadata().unwrap().len(), (20 << 20) - 4096);
        let again = tempfile::tempfile().unwrap();
        let first = [(start..start + 4096, 0)];
        to_file(std::process::id().cast_signed(), Sharing::Shared, first, &again, Disk::Later).unwrap();
        assert_eq!(again.metadata().unwrap().len(), 4096);
        let mut page = [0; 4096];
        for n in 2..(20 << 20) / 4096u64 {
            file.read_exact_at(&mut page, (n - 1) * 4096).unwrap();
            assert_eq!((page[0], page[4095]), (n as u8, (n >> 8) as u8), "page {n}");
        }
    }

    #[test]
    fn the_first_error_ends_the_work() {
        let cut = pieces([(0..200 << 20, 0)]);
        let error = each(&cut, |piece, _| match piece.offset {
            0 => Err(Error::new("broken")),
            _ => Ok(()),
        });
        assert_eq!(error.unwrap_err().to_string(), "broken");
    }
}
