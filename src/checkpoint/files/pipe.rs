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

/// The extension with the lengths of packets, by pipe. CRIU would make a stream of them.
pub const PACKETS: &str = "packets";
type Packets = BTreeMap<u32, Vec<usize>>;

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
        let (entry, data, packets) = contents(live, pipe.pipe_id)?;
        dump.model.pipes_data.push((entry, data));
        record_packets(dump, pipe.pipe_id, packets)?;
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

/// Records where the packets of a pipe end, if it has any.
pub fn record_packets(dump: &mut Dump<'_>, pipe_id: u32, packets: Vec<usize>) -> Result<()> {
    if packets.is_empty() {
        return Ok(());
    }
    let mut all: Packets = dump.model.extension(PACKETS)?;
    all.insert(pipe_id, packets);
    dump.model.set_critical_extension(PACKETS, &all)
}

/// Capacity and contents of a pipe, which keeps them, and the lengths of its packets.
pub fn contents(live: &Live, pipe_id: u32) -> Result<(PipeDataEntry, Vec<u8>, Vec<usize>)> {
    let what = "cannot read what a pipe holds";
    let name = |e| live.name(e);
    let source = live.reopen(OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    let size = fcntl(&source, FcntlArg::F_GETPIPE_SZ)
        .during(what, || "fcntl(_, F_GETPIPE_SZ)".into())
        .map_err(name)?;
    let waiting = ioctl::readable(&source).during(what, || "ioctl(_, FIONREAD)".into()).map_err(name)?;
    let waiting = usize::try_from(waiting).unwrap_or(0);
    let mut data = vec![0; waiting];
    let mut lengths = Vec::new();
    if waiting > 0 {
        let read = || format!("read(_, _, {waiting})");
        let mut copied = copy(&source, size, waiting).map_err(name)?;
        lengths = read_packets(&mut copied, &mut data).during(what, read).map_err(name)?;
        if lengths.len() == 1 {
            // A packet or a stream: a part of a packet takes all of it away.
            let mut copied = copy(&source, size, waiting).map_err(name)?;
            copied.read_exact(&mut [0]).during(what, read).map_err(name)?;
            let left = ioctl::readable(&copied).during(what, || "ioctl(_, FIONREAD)".into()).map_err(name)?;
            let direct = live.info.flags & libc::O_DIRECT.cast_unsigned() != 0;
            if left > 0 || waiting == 1 && !direct {
                lengths.clear();
            }
        }
    }
    let bytes = u32::try_from(waiting).map_err(|_| name(Error::new("a pipe holds more than 4 GiB")))?;
    Ok((PipeDataEntry { pipe_id, bytes, size: Some(size.cast_unsigned()) }, data, lengths))
}

/// What a pipe of this size holds, in one of our own.
fn copy(source: &OwnedFd, size: i32, waiting: usize) -> Result<std::fs::File> {
    let what = "cannot read what a pipe holds";
    let (r, w) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).during(what, || "pipe2()".into())?;
    fcntl(&w, FcntlArg::F_SETPIPE_SZ(size)).during(what, || format!("fcntl(_, F_SETPIPE_SZ, {size})"))?;
    let n = tee(source, &w, waiting, SpliceFFlags::SPLICE_F_NONBLOCK)
        .during(what, || format!("tee(_, _, {waiting})"))?;
    if n != waiting {
        return Err(Error::new(format!("{what}: tee(2) gave {n} of {waiting} bytes")));
    }
    Ok(r.into())
}

/// Reads until there is nothing more. Each read ends with a packet, or takes all that is no packet.
fn read_packets(from: &mut impl Read, data: &mut [u8]) -> std::io::Result<Vec<usize>> {
    let (mut lengths, mut done) = (Vec::new(), 0);
    while done < data.len() {
        match from.read(&mut data[done..])? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            length => {
                lengths.push(length);
                done += length;
            }
        }
    }
    Ok(lengths)
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
        fill(&w, entry, data, &packets(opener, pipe_id)?)?;
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

/// The lengths of a pipe's packets.
pub fn packets(opener: &Opener<'_, '_>, pipe_id: u32) -> Result<Vec<usize>> {
    Ok(opener.restore.model.extension::<Packets>(PACKETS)?.remove(&pipe_id).unwrap_or_default())
}

/// Gives a pipe its capacity and its contents, in packets of these lengths, through an end that can be written.
pub fn fill(w: &OwnedFd, entry: &PipeDataEntry, data: &[u8], packets: &[usize]) -> Result<()> {
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
    let direct = if packets.is_empty() { 0 } else { libc::O_DIRECT };
    external::set_flags(&writer, (libc::O_NONBLOCK | direct).cast_unsigned())?;
    let mut writer = std::fs::File::from(writer);
    let mut rest = data;
    let mut written = Ok(());
    for length in packets {
        let (packet, others) = rest.split_at((*length).min(rest.len()));
        written = written.and_then(|()| writer.write_all(packet));
        rest = others;
    }
    let written = written.and_then(|()| writer.write_all(rest));
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
        let (entry, data, packets) = contents(&live, 5).unwrap();
        assert!(packets.is_empty());
        assert_eq!((entry.bytes, entry.size), (100_000, Some(1 << 17)));
        assert_eq!(data, text);
        assert_eq!(ioctl::readable(&r).unwrap(), 100_000);

        let (r2, w2) = nix::unistd::pipe().unwrap();
        fill(&w2, &entry, &data, &[]).unwrap();
        assert_eq!(fcntl(&r2, FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 17);
        drop(w2);
        let mut back = Vec::new();
        std::fs::File::from(r2).read_to_end(&mut back).unwrap();
        assert_eq!(back, text);
    }

    #[test]
    fn packets_stay_packets() {
        let (r, w) = pipe2(OFlag::O_DIRECT).unwrap();
        for packet in [&b"one"[..], b"three", b"x"] {
            nix::unistd::write(&w, packet).unwrap();
        }
        let (entry, data, packets) = contents(&Live::own(r, 1).unwrap(), 5).unwrap();
        assert_eq!((&data[..], &packets[..]), (&b"onethreex"[..], &[3, 5, 1][..]));
        let (r, w) = nix::unistd::pipe().unwrap();
        fill(&w, &entry, &data, &packets).unwrap();
        let mut buffer = [0; 64];
        let read = [(); 3].map(|()| nix::unistd::read(&r, &mut buffer).unwrap());
        assert_eq!(read, [3, 5, 1]);
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_no_wait() {
        let (_r, w) = nix::unistd::pipe().unwrap();
        let entry = PipeDataEntry { pipe_id: 1, bytes: 8192, size: Some(4096) };
        assert!(fill(&w, &entry, &[0; 8192], &[]).is_err());
    }
}
