//! Filling a queue with the very events that it had.
//!
//! ```text
//!   f f f f f f f f O            full of fillers: the kernel adds IN_Q_OVERFLOW, once, and drops what comes then
//!             f f f O            so many are read that there is room for the wanted ones, and for nothing else
//!             f f f O w w w w    each is made to happen, on a stage, under its watch's number
//!             f f f O w w w w    the stage is left; that its watches end is dropped, for the queue is full
//!                     w w w w    the rest of the fillers is read
//! ```
//!
//! Nothing else adds an event for a watch that is not there, and nothing removes a watch without an event that says so.
//! Where the wanted ones have an `IN_Q_OVERFLOW` among them, the kernel's stands in that place.
//!
//! A queue of a process that lives is filled in the same way: its own watches give their numbers up for that time. What
//! somebody does to watched files in these milliseconds goes unnoticed; and if this command is killed in them, nobody gives
//! the program its events and watches back.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::event::{Event, HEADER, take, take_all, waiting};
use super::stage::Stage;
use crate::checkpoint::error::Context;
use crate::checkpoint::{Error, Result};
use crate::sys;

const WHAT: &str = "cannot fill an inotify queue";
/// Fillers between two looks.
const AT_ONCE: usize = 1024;
/// No queue is longer: twice a thousand times what the kernel begins with.
const LONGEST: usize = 32 << 20;

/// Puts events into the queue of an instance without watches and events. What cannot be made again, and what there is no
/// room for, becomes `IN_Q_OVERFLOW`: its reader looks for itself then.
pub fn fill(inotify: BorrowedFd<'_>, wanted: &[Event]) -> Result<()> {
    let wanted = possible(wanted);
    if wanted.is_empty() {
        return Ok(());
    }
    exactly(inotify, &wanted).or_else(|error| {
        // The stage has been left behind with its watches.
        take_all(inotify)?;
        exactly(inotify, &[Event::overflow()]).map_err(|_| error)
    })
}

/// The events in an order in which they can be made. `IN_UNMOUNT` would take a file system to unmount.
fn possible(wanted: &[Event]) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::with_capacity(wanted.len());
    let mut ended = Vec::new();
    for event in wanted {
        if event.is(libc::IN_Q_OVERFLOW | libc::IN_UNMOUNT) {
            events.retain(|event| event.wd >= 0);
            events.push(Event::overflow());
        } else if event.is(libc::IN_IGNORED) && ended.contains(&event.wd) {
            // It has come with the end of its file.
        } else {
            events.push(event.clone());
            if event.is(libc::IN_DELETE_SELF) {
                ended.push(event.wd);
                events.push(Event { wd: event.wd, mask: libc::IN_IGNORED, ..Event::default() });
            }
        }
    }
    events
}

/// Takes the watches of an instance away, and all events, of which it gives the first `bytes` back.
pub fn clear(inotify: BorrowedFd<'_>, bytes: usize, watches: &[i32]) -> Result<Vec<Event>> {
    let events = take(inotify, bytes)?;
    take_all(inotify)?;
    let stage = Stage::new(inotify, &[])?;
    let filler = Filler::new(inotify, stage.root(), watches.iter().copied().max().unwrap_or(0))?;
    filler.fill()?;
    for wd in watches {
        let gone = sys::inotify::remove_watch(inotify, *wd);
        // Its file may just have been removed.
        if gone != Err(Errno::EINVAL) {
            gone.during(WHAT, || format!("inotify_rm_watch(_, {wd})"))?;
        }
    }
    filler.end()?;
    take_all(inotify)?;
    Ok(events)
}

fn exactly(inotify: BorrowedFd<'_>, wanted: &[Event]) -> Result<()> {
    let mut stage = Stage::new(inotify, wanted)?;
    let highest = wanted.iter().map(|event| event.wd).max().unwrap_or(0);
    let filler = Filler::new(inotify, stage.root(), highest)?;
    let room = filler.fill()?;
    let split = wanted.iter().position(|event| event.is(libc::IN_Q_OVERFLOW));
    let (before, behind) = wanted.split_at(split.unwrap_or(0));
    let behind = if split.is_some() { &behind[1..] } else { behind };
    if before.len() + behind.len() >= room {
        return Err(Error::new(format!("{WHAT}: {} events, where there is room for {room}", wanted.len())));
    }
    if !before.is_empty() {
        take_all(inotify)?;
        filler.add(room - before.len())?;
        play(&mut stage, before)?;
        filler.add(1)?;
    }
    filler.remove(behind.len() + 1)?;
    play(&mut stage, behind)?;
    stage.leave()?;
    filler.end()?;
    let bytes: usize = wanted.iter().map(Event::len).sum();
    let rest = waiting(inotify)?.checked_sub(bytes).unwrap_or(usize::MAX);
    if !rest.is_multiple_of(HEADER) || rest > LONGEST {
        return Err(Error::new(format!("{WHAT}: it has too little in it")));
    }
    filler.remove(rest / HEADER)?;
    match waiting(inotify)? {
        left if left == bytes => Ok(()),
        left => Err(Error::new(format!("{WHAT}: it has {left} bytes, not {bytes}"))),
    }
}

fn play(stage: &mut Stage<'_>, mut events: &[Event]) -> Result<()> {
    while let Some(first) = events.first() {
        let count = stage.play(events)?;
        // The kernel adds the end of the watch to the end of the file.
        let count = count + usize::from(first.is(libc::IN_DELETE_SELF));
        events = events.get(count..).unwrap_or_default();
    }
    Ok(())
}

/// A watched file to which things happen that mean nothing.
struct Filler<'a> {
    inotify: BorrowedFd<'a>,
    file: File,
    wd: i32,
}

