//! Which descriptors, of one process or of several, are one open file description.
//!
//! Two descriptors made by dup(2), fork(2) or SCM_RIGHTS share offset and status flags, and must share them again
//! after a restore. kcmp(2) tells, and orders; files that differ in what fdinfo prints can't be one, which spares
//! nearly all calls.
//!
//! ```text
//!   key: inode, flags, offset ──> bucket, sorted by kcmp: [file 3] [file 9] [file 4]
//!                                                 binary search ──^
//! ```

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::checkpoint::Result;

/// What two descriptors of one open file description agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Device of the file.
    pub dev: u64,
    /// Inode of the file.
    pub ino: u64,
    /// Status flags.
    pub flags: u32,
    /// Offset.
    pub pos: u64,
}

/// A descriptor that stands for its open file description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Process, as a pid of this host.
    pub pid: i32,
    /// Its descriptor.
    pub fd: i32,
}

/// The open file descriptions seen so far, each under an id.
#[derive(Debug, Default)]
pub struct Shared {
    buckets: HashMap<Key, Vec<(Holder, u32)>>,
}

impl Shared {
    /// The id of the open file description that `holder` has, and whether it is new; `compare` is kcmp(2).
    pub fn classify(
        &mut self,
        key: Key,
        holder: Holder,
        new_id: impl FnOnce() -> u32,
        compare: impl Fn(Holder, Holder) -> Result<Ordering>,
    ) -> Result<(u32, bool)> {
        let bucket = self.buckets.entry(key).or_default();
        match search(bucket, |known| compare(known, holder))? {
            Ok(at) => Ok((bucket[at].1, false)),
            Err(at) => {
                let id = new_id();
                bucket.insert(at, (holder, id));
                Ok((id, true))
            }
        }
    }

    /// The id of a file that was classified before, of which only device and inode are known; `compare` is asked
    /// for each that may be it.
    pub fn find(
        &self,
        dev: Option<u64>,
        ino: u64,
        compare: impl Fn(Holder) -> Result<Ordering>,
    ) -> Result<Option<(Holder, u32)>> {
        for (key, bucket) in &self.buckets {
            if key.ino != ino || dev.is_some_and(|d| d != key.dev) {
                continue;
            }
            if let Ok(at) = search(bucket, &compare)? {
                return Ok(Some(bucket[at]));
            }
        }
        Ok(None)
    }
}

/// Binary search whose comparison may fail: `Ok(index)` of the equal one, or `Err(index)` where it belongs.
fn search(
    bucket: &[(Holder, u32)],
    compare: impl Fn(Holder) -> Result<Ordering>,
) -> Result<std::result::Result<usize, usize>> {
    let (mut low, mut high) = (0, bucket.len());
    while low < high {
        let middle = low + (high - low) / 2;
        match compare(bucket[middle].0)? {
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(Err(low))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const KEY: Key = Key { dev: 1, ino: 2, flags: 0, pos: 0 };

    /// Descriptors congruent modulo 10 are one file, and the kernel's order of files is the reverse of ours.
    fn compare(a: Holder, b: Holder) -> Result<Ordering> {
        Ok((b.fd % 10).cmp(&(a.fd % 10)))
    }

    #[test]
    fn duplicates_get_one_id() {
        let (mut shared, next) = (Shared::default(), Cell::new(100));
        let new = || {
            next.set(next.get() + 1);
            next.get()
        };
        let mut id = |key, pid, fd| shared.classify(key, Holder { pid, fd }, new, compare).unwrap();
        let first: Vec<u32> = (0..10).map(|fd| id(KEY, 1, fd).0).collect();
        for fd in [13, 10, 19, 15] {
            assert_eq!(id(KEY, 2, fd), (first[fd as usize % 10], false));
        }
        let other = Key { pos: 5, ..KEY };
        assert!(id(other, 3, 23).1, "another offset is another file, without a call");
        assert_eq!(next.get(), 111);
    }

    #[test]
    fn a_file_is_found_by_inode() {
        let mut shared = Shared::default();
        for fd in 0..5 {
            shared.classify(KEY, Holder { pid: 1, fd }, || fd as u32 + 50, compare).unwrap();
        }
        let wanted = Holder { pid: 9, fd: 13 };
        let found = shared.find(None, 2, |known| compare(known, wanted)).unwrap();
        assert_eq!(found, Some((Holder { pid: 1, fd: 3 }, 53)));
        assert_eq!(shared.find(None, 3, |known| compare(known, wanted)).unwrap(), None);
        assert_eq!(shared.find(Some(7), 2, |known| compare(known, wanted)).unwrap(), None);
    }
}
