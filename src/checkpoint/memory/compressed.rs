//! `--compress`: pages-N.img in blocks, each compressed by itself, by all processors.
//!
//! ```text
//!   pages-N.img        ├ 256 KiB ┤├ 256 KiB ┤├ rest ┤            is replaced by
//!   pages-N.lz4.img    ├ head ┤├ table: where each block is, and how long ┤├ block 1 ┤├ block 0 ┤├ block 2 ┤
//!
//!   head    │ "stasis-4" │ length of pages-N.img │ blocks │            three words of 8 bytes
//!   table   │ position │ length │ of block 0, then of block 1, ...      two words each
//! ```
//!
//! A block that does not get shorter stands as it is: its length is that of the pages. The pages are compressed where
//! all of them have been written, so that nobody who stands still waits longer than without it if the container goes
//! on. Whoever reads them gets a file in memory that has all of them: they cost their size twice during a restore. CRIU
//! cannot read such images, nor can a Stasis that does not know of them: a critical extension says so.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::ImageDir;

/// The name of this room's extension in stasis.img: how the pages are compressed.
pub const EXTENSION: &str = "compressed pages";
/// What it says.
pub const LZ4: &str = "lz4";

const MAGIC: u64 = u64::from_le_bytes(*b"stasis-4");
/// Bytes of a block before it is compressed.
const BLOCK: usize = 256 << 10;
const WORD: usize = 8;
const HEAD: usize = 3 * WORD;
const ENTRY: usize = 2 * WORD;

/// What `pages-N.img` is called when it is compressed.
pub fn name(pages: &str) -> String {
    format!("{}.lz4.img", pages.strip_suffix(".img").unwrap_or(pages))
}

/// Compresses the pages of a set that is not complete yet.
pub fn compress(images: &ImageDir) -> Result<()> {
    let is_pages = |name: &String| name.starts_with("pages-") && name.ends_with(".img");
    for pages in images.names()?.into_iter().filter(is_pages) {
        let at = |e: Error| e.path(images.path().join(&pages));
        let from = images.raw_open(&pages)?;
        let to = images.raw_create_large(&name(&pages))?;
        pack(&from, &to).map_err(at)?;
        images.remove(&pages)?;
    }
    Ok(())
}

/// Whether a set has compressed pages.
pub fn any(images: &ImageDir) -> Result<bool> {
    Ok(images.names()?.iter().any(|name| name.starts_with("pages-") && name.ends_with(".lz4.img")))
}

/// The pages that are called `pages`, from what has been compressed of them; `needed`: so many bytes of it at least.
/// None: they are not compressed.
pub fn open(images: &ImageDir, pages: &str, needed: u64) -> Result<Option<File>> {
    let name = name(pages);
    if !images.exists(&name) || images.exists(pages) {
        return Ok(None);
    }
    let mut all = images.expanded.lock().map_err(|_| Error::new("another thread has failed"))?;
    if let Some(known) = all.get(&name) {
        return known
            .try_clone()
            .during("cannot open the pages", || "fcntl(memfd, F_DUPFD)".into())
            .map(Some);
    }
    let file = unpack(&images.raw_open(&name)?, needed).map_err(|e| e.path(images.path().join(&name)))?;
    let copy = file.try_clone().during("cannot open the pages", || "fcntl(memfd, F_DUPFD)".into())?;
    all.insert(name, copy);
    Ok(Some(file))
}

/// How many bytes of pages are behind a compressed image.
pub fn length(file: &File) -> Option<u64> {
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, 0).ok()?;
    (word(&head, 0) == MAGIC).then(|| word(&head, 1))
}

