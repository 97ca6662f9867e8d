//! Staying with a process until it ends: copying what it reads and writes, passing signals on.
//!
//! One thread, one poll(2). Writes are of at most a pipe's atomic size after poll has said that they fit, so that
//! nobody who doesn't read can keep us from passing on a signal; our own descriptors, which we share with whoever
//! started us, are never made non-blocking.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::Result;
use super::stdio::{Ours, receive_master};
use crate::sys::{Context, ioctl, pidfd, process::wait_child};

/// Takes over all signals of this process. To be made before the process to stay with, so that none is lost.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks every signal and opens a descriptor for them.
    pub fn take() -> Result<Self> {
        let all = SigSet::all();
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), None).context(|| "sigprocmask")?;
        let fd = SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        Ok(Self(fd.context(|| "signalfd")?))
    }
}

/// As many bytes as a pipe takes at once when poll(2) says it takes any.
const CHUNK: usize = 4096;

/// Bytes on their way from one descriptor to another. Each end is closed as soon as nothing more can come or go.
struct Pump {
    from: Option<OwnedFd>,
    to: Option<OwnedFd>,
    held: Vec<u8>,
}

impl Pump {
    fn new(from: OwnedFd, to: OwnedFd) -> Self {
        Self { from: Some(from), to: Some(to), held: Vec::new() }
    }

    fn wants(&self) -> Option<PollFd<'_>> {
        if self.held.is_empty() {
            self.from.as_ref().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
        } else {
            self.to.as_ref().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLOUT))
        }
    }

    /// Moves bytes once poll(2) has said so.
    fn step(&mut self) {
        if self.held.is_empty() {
            let Some(from) = &self.from else { return };
            let mut buffer = [0; CHUNK];
            match nix::unistd::read(from, &mut buffer) {
                Ok(n @ 1..) => self.held.extend_from_slice(&buffer[..n]),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                // EIO is what the master of a terminal says once nobody holds its slave.
                Ok(_) | Err(_) => self.close(),
            }
        } else if let Some(to) = &self.to {
            match nix::unistd::write(to, &self.held) {
                Ok(n) => drop(self.held.drain(..n)),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(_) => self.close(),
            }
        }
    }

    fn close(&mut self) {
        (self.from, self.to) = (None, None);
        self.held.clear();
    }
}

/// Our terminal in raw mode, until dropped.
struct Raw {
    tty: OwnedFd,
    before: Termios,
}

impl Raw {
    fn enter() -> Result<Self> {
        let tty = host_terminal()?;
        let before = tcgetattr(&tty).context(|| "tcgetattr")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        // The container's terminal passes line feeds on as they are; ours makes new lines of them.
        raw.output_flags.insert(OutputFlags::OPOST);
        tcsetattr(&tty, SetArg::TCSANOW, &raw)
            .context(|| "failed to set the terminal from the stdin: tcsetattr")?;
        Ok(Self { tty, before })
    }

    fn pass_size(&self, master: BorrowedFd<'_>) {
        // Cosmetics, and our terminal may be gone already.
        if let Ok(size) = ioctl::window_size(&self.tty) {
            let _ = ioctl::set_window_size(master, &size);
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.tty, SetArg::TCSANOW, &self.before);
    }
}

/// The terminal that we have: one of our standard descriptors, or else our controlling terminal.
fn host_terminal() -> Result<OwnedFd> {
    let (input, output, error) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for fd in [error.as_fd(), output.as_fd(), input.as_fd()] {
        if tcgetattr(fd).is_ok() {
            return Ok(fd.try_clone_to_owned().context(|| "dup")?);
        }
    }
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open("/dev/tty", flags, nix::sys::stat::Mode::empty()).context(|| "open /dev/tty")?)
}

/// Stays with the child `pid` until it exits, and returns its exit status.
pub fn stay(pid: i32, handle: BorrowedFd<'_>, ours: Ours, signals: &Signals) -> Result<i32> {
    let dup = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().context(|| "dup");
    let (input, output, error) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    match ours {
        Ours::Nothing => pump(pid, handle, &mut [], None, signals),
        Ours::Pipes([to, from, from_error]) => {
            let mut pumps = [
                Pump::new(dup(input.as_fd())?, to),
                Pump::new(from, dup(output.as_fd())?),
                Pump::new(from_error, dup(error.as_fd())?),
            ];
            let code = pump(pid, handle, &mut pumps, None, signals)?;
            // What it has written, or what its children still write: runc waits for the end of that, too.
            drain(&mut pumps[1..]);
            Ok(code)
        }
        Ours::Terminal(socket) => {
            let master = receive_master(&socket)?;
            let raw = Raw::enter()?;
            raw.pass_size(master.as_fd());
            fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context(|| "fcntl")?;
            let mut pumps = [
                Pump::new(dup(input.as_fd())?, dup(master.as_fd())?),
                Pump::new(dup(master.as_fd())?, dup(output.as_fd())?),
            ];
            let code = pump(pid, handle, &mut pumps, Some((&raw, master.as_fd())), signals)?;
            flush(&mut pumps[1]);
            Ok(code)
        }
    }
}

