//! Looking at a ring: what it is, whether it is idle, and what of it cannot be kept.

use std::os::fd::AsFd;

use nix::errno::Errno;

use super::facts::Facts;
use super::{ARRAY, COUNT_MAX, MASK, params, size, word};
use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::{Live, Pids, names};
use crate::checkpoint::files::registry::compare;
use crate::checkpoint::files::share::Holder;
use crate::checkpoint::image::RingExtra;
use crate::checkpoint::remote::{Arg, Batch, Injection};
use crate::checkpoint::{Error, Result};
use crate::sys::io_uring::{self as sys, COMPLETION, OFF_QUEUES, OFF_REQUESTS, REQUEST, Region};

/// The flags that a ring is made with again.
pub const KEPT: u32 = sys::SETUP_SINGLE_ISSUER | sys::SETUP_DEFER_TASKRUN | sys::SETUP_NO_SQARRAY;
/// How long requests that are under way may take, in seconds.
pub(super) const PATIENCE: u64 = 2;
/// Groups of provided buffers that are looked for.
const GROUPS: u32 = 1024;

/// Asks a ring, or has a task ask it, with the errors that this gives.
type Ask<'a> = &'a mut dyn FnMut(u32, Option<&mut [u8]>) -> Result<nix::Result<()>>;

/// Refuses what shows only in the errors that a ring gives to whom it listens to; whether completions wait to be asked
/// for.
fn interrogate(ask: Ask<'_>) -> Result<bool> {
    let refusal = |what: &str| {
        Err(Error::new(format!("an io_uring has {what}, which cannot be checkpointed"))
            .remedy("let the program do without, or end it"))
    };
    if ask(sys::REGISTER_EVENTFD, None)? == Err(Errno::EBUSY) {
        return refusal("a registered eventfd");
    }
    if ask(sys::REGISTER_NAPI, None)? == Err(Errno::EINVAL) && others_listen(sys::REGISTER_NAPI) {
        return refusal("completions that are polled for (IORING_SETUP_IOPOLL)");
    }
    for group in 0..GROUPS {
        let mut status = [0; 40];
        status[..4].copy_from_slice(&group.to_ne_bytes());
        match ask(sys::REGISTER_PBUF_STATUS, Some(&mut status))? {
            Err(Errno::ENOENT) => {}
            // Before Linux 6.8 nobody can tell.
            Err(Errno::EINVAL) if group == 0 => break,
            _ => return refusal("provided buffers"),
        }
    }
    Ok(ask(sys::REGISTER_RESIZE_RINGS, None)? == Err(Errno::EFAULT))
}

/// Whether a ring without anything special reads the argument of an operation.
fn others_listen(operation: u32) -> bool {
    let ring = sys::setup(1, &mut sys::Params::default());
    ring.is_ok_and(|ring| sys::register(ring.as_fd(), operation, None) == Err(Errno::EFAULT))
}

/// From outside, while the program runs.
pub fn check(live: &Live, pids: &Pids) -> Result<()> {
    let facts = Facts::of(live)?;
    facts.refuse()?;
    registered(live, &facts)?;
    alone(live, pids)?;
    if sys::enter(live.file.as_fd()) == Err(Errno::EBADFD) {
        return Err(Error::new("an io_uring has not been started yet (IORING_SETUP_R_DISABLED)")
            .remedy("checkpoint when the program has called IORING_REGISTER_ENABLE_RINGS"));
    }
    if answers_at_once() && !is_of_one_thread(live) {
        interrogate(&mut |operation, bytes| Ok(sys::register(live.file.as_fd(), operation, bytes)))?;
    }
    Ok(())
}

/// Before Linux 5.18 a ring that is asked takes no more requests, and does not answer before all have ended that are under
/// way: then it is asked only when it stands still.
fn answers_at_once() -> bool {
    others_listen(sys::REGISTER_RING_FDS)
}

/// It listens to the thread that made it, and to nobody else.
fn is_of_one_thread(live: &Live) -> bool {
    sys::register(live.file.as_fd(), sys::REGISTER_EVENTFD, None) == Err(Errno::EEXIST)
}

