//! eventfd(2): a counter.

use std::os::fd::OwnedFd;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{read, write};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::external;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::image::{EventfdFileEntry, FdTypes, FileEntry};
use crate::checkpoint::{Error, Result};

/// An eventfd.
pub fn is(live: &Live) -> bool {
    live.is_anon("eventfd")
}

/// EFD_SEMAPHORE lives in no status flag; fdinfo prints it since 6.2, and before that one has to be tried. CRIU has no field for it and takes what it finds
/// in `flags`, where this bit (1) would be O_WRONLY, which no eventfd has.
const SEMAPHORE: u32 = 1;

/// Records the counter.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let told = live.info.field("eventfd-semaphore").map(|told| Ok(told == "1"));
    let entry = entry(live, id)
        .and_then(|entry| {
            told.unwrap_or_else(|| is_semaphore(&live.file, entry.counter)).map(|is| mark(entry, is))
        })
        .map_err(|e| live.name(e))?;
    let entry = EventfdFileEntry { fown: live.fown(&dump.files.pids)?, ..entry };
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Eventfd as i32,
        id,
        efd: Some(entry),
        ..FileEntry::default()
    });
    Ok(())
}

fn mark(mut entry: EventfdFileEntry, semaphore: bool) -> EventfdFileEntry {
    entry.flags |= if semaphore { SEMAPHORE } else { 0 };
    entry
}

/// Tries an eventfd of processes that stand still, and leaves it as it was: a semaphore is read one by one. It holds 2
/// for that at least; nobody is told, for whoever polls it looks again first.
fn is_semaphore(file: &OwnedFd, count: u64) -> Result<bool> {
    let what = "cannot tell whether an eventfd is a semaphore";
    let add = |n: u64| write(file, &n.to_ne_bytes()).during(what, || format!("write(_, {n})"));
    let take = || -> Result<u64> {
        let mut got = [0; 8];
        read(file, &mut got).during(what, || "read(_, 8)".into())?;
        Ok(u64::from_ne_bytes(got))
    };
    if count < 2 {
        add(2 - count)?;
    }
    let is = take()? == 1;
    match (is, count) {
        (true, 0) => drop(take()?),
        (true, 1) | (false, 0) => {}
        (true, _) => drop(add(1)?),
        (false, _) => drop(add(count)?),
    }
    Ok(is)
}

fn entry(live: &Live, id: u32) -> Result<EventfdFileEntry> {
    Ok(EventfdFileEntry {
        id,
        flags: live.info.flags,
        counter: live.info.number("eventfd-count", 16)?,
        ..EventfdFileEntry::default()
    })
}

/// Makes eventfds with their counters.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    for e in opener.of(FdTypes::Eventfd).filter_map(|e| e.efd.as_ref()) {
        let file = make(e)?;
        opener.put_owned(e.id, file, &e.fown, e.flags);
    }
    Ok(())
}

fn make(e: &EventfdFileEntry) -> Result<OwnedFd> {
    let semaphore = if e.flags & SEMAPHORE != 0 { EfdFlags::EFD_SEMAPHORE } else { EfdFlags::empty() };
    let what = "cannot make an eventfd";
    let file = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | semaphore)
        .during(what, || "eventfd2(0, _)".into())?;
    // eventfd2 takes 32 bits of a counter of 64.
    match e.counter {
        0 => {}
        u64::MAX => return Err(Error::new("an eventfd's counter is beyond its limit")),
        n => drop(file.write(n).during(what, || format!("write(_, {n})"))?),
    }
    let file = OwnedFd::from(file);
    external::set_flags(&file, e.flags)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trying_changes_nothing() {
        for flags in [EfdFlags::empty(), EfdFlags::EFD_SEMAPHORE] {
            for count in [0, 1, 2, 7, u32::MAX] {
                let file: OwnedFd = EventFd::from_value_and_flags(count, flags).unwrap().into();
                assert_eq!(is_semaphore(&file, count.into()).unwrap(), !flags.is_empty(), "{count}");
                let live = Live::own(file, 1).unwrap();
                assert_eq!(entry(&live, 1).unwrap().counter, u64::from(count));
            }
        }
    }

    #[test]
    fn counter_and_semaphore_come_back() {
        for (flags, count) in
            [(EfdFlags::EFD_SEMAPHORE, 3u64), (EfdFlags::EFD_NONBLOCK, 1 << 40), (EfdFlags::empty(), 0)]
        {
            let was = EventFd::from_flags(flags).unwrap();
            if count > 0 {
                was.write(count).unwrap();
            }
            let live = Live::own(was.into(), 1).unwrap();
            assert!(is(&live));
            let e = mark(entry(&live, 9).unwrap(), flags.contains(EfdFlags::EFD_SEMAPHORE));
            assert_eq!(e.counter, count);
            let again = Live::own(make(&e).unwrap(), 1).unwrap();
            let semaphore = is_semaphore(&again.file, count).unwrap();
            assert_eq!(mark(entry(&again, 9).unwrap(), semaphore), e);
        }
    }

    #[test]
    fn an_impossible_counter_is_refused() {
        let e = EventfdFileEntry { counter: u64::MAX, ..EventfdFileEntry::default() };
        assert!(make(&e).is_err());
    }
}
