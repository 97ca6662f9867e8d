//! Making rings again, in the task that has them.

use std::os::fd::{AsFd, OwnedFd};

use super::{ARRAY, COMPLETIONS, FLAGS, HEAD, TAIL, params, read, word};
use crate::checkpoint::context::NewTask;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::opener::Files;
use crate::checkpoint::image::{FdinfoEntry, RingExtra};
use crate::checkpoint::remote::Batch;
use crate::checkpoint::{Error, Result};
use crate::sys::io_uring::{
    self as sys, OFF_QUEUES, OFF_REQUESTS, REGISTER_BUFFERS, REGISTER_FILES, Region, SETUP_NO_SQARRAY,
};
use crate::sys::pidfd;

impl Files<'_> {
    /// Makes the rings of a table whose other descriptors are in place, and brings them to where they were.
    pub(in super::super) fn make_rings(&mut self, task: &mut NewTask, table: &[FdinfoEntry]) -> Result<()> {
        for ring in read(self.restore.model)? {
            let numbers: Vec<&FdinfoEntry> = table.iter().filter(|entry| entry.id == ring.id).collect();
            let Some(first) = numbers.first() else { continue };
            let fd = first.fd.cast_signed();
            setup(task, &ring, &numbers)?;
            let file = pidfd::getfd(task.pidfd.as_fd(), fd)
                .during("cannot fetch a new ring", || format!("pidfd_getfd(pidfd, {fd}, 0)"))?;
            bring(task, &ring, fd, &file).map_err(|e| e.fd(fd))?;
            self.opened.insert(ring.id, file);
        }
        Ok(())
    }

    /// Registers buffers and files, once the memory is in place.
    pub(in super::super) fn register_with_rings(&self, task: &mut NewTask) -> Result<()> {
        let table = self.table(task.vpid);
        let mut batch = Batch::new();
        for ring in read(self.restore.model)? {
            let Some(fd) = table.iter().find(|entry| entry.id == ring.id).map(|entry| entry.fd) else {
                continue;
            };
            if !ring.buffers.is_empty() {
                batch.about("cannot register the buffers of an io_uring");
                let vectors: Vec<u64> = ring.buffers.iter().flat_map(|b| [b.address, b.length]).collect();
                let vectors = batch.words(&vectors);
                let args = [fd.into(), REGISTER_BUFFERS.into(), vectors, (ring.buffers.len() as u64).into()];
                batch.call(libc::SYS_io_uring_register, &args);
            }
            if !ring.files.is_empty() {
                batch.about("cannot register the files of an io_uring");
                let bytes: Vec<u8> = ring.files.iter().flat_map(|fd| fd.to_ne_bytes()).collect();
                let files = batch.data(&bytes);
                let args = [fd.into(), REGISTER_FILES.into(), files, (ring.files.len() as u64).into()];
                batch.call(libc::SYS_io_uring_register, &args);
            }
        }
        if batch.is_empty() { Ok(()) } else { task.injection.run(&batch).map(drop) }
    }
}

/// Makes a ring under its numbers.
fn setup(task: &mut NewTask, ring: &RingExtra, numbers: &[&FdinfoEntry]) -> Result<()> {
    let params = params(ring);
    let mut batch = Batch::new();
    batch.about("cannot make an io_uring");
    let mut bytes = [0; size_of::<sys::Params>()];
    for (at, value) in [params.sq_entries, params.cq_entries, params.flags].into_iter().enumerate() {
        bytes[at * 4..at * 4 + 4].copy_from_slice(&value.to_ne_bytes());
    }
    let params = batch.data(&bytes);
    let call = batch.call(libc::SYS_io_uring_setup, &[ring.sq_entries.into(), params]);
    let made = task.injection.run(&batch)?.int(call);

    let mut batch = Batch::new();
    batch.about("cannot put an io_uring in place");
    for number in numbers {
        let closes = number.flags & libc::FD_CLOEXEC.cast_unsigned() != 0;
        let fd = number.fd.cast_signed();
        if fd == made {
            let flags = if closes { libc::FD_CLOEXEC } else { 0 };
            batch.call(libc::SYS_fcntl, &[fd.into(), libc::F_SETFD.into(), flags.into()]);
        } else {
            let flags = if closes { libc::O_CLOEXEC } else { 0 };
            batch.call(libc::SYS_dup3, &[made.into(), fd.into(), flags.into()]);
        }
    }
    let flags = ring.status_flags & (libc::O_NONBLOCK | libc::O_ASYNC).cast_unsigned();
    batch.call(libc::SYS_fcntl, &[made.into(), libc::F_SETFL.into(), flags.into()]);
    if numbers.iter().all(|number| number.fd.cast_signed() != made) {
        batch.call(libc::SYS_close, &[made.into()]);
    }
    task.injection.run(&batch).map(drop)
}

