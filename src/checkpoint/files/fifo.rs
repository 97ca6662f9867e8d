//! Named pipes: a path, as a regular file has one, and a buffer, as a pipe has one.

use std::collections::BTreeMap;

use std::os::fd::AsFd;

use nix::fcntl::OFlag;

use crate::checkpoint::context::Dump;
use crate::checkpoint::files::live::{Live, reopen};
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{external, pipe, regular};
use crate::checkpoint::image::{FdTypes, FifoEntry, FileEntry};
use crate::checkpoint::{Error, Result};

/// A fifo in a file system.
pub fn is(live: &Live) -> bool {
    live.format() == libc::S_IFIFO && !pipe::is(live) && live.info.flags & libc::O_PATH as u32 == 0
}

/// Records the path as a regular file, and points to it.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let regf_id = dump.new_id();
    let path = regular::entry(dump, live, regf_id)?;
    let pipe_id = pipe::pipe_id(live)?;
    if dump.files.pipes.insert((live.stat.st_dev, live.stat.st_ino)) {
        let (entry, data, packets) = pipe::contents(live, pipe_id)?;
        dump.model.fifo_data.push((entry, data));
        pipe::record_packets(dump, pipe_id, packets)?;
    }
    let fifo = FifoEntry { id, pipe_id, regf_id: Some(regf_id) };
    dump.model.files.push(path);
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Fifo as i32,
        id,
        fifo: Some(fifo),
        ..FileEntry::default()
    });
    Ok(())
}

/// Opens fifos. A both-ways descriptor is held meanwhile: an open of one side waits for the other, and without a
/// reader the contents would be lost.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let mut held = BTreeMap::new();
    for fifo in opener.of(FdTypes::Fifo).filter_map(|e| e.fifo.as_ref()) {
        let reg = opener
            .regular(fifo.regf_id.unwrap_or(fifo.id))
            .ok_or_else(|| Error::new(format!("fifo {} has no path in the images", fifo.id)))?;
        let node = opener.node(reg)?;
        let both = reopen(node.as_fd(), OFlag::O_RDWR | OFlag::O_NONBLOCK).map_err(|e| e.path(reg.path()))?;
        // open(2) takes O_DIRECT only where the file system has direct I/O; packets are another matter.
        let flags = regular::open_flags(reg.flags);
        let file = reopen(node.as_fd(), flags - OFlag::O_DIRECT).map_err(|e| e.path(reg.path()))?;
        if flags.contains(OFlag::O_DIRECT) {
            external::set_flags(&file, reg.flags).map_err(|e| e.path(reg.path()))?;
        }
        if !held.contains_key(&fifo.pipe_id) {
            if let Some((entry, data)) =
                opener.restore.model.fifo_data.iter().find(|d| d.0.pipe_id == fifo.pipe_id)
            {
                pipe::fill(&both, entry, data, &pipe::packets(opener, fifo.pipe_id)?)
                    .map_err(|e| e.path(reg.path()))?;
            }
            held.insert(fifo.pipe_id, both);
        }
        opener.put_owned(fifo.id, file, &reg.fown, reg.flags);
    }
    Ok(())
}
