//! eventfd(2): a counter.

use std::os::fd::OwnedFd;

use nix::sys::eventfd::{EfdFlags, EventFd};

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

/// EFD_SEMAPHORE lives in no status flag; fdinfo prints it since 6.2. CRIU has no field for it and takes what it finds
/// in `flags`, where this bit (1) would be O_WRONLY, which no eventfd has.
const SEMAPHORE: u32 = 1;

/// Records the counter.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let entry = entry(live, id).map_err(|e| live.name(e))?;
    let entry = EventfdFileEntry { fown: live.fown(&dump.files.pids)?, ..entry };
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Eventfd as i32,
        id,
        efd: Some(entry),
        ..FileEntry::default()
    });
    Ok(())
}

fn entry(live: &Live, id: u32) -> Result<EventfdFileEntry> {
    let semaphore = live.info.field("eventfd-semaphore") == Some("1");
    Ok(EventfdFileEntry {
        id,
        flags: live.info.flags | if semaphore { SEMAPHORE } else { 0 },
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
            let e = entry(&live, 9).unwrap();
            assert_eq!(e.counter, count);
            let again = Live::own(make(&e).unwrap(), 1).unwrap();
            assert_eq!(entry(&again, 9).unwrap(), e);
        }
    }

    #[test]
    fn an_impossible_counter_is_refused() {
        let e = EventfdFileEntry { counter: u64::MAX, ..EventfdFileEntry::default() };
        assert!(make(&e).is_err());
    }
}