/// Lets the kernel count as many requests and completions as the ring has had, and puts back what is in its memory.
fn bring(task: &mut NewTask, ring: &RingExtra, fd: i32, file: &OwnedFd) -> Result<()> {
    let what = "cannot bring an io_uring to where it was";
    let map = |offset: i64, len: usize| {
        Region::map(file, offset, len)
            .during(what, || format!("mmap(ring, {len}, {offset:#x})"))?
            .ok_or_else(|| Error::new(format!("{what}: it has another size")))
    };
    let queues = map(OFF_QUEUES, ring.queues.len())?;
    let requests = map(OFF_REQUESTS, ring.requests.len())?;
    let at = |offsets: &[u32], index: usize| offsets.get(index).copied().unwrap_or(u32::MAX);
    let (sq_head, sq_tail) = (at(&ring.sq_off, HEAD), at(&ring.sq_off, TAIL));
    let (cq_head, cq_tail) = (at(&ring.cq_off, HEAD), at(&ring.cq_off, TAIL));
    // Offsets of an image that another kernel has written may be others.
    let completions = at(&ring.cq_off, COMPLETIONS);
    let mask = |offsets: &[u32]| queues.word(at(offsets, super::MASK)).wrapping_add(1);
    if (mask(&ring.sq_off), mask(&ring.cq_off)) != (ring.sq_entries, ring.cq_entries)
        || completions == u32::MAX
    {
        return Err(Error::new(format!("{what}: this kernel lays rings out otherwise"))
            .remedy("restore under the kernel of the checkpoint"));
    }

    let count = word(ring, &ring.sq_off, HEAD);
    let unseen = word(ring, &ring.cq_off, TAIL).wrapping_sub(word(ring, &ring.cq_off, HEAD));
    if word(ring, &ring.cq_off, TAIL) != count || unseen > count.min(ring.cq_entries) {
        return Err(Error::new(format!("{what}: its counters do not agree")));
    }
    // Requests of zeros do nothing.
    requests.write(&vec![0; ring.requests.len()]);
    if ring.flags & SETUP_NO_SQARRAY == 0 {
        for slot in 0..ring.sq_entries {
            queues.set_word(at(&ring.sq_off, ARRAY).saturating_add(slot * 4), slot);
        }
    }
    queues.set_word(sq_tail, count);
    let mut done = 0;
    while done < count {
        // As far as there is room for completions, of which the last ones stay.
        let seen = done.min(count - unseen);
        queues.set_word(cq_head, seen);
        let room = (ring.cq_entries - (done - seen)).min(count - done);
        let mut batch = Batch::new();
        batch.about(what);
        for _ in 0..room.div_ceil(ring.sq_entries) {
            let args = [fd.into(), ring.sq_entries.into(), 0.into(), 0.into(), 0.into(), 0.into()];
            batch.call(libc::SYS_io_uring_enter, &args);
        }
        task.injection.run(&batch)?;
        let now = queues.word(sq_head);
        if now <= done || now > count || queues.word(cq_tail) != now {
            return Err(Error::new(format!("{what}: of {count} requests {now} are counted")));
        }
        done = now;
    }
    requests.write(&ring.requests);
    queues.write(&ring.queues);
    queues.set_word(at(&ring.sq_off, FLAGS), 0);
    Ok(())
}