/// The loop: until the child has exited.
fn pump(
    pid: i32,
    handle: BorrowedFd<'_>,
    pumps: &mut [Pump],
    terminal: Option<(&Raw, BorrowedFd<'_>)>,
    signals: &Signals,
) -> Result<i32> {
    loop {
        let ready = {
            let mut fds = vec![
                PollFd::new(handle, PollFlags::POLLIN),
                PollFd::new(signals.0.as_fd(), PollFlags::POLLIN),
            ];
            let (wants, fresh) = wanted(pumps);
            fds.extend(fresh);
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                done => done.context(|| "poll")?,
            };
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            (ready[0], ready[1], wants.into_iter().zip(ready.into_iter().skip(2)).collect::<Vec<_>>())
        };
        for (index, ready) in ready.2 {
            if ready {
                pumps[index].step();
            }
        }
        if ready.1 {
            while let Ok(Some(info)) = signals.0.read_signal() {
                take_signal(info.ssi_signo as i32, pid, handle, terminal);
            }
        }
        if ready.0 {
            match wait_child(pid, false) {
                Ok(Some(code)) => return Ok(code),
                Ok(None) => {}
                Err(errno) => return Err(crate::sys::Error::call("wait4", errno).into()),
            }
        }
    }
}

/// The pumps with something to wait for, by index, and what that is.
fn wanted(pumps: &[Pump]) -> (Vec<usize>, Vec<PollFd<'_>>) {
    pumps.iter().enumerate().filter_map(|(i, p)| Some((i, p.wants()?))).unzip()
}

fn take_signal(signal: i32, pid: i32, handle: BorrowedFd<'_>, terminal: Option<(&Raw, BorrowedFd<'_>)>) {
    match (signal, terminal) {
        (libc::SIGCHLD, _) => reap_others(pid),
        (libc::SIGWINCH, Some((raw, master))) => raw.pass_size(master),
        (libc::SIGURG | libc::SIGPIPE, _) => {}
        _ => {
            // It may be gone: the handle says so next.
            let _ = pidfd::send_signal(handle, signal);
        }
    }
}

/// Waits for what was reparented to us as the subreaper, leaving the one process that matters to the caller.
fn reap_others(pid: i32) {
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
    let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(status) = waitid(Id::All, peek) {
        match status.pid() {
            Some(other) if other.as_raw() != pid => {
                if wait_child(other.as_raw(), false).is_err() {
                    return;
                }
            }
            _ => return,
        }
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}

/// Moves everything until the other side closes.
fn drain(pumps: &mut [Pump]) {
    loop {
        let ready: Vec<(usize, bool)> = {
            let (wants, mut fds) = wanted(pumps);
            if fds.is_empty() {
                return;
            }
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            wants.into_iter().zip(fds.iter().map(|fd| fd.any().unwrap_or(false))).collect()
        };
        for (index, ready) in ready {
            if ready {
                pumps[index].step();
            }
        }
    }
}

/// Moves what is there already.
fn flush(pump: &mut Pump) {
    loop {
        let Some(want) = pump.wants() else { return };
        if !matches!(poll(&mut [want], PollTimeout::ZERO), Ok(1..)) {
            return;
        }
        pump.step();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::pipe;

    #[test]
    fn a_pump_moves_everything_and_closes_its_end() {
        let (from, feed) = pipe().unwrap();
        let (sink, to) = pipe().unwrap();
        nix::unistd::write(&feed, b"hello").unwrap();
        drop(feed);
        drain(&mut [Pump::new(from, to)]);
        let mut buffer = [0; 16];
        assert_eq!(nix::unistd::read(&sink, &mut buffer).unwrap(), 5);
        assert_eq!(nix::unistd::read(&sink, &mut buffer).unwrap(), 0, "the far end is closed");
    }
}
