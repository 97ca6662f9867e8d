//! The filler: puts the pages of the images into memory that is already in use.
//!
//! ```text
//!   ┌─> events: fault   the part around the page is filled, who waited goes on
//!   │           fork    the child's memory is one more space, with the same parts left
//!   │           remap, remove, unmap    the table follows
//!   ├── what was touched first after an earlier restore
//!   └── the next piece of what is left, once the restore has let the program go
//! ```
//!
//! One thread, so that events and copies have an order: while an event of an address space is unread the kernel refuses
//! to copy into it, so no page is put where the program has just unmapped or given back memory.

use std::collections::VecDeque;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::memory::lazy::table::Table;
use crate::checkpoint::memory::lazy::touched::Touched;
use crate::checkpoint::memory::pagemap::Run;
use crate::checkpoint::memory::pages::PAGE;
use crate::sys::memory::Anonymous;
use crate::sys::userfaultfd::{self, Event};

/// Bytes filled around a page that somebody waits for.
const AROUND: u64 = 64 << 10;
/// Bytes filled between one look at the events and the next.
const PIECE: u64 = 512 << 10;
/// Pages touched first earlier that are filled, with what lies around them, before the restore lets the program go.
const EARLY: usize = 128;
/// How often the progress is told.
const INTERVAL: Duration = Duration::from_millis(100);

/// An address space that is being filled.
#[derive(Debug)]
pub struct Space {
    /// Its userfaultfd, which does not block.
    pub uffd: OwnedFd,
    /// What is left.
    pub table: Table,
    /// Pages that somebody waits for, and that could not be filled because an event came between.
    pub waiting: Vec<u64>,
    /// The process whose images fill it.
    vpid: i32,
    /// Pages that were touched first after an earlier restore, and come before all that nobody waits for.
    ahead: VecDeque<u64>,
}

impl Space {
    /// A space of which all of `table` is left.
    pub fn new(uffd: OwnedFd, table: Table, vpid: i32) -> Self {
        Self { uffd, table, waiting: Vec::new(), vpid, ahead: VecDeque::new() }
    }
}

/// How a copy has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copied {
    All,
    /// An event has to be read first.
    Interrupted,
    /// The address space is gone.
    Dead,
}

/// Fills all spaces: while nothing has closed the other end of the pipe `hold`, only what somebody waits for, and a little
/// of what was `touched` first earlier. Ends early with an error when `guard`, a pidfd, says that nobody watches over it any
/// more: the spaces are the caller's to close, once nobody can look at what is missing in them.
pub fn run(
    spaces: &mut Vec<Space>,
    files: &[File],
    touched: &mut Touched,
    guard: BorrowedFd<'_>,
    mut hold: Option<BorrowedFd<'_>>,
    mut report: impl FnMut(u64),
) -> Result<()> {
    let size = NonZeroUsize::new(PIECE as usize).ok_or_else(|| Error::new("a buffer of no size"))?;
    let mut buffer =
        Anonymous::buffer(size).during("cannot allocate a buffer", || format!("mmap(NULL, {PIECE}, ...)"))?;
    let buffer = buffer.as_mut_slice();
    let mut told = Instant::now();
    let mut earlier = touched.earlier();
    for space in spaces.iter_mut() {
        space.ahead = earlier.remove(&space.vpid).unwrap_or_default();
    }
    let mut early = EARLY;
    while spaces.iter().any(|space| space.table.bytes() > 0 || !space.waiting.is_empty()) {
        let ready = ready(spaces, guard, hold, early > 0)?;
        for index in ready.spaces {
            events(spaces, index, files, touched, buffer)?;
        }
        if ready.released {
            hold = None;
        }
        for space in spaces.iter_mut() {
            for page in std::mem::take(&mut space.waiting) {
                fault(space, page, files, touched, buffer)?;
            }
        }
        if hold.is_some() && early == 0 {
            continue;
        }
        if let Some(space) = spaces.iter_mut().find(|space| !space.ahead.is_empty()) {
            ahead(space, files, buffer)?;
            early = early.saturating_sub(1);
            continue;
        }
        if hold.is_some() {
            early = 0;
            continue;
        }
        if let Some(space) = spaces.iter_mut().find(|space| space.table.bytes() > 0) {
            if let Some(part) = space.table.first(PIECE) {
                fill(space, part, files, buffer)?;
            }
        }
        if told.elapsed() > INTERVAL {
            report(spaces.iter().map(|space| space.table.bytes()).sum());
            told = Instant::now();
        }
    }
    Ok(())
}

/// What there is to do.
struct Ready {
    /// The spaces that have events.
    spaces: Vec<usize>,
    /// Nothing holds the filler back any more.
    released: bool,
}

