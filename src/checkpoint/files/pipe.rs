//! Pipes, and the buffers behind fifos.
//!
//! ```text
//!   dump:     /proc/self/fd/N opened for reading ──tee(2)──> a pipe of our own ──read(2)──> pipes-data.img
//!             (nothing is taken from the live pipe)
//!   restore:  pipe2, F_SETPIPE_SZ, write(2); each open file description of it: the pipe's own end, or a new open
//! ```
//!
//! `pipe_id` is the inode's number, as in the `pipe:[N]` by which runc names pipes to CRIU.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};
use nix::unistd::pipe2;

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::{Live, reopen};
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{external, regular};
use crate::checkpoint::image::{FdTypes, FileEntry, PipeDataEntry, PipeEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::ioctl;

const PIPEFS_MAGIC: i64 = 0x5049_5045;

/// A pipe without a name in a file system.
pub fn is(live: &Live) -> bool {
    live.format() == libc::S_IFIFO && live.fs == PIPEFS_MAGIC
}

/// Refuses packets whose boundaries would be lost. Only the writing end knows of them.
pub fn check(live: &Live) -> Result<()> {
    let packets = live.info.flags & libc::O_DIRECT as u32 != 0;
    if packets && ioctl::readable(&live.file).unwrap_or(0) > 0 {
        return Err(live
            .name(Error::new("a pipe in packet mode (O_DIRECT) holds packets"))
            .remedy("the image format keeps no packet boundaries; try again when the pipe is empty"));
    }
    Ok(())
}

/// Records one end of a pipe and, once for each pipe, what it holds.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let pipe = PipeEntry {
        id,
        pipe_id: pipe_id(live)?,
        flags: live.info.flags,
        fown: live.fown(&dump.files.pids).map_err(|e| live.name(e))?,
    };
    if external::stdio_index(&dump.source.stdio, live, false).is_none()
        && dump.files.pipes.insert((live.stat.st_dev, live.stat.st_ino))
    {
        let (entry, data) = contents(live, pipe.pipe_id)?;
        dump.model.pipes_data.push((entry, data));
    }
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Pipe as i32,
        id,
        pipe: Some(pipe),
        ..FileEntry::default()
    });
    Ok(())
}

/// The number that the images know a pipe by.
pub fn pipe_id(live: &Live) -> Result<u32> {
    u32::try_from(live.stat.st_ino)
        .map_err(|_| live.name(Error::new("a pipe's inode number has more than 32 bits")))
}

/// Capacity and contents of a pipe, which keeps them.
pub fn contents(live: &Live, pipe_id: u32) -> Result<(PipeDataEntry, Vec<u8>)> {
    let what = "cannot read what a pipe holds";
    let name = |e| live.name(e);
    let source = live.reopen(OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    let size = fcntl(&source, FcntlArg::F_GETPIPE_SZ)
        .during(what, || "fcntl(_, F_GETPIPE_SZ)".into())
        .map_err(name)?;
    let waiting = ioctl::readable(&source).during(what, || "ioctl(_, FIONREAD)".into()).map_err(name)?;
    let waiting = usize::try_from(waiting).unwrap_or(0);
    let mut data = vec![0; waiting];
    if waiting > 0 {
        let (r, w) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).during(what, || "pipe2()".into())?;
        fcntl(&w, FcntlArg::F_SETPIPE_SZ(size))
            .during(what, || format!("fcntl(_, F_SETPIPE_SZ, {size})"))
            .map_err(name)?;
        let n = tee(&source, &w, waiting, SpliceFFlags::SPLICE_F_NONBLOCK)
            .during(what, || format!("tee(_, _, {waiting})"))
            .map_err(name)?;
        if n != waiting {
            return Err(name(Error::new(format!("{what}: tee(2) gave {n} of {waiting} bytes"))));
        }
        drop(w);
        std::fs::File::from(r)
            .read_exact(&mut data)
            .during(what, || format!("read(_, _, {waiting})"))
            .map_err(name)?;
    }
    let bytes = u32::try_from(waiting).map_err(|_| name(Error::new("a pipe holds more than 4 GiB")))?;
    Ok((PipeDataEntry { pipe_id, bytes, size: Some(size.cast_unsigned()) }, data))
}

/// Makes every pipe of the images, fills it, and opens its ends.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let mut pipes: BTreeMap<u32, Vec<&PipeEntry>> = BTreeMap::new();
    for pipe in opener.of(FdTypes::Pipe).filter_map(|e| e.pipe.as_ref()) {
        pipes.entry(pipe.pipe_id).or_default().push(pipe);
    }
    for (pipe_id, ends) in pipes {
        let name = format!("pipe:[{pipe_id}]");
        if let Some(index) = opener.stdio.iter().take(3).position(|s| *s == name) {
            for end in ends {
                let file = external::attach(opener.restore, index, end.flags)?;
                opener.put(end.id, file);
            }
            continue;
        }
        make(opener, pipe_id, &ends).map_err(|e| e.path(&name))?;
    }
    Ok(())
}

