//! What a program touches first after a lazy restore, for the next one: `stasis-touched.json` beside the images.
//!
//! ```text
//!   {"faults": 3, "pages": [[1, 140001000], [1, 140009000], [7, 94003000]]}      process and address, in order
//! ```
//!
//! It is a hint and no part of the images: where it is missing, wrong or hostile, memory is filled in another order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::{Deserialize, Serialize};

use crate::checkpoint::image::TOUCHED;

/// Pages that are recorded at most: with what lies around each, 256 MiB.
const MOST: usize = 4096;
/// Bytes of the file that are read at most.
const SIZE: u64 = 256 << 10;
/// How long pages count as touched first.
const FIRST: Duration = Duration::from_secs(10);

/// What the file says.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    /// How often the program waited for memory, the last time.
    faults: u64,
    pages: Vec<(i32, u64)>,
}

/// What has been touched first, earlier and in this restore.
#[derive(Debug)]
pub struct Touched {
    record: Record,
    known: BTreeSet<(i32, u64)>,
    began: Instant,
}

impl Default for Touched {
    fn default() -> Self {
        Self::of(Vec::new())
    }
}

impl Touched {
    /// What was recorded in a directory of images; nothing where that cannot be read.
    pub fn read(dir: BorrowedFd<'_>) -> Self {
        Self::of(load(dir).unwrap_or_default().pages)
    }

    pub(super) fn of(mut pages: Vec<(i32, u64)>) -> Self {
        pages.truncate(MOST);
        let known = pages.iter().copied().collect();
        Self { record: Record { faults: 0, pages }, known, began: Instant::now() }
    }

    /// The pages of each process that were touched first earlier, in order.
    pub fn earlier(&self) -> BTreeMap<i32, VecDeque<u64>> {
        let mut earlier: BTreeMap<i32, VecDeque<u64>> = BTreeMap::new();
        for &(vpid, page) in &self.record.pages {
            earlier.entry(vpid).or_default().push_back(page);
        }
        earlier
    }

    /// The program waits for memory.
    pub fn fault(&mut self) {
        self.record.faults += 1;
    }

    /// A page that the images have, and that somebody has waited for.
    pub fn add(&mut self, vpid: i32, page: u64) {
        let first = self.record.pages.len() < MOST && self.began.elapsed() < FIRST;
        if first && self.known.insert((vpid, page)) {
            self.record.pages.push((vpid, page));
        }
    }

    /// Puts the file in the place of the one before, in one step. A directory that cannot be written to, or is gone, has none.
    pub fn write(&self, dir: BorrowedFd<'_>) {
        let new = format!("{TOUCHED}.new");
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let written = (|| {
            let text = serde_json::to_vec(&self.record).map_err(|_| Errno::EIO)?;
            let _ = unlinkat(dir, new.as_str(), UnlinkatFlags::NoRemoveDir);
            let mut file = File::from(openat(dir, new.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
            file.write_all(&text).map_err(|_| Errno::EIO)?;
            renameat(dir, new.as_str(), dir, TOUCHED)
        })();
        if written.is_err() {
            let _ = unlinkat(dir, new.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

fn load(dir: BorrowedFd<'_>) -> Option<Record> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let file = File::from(openat(dir, TOUCHED, flags, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    file.take(SIZE).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn directory() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        let opened = File::open(dir.path()).unwrap();
        (dir, opened)
    }

    #[test]
    fn what_is_written_is_read_and_added_to() {
        let (path, dir) = directory();
        let mut first = Touched::read(dir.as_fd());
        assert!(first.earlier().is_empty());
        for (vpid, page) in [(1, 0x9000), (7, 0x1000), (1, 0x2000), (1, 0x9000)] {
            first.fault();
            first.add(vpid, page);
        }
        first.write(dir.as_fd());
        let text = std::fs::read_to_string(path.path().join(TOUCHED)).unwrap();
        assert_eq!(text, r#"{"faults":4,"pages":[[1,36864],[7,4096],[1,8192]]}"#);
        let mut second = Touched::read(dir.as_fd());
        assert_eq!(second.earlier(), BTreeMap::from([(1, [0x9000, 0x2000].into()), (7, [0x1000].into())]));
        second.fault();
        second.add(1, 0x3000);
        second.write(dir.as_fd());
        let third = Touched::read(dir.as_fd());
        assert_eq!(
            third.earlier()[&1],
            [0x9000, 0x2000, 0x3000],
            "what was filled first stays in the record"
        );
        let names: Vec<_> = std::fs::read_dir(path.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [TOUCHED]);
    }

    #[test]
    fn what_is_not_understood_says_nothing() {
        let (path, dir) = directory();
        let file = path.path().join(TOUCHED);
        let long = format!(r#"{{"faults":0,"pages":[{}[1,4096]]}}"#, "[1,4096],".repeat(1 << 16));
        let texts = ["", "{", "[]", r#"{"faults":-1,"pages":[]}"#, r#"{"faults":0,"pages":[[1]]}"#, &long];
        for text in texts {
            std::fs::write(&file, text).unwrap();
            assert!(Touched::read(dir.as_fd()).earlier().is_empty(), "{text:.50}");
        }
        let pages: Vec<(i32, u64)> = (0..2 * MOST as u64).map(|page| (1, page << 12)).collect();
        std::fs::write(&file, serde_json::to_string(&Record { faults: 0, pages }).unwrap()).unwrap();
        assert_eq!(Touched::read(dir.as_fd()).earlier()[&1].len(), MOST);
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
        assert!(load(dir.as_fd()).is_none());
        std::fs::remove_file(&file).unwrap();
        nix::unistd::mkfifo(&file, Mode::S_IRWXU).unwrap();
        assert!(load(dir.as_fd()).is_none(), "and nobody waits for the other end of a fifo");
    }
}