/// Looks at the descriptors; while the filler is held back and has nothing to do `early`, waits for one of them.
fn ready(
    spaces: &[Space],
    guard: BorrowedFd<'_>,
    hold: Option<BorrowedFd<'_>>,
    early: bool,
) -> Result<Ready> {
    let mut fds: Vec<PollFd<'_>> =
        vec![PollFd::new(guard, PollFlags::POLLIN), PollFd::new(hold.unwrap_or(guard), PollFlags::POLLIN)];
    fds.extend(spaces.iter().map(|space| PollFd::new(space.uffd.as_fd(), PollFlags::POLLIN)));
    let idle = hold.is_some() && !early && spaces.iter().all(|space| space.waiting.is_empty());
    match poll(&mut fds, if idle { PollTimeout::NONE } else { PollTimeout::ZERO }) {
        Err(Errno::EINTR) => return Ok(Ready { spaces: Vec::new(), released: false }),
        done => done.during("cannot wait for events of the memory", || "poll(uffds)".into())?,
    };
    let any = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
    if fds.first().is_some_and(any) {
        return Err(Error::new("the process that watched over the fill has died"));
    }
    let released = fds.get(1).is_some_and(any);
    let spaces = fds.iter().skip(2).enumerate().filter(|(_, fd)| any(fd)).map(|(index, _)| index).collect();
    Ok(Ready { spaces, released })
}

/// Reads all events of a space.
fn events(
    spaces: &mut Vec<Space>,
    index: usize,
    files: &[File],
    touched: &mut Touched,
    buffer: &mut [u8],
) -> Result<()> {
    loop {
        let Some(space) = spaces.get_mut(index) else { return Ok(()) };
        let event = userfaultfd::event(space.uffd.as_fd())
            .during("cannot read events of the memory", || "read(uffd)".into())?;
        let table = &mut space.table;
        match event {
            None => return Ok(()),
            Some(Event::Fault(page)) => {
                touched.fault();
                fault(space, page & !(PAGE - 1), files, touched, buffer)?;
            }
            Some(Event::Fork(uffd)) => {
                let child = Space::new(uffd, table.clone(), space.vpid);
                spaces.push(child);
            }
            Some(Event::Remap { from, to, len }) => table.remap(from, to, len),
            Some(Event::Remove(start, end) | Event::Unmap(start, end)) => drop(table.cut(&(start..end))),
            Some(Event::Other(number)) => {
                return Err(Error::new(format!("the kernel tells event {number:#x} of the memory")));
            }
        }
    }
}

/// Somebody waits for a page.
fn fault(
    space: &mut Space,
    page: u64,
    files: &[File],
    touched: &mut Touched,
    buffer: &mut [u8],
) -> Result<()> {
    if let Some(part) = space.table.around(page, AROUND) {
        touched.add(space.vpid, page);
        if fill(space, part, files, buffer)? == Copied::Interrupted {
            space.waiting.push(page);
        }
        return Ok(());
    }
    // Never in the images, or given back since, or filled in the meantime.
    match userfaultfd::zero_and_wake(space.uffd.as_fd(), page, PAGE) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(Errno::EAGAIN) => {
            space.waiting.push(page);
            Ok(())
        }
        Err(Errno::EEXIST | Errno::ENOENT) => wake(space, page),
        Err(errno) => Err(Error::new("cannot fill the memory")
            .call(format!("ioctl(uffd, UFFDIO_ZEROPAGE, {{{page:#x}, {PAGE}}})"), errno)),
    }
}

/// Fills the next part that was touched first earlier.
fn ahead(space: &mut Space, files: &[File], buffer: &mut [u8]) -> Result<()> {
    let Some(page) = space.ahead.pop_front() else { return Ok(()) };
    if let Some(part) = space.table.around(page & !(PAGE - 1), AROUND) {
        if fill(space, part, files, buffer)? == Copied::Interrupted {
            space.ahead.push_front(page);
        }
    }
    Ok(())
}

fn wake(space: &Space, page: u64) -> Result<()> {
    userfaultfd::wake(space.uffd.as_fd(), page, PAGE)
        .during("cannot fill the memory", || format!("ioctl(uffd, UFFDIO_WAKE, {{{page:#x}, {PAGE}}})"))
}

/// Fills a part. What an event has kept from being filled is still in the table afterwards.
fn fill(space: &mut Space, part: Run, files: &[File], buffer: &mut [u8]) -> Result<Copied> {
    let len = usize::try_from(part.range.end - part.range.start).unwrap_or(0).min(buffer.len());
    let bytes = &mut buffer[..len];
    let file = files.get(part.file).ok_or_else(|| Error::new("the pages are nowhere"))?;
    file.read_exact_at(bytes, part.offset)
        .during("cannot read the pages", || format!("pread(pages, {len}, {})", part.offset))?;
    let (done, how) = copy(space, part.range.start, bytes)?;
    match how {
        Copied::Dead => drop(space.table.cut(&(0..u64::MAX))),
        _ => drop(space.table.cut(&(part.range.start..part.range.start + done as u64))),
    }
    Ok(how)
}