/// Another process that has the ring could not be given it.
fn alone(live: &Live, pids: &Pids) -> Result<()> {
    for (&pid, &vpid) in pids.iter().filter(|(pid, _)| **pid != live.pid) {
        for (fd, name) in names(pid).unwrap_or_default() {
            let path = format!("/proc/{pid}/fd/{fd}");
            if name == live.link
                && nix::sys::stat::stat(path.as_str()).is_ok_and(|stat| stat.st_ino == live.stat.st_ino)
            {
                return Err(Error::new(format!("process {vpid} has the same io_uring, as descriptor {fd}"))
                    .remedy("a ring can be restored in one process only: let the others close it"));
            }
        }
    }
    Ok(())
}

/// The descriptors of the process that are the registered files; `u32::MAX` where there is none.
fn registered(live: &Live, facts: &Facts) -> Result<Vec<u32>> {
    let mut found = vec![u32::MAX; facts.places.0];
    if facts.files.is_empty() {
        return Ok(found);
    }
    let links: Vec<(i32, String)> =
        names(live.pid)?.into_iter().filter_map(|(fd, name)| Some((fd, name.into_string().ok()?))).collect();
    for (place, name) in &facts.files {
        let named: Vec<i32> = links.iter().filter(|(_, link)| link == name).map(|(fd, _)| *fd).collect();
        let holder = |fd: i32| Holder { pid: live.pid, fd };
        let refusal = |what: &str| {
            Error::new(format!("file {place} that is registered with an io_uring, {name}, {what}"))
                .remedy("let the program keep one descriptor of each file that it registers")
        };
        let Some((&first, others)) = named.split_first() else {
            return Err(refusal("has no descriptor"));
        };
        for &other in others {
            if !compare(holder(first), holder(other))?.is_eq() {
                return Err(refusal("is open several times: which one it is cannot be told"));
            }
        }
        if let Some(found) = found.get_mut(*place) {
            *found = first.cast_unsigned();
        }
    }
    Ok(found)
}

/// Refuses requests that do not end.
pub(super) fn under_way(facts: &Facts) -> Error {
    let count = facts.under_way().cast_signed();
    let what = if count > 0 {
        format!("{count} requests of an io_uring are under way")
    } else {
        "an io_uring has had more completions than requests: some may be under way".to_owned()
    };
    Error::new(what).remedy("checkpoint when the program waits for nothing by io_uring")
}

