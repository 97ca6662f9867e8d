//! Sessions and their terminals.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;

use crate::checkpoint::context::{Dump, NewTask};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::opener::Files;
use crate::checkpoint::remote::{Batch, Conduit};
use crate::checkpoint::task::status::Stat;
use crate::checkpoint::{Error, Result};
use crate::sys::pidfd;

/// Fields of /proc/PID/stat.
const SESSION: usize = 6;
const TERMINAL: usize = 7;
const FOREGROUND: usize = 8;

/// Session and foreground group of the pty with that index, as the container numbers them; zeros if it has none.
pub fn of(dump: &Dump<'_>, index: u32) -> Result<(u32, u32)> {
    for task in dump.tasks.iter().filter(|t| !t.zombie) {
        let stat = Stat::of(task.pid)?;
        // Both halves of a device number, packed by new_encode_dev(): 12 bits of major above 8 of minor.
        let number = stat.field(TERMINAL);
        let (major, minor) = ((number >> 8) & 0xfff, (number & 0xff) | ((number >> 12) & 0xfff00));
        if stat.field(SESSION) != i64::from(task.pid) || major != 136 || minor != i64::from(index) {
            continue;
        }
        let foreground = i32::try_from(stat.field(FOREGROUND)).unwrap_or(-1);
        let pgrp = dump.files.pids.get(&foreground).copied().unwrap_or(task.vpid);
        return Ok((task.vpid.cast_unsigned(), pgrp.cast_unsigned()));
    }
    Ok((0, 0))
}

impl Files<'_> {
    /// Gives a session its terminal. To be called when its leader leads it, and has no children yet.
    pub fn take_terminal(&mut self, task: &mut NewTask, conduit: &Conduit) -> Result<()> {
        let sid = task.vpid.cast_unsigned();
        let Some(session) = self.terminals.sessions.get(&sid) else { return Ok(()) };
        let vpid = task.vpid;
        self.sessions.insert(sid);
        let fd = send(task, conduit, &session.slave)?;
        let mut batch = Batch::new();
        batch.about("giving a session its terminal");
        batch.call(libc::SYS_ioctl, &[fd.into(), libc::TIOCSCTTY.into(), 0.into()]);
        batch.call(libc::SYS_close, &[fd.into()]);
        task.injection.run(&batch).map_err(|e| e.pid(vpid))?;
        for (id, flags) in session.controlling.clone() {
            let file = open_tty(task, flags).map_err(|e| e.pid(vpid))?;
            self.opened.insert(id, file);
        }
        Ok(())
    }

    /// Puts the foreground group of a session in place, when all groups exist.
    pub(in crate::checkpoint::files) fn set_foreground(
        &mut self,
        task: &mut NewTask,
        conduit: &Conduit,
    ) -> Result<()> {
        let sid = task.vpid.cast_unsigned();
        let Some(session) = self.terminals.sessions.get(&sid) else { return Ok(()) };
        if session.pgrp == 0 {
            return Ok(());
        }
        let fd = send(task, conduit, &session.slave)?;
        let mut batch = Batch::new();
        batch.about("setting the foreground process group of a terminal");
        let group = batch.data(&session.pgrp.to_ne_bytes());
        batch.call(libc::SYS_ioctl, &[fd.into(), libc::TIOCSPGRP.into(), group]);
        batch.call(libc::SYS_close, &[fd.into()]);
        let vpid = task.vpid;
        task.injection.run(&batch).map_err(|e| e.pid(vpid)).map(drop)
    }

    /// Every session must have been led by somebody, or processes would wait for a terminal that never speaks.
    pub(in crate::checkpoint::files) fn check_sessions(&self) -> Result<()> {
        match self.terminals.sessions.keys().find(|sid| !self.sessions.contains(sid)) {
            Some(sid) => Err(Error::new(format!("session {sid} has a terminal, but no process leads it"))),
            None => Ok(()),
        }
    }
}

fn send(task: &mut NewTask, conduit: &Conduit, fd: &OwnedFd) -> Result<i32> {
    conduit
        .send(&mut task.injection, &[fd.as_fd()])?
        .first()
        .copied()
        .ok_or_else(|| Error::new("a terminal did not arrive"))
}

/// Only a process of the session can open /dev/tty.
fn open_tty(task: &mut NewTask, flags: u32) -> Result<OwnedFd> {
    let mut batch = Batch::new();
    batch.about("opening /dev/tty");
    let path = batch.string(b"/dev/tty");
    let wanted = crate::checkpoint::files::regular::open_flags(flags) | OFlag::O_CLOEXEC;
    let flags = wanted.bits().cast_unsigned();
    let call = batch.call(libc::SYS_openat, &[libc::AT_FDCWD.into(), path, flags.into(), 0.into()]);
    let fd = task.injection.run(&batch)?.ret(call);
    let number = i32::try_from(fd).map_err(|_| Error::new("a descriptor is too large"))?;
    let file = pidfd::getfd(task.pidfd.as_fd(), number)
        .during("cannot fetch /dev/tty", || format!("pidfd_getfd(_, {number}, 0)"))?;
    task.injection.syscall(libc::SYS_close, &[number.into()])?;
    Ok(file)
}
