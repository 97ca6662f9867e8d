//! Events as read(2) gives them.

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use crate::checkpoint::error::Context;
use crate::checkpoint::{Error, Result};
use crate::sys::ioctl;

/// `struct inotify_event` without its name.
pub const HEADER: usize = 16;
const WHAT: &str = "cannot look for inotify events";

/// One event.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The watch; -1 of `IN_Q_OVERFLOW`.
    pub wd: i32,
    /// One kind, and perhaps `IN_ISDIR`.
    pub mask: u32,
    /// What the two halves of a rename have in common.
    #[serde(default)]
    pub cookie: u32,
    /// The file in the directory that is watched; empty: what is watched itself.
    #[serde(default)]
    pub name: Vec<u8>,
}

impl Event {
    /// That events were lost.
    pub fn overflow() -> Self {
        Self { wd: -1, mask: libc::IN_Q_OVERFLOW, ..Self::default() }
    }

    /// Whether it is of a kind.
    pub fn is(&self, kind: u32) -> bool {
        self.mask & kind != 0
    }

    /// Bytes that it takes in a queue.
    pub fn len(&self) -> usize {
        let name = if self.name.is_empty() { 0 } else { self.name.len() + 1 };
        HEADER + name.next_multiple_of(HEADER)
    }
}

/// Refuses what no kernel writes: a name is one of a file in a directory.
pub fn validate(event: &Event) -> Result<()> {
    let hostile = event.name.len() > 255
        || event.name.iter().any(|byte| [0, b'/'].contains(byte))
        || [&b"."[..], b".."].contains(&event.name.as_slice());
    if hostile || event.wd < -1 {
        return Err(Error::new("the images have a malformed event of inotify"));
    }
    Ok(())
}

/// The bytes of a queue's events.
pub fn waiting(inotify: BorrowedFd<'_>) -> Result<usize> {
    let bytes = ioctl::readable(inotify).during(WHAT, || "ioctl(_, FIONREAD)".into())?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Takes the first events out of a queue: as many as fit.
pub fn take(inotify: BorrowedFd<'_>, bytes: usize) -> Result<Vec<Event>> {
    let mut buffer = vec![0; bytes];
    let read = nix::unistd::read(inotify, &mut buffer).during(WHAT, || format!("read(_, {bytes})"))?;
    buffer.truncate(read);
    Ok(parse(&buffer))
}

/// Takes all events out of a queue.
pub fn take_all(inotify: BorrowedFd<'_>) -> Result<Vec<Event>> {
    let mut all = Vec::new();
    loop {
        match waiting(inotify)? {
            0 => return Ok(all),
            bytes => all.append(&mut take(inotify, bytes)?),
        }
    }
}

fn parse(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() {
        let word = |at: usize| header[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
        let length = (word(12) as usize).min(rest.len());
        let (name, behind) = rest.split_at(length);
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        events.push(Event { wd: word(0).cast_signed(), mask: word(4), cookie: word(8), name });
        bytes = behind;
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_apart() {
        let mut bytes = Vec::new();
        for (wd, name) in [(1, &b""[..]), (2, b"file\0\0\0\0\0\0\0\0\0\0\0\0"), (3, b"")] {
            let words = [wd, libc::IN_CREATE, 7, name.len() as u32];
            bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
            bytes.extend(name);
        }
        let events = parse(&bytes);
        assert_eq!(events.iter().map(Event::len).sum::<usize>(), bytes.len());
        assert_eq!((events.len(), events[1].name.as_slice(), events[2].wd), (3, &b"file"[..], 3));
        assert!(parse(&bytes[..15]).is_empty());
        let long = Event { name: vec![b'x'; 16], ..Event::default() };
        assert_eq!((long.len(), Event::overflow().len()), (48, 16));
    }
}