/// Records a ring of a stopped process.
pub fn record(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<RingExtra> {
    let mut facts = Facts::of(live)?;
    let task = dump.tasks.iter_mut().find(|task| task.pid == live.pid);
    let injection = task.and_then(|task| task.injection.as_mut());
    let injection = injection.ok_or_else(|| Error::new("the task cannot be asked"))?;
    if facts.under_way() != 0 {
        wait(injection, live.fd, &facts)?;
        facts = Facts::of(live)?;
    }
    facts.refuse()?;
    if facts.under_way() != 0 {
        return Err(under_way(&facts));
    }
    let mut flags = 0;
    if is_of_one_thread(live) {
        flags |= sys::SETUP_SINGLE_ISSUER;
        if asked(injection, live.fd, sys::REGISTER_EVENTFD, None)? == Err(Errno::EEXIST) {
            return Err(Error::new("an io_uring is of a thread that is not the first of its process")
                .remedy("make the ring without IORING_SETUP_SINGLE_ISSUER"));
        }
        let deferred = interrogate(&mut |operation, bytes| {
            asked(injection, live.fd, operation, bytes.map(|bytes| &*bytes))
        })?;
        flags |= if deferred { sys::SETUP_DEFER_TASKRUN } else { 0 };
    } else if !answers_at_once() {
        interrogate(&mut |operation, bytes| Ok(sys::register(live.file.as_fd(), operation, bytes)))?;
    }
    if facts.taken > COUNT_MAX || facts.posted.wrapping_sub(facts.seen) > facts.taken {
        return Err(Error::new(format!(
            "an io_uring has had {} requests, too many to be counted again at the restore",
            facts.taken
        )));
    }
    let ring = RingExtra {
        id,
        flags,
        sq_entries: facts.sq_entries,
        cq_entries: facts.cq_entries,
        files: registered(live, &facts)?,
        buffers: facts.buffers(),
        status_flags: live.info.flags,
        ..RingExtra::default()
    };
    contents(live, ring)
}

/// Has the task ask its ring.
fn asked(
    injection: &mut Injection,
    fd: i32,
    operation: u32,
    bytes: Option<&[u8]>,
) -> Result<nix::Result<()>> {
    let mut batch = Batch::new();
    let argument = bytes.map_or(Arg::from(sys::NOWHERE), |bytes| batch.data(bytes));
    let args = [fd.into(), operation.into(), argument, 1.into()];
    let call = batch.call(libc::SYS_io_uring_register, &args);
    let call = batch.tolerate(call);
    Ok(injection.run(&batch)?.result(call).map(drop))
}

/// Waits in the task until all that is under way is done, or for some time.
fn wait(injection: &mut Injection, fd: i32, facts: &Facts) -> Result<()> {
    let mut batch = Batch::new();
    let time = batch.words(&[PATIENCE, 0]);
    // sigmask, its size, timespec
    let argument = batch.words(&[0, 0, 0]);
    batch.link(argument, 16, time);
    let all = facts.taken.wrapping_sub(facts.seen).min(facts.cq_entries);
    let flags = sys::ENTER_GETEVENTS | sys::ENTER_EXT_ARG;
    let args = [fd.into(), 0.into(), all.into(), flags.into(), argument, 24.into()];
    let call = batch.call(libc::SYS_io_uring_enter, &args);
    batch.tolerate(call);
    injection.run(&batch).map(drop)
}

/// Adds what is in the ring's memory, and finds out whether the submission queue has an array of its own.
fn contents(live: &Live, mut ring: RingExtra) -> Result<RingExtra> {
    let what = "cannot look at an io_uring";
    let unlike = || {
        Error::new("an io_uring has requests or completions of another size (IORING_SETUP_SQE128, CQE32)")
            .remedy("let the program close it")
    };
    let map = |offset: i64, len: usize| {
        Region::map(&live.file, offset, len).during(what, || format!("mmap(ring, {len}, {offset:#x})"))
    };
    layout(&mut ring)?;
    let len = size(&ring).ok_or_else(unlike)?;
    let whole = map(OFF_QUEUES, len)?;
    if let Some(queues) = &whole {
        ring.queues = queues.bytes(len);
    }
    let array = ring.sq_off.get(ARRAY).map_or(0, |at| *at as usize);
    let unused = ring.queues.get(array..).is_none_or(|array| array.iter().all(|byte| *byte == 0));
    if unused && ring.sq_entries > 1 {
        // Who has an array fills it, or nothing has been asked yet: then it makes no difference.
        let mut without = RingExtra { flags: ring.flags | sys::SETUP_NO_SQARRAY, ..ring.clone() };
        if layout(&mut without).is_ok() {
            let len = size(&without).ok_or_else(unlike)?;
            without.queues = map(OFF_QUEUES, len)?.ok_or_else(unlike)?.bytes(len);
            ring = without;
        }
    }
    let len = ring.sq_entries as usize * REQUEST;
    ring.requests = map(OFF_REQUESTS, len)?.ok_or_else(unlike)?.bytes(len);
    let pages = |len: usize| len.next_multiple_of(4096);
    let longer = ring.queues.len() + ring.cq_entries as usize * COMPLETION;
    let larger = pages(len * 2) > pages(len) && map(OFF_REQUESTS, len * 2)?.is_some()
        || pages(longer) > pages(ring.queues.len()) && map(OFF_QUEUES, longer)?.is_some();
    let masks = (word(&ring, &ring.sq_off, MASK), word(&ring, &ring.cq_off, MASK));
    if larger || masks != (ring.sq_entries - 1, ring.cq_entries - 1) {
        return Err(unlike());
    }
    Ok(ring)
}

/// Finds out where such a ring has its parts.
fn layout(ring: &mut RingExtra) -> Result<()> {
    let mut params = params(ring);
    let like = sys::setup(ring.sq_entries, &mut params)
        .during("cannot make a ring like that of the container", || {
            format!("io_uring_setup({}, {{flags={:#x}}})", ring.sq_entries, params.flags)
        })?;
    drop(like);
    (ring.sq_off, ring.cq_off) = (params.sq_off.to_vec(), params.cq_off.to_vec());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_of_ours_is_recorded() {
        let mut params = sys::Params::default();
        let Ok(file) = sys::setup(8, &mut params) else { return };
        let live = Live::own(file, 1).unwrap();
        assert!(super::super::is(&live));
        let facts = Facts::of(&live).unwrap();
        let ring =
            RingExtra { sq_entries: facts.sq_entries, cq_entries: facts.cq_entries, ..RingExtra::default() };
        let ring = contents(&live, ring).unwrap();
        super::super::validate(&ring).unwrap();
        assert_eq!(ring.requests.len(), 8 * 64);
    }
}
