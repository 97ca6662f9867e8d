//! What `/proc/PID/fdinfo/N` tells of a ring.

use std::os::fd::AsRawFd;

use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::image::RingBuffer;
use crate::checkpoint::{Error, Result};

/// A ring that is busy lets nobody look at parts of it.
const LOOKS: usize = 1000;

/// What fdinfo says.
#[derive(Debug, Default, PartialEq)]
pub struct Facts {
    /// Sizes of the queues.
    pub sq_entries: u32,
    /// See there.
    pub cq_entries: u32,
    /// Requests taken by the kernel.
    pub taken: u32,
    /// Completions posted, and those that the program has seen.
    pub posted: u32,
    /// See there.
    pub seen: u32,
    /// Its thread that looks for requests.
    pub poller: bool,
    /// Requests that wait for a file to be ready.
    pub polls: usize,
    /// Completions that the queue had no room for.
    pub overflown: usize,
    /// Registered credentials.
    pub personalities: usize,
    /// Registered files by name, and buffers; those that are there.
    pub files: Vec<(usize, String)>,
    /// See there.
    pub buffers: Vec<(usize, RingBuffer)>,
    /// How many places there are.
    pub places: (usize, usize),
}

impl Facts {
    /// Reads the fdinfo of a duplicate of ours.
    pub fn of(live: &Live) -> Result<Self> {
        let path = format!("/proc/self/fdinfo/{}", live.file.as_raw_fd());
        for _ in 0..LOOKS {
            let text = std::fs::read_to_string(&path)
                .during("cannot read fdinfo", || format!("open({path:?}, O_RDONLY)"))?;
            if let Some(facts) = Self::parse(&text)? {
                return Ok(facts);
            }
            std::thread::yield_now();
        }
        Err(Error::new("an io_uring is so busy that it cannot be looked at"))
    }

    /// None: the ring was held by somebody, and the kernel has left parts out.
    fn parse(text: &str) -> Result<Option<Self>> {
        if !text.lines().any(|line| line.starts_with("SqMask:")) {
            return Err(Error::new("this kernel does not tell how large an io_uring is")
                .remedy("Linux 5.16 does; or let the program do without io_uring"));
        }
        let mut facts = Self::default();
        let mut section = "";
        let mut whole = false;
        for line in text.lines() {
            let (key, value) = line.split_once(':').map_or((line, ""), |(key, value)| (key, value.trim()));
            let bad = || Error::new(format!("fdinfo of an io_uring not understood: {line:?}"));
            if !line.starts_with(' ') {
                section = key;
                let number = || match value.strip_prefix("0x") {
                    Some(hex) => u32::from_str_radix(hex, 16).map_err(|_| bad()),
                    None => value.parse().map_err(|_| bad()),
                };
                match key {
                    "SqMask" => facts.sq_entries = number()?.wrapping_add(1),
                    "CqMask" => facts.cq_entries = number()?.wrapping_add(1),
                    "CachedSqHead" => facts.taken = number()?,
                    "CachedCqTail" => facts.posted = number()?,
                    "CqHead" => facts.seen = number()?,
                    "SqThread" => facts.poller = value != "-1",
                    "UserFiles" => facts.places.0 = number()? as usize,
                    "UserBufs" => (facts.places.1, whole) = (number()? as usize, true),
                    _ => {}
                }
                continue;
            }
            let index = || key.trim().parse::<usize>().map_err(|_| bad());
            match section {
                "UserFiles" if value != "<none>" => facts.files.push((index()?, value.to_owned())),
                "UserBufs" if value != "<none>" => {
                    let parts = value.strip_prefix("0x").and_then(|value| value.split_once('/'));
                    let (address, length) = parts.ok_or_else(bad)?;
                    let address = u64::from_str_radix(address, 16).map_err(|_| bad())?;
                    let length = length.parse().map_err(|_| bad())?;
                    facts.buffers.push((index()?, RingBuffer { address, length }));
                }
                "PollList" => facts.polls += 1,
                "CqOverflowList" => facts.overflown += 1,
                "Personalities" => facts.personalities += 1,
                _ => {}
            }
        }
        Ok(whole.then_some(facts))
    }

    /// Requests that are under way.
    pub fn under_way(&self) -> u32 {
        self.taken.wrapping_sub(self.posted)
    }

    /// Refuses what cannot be kept.
    pub fn refuse(&self) -> Result<()> {
        let what = match () {
            () if self.poller => "an io_uring has a thread that polls its queue (IORING_SETUP_SQPOLL)",
            () if self.polls > 0 => "requests of an io_uring wait for files to be ready",
            () if self.personalities > 0 => "an io_uring has registered credentials (personalities)",
            () if self.overflown > 0 => "completions of an io_uring have overflown its queue",
            () => return Ok(()),
        };
        Err(Error::new(format!("{what}, which cannot be checkpointed"))
            .remedy("let the program end its requests, or do without io_uring"))
    }

    /// The registered buffers, with those places that have none.
    pub fn buffers(&self) -> Vec<RingBuffer> {
        let mut all = vec![RingBuffer { address: 0, length: 0 }; self.places.1];
        for (place, buffer) in &self.buffers {
            if let Some(found) = all.get_mut(*place) {
                found.clone_from(buffer);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t9\nSqMask:\t0x3f\nSqHead:\t7\nSqTail:\t9\n\
        CachedSqHead:\t7\nCqMask:\t0x7f\nCqHead:\t4\nCqTail:\t6\nCachedCqTail:\t6\nSQEs:\t2\n    7: opcode:NOP, fd:0\n\
        CQEs:\t2\n    4: user_data:3, res:0, flags:0\nSqThread:\t-1\nSqThreadCpu:\t-1\nUserFiles:\t3\n    0: /a b: c\n\
        \u{20}   1: <none>\n    2: socket:[77]\nUserBufs:\t1\n    0: 0x7ffd22eb5a70/8192\nPollList:\n  op=6, task_works=0\n\
        CqOverflowList:\n  user_data=1, res=2, flags=0\n";

    #[test]
    fn fdinfo_is_understood() {
        let facts = Facts::parse(TEXT).unwrap().unwrap();
        assert_eq!((facts.sq_entries, facts.cq_entries), (64, 128));
        assert_eq!((facts.taken, facts.posted, facts.seen, facts.under_way()), (7, 6, 4, 1));
        assert_eq!(facts.files, [(0, "/a b: c".to_owned()), (2, "socket:[77]".to_owned())]);
        assert_eq!(facts.places, (3, 1));
        assert_eq!(facts.buffers(), [RingBuffer { address: 0x7ffd_22eb_5a70, length: 8192 }]);
        assert_eq!((facts.polls, facts.overflown, facts.poller), (1, 1, false));
        assert!(facts.refuse().unwrap_err().to_string().contains("wait for files"));
        let idle = TEXT.replace("  op=6, task_works=0\n", "").replace("  user_data=1, res=2, flags=0\n", "");
        assert!(Facts::parse(&idle).unwrap().unwrap().refuse().is_ok());
        let poller = Facts::parse(&TEXT.replace("SqThread:\t-1", "SqThread:\t77")).unwrap().unwrap();
        assert!(poller.refuse().unwrap_err().to_string().contains("SQPOLL"));
        let (held, _) = TEXT.split_once("UserFiles").unwrap();
        assert_eq!(Facts::parse(held).unwrap(), None);
    }
}
