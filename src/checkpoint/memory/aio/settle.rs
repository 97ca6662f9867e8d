//! Waiting for what is under way, by taking the ring away and putting another in its place.
//!
//! ```text
//!   vmsplice(old ring) ──> a pipe that holds its pages: what the kernel writes last is still to be read there
//!   a new ring, with the results of the old one
//!   io_destroy(old): waits ┐ one batch: it is finished even when nobody is there any more
//!   mremap(new, to old)    ┘
//!   what came last, from the pipe ──> the new ring; requests to poll are made again
//! ```

use std::cmp::Ordering;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;

use super::make::{add, is_poll, make, place, poll, polls_of};
use super::{EXTENSION, NAME, Poll, Polls, Ring};
use crate::checkpoint::context::{Dump, LiveTask, NewTask};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::memory::look::Looks;
use crate::checkpoint::memory::maps::{self, Mapping};
use crate::checkpoint::memory::pages::PAGE;
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::{Batch, Injection};
use crate::checkpoint::task::sharing;
use crate::checkpoint::task::status::Status;
use crate::sys::kcmp::{What, kcmp};
use crate::sys::pidfd;

/// How long requests may take: disks that are asked again by their drivers take half a minute.
const PATIENCE: Duration = Duration::from_mins(1);
/// A pipe holds no more without privileges.
const PIPE: u64 = 256 * PAGE;
const SPLICE_F_NONBLOCK: i32 = 2;

/// Waits for the requests of all stopped processes. Their memory and their eventfds are as they are from here on.
pub fn settle(dump: &mut Dump<'_>) -> Result<()> {
    if nobody_has_any() {
        return Ok(());
    }
    let mut polls = Polls::new();
    let tenants = sharing::tenants(&dump.model);
    for task in dump.tasks.iter_mut().filter(|task| !task.zombie) {
        let vpid = task.vpid;
        if tenants.contains_key(&vpid.cast_unsigned()) {
            continue;
        }
        let own = of_task(task).map_err(|e| e.pid(vpid))?;
        if !own.is_empty() {
            polls.insert(vpid.cast_unsigned(), own);
        }
    }
    if polls.is_empty() { Ok(()) } else { dump.model.set_critical_extension(EXTENSION, &polls) }
}

/// No process of this machine has a ring.
fn nobody_has_any() -> bool {
    std::fs::read_to_string("/proc/sys/fs/aio-nr").is_ok_and(|count| count.trim() == "0")
}

fn of_task(task: &mut LiveTask) -> Result<Vec<Poll>> {
    let mappings = maps::read(task.pid)?;
    let mut polls = Vec::new();
    for ring in mappings.iter().filter(|mapping| mapping.name().starts_with(NAME)) {
        polls.append(&mut renew(task, ring).map_err(|e| e.path(&ring.name))?);
    }
    Ok(polls)
}