fn pack(from: &File, to: &File) -> Result<()> {
    let length = from.metadata().during("cannot measure the pages", || "fstat(pages)".into())?.len();
    let blocks = usize::try_from(length.div_ceil(BLOCK as u64)).map_err(|_| Error::new("too many pages"))?;
    let start = HEAD + blocks * ENTRY;
    let next = AtomicU64::new(start as u64);
    let table = on_all_processors(
        blocks,
        || (vec![0; BLOCK], Vec::new()),
        |block, (raw, packed)| {
            let raw = &mut raw[..size_of(block, length)];
            let at = block as u64 * BLOCK as u64;
            from.read_exact_at(raw, at)
                .during("cannot read the pages", || format!("pread(pages, {}, {at})", raw.len()))?;
            packed.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
            let shorter = lz4_flex::block::compress_into(raw, packed).ok().filter(|len| *len < raw.len());
            let bytes = shorter.map_or(&*raw, |len| &packed[..len]);
            let place = next.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            to.write_all_at(bytes, place)
                .during("cannot write the pages", || format!("pwrite(pages, {}, {place})", bytes.len()))?;
            Ok([place, bytes.len() as u64])
        },
    )?;
    let words = [MAGIC, length, blocks as u64].into_iter().chain(table.into_iter().flatten());
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    to.write_all_at(&bytes, 0)
        .during("cannot write the pages", || format!("pwrite(pages, {}, 0)", bytes.len()))
}

fn unpack(from: &File, needed: u64) -> Result<File> {
    let bad = |what: &str| Error::new(format!("the compressed pages cannot be understood: {what}"));
    let there = from.metadata().during("cannot measure the pages", || "fstat(pages)".into())?.len();
    let mut head = [0; HEAD];
    from.read_exact_at(&mut head, 0).map_err(|_| bad("they are too short"))?;
    let length = word(&head, 1);
    if word(&head, 0) != MAGIC {
        return Err(bad("they do not begin as such"));
    }
    if length < needed {
        return Err(Error::new(format!("the image has {length} bytes of pages, {needed} are needed")));
    }
    let blocks = length.div_ceil(BLOCK as u64);
    // What the file can hold bounds what is allocated; lz4 makes nothing more than 255 times shorter.
    if word(&head, 2) != blocks || blocks > there / ENTRY as u64 || length / 256 > there {
        return Err(bad("their number is wrong"));
    }
    let blocks = usize::try_from(blocks).map_err(|_| bad("there are too many"))?;
    let mut table = vec![0; blocks * ENTRY];
    from.read_exact_at(&mut table, HEAD as u64).map_err(|_| bad("their table is cut"))?;
    let places: Vec<(u64, usize)> = (0..blocks)
        .map(|block| {
            (word(&table, 2 * block), usize::try_from(word(&table, 2 * block + 1)).unwrap_or(usize::MAX))
        })
        .collect();
    let fits = |(block, (_, len)): (usize, &(u64, usize))| *len <= size_of(block, length);
    let sum: u64 = places.iter().map(|(_, len)| *len as u64).fold(0, u64::saturating_add);
    if !places.iter().enumerate().all(fits) || sum > there {
        return Err(bad("a block is too long"));
    }
    let what = "no memory for the pages";
    let to: OwnedFd = memfd_create(c"stasis-pages", MFdFlags::MFD_CLOEXEC)
        .during(what, || "memfd_create(\"stasis-pages\", MFD_CLOEXEC)".into())?;
    let to = File::from(to);
    to.set_len(length).during(what, || format!("ftruncate(memfd, {length})"))?;
    on_all_processors(
        blocks,
        || (Vec::new(), vec![0; BLOCK]),
        |block, (packed, raw)| {
            let (place, len) = places[block];
            let raw = &mut raw[..size_of(block, length)];
            packed.resize(len, 0);
            from.read_exact_at(packed, place).map_err(|_| bad("a block is cut"))?;
            if len == raw.len() {
                raw.copy_from_slice(packed);
            } else if lz4_flex::block::decompress_into(packed, raw).ok() != Some(raw.len()) {
                return Err(bad("a block is damaged"));
            }
            let at = block as u64 * BLOCK as u64;
            to.write_all_at(raw, at).during(what, || format!("pwrite(memfd, {}, {at})", raw.len()))
        },
    )?;
    Ok(to)
}

