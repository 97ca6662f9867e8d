//! What a container uses, now and again, and when memory was not enough for it.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Container, Error, Result, Status};
use crate::cgroup::oom::News;
use crate::cgroup::{Stats, rdt};
use crate::sys::{Context, pidfd};

/// One thing to tell.
#[derive(Debug)]
pub enum Event {
    /// The interval is over.
    Stats(Box<Stats>),
    /// The kernel has killed a process for want of memory.
    Oom,
}

impl Container {
    /// What it has used so far.
    pub fn stats(&self) -> Result<Stats> {
        if self.status()? == Status::Stopped {
            return Err(Error::new(format!("container with id {} is not running", self.state.id)));
        }
        self.read_stats()
    }

    fn read_stats(&self) -> Result<Stats> {
        let mut stats = self.cgroup().stats()?;
        stats.intel_rdt = rdt::stats(&self.state.rdt)?;
        Ok(stats)
    }

    /// Tells of everything until the container ends, or `tell` returns false.
    pub fn watch(&self, interval: Duration, tell: &mut dyn FnMut(Event) -> bool) -> Result<()> {
        let cgroup = self.cgroup();
        let gone = |errno| matches!(errno, Errno::ESRCH | Errno::EINVAL);
        let init = match pidfd::open(self.state.init_process_pid, 0) {
            Err(errno) if gone(errno) => return Ok(()),
            opened => opened.context(|| "pidfd_open")?,
        };
        let mut oom = cgroup.watch_oom()?;
        let mut next = Instant::now() + interval;
        while self.has_init() {
            let left = next.saturating_duration_since(Instant::now()).as_millis();
            // Rounded up, or the last millisecond would be spent turning round.
            let timeout = PollTimeout::try_from(left + 1).unwrap_or(PollTimeout::MAX);
            let mut fds = vec![PollFd::new(init.as_fd(), PollFlags::POLLIN)];
            fds.extend(oom.as_ref().map(|watch| PollFd::new(watch.fd(), PollFlags::POLLIN)));
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => continue,
                done => done.context(|| "poll")?,
            };
            let news = match &mut oom {
                Some(watch) => watch.news()?,
                None => None,
            };
            match news {
                Some(News::Over) => return Ok(()),
                Some(News::Oom(times)) if !(0..times).all(|_| tell(Event::Oom)) => return Ok(()),
                _ => {}
            }
            if Instant::now() >= next && self.has_init() {
                next += interval;
                if !tell(Event::Stats(Box::new(self.read_stats()?))) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