fn renew(task: &mut LiveTask, mapping: &Mapping) -> Result<Vec<Poll>> {
    let injection = task.injection.as_mut().ok_or_else(|| Error::new("the task cannot be asked"))?;
    let (at, len) = (mapping.start, mapping.len());
    if !is_alive(injection, at)? {
        return Err(of_parent());
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    injection.read_mem(at, &mut bytes)?;
    let before = Ring::parse(bytes)?;
    let pages = hold(injection, task.pidfd.as_fd(), at, len)?;
    let unseen = before.unseen();
    let new = make(injection, len, &unseen)?;
    replace(injection, new, at, len)?;

    let after = Ring::parse(read(pages, len)?)?;
    let (polls, done): (Vec<_>, Vec<_>) =
        after.since(&before).into_iter().partition(|event| is_poll(injection, event));
    add(injection, at, unseen.len(), &done)?;
    let polls: Vec<Poll> = polls.iter().map(|event| (at, event.iocb)).collect();
    poll(injection, &polls)?;
    Ok(polls)
}

fn of_parent() -> Error {
    Error::new("a ring of Linux AIO is a parent's, or only a part of one")
        .remedy("let the program unmap it in its children")
}

/// Refuses the rings that processes (pid on this host, pid inside) have from their parents, looked at while they run.
/// Where the parent has destroyed it, or has ended, only the child itself can tell.
pub fn refusals(live: &[(i32, i32)], looks: &Looks) -> Vec<Error> {
    let rings =
        |pid: i32| looks.of(pid).iter().map(|(mapping, _)| mapping).filter(|m| m.name().starts_with(NAME));
    let mut found = Vec::new();
    for &(pid, vpid) in live {
        for ring in rings(pid) {
            let Ok(Status { ppid, .. }) = Status::of(pid) else { break };
            let same = |other: &Mapping| (other.device, other.inode) == (ring.device, ring.inode);
            // A child of vfork(2) has the parent's memory itself.
            if rings(ppid).any(same) && kcmp(pid, ppid, What::Vm).is_ok_and(Ordering::is_ne) {
                found.push(of_parent().pid(vpid).path(&ring.name));
            }
        }
    }
    found
}

/// Whether the kernel knows it as a context of this process.
fn is_alive(injection: &mut Injection, context: u64) -> Result<bool> {
    let mut batch = Batch::new();
    let args = [context.into(), 0.into(), 0.into(), 0.into(), 0.into()];
    let call = batch.call(libc::SYS_io_getevents, &args);
    batch.tolerate(call);
    Ok(injection.run(&batch)?.result(call) != Err(Errno::EINVAL))
}

/// Pipes that hold the pages of a ring, in order.
fn hold(
    injection: &mut Injection,
    pidfd: std::os::fd::BorrowedFd<'_>,
    at: u64,
    len: u64,
) -> Result<Vec<OwnedFd>> {
    let what = "cannot hold the pages of a ring of Linux AIO";
    let mut pipes = Vec::new();
    for start in (0..len).step_by(PIPE as usize) {
        let part = (len - start).min(PIPE);
        let mut batch = Batch::new();
        batch.about(what);
        let ends = batch.out(8);
        batch.call(libc::SYS_pipe2, &[ends.arg(), libc::O_CLOEXEC.into()]);
        let size = batch.call(libc::SYS_fcntl, &[ends.load_u32(4), libc::F_SETPIPE_SZ.into(), part.into()]);
        batch.tolerate(size);
        let range = batch.words(&[at + start, part]);
        let splice =
            batch.call(libc::SYS_vmsplice, &[ends.load_u32(4), range, 1.into(), SPLICE_F_NONBLOCK.into()]);
        batch.tolerate(splice);
        let results = injection.run(&batch)?;
        let (near, far) = (results.i32(ends, 0), results.i32(ends, 4));
        let pipe = pidfd::getfd(pidfd, near).during(what, || format!("pidfd_getfd(pidfd, {near}, 0)"));
        let mut batch = Batch::new();
        batch.call(libc::SYS_close, &[near.into()]);
        batch.call(libc::SYS_close, &[far.into()]);
        injection.run(&batch)?;
        pipes.push(pipe?);
        if results.ret(splice) != part.cast_signed() {
            return Err(Error::new(format!("{what}: a pipe took {} of {part} bytes", results.ret(splice)))
                .remedy("raise fs.pipe-user-pages-soft and fs.pipe-max-size"));
        }
    }
    Ok(pipes)
}

/// What is in the pages now.
fn read(pipes: Vec<OwnedFd>, len: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    for pipe in pipes {
        File::from(pipe)
            .read_to_end(&mut bytes)
            .during("cannot read the last results of Linux AIO", || "read(pipe)".into())?;
    }
    Ok(bytes)
}

fn replace(injection: &mut Injection, new: u64, at: u64, len: u64) -> Result<()> {
    let mut batch = Batch::new();
    batch.about("cannot wait for the requests of Linux AIO");
    batch.call(libc::SYS_io_destroy, &[at.into()]);
    place(&mut batch, new, len, at);
    let usual = injection.patience();
    injection.set_patience(PATIENCE);
    let done = injection.run(&batch);
    injection.set_patience(usual);
    done.map(drop)
}

/// Refuses requests to poll where memory comes later than the requests.
pub fn check(model: &Model, lazy: bool) -> Result<()> {
    if lazy && !model.extension::<Polls>(EXTENSION)?.is_empty() {
        return Err(Error::new("the images have poll requests of Linux AIO, which need the memory at once")
            .remedy("restore without --lazy"));
    }
    Ok(())
}

/// Makes the requests to poll again that a process had under way, once it has its memory and its descriptors.
pub fn polls(task: &mut NewTask, model: &Model) -> Result<()> {
    poll(&mut task.injection, &polls_of(model, task.vpid.cast_unsigned())?)
}
