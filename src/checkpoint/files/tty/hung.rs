//! Ends of ptys that are left alone: slaves whose master is gone, masters whose slaves were all closed.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{index_of, info_id};
use crate::checkpoint::Result;
use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::regular;
use crate::checkpoint::image::{FdTypes, FileEntry, RegFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType};
use crate::sys::ioctl;

/// The extension with the indices of ptys whose slaves have all been closed. Their masters read EIO, those of which none
/// was ever opened wait.
pub(super) const LONELY: &str = "lonely-masters";
/// Whether a slave has lost its master: nothing can be asked of it any more, and nothing comes from it.
pub(super) fn is_hung(live: &Live) -> bool {
    index_of(live.stat.st_rdev).is_some() && ioctl::termios(&live.file) == Err(Errno::EIO)
}

/// Whether all slaves of a master have been closed.
pub(super) fn is_lonely(live: &Live) -> Result<bool> {
    let mut ready = [PollFd::new(live.file.as_fd(), PollFlags::empty())];
    poll(&mut ready, PollTimeout::ZERO).during("cannot look into a terminal", || "poll(_, 0)".into())?;
    Ok(ready[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}

/// Records a slave that was hung up: it has a path that leads nowhere, and no settings. Its index is its own as long as
/// somebody has it open.
pub(super) fn record(dump: &mut Dump<'_>, live: &Live, index: u32, regf_id: u32) -> Result<u32> {
    let reg = RegFileEntry {
        name: regular::bytes(&live.undeleted().0),
        mnt_id: Some(live.info.mnt_id),
        ..regular::bare(dump, live, regf_id)?
    };
    let file = FileEntry { r#type: FdTypes::Reg as i32, id: regf_id, reg: Some(reg), ..FileEntry::default() };
    dump.model.files.push(file);
    let id = info_id(index, false);
    if dump.model.tty_info.iter().all(|known| known.id != id) {
        dump.model.tty_info.push(TtyInfoEntry {
            id,
            r#type: TtyType::Pty as i32,
            rdev: u32::try_from(live.stat.st_rdev).unwrap_or(0),
            pty: Some(TtyPtyEntry { index }),
            ..TtyInfoEntry::default()
        });
    }
    Ok(id)
}
