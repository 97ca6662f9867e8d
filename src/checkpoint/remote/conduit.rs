//! Passing descriptors into a task: a unix socket whose far end the task and its children inherit.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::batch::{Arg, Batch};
use super::injection::Injection;
use crate::checkpoint::error::{Context, Error, Result};

/// The kernel passes at most this many descriptors in a message.
const AT_ONCE: usize = 253;

/// The near end of a socket pair that was made inside a task.
#[derive(Debug)]
pub struct Conduit {
    near: OwnedFd,
    far: i32,
}

impl Conduit {
    /// Makes the pair in the task, moves the far end to descriptor `far_fd` there, and takes the near end.
    pub fn open(injection: &mut Injection, far_fd: i32) -> Result<Self> {
        let tid = injection.thread().tid();
        let mut batch = Batch::new();
        batch.about("cannot make the socket pair that passes descriptors");
        let pair = batch.out(8);
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        batch.call(libc::SYS_socketpair, &[libc::AF_UNIX.into(), kind.into(), 0.into(), pair.arg()]);
        let results = injection.run(&batch)?;
        let (near_there, far_there) = (results.i32(pair, 0), results.i32(pair, 4));
        let near = take(tid, near_there)?;

        let mut batch = Batch::new();
        batch.about("cannot make the socket pair that passes descriptors");
        // The near end first: far_fd may be its number.
        batch.call(libc::SYS_close, &[near_there.into()]);
        if far_there != far_fd {
            batch.call(libc::SYS_dup3, &[far_there.into(), far_fd.into(), libc::O_CLOEXEC.into()]);
            batch.call(libc::SYS_close, &[far_there.into()]);
        }
        injection.run(&batch)?;
        Ok(Self { near, far: far_fd })
    }

    /// Gives the far end, under the same number, to a task that has not inherited it; `from` is one that has it.
    pub fn extend(&self, from: &Injection, to: &mut Injection) -> Result<()> {
        let far = take(from.thread().tid(), self.far)?;
        // By a conduit of its own.
        let numbers = Self::open(to, self.far)?.send(to, &[far.as_fd()])?;
        let mut batch = Batch::new();
        batch.about("cannot hand on the socket that passes descriptors");
        for number in numbers {
            batch.call(libc::SYS_dup3, &[number.into(), self.far.into(), libc::O_CLOEXEC.into()]);
            batch.call(libc::SYS_close, &[number.into()]);
        }
        to.run(&batch).map(drop)
    }

    /// The far end's number in the task and its children.
    pub fn far(&self) -> i32 {
        self.far
    }

    /// Passes descriptors to a task that has the far end; they get its lowest free numbers, in order, without
    /// close-on-exec.
    pub fn send(&self, injection: &mut Injection, fds: &[BorrowedFd]) -> Result<Vec<i32>> {
        let mut all = Vec::with_capacity(fds.len());
        for some in fds.chunks(AT_ONCE) {
            all.extend(self.send_some(injection, some)?);
        }
        Ok(all)
    }

    fn send_some(&self, injection: &mut Injection, fds: &[BorrowedFd]) -> Result<Vec<i32>> {
        let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let byte = [IoSlice::new(&[0])];
        sendmsg::<()>(
            self.near.as_raw_fd(),
            &byte,
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .during("cannot pass descriptors to the task", || {
            format!("sendmsg({}, SCM_RIGHTS {raw:?})", self.near.as_raw_fd())
        })?;

        let header = 16;
        let control_len = (header + raw.len() * 4).next_multiple_of(8);
        let mut batch = Batch::new();
        batch.about("cannot receive descriptors in the task");
        let control = batch.out(control_len);
        let byte = batch.out(1);
        let iov = batch.words(&[0, 1]);
        batch.link(iov, 0, byte);
        // name, namelen, iov, iovlen, control, controllen, flags
        let message = batch.words(&[0, 0, 0, 1, 0, control_len as u64, 0]);
        batch.link(message, 16, iov);
        batch.link(message, 32, control);
        let call = batch.call(libc::SYS_recvmsg, &[self.far.into(), message, Arg::from(libc::MSG_DONTWAIT)]);
        batch.expect(call, 1u64);
        let results = injection.run(&batch)?;
        // The header of the control message has its length first. Fewer came if the task's limit was reached.
        let got = usize::try_from(results.u64(control, 0)).unwrap_or(0).saturating_sub(header) / 4;
        if got != raw.len() {
            return Err(Error::new(format!("the task received {got} of {} descriptors", raw.len()))
                .remedy("its limit of open files may be too low"));
        }
        Ok((0..got).map(|i| results.i32(control, header + i * 4)).collect())
    }

    /// Closes the far end in one task.
    pub fn close(&self, injection: &mut Injection) -> Result<()> {
        let mut batch = Batch::new();
        batch.about("cannot close the socket that passes descriptors");
        batch.call(libc::SYS_close, &[self.far.into()]);
        injection.run(&batch).map(drop)
    }
}

/// Takes a copy of a task's descriptor.
fn take(tid: i32, fd: i32) -> Result<OwnedFd> {
    let what = "cannot take the task's descriptor";
    // SAFETY: both calls take numbers, and give a new descriptor that nobody else owns.
    unsafe {
        let pidfd = nix::errno::Errno::result(libc::syscall(libc::SYS_pidfd_open, tid, 0))
            .during(what, || format!("pidfd_open({tid}, 0)"))?;
        let pidfd = OwnedFd::from_raw_fd(i32::try_from(pidfd).unwrap_or(-1));
        let copy = nix::errno::Errno::result(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0))
            .during(what, || format!("pidfd_getfd({tid}, {fd}, 0)"))?;
        Ok(OwnedFd::from_raw_fd(i32::try_from(copy).unwrap_or(-1)))
    }
}
