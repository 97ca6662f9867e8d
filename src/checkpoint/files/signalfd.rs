//! signalfd(2): a mask. The signals themselves wait with the process that reads.

use std::os::fd::OwnedFd;

use crate::checkpoint::Result;
use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::external;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::image::{FdTypes, FileEntry, SignalfdEntry};
use crate::sys::signalfd::signalfd;

/// A signalfd.
pub fn is(live: &Live) -> bool {
    live.is_anon("signalfd")
}

/// Records the mask.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let sigmask = live.info.number("sigmask", 16).map_err(|e| live.name(e))?;
    let fown = live.fown(&dump.files.pids)?;
    let entry = SignalfdEntry { id, flags: live.info.flags, fown, sigmask };
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Signalfd as i32,
        id,
        sgfd: Some(entry),
        ..FileEntry::default()
    });
    Ok(())
}

/// Makes signalfds.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    for e in opener.of(FdTypes::Signalfd).filter_map(|e| e.sgfd.as_ref()) {
        let file = make(e)?;
        opener.put_owned(e.id, file, &e.fown, e.flags);
    }
    Ok(())
}

fn make(e: &SignalfdEntry) -> Result<OwnedFd> {
    let file = signalfd(e.sigmask, libc::SFD_CLOEXEC)
        .during("cannot make a signalfd", || format!("signalfd4(-1, {:#x}, 8, SFD_CLOEXEC)", e.sigmask))?;
    external::set_flags(&file, e.flags)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_comes_back_with_real_time_signals() {
        let sigmask = 1 << (libc::SIGUSR1 - 1) | 1 << 39 | 1 << 63;
        let e = SignalfdEntry { sigmask, flags: libc::O_NONBLOCK as u32, ..SignalfdEntry::default() };
        let live = Live::own(make(&e).unwrap(), 1).unwrap();
        assert!(is(&live));
        assert_eq!(live.info.number("sigmask", 16).unwrap(), sigmask);
        assert!(live.info.flags & libc::O_NONBLOCK as u32 != 0);
    }
}