/// Copies pages to where they are missing. A page that is there is the program's own by now.
fn copy(space: &Space, start: u64, bytes: &[u8]) -> Result<(usize, Copied)> {
    let mut done = 0;
    while done < bytes.len() {
        let at = start + done as u64;
        match userfaultfd::copy_and_wake(space.uffd.as_fd(), at, &bytes[done..]) {
            Ok(0) => return Ok((done, Copied::Interrupted)),
            Ok(copied) => done += copied,
            Err(Errno::EEXIST) => {
                wake(space, at)?;
                done += PAGE as usize;
            }
            // A child does not inherit everything.
            Err(Errno::ENOENT) => done += PAGE as usize,
            Err(Errno::ESRCH) => return Ok((done, Copied::Dead)),
            Err(errno) => {
                let call = format!("ioctl(uffd, UFFDIO_COPY, {{{at:#x}, {}}})", bytes.len() - done);
                return Err(Error::new("cannot fill the memory").call(call, errno));
            }
        }
    }
    Ok((done, Copied::All))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pidfd;

    /// Pages 0 to 63 have a byte each, page 64 is in no image: whoever reads gets them, whether before or after their turn.
    #[test]
    fn memory_is_filled_while_it_is_read() {
        const PAGES: usize = 65;
        let file = tempfile::tempfile().unwrap();
        let contents: Vec<u8> = (0..64u8).flat_map(|page| [page + 1; PAGE as usize]).collect();
        file.write_all_at(&contents, 0).unwrap();
        let memory = Anonymous::private(NonZeroUsize::new(PAGES * PAGE as usize).unwrap()).unwrap();
        let start = memory.address();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | userfaultfd::UFFD_USER_MODE_ONLY;
        let uffd = userfaultfd::open(flags).unwrap();
        userfaultfd::api(uffd.as_fd(), 0).unwrap();
        userfaultfd::register_missing(uffd.as_fd(), start, PAGES as u64 * PAGE).unwrap();
        let mut table = Table::default();
        table.add(Run { range: start..start + 64 * PAGE, file: 0, offset: 0 });
        let handle = pidfd::open(std::process::id().cast_signed(), 0).unwrap();
        let (hold, release) = nix::unistd::pipe().unwrap();
        let filler = std::thread::spawn(move || {
            let mut touched = Touched::default();
            let mut spaces = vec![Space::new(uffd, table, 1)];
            run(&mut spaces, &[file], &mut touched, handle.as_fd(), Some(hold.as_fd()), |_| {})?;
            Ok::<_, Error>(touched)
        });
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let first_is_there = || {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, start / PAGE * 8).unwrap();
            u64::from_ne_bytes(entry) >> 63 == 1
        };
        assert_eq!(memory.as_slice()[63 * PAGE as usize], 64);
        assert!(!first_is_there(), "only what is waited for comes before the filler is let go");
        drop(release);
        // Backwards, as the filler does not go.
        let seen: Vec<u8> = (0..64).rev().map(|page| memory.as_slice()[page * PAGE as usize + 100]).collect();
        assert_eq!(seen, (0..64u8).rev().map(|page| page + 1).collect::<Vec<_>>());
        filler.join().unwrap().unwrap();
        assert!(first_is_there());
        assert_eq!(memory.as_slice()[64 * PAGE as usize], 0);
    }

    #[test]
    fn the_end_of_the_guard_ends_the_fill() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let handle = pidfd::open(child.id().cast_signed(), 0).unwrap();
        child.wait().unwrap();
        let memory = Anonymous::private(NonZeroUsize::new(PAGE as usize).unwrap()).unwrap();
        let uffd =
            userfaultfd::open(libc::O_CLOEXEC | libc::O_NONBLOCK | userfaultfd::UFFD_USER_MODE_ONLY).unwrap();
        userfaultfd::api(uffd.as_fd(), 0).unwrap();
        let mut table = Table::default();
        table.add(Run { range: memory.address()..memory.address() + PAGE, file: 0, offset: 0 });
        let mut spaces = vec![Space::new(uffd, table, 1)];
        let error = run(&mut spaces, &[], &mut Touched::default(), handle.as_fd(), None, |_| {})
            .unwrap_err()
            .to_string();
        assert!(error.contains("died"), "{error}");
        assert_eq!(spaces[0].table.bytes(), PAGE, "still there, for the caller to close");
    }
}
