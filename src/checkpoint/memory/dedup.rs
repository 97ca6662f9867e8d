//! `--auto-dedup`: what a later set of images has anew is taken out of the earlier ones.
//!
//! ```text
//!   a/pages-1.img   ███████████   ──>  ██░░███░░░█      ░ a hole: takes no room, and nobody reads it
//!   b/pages-1.img     ▓▓   ▓▓▓         (b/parent -> ../a)
//! ```
//!
//! Files keep their lengths and pagemaps. The earlier sets are good for nothing but the later one from then on, which
//! must be complete before this begins.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::ImageDir;
use crate::checkpoint::memory::{compressed, pagemap};

/// Makes holes in the sets before `images`, as far as the links `parent` lead. False where the file system makes none, or
/// the pages are compressed.
pub fn dedup(images: &ImageDir) -> Result<bool> {
    for name in images.names()?.iter().filter(|name| name.starts_with("pagemap-")) {
        // A set that replaces nothing has no older pages either.
        if let Some(parent) = images.parent()?.filter(|parent| parent.exists(name)) {
            if !replace(images, &parent, name)? {
                return Ok(false);
            }
        }
    }
    match images.parent()? {
        Some(parent) => dedup(&parent),
        None => Ok(true),
    }
}

fn replace(images: &ImageDir, parent: &ImageDir, name: &str) -> Result<bool> {
    if compressed::any(parent)? {
        return Ok(false);
    }
    let old = pagemap::open(parent, name)?;
    let files = old.files.iter().map(writable).collect::<Result<Vec<File>>>()?;
    for run in pagemap::present_in(images, name)?.iter().flat_map(|range| old.within(range)) {
        let (Some(file), Ok(offset)) = (files.get(run.file), i64::try_from(run.offset)) else { continue };
        let len = i64::try_from(run.range.end - run.range.start).unwrap_or(i64::MAX);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(file, flags, offset, len) {
            Err(Errno::EOPNOTSUPP) => return Ok(false),
            made => made
                .during("cannot take pages out of the earlier images", || {
                    format!("fallocate(pages, FALLOC_FL_PUNCH_HOLE, {offset}, {len})")
                })
                .map_err(|e: Error| e.path(parent.path()))?,
        }
    }
    Ok(true)
}

/// The same file, to be changed.
fn writable(file: &File) -> Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options()
        .write(true)
        .open(&path)
        .during("cannot change the earlier images", || format!("open({path:?}, O_WRONLY)"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::path::Path;

    use super::*;

    fn set(
        dir: &Path,
        entries: &[crate::checkpoint::image::PagemapEntry],
        bytes: &[u8],
        parent: Option<&str>,
    ) {
        let images = ImageDir::create(dir).unwrap();
        let file = pagemap::create(&images, "pagemap-1.img", 1, entries, false).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        if let Some(parent) = parent {
            images.link_parent(Path::new(parent)).unwrap();
        }
        images.publish(true).unwrap();
    }

    #[test]
    fn pages_are_kept_where_they_are_newest() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (present, in_parent) = (pagemap::present, pagemap::in_parent);
        set(&path("a"), &[present(&(0x1000..0x9000), false)], &[1; 8 << 12], None);
        let second = [present(&(0x2000..0x4000), false), in_parent(&(0x4000..0x9000), false)];
        set(&path("b"), &second, &[2; 2 << 12], Some("../a"));
        let third = [present(&(0x3000..0x5000), false), in_parent(&(0x5000..0x9000), false)];
        set(&path("c"), &third, &[3; 2 << 12], Some("../b"));
        let before = std::fs::metadata(path("a/pages-1.img")).unwrap();
        if !dedup(&ImageDir::open(path("c")).unwrap()).unwrap() {
            return; // A file system without holes.
        }
        let after = std::fs::metadata(path("a/pages-1.img")).unwrap();
        assert_eq!((before.size(), after.blocks() + 3 * 8), (after.size(), before.blocks()));
        let bytes = |name: &str| std::fs::read(path(name)).unwrap();
        let page = |byte: u8, count: usize| vec![byte; count << 12];
        assert_eq!(bytes("a/pages-1.img"), [page(1, 1), page(0, 3), page(1, 4)].concat());
        assert_eq!(bytes("b/pages-1.img"), [page(2, 1), page(0, 1)].concat());
        assert_eq!(bytes("c/pages-1.img"), page(3, 2));
    }
}