impl<'a> Filler<'a> {
    /// As a watch above all others.
    fn new(inotify: BorrowedFd<'a>, root: &OwnedFd, highest: i32) -> Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC;
        let file: OwnedFd = openat(root, "filler", flags, Mode::S_IRWXU)
            .during(WHAT, || "openat(_, \"filler\", O_RDWR|O_CREAT)".into())?;
        let next = if highest == i32::MAX { 1 } else { highest.max(0) + 1 };
        sys::ioctl::set_inotify_next_wd(inotify, next)
            .during(WHAT, || format!("ioctl(_, INOTIFY_IOC_SETNEXTWD, {next})"))?;
        let mask = libc::IN_MODIFY | libc::IN_ACCESS;
        let wd = sys::inotify::add_watch(inotify, file.as_fd(), mask)
            .during(WHAT, || format!("inotify_add_watch(_, \"filler\", {mask:#x})"))?;
        Ok(Self { inotify, file: file.into(), wd })
    }

    /// Adds so many events. Two that are alike would be one.
    fn add(&self, count: usize) -> Result<()> {
        for turn in 0..count {
            let done = match turn % 2 {
                0 => self.file.write_at(b"x", 0),
                _ => self.file.read_at(&mut [0], 0),
            };
            done.during(WHAT, || "pwrite(_, 1)".into())?;
        }
        Ok(())
    }

    /// Fills the empty queue until it overflows; how many events it has room for.
    fn fill(&self) -> Result<usize> {
        let mut last = 0;
        loop {
            self.add(AT_ONCE)?;
            let now = waiting(self.inotify)?;
            if now == last || now > LONGEST {
                // The last one says that it has.
                return Ok((now / HEADER).saturating_sub(1));
            }
            last = now;
        }
    }

    /// Reads so many events, all of which have no names.
    fn remove(&self, mut count: usize) -> Result<()> {
        while count > 0 {
            let got = take(self.inotify, count * HEADER)?;
            count = count.saturating_sub(got.len());
        }
        Ok(())
    }

    fn end(&self) -> Result<()> {
        sys::inotify::remove_watch(self.inotify, self.wd)
            .during(WHAT, || format!("inotify_rm_watch(_, {})", self.wd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(wd: i32, mask: u32, cookie: u32, name: &str) -> Event {
        Event { wd, mask, cookie, name: name.as_bytes().to_vec() }
    }

    /// What is in the queue afterwards; cookies are 1 where there are any.
    fn filled(wanted: &[Event]) -> Vec<Event> {
        let inotify = sys::inotify::init().unwrap();
        exactly(inotify.as_fd(), &possible(wanted)).unwrap();
        let mut events = take_all(inotify.as_fd()).unwrap();
        events.iter_mut().for_each(|event| event.cookie = event.cookie.min(1));
        events
    }

    #[test]
    fn every_event_is_made_again() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = libc::IN_ISDIR;
        let mut wanted = [
            event(1, libc::IN_CREATE, 0, "f"),
            event(1, libc::IN_OPEN, 0, "f"),
            event(1, libc::IN_MODIFY, 0, "f"),
            event(1, libc::IN_ACCESS, 0, "f"),
            event(1, libc::IN_CLOSE_WRITE, 0, "f"),
            event(1, libc::IN_CLOSE_NOWRITE, 0, "f"),
            event(1, libc::IN_ATTRIB, 0, "f"),
            event(1, libc::IN_CREATE | dir, 0, "d"),
            event(1, libc::IN_OPEN | dir, 0, "d"),
            event(1, libc::IN_ACCESS | dir, 0, "d"),
            event(1, libc::IN_CLOSE_NOWRITE | dir, 0, "d"),
            event(1, libc::IN_ATTRIB | dir, 0, "d"),
            event(1, libc::IN_MOVED_FROM, 1, "f"),
            event(7, libc::IN_MOVED_TO, 1, "a name of more than sixteen bytes"),
            event(7, libc::IN_MOVED_FROM, 2, "g"),
            event(1, libc::IN_MOVED_TO | dir, 3, "h"),
            event(1, libc::IN_DELETE, 0, "f"),
            event(1, libc::IN_DELETE | dir, 0, "d"),
            event(1, libc::IN_ACCESS | dir, 0, ""),
            event(1, libc::IN_MOVE_SELF, 0, ""),
            event(3, libc::IN_MODIFY, 0, ""),
            event(3, libc::IN_MOVE_SELF, 0, ""),
            event(3, libc::IN_ATTRIB, 0, ""),
            event(3, libc::IN_DELETE_SELF, 0, ""),
            event(3, libc::IN_IGNORED, 0, ""),
            event(1, libc::IN_DELETE_SELF, 0, ""),
            event(1, libc::IN_IGNORED, 0, ""),
            event(8, libc::IN_IGNORED, 0, ""),
        ];
        for count in 1..=wanted.len() {
            let single = &wanted[count - 1..count];
            if !single[0].is(libc::IN_MOVE | libc::IN_DELETE_SELF) {
                assert_eq!(filled(single), single);
            }
        }
        let mut overflown = wanted.to_vec();
        overflown.insert(5, Event::overflow());
        let (all, most) = (filled(&wanted), filled(&overflown));
        wanted.iter_mut().for_each(|event| event.cookie = event.cookie.min(1));
        assert_eq!(all, wanted);
        overflown.iter_mut().for_each(|event| event.cookie = event.cookie.min(1));
        assert_eq!(most, overflown);
        assert_eq!(filled(&[Event::overflow()]), [Event::overflow()]);
    }
}
