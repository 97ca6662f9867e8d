//! Making a ring that has results in it already.

use nix::errno::Errno;

use super::{EVENT, EXTENSION, Event, HEADER, POLL, Poll, Polls, Ring, requests};
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::{Arg, Batch, Injection};

/// `struct iocb`, and where its fields are.
const IOCB: usize = 64;
const OPCODE: usize = 16;
const DESCRIPTOR: usize = 20;
/// Requests made at once.
const AT_ONCE: usize = 256;

/// The context of a new ring of `len` bytes that stands where the kernel likes, its first results being `events`.
pub(super) fn make(injection: &mut Injection, len: u64, events: &[Event]) -> Result<u64> {
    let mut batch = Batch::new();
    let what = "cannot make a ring of Linux AIO";
    batch.about(what);
    let name = batch.string(b"aio");
    let file = batch.call(libc::SYS_memfd_create, &[name, libc::MFD_CLOEXEC.into()]);
    let context = batch.out(8);
    let setup = batch.call(libc::SYS_io_setup, &[requests(len).into(), context.arg()]);
    batch.tolerate(setup);
    let results = injection.run(&batch)?;
    let (file, context) = (results.int(file), results.u64(context, 0));
    if let Err(errno) = results.result(setup) {
        injection.syscall(libc::SYS_close, &[file.into()])?;
        let error = Error::new(what).call(format!("io_setup({}, _)", requests(len)), errno);
        return Err(match errno {
            Errno::EAGAIN => error.remedy("raise fs.aio-max-nr"),
            _ => error,
        });
    }
    let filled = check(injection, context, len)
        .and_then(|()| count(injection, context, file, events.len()))
        .and_then(|()| write(injection, context, 0, events));
    injection.syscall(libc::SYS_close, &[file.into()])?;
    match filled {
        Ok(()) => Ok(context),
        Err(error) => {
            injection.syscall(libc::SYS_io_destroy, &[context.into()])?;
            Err(error)
        }
    }
}

/// Whether the kernel has made it as large as the other.
fn check(injection: &Injection, context: u64, len: u64) -> Result<()> {
    let mut header = [0; HEADER];
    injection.read_mem(context, &mut header)?;
    let nr = Ring(header.to_vec()).nr();
    if u64::from(nr) == (len - HEADER as u64) / EVENT as u64 {
        return Ok(());
    }
    Err(Error::new(format!("a ring of Linux AIO of {len} bytes has room for {nr} events here"))
        .remedy("this machine has more processors than that of the checkpoint"))
}

/// Brings the tail forward: the kernel counts for itself. Reading nothing from an empty file ends at once.
fn count(injection: &mut Injection, context: u64, file: i32, count: usize) -> Result<()> {
    let mut batch = Batch::new();
    batch.about("cannot put the results of Linux AIO into a new ring, of which it may have more than this machine allows");
    let request = batch.data(&[0; IOCB]);
    batch.link_u32(request, DESCRIPTOR, file);
    let list = batch.words(&[0; AT_ONCE]);
    for index in 0..AT_ONCE.min(count) {
        batch.link(list, index * 8, request);
    }
    let mut left = count;
    while left > 0 {
        let some = left.min(AT_ONCE);
        let call = batch.call(libc::SYS_io_submit, &[context.into(), some.into(), list]);
        batch.expect(call, some);
        left -= some;
    }
    if batch.is_empty() { Ok(()) } else { injection.run(&batch).map(drop) }
}

/// Adds results behind the first `at`, for which the tail has been brought forward.
fn write(injection: &Injection, context: u64, at: usize, events: &[Event]) -> Result<()> {
    let bytes: Vec<u8> = events.iter().flat_map(|event| event.bytes).collect();
    injection.write_mem(context + (HEADER + at * EVENT) as u64, &bytes)
}

/// Adds results to a ring that has `at` of them and was just made.
pub(super) fn add(injection: &mut Injection, context: u64, at: usize, events: &[Event]) -> Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::new();
    let name = batch.string(b"aio");
    let file = batch.call(libc::SYS_memfd_create, &[name, libc::MFD_CLOEXEC.into()]);
    let file = injection.run(&batch)?.int(file);
    let added = count(injection, context, file, events.len());
    injection.syscall(libc::SYS_close, &[file.into()])?;
    added.and_then(|()| write(injection, context, at, events))
}

/// Makes requests to poll again.
pub(super) fn poll(injection: &mut Injection, polls: &[Poll]) -> Result<()> {
    let mut batch = Batch::new();
    batch.about("cannot make a poll request of Linux AIO again");
    for (context, request) in polls {
        let list = batch.words(&[*request]);
        let call = batch.call(libc::SYS_io_submit, &[(*context).into(), 1.into(), list]);
        batch.expect(call, 1);
    }
    if batch.is_empty() { Ok(()) } else { injection.run(&batch).map(drop) }
}

/// Whether a request that has ended is one to poll which has seen nothing.
pub(super) fn is_poll(injection: &Injection, event: &Event) -> bool {
    let mut request = [0; IOCB];
    if event.result != 0 || injection.read_mem(event.iocb, &mut request).is_err() {
        return false;
    }
    // aio_data comes first, aio_lio_opcode in the middle.
    request[..8] == event.data.to_ne_bytes() && request[OPCODE..OPCODE + 2] == POLL.to_ne_bytes()
}

/// Puts a ring in the place of `len` bytes of ordinary memory that have its image.
pub fn restore(injection: &mut Injection, at: u64, len: u64) -> Result<()> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    injection.read_mem(at, &mut bytes)?;
    let events = Ring::parse(bytes)?.unseen();
    let context = make(injection, len, &events)?;
    let mut batch = Batch::new();
    place(&mut batch, context, len, at);
    injection.run(&batch).map(drop)
}

/// Moves a ring, and so its context, to another address, where something else is mapped or nothing.
pub(super) fn place(batch: &mut Batch, context: u64, len: u64, at: u64) {
    batch.about("cannot put a ring of Linux AIO in its place");
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let args: [Arg; 5] = [context.into(), len.into(), len.into(), flags.into(), at.into()];
    let call = batch.call(libc::SYS_mremap, &args);
    batch.expect(call, at);
}

/// The requests to poll that a process had under way.
pub(super) fn polls_of(model: &Model, vpid: u32) -> Result<Vec<Poll>> {
    let mut all: Polls = model.extension(EXTENSION)?;
    Ok(all.remove(&vpid).unwrap_or_default())
}
