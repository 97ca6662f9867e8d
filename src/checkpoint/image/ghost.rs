//! ghost-file-N.img: a file that has no name any more, with what it held.
//!
//! ```text
//!   all of it     record │ bytes to the end of the image
//!   sparse        record (chunks) │ chunk record │ its bytes │ chunk record │ its bytes ...
//! ```
//!
//! Contents may be larger than memory, so they go from file to file and never into the model.

use std::fs::File;
use std::io::{Read, Write};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{GhostChunkEntry, GhostFileEntry, ImageDir, Kind};
use crate::sys::hugetlb::Target;

/// Name of the image of ghost `id`; CRIU writes the number in hexadecimal.
pub fn name(id: u32) -> String {
    format!("ghost-file-{id:x}.img")
}

/// Writes the record and, for a regular file, what `source` holds. Sets `chunks` and `size` as fits.
pub fn write(
    dir: &ImageDir,
    id: u32,
    entry: &GhostFileEntry,
    source: Option<&File>,
) -> Result<GhostFileEntry> {
    let mut entry = entry.clone();
    let mut writer = dir.writer(Kind::GhostFile, &name(id))?;
    let Some(source) = source else {
        writer.record(&entry)?;
        writer.finish()?;
        return Ok(entry);
    };
    let failed = |e: Error| e.path(dir.path().join(name(id)));
    let size = source.metadata().during("cannot read the removed file", || "fstat(_)".into())?.len();
    let runs = runs(source, size)?;
    let whole =
        matches!(runs.as_slice(), [] if size == 0) || matches!(runs.as_slice(), [(0, n)] if *n == size);
    entry.size = Some(size);
    entry.chunks = (!whole).then_some(true);
    writer.record(&entry)?;
    for (offset, length) in runs {
        if !whole {
            writer.record(&GhostChunkEntry { len: length, off: offset })?;
        }
        copy(source, offset, length, |bytes| writer.raw(bytes)).map_err(failed)?;
    }
    writer.finish()?;
    Ok(entry)
}

/// Reads the record alone.
pub fn read(dir: &ImageDir, id: u32) -> Result<GhostFileEntry> {
    let mut reader = dir.reader(Kind::GhostFile, &name(id))?;
    reader.record()?.ok_or_else(|| Error::new("the image is truncated: it has no record").path(reader.path()))
}

/// Fills `file`, an empty one open for reading and writing, with what ghost `id` held.
pub fn restore(dir: &ImageDir, id: u32, file: &File) -> Result<()> {
    let mut reader = dir.reader(Kind::GhostFile, &name(id))?;
    let path = reader.path().to_owned();
    let target = Target::new(file).during("cannot fill the removed file", || "fstatfs(_)".into())?;
    let put = |r: std::io::Result<u64>| r.during("cannot fill the removed file", || "write(_, _, _)".into());
    let entry: GhostFileEntry =
        reader.record()?.ok_or_else(|| Error::new("the image is truncated: it has no record").path(&path))?;
    if entry.chunks != Some(true) {
        // Huge pages are written only where the file has them already.
        if let Some(size) = entry.size.filter(|_| target.is_huge()) {
            put(file.set_len(size).map(|()| 0))?;
        }
        let mut to = target.from(0);
        let copied = put(std::io::copy(&mut reader.into_input(), &mut to))?;
        put(to.flush().map(|()| 0))?;
        return match entry.size {
            Some(size) if size != copied => {
                Err(Error::new(format!("the image is truncated: {copied} of {size} bytes")).path(path))
            }
            _ => Ok(()),
        };
    }
    let size = entry.size.unwrap_or(0);
    put(file.set_len(size).map(|()| 0))?;
    while let Some(chunk) = reader.record::<GhostChunkEntry>()? {
        if chunk.off.checked_add(chunk.len).is_none_or(|end| end > size) {
            return Err(Error::new("a chunk lies beyond the end of the removed file").path(path));
        }
        let mut to = target.from(chunk.off);
        let copied = put(std::io::copy(&mut reader.input().take(chunk.len), &mut to))?;
        put(to.flush().map(|()| 0))?;
        if copied != chunk.len {
            return Err(
                Error::new("the image is truncated: a chunk of the removed file is cut off").path(path)
            );
        }
    }
    Ok(())
}

/// Reads all that a removed file held.
pub fn verify(dir: &ImageDir, id: u32) -> Result<()> {
    let mut reader = dir.reader(Kind::GhostFile, &name(id))?;
    let path = reader.path().to_owned();
    let short = |have, of| Error::new(format!("the image is truncated: {have} of {of} bytes")).path(&path);
    let read = |r: std::io::Result<u64>| r.during("cannot read the image", || "read(_, _, _)".into());
    let entry: GhostFileEntry =
        reader.record()?.ok_or_else(|| Error::new("the image is truncated: it has no record").path(&path))?;
    if entry.chunks != Some(true) {
        let have = read(std::io::copy(&mut reader.into_input(), &mut std::io::sink()))?;
        return match entry.size {
            Some(size) if size != have => Err(short(have, size)),
            _ => Ok(()),
        };
    }
    while let Some(chunk) = reader.record::<GhostChunkEntry>()? {
        let have = read(std::io::copy(&mut reader.input().take(chunk.len), &mut std::io::sink()))?;
        if have != chunk.len {
            return Err(short(have, chunk.len));
        }
    }
    Ok(())
}

/// Where the file has data: offsets and lengths.
fn runs(file: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        lseek(file, at, whence).map(|n| n.unsigned_abs())
    };
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => break,
            Err(Errno::EINVAL) => return Ok(vec![(0, size)]),
            Err(errno) => {
                return Err(Error::new("cannot read the removed file")
                    .call(format!("lseek(_, {at}, SEEK_DATA)"), errno));
            }
        };
        let end = seek(start, Whence::SeekHole).unwrap_or(size).min(size);
        if end <= start {
            break;
        }
        runs.push((start, end - start));
        at = end;
    }
    Ok(runs)
}

/// Hands out a range of the file piece by piece, without moving its offset.
fn copy(file: &File, mut at: u64, length: u64, mut put: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 1 << 16];
    let end = at.saturating_add(length);
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        let n = file
            .read_at(&mut buffer[..want], at)
            .during("cannot read the removed file", || format!("pread64(_, _, {want}, {at})"))?;
        if n == 0 {
            return Err(Error::new("the removed file shrank while it was read"));
        }
        put(&buffer[..n])?;
        at += n as u64;
    }
    Ok(())
}