fn make(opener: &mut Opener<'_, '_>, pipe_id: u32, ends: &[&PipeEntry]) -> Result<()> {
    let (r, w) = pipe2(OFlag::O_CLOEXEC).during("cannot make a pipe", || "pipe2(_, O_CLOEXEC)".into())?;
    if let Some((entry, data)) = opener.restore.model.pipes_data.iter().find(|d| d.0.pipe_id == pipe_id) {
        fill(&w, entry, data)?;
    }
    let (mut r, mut w) = (Some(r), Some(w));
    // The first reader and the first writer get the pipe's own ends, the others an open of their own.
    let keep = r.as_ref().or(w.as_ref()).map(|f| f.try_clone()).transpose();
    let keep = keep
        .during("cannot duplicate a pipe's end", || "fcntl(_, F_DUPFD_CLOEXEC, 0)".into())?
        .ok_or_else(|| Error::new("a pipe has no ends"))?;
    for end in ends {
        let own = match end.flags.cast_signed() & libc::O_ACCMODE {
            libc::O_RDONLY => r.take(),
            libc::O_WRONLY => w.take(),
            _ => None,
        };
        let file = match own {
            Some(file) => {
                external::set_flags(&file, end.flags & !(libc::O_ASYNC.cast_unsigned()))?;
                file
            }
            None => reopen(keep.as_fd(), regular::open_flags(end.flags))?,
        };
        opener.put_owned(end.id, file, &end.fown, end.flags);
    }
    Ok(())
}

/// Gives a pipe its capacity and its contents, through an end that can be written.
pub fn fill(w: &OwnedFd, entry: &PipeDataEntry, data: &[u8]) -> Result<()> {
    if let Some(size) = entry.size {
        let size = i32::try_from(size).map_err(|_| Error::new(format!("a pipe of {size} bytes")))?;
        match fcntl(w, FcntlArg::F_SETPIPE_SZ(size)) {
            // More than /proc/sys/fs/pipe-max-size allows: the default will do unless the data says otherwise.
            Ok(_) | Err(Errno::EPERM) => {}
            Err(errno) => {
                return Err(
                    Error::new("cannot size a pipe").call(format!("fcntl(_, F_SETPIPE_SZ, {size})"), errno)
                );
            }
        }
    }
    if data.is_empty() {
        return Ok(());
    }
    let writer = w.try_clone().during("cannot fill a pipe", || "fcntl(_, F_DUPFD_CLOEXEC, 0)".into())?;
    external::set_flags(&writer, libc::O_NONBLOCK.cast_unsigned())?;
    let written = std::fs::File::from(writer).write_all(data);
    external::set_flags(w, 0)?;
    written
        .during("cannot fill a pipe", || format!("write(_, _, {})", data.len()))
        .map_err(|e| e.remedy("raise fs.pipe-max-size to what it was where the checkpoint was taken"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_read_and_kept_and_filled_in_again() {
        let (r, w) = nix::unistd::pipe().unwrap();
        fcntl(&w, FcntlArg::F_SETPIPE_SZ(1 << 17)).unwrap();
        let text: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        nix::unistd::write(&w, &text[..10]).unwrap();
        nix::unistd::write(&w, &text[10..]).unwrap();
        let live = Live::own(w, 1).unwrap();
        assert!(is(&live));
        let (entry, data) = contents(&live, 5).unwrap();
        assert_eq!((entry.bytes, entry.size), (100_000, Some(1 << 17)));
        assert_eq!(data, text);
        assert_eq!(ioctl::readable(&r).unwrap(), 100_000);

        let (r2, w2) = nix::unistd::pipe().unwrap();
        fill(&w2, &entry, &data).unwrap();
        assert_eq!(fcntl(&r2, FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 17);
        drop(w2);
        let mut back = Vec::new();
        std::fs::File::from(r2).read_to_end(&mut back).unwrap();
        assert_eq!(back, text);
    }

    #[test]
    fn packets_are_refused() {
        let (r, w) = pipe2(OFlag::O_DIRECT).unwrap();
        check(&Live::own(w.try_clone().unwrap(), 1).unwrap()).unwrap();
        nix::unistd::write(&w, b"one").unwrap();
        assert!(check(&Live::own(w, 1).unwrap()).unwrap_err().to_string().contains("packet mode"));
        drop(r);
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_no_wait() {
        let (_r, w) = nix::unistd::pipe().unwrap();
        let entry = PipeDataEntry { pipe_id: 1, bytes: 8192, size: Some(4096) };
        assert!(fill(&w, &entry, &[0; 8192]).is_err());
    }
}