/// Does `work` with every block, each processor with buffers of its own. The first error ends it; the results are in order.
fn on_all_processors<B, R: Send>(
    blocks: usize,
    buffers: impl Fn() -> B + Sync,
    work: impl Fn(usize, &mut B) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let run = || {
        let (mut buffers, mut done) = (buffers(), Vec::new());
        loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= blocks {
                return Ok(done);
            }
            match work(block, &mut buffers) {
                Ok(result) => done.push((block, result)),
                Err(error) => {
                    next.store(blocks, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from).min(blocks);
    let mut all = std::thread::scope(|scope| {
        let others = (1..processors).map_while(|_| std::thread::Builder::new().spawn_scoped(scope, run).ok());
        let others: Vec<_> = others.collect();
        let mine = run();
        let failed = || Err(Error::new("a thread that compressed pages has failed"));
        let theirs = others.into_iter().map(|other| other.join().unwrap_or_else(|_| failed()));
        let theirs: Vec<Result<Vec<(usize, R)>>> = theirs.collect();
        std::iter::once(mine).chain(theirs).collect::<Result<Vec<_>>>()
    })?
    .into_iter()
    .flatten()
    .collect::<Vec<_>>();
    all.sort_unstable_by_key(|(block, _)| *block);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}

/// Bytes of a block before it is compressed.
fn size_of(block: usize, length: u64) -> usize {
    let left = length.saturating_sub(block as u64 * BLOCK as u64);
    usize::try_from(left).unwrap_or(BLOCK).min(BLOCK)
}

fn word(bytes: &[u8], number: usize) -> u64 {
    let word = bytes.get(number * WORD..(number + 1) * WORD).and_then(|word| word.try_into().ok());
    word.map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(len: usize) -> Vec<u8> {
        // Some of it can be made shorter, some cannot.
        let mut x = 88_172_645_463_325_252u64;
        let mut noise = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        };
        (0..len).map(|at| if (at / BLOCK).is_multiple_of(2) { (at / 512) as u8 } else { noise() }).collect()
    }

    fn packed(pages: &[u8]) -> File {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.write_all_at(pages, 0).unwrap();
        pack(&from, &to).unwrap();
        to
    }

    #[test]
    fn pages_come_back() {
        for len in [0, 4096, BLOCK, 5 * BLOCK + 8192] {
            let pages = pages(len);
            let file = packed(&pages);
            assert_eq!(length(&file), Some(len as u64));
            let shorter = file.metadata().unwrap().len() < len as u64 * 3 / 4;
            assert!(shorter || len == 0, "{len} bytes");
            let back = unpack(&file, len as u64).unwrap();
            let mut bytes = vec![1; len];
            back.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(back.metadata().unwrap().len(), len as u64);
            assert!(bytes == pages, "{len} bytes");
        }
    }

    #[test]
    fn damaged_images_are_refused() {
        let good = packed(&pages(3 * BLOCK));
        let mut bytes = vec![0; usize::try_from(good.metadata().unwrap().len()).unwrap()];
        good.read_exact_at(&mut bytes, 0).unwrap();
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = bytes.clone();
            change(&mut bytes);
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            unpack(&file, 3 * BLOCK as u64).unwrap_err().to_string()
        };
        let set = |bytes: &mut Vec<u8>, number: usize, value: u64| {
            bytes[number * WORD..(number + 1) * WORD].copy_from_slice(&value.to_le_bytes());
        };
        assert!(refused(&|b| b.truncate(10)).contains("too short"));
        assert!(refused(&|b| b[0] = 0).contains("do not begin"));
        assert!(refused(&|b| set(b, 1, BLOCK as u64)).contains("are needed"));
        assert!(refused(&|b| set(b, 1, 1 << 60)).contains("number is wrong"));
        assert!(refused(&|b| set(b, 2, 2)).contains("number is wrong"));
        assert!(refused(&|b| b.truncate(HEAD + 20)).contains("number is wrong"));
        assert!(refused(&|b| set(b, 3, 1 << 50)).contains("block is cut"));
        assert!(refused(&|b| set(b, 4, u64::MAX)).contains("too long"));
        assert!(refused(&|b| set(b, 4, 1)).contains("damaged"));
        assert!(refused(&|b| b.truncate(b.len() - 1)).contains("cut"));
    }
}
