//! Terminals that `exec --tty` has made: their masters are with clients, who end with the checkpoint.
//!
//! The pty is made anew, with all that belongs to it: settings, size, session, foreground group, what was typed and not
//! read. Its master goes to whoever `restore --exec-console-socket` names, with the path of the slave beside it. Without
//! one nobody has it, and it is closed when the processes go on: they see what they would have seen when their client had
//! died, a terminal that is hung up, and SIGHUP for the leader of the session.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::{CONSOLE, index_of};
use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::Files;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::image::{TtyInfoEntry, TtyType};
use crate::checkpoint::model::Model;
use crate::checkpoint::{Error, Result};
use crate::init::console;

/// The extension with the indices of those ptys.
pub const EXTENSION: &str = "exec-terminals";

/// What is said of such a terminal where processes of exec are not to be kept.
pub(super) fn refusal(live: &Live) -> Error {
    live.name(Error::new("a terminal belongs to somebody outside the container")).remedy(
        "with --keep-exec it comes back without its client; or end the session that `exec --tty` opened",
    )
}

/// Records those whose master no process of the container has, when all terminals are known.
pub fn record(dump: &mut Dump<'_>) -> Result<()> {
    let given = dump.source.spec.process().as_ref().and_then(|p| p.terminal()).unwrap_or(false);
    let clients = without_master(&dump.model.tty_info, given);
    match clients.first() {
        None => Ok(()),
        Some(_) if dump.options.keep_exec => dump.model.set_critical_extension(EXTENSION, &clients),
        Some(index) => Err(Error::new(format!(
            "the terminal /dev/pts/{index} belongs to somebody outside the container"
        ))
        .remedy("with --keep-exec it comes back without its client")),
    }
}

/// Indices of ptys with a slave that is alive, and no master. `given`: that of the console is not among them.
fn without_master(infos: &[TtyInfoEntry], given: bool) -> BTreeSet<u32> {
    let of_end = |master: bool| {
        let ends = infos.iter().filter(move |info| {
            let alive = info.r#type == TtyType::Pty as i32 && info.termios.is_some();
            alive && index_of(info.rdev.into()).is_none() == master
        });
        ends.filter_map(|info| info.pty.as_ref()).map(|pty| pty.index).collect::<BTreeSet<_>>()
    };
    let mut found = &of_end(false) - &of_end(true);
    if given {
        found.remove(&CONSOLE);
    }
    found
}

/// Those of the images.
pub(super) fn of(model: &Model) -> Result<BTreeSet<u32>> {
    let known = without_master(&model.tty_info, false);
    Ok(&model.extension::<BTreeSet<u32>>(EXTENSION)? & &known)
}

impl Files<'_> {
    /// Gives the masters to who has asked for them; says which terminals nobody is going to have.
    pub fn hand_terminals(&self) -> Result<Vec<String>> {
        let mut alone = Vec::new();
        for (index, master) in &self.terminals.clients {
            let name = format!("/dev/pts/{index}");
            let Some(path) = &self.restore.options.exec_console else {
                alone.push(format!("the client of the terminal {name} is gone: it is hung up"));
                continue;
            };
            let socket = UnixStream::connect(path)
                .during("cannot send the terminal of a process of exec", || format!("connect({path:?})"))?;
            console::send(socket.as_fd(), name.as_bytes(), master.as_fd())
                .map_err(|e| Error::new(format!("cannot send the terminal {name}: {e}")))?;
        }
        Ok(alone)
    }

    /// Closes the masters. To be called when the processes go on, for signals come of it.
    pub fn hang_up_terminals(&mut self) {
        self.terminals.clients.clear();
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::makedev;

    use super::*;
    use crate::checkpoint::image::{TermiosEntry, TtyPtyEntry};

    #[test]
    fn only_slaves_that_are_alive_and_have_no_master_are_a_clients() {
        let info = |index: u32, master: bool, alive: bool| {
            let rdev = if master { makedev(5, 2) } else { makedev(136, index.into()) };
            TtyInfoEntry {
                r#type: TtyType::Pty as i32,
                rdev: u32::try_from(rdev).unwrap(),
                termios: alive.then(TermiosEntry::default),
                pty: Some(TtyPtyEntry { index }),
                ..TtyInfoEntry::default()
            }
        };
        let ctty = TtyInfoEntry { r#type: TtyType::Ctty as i32, pty: None, ..info(9, false, true) };
        let all = [
            info(0, false, true),
            info(1, false, true),
            info(1, true, true),
            info(2, false, true),
            info(3, false, false),
            ctty,
        ];
        assert_eq!(without_master(&all, true), [2].into());
        assert_eq!(without_master(&all, false), [0, 2].into());
        let mut model = Model { tty_info: all.to_vec(), ..Model::default() };
        model.set_critical_extension(EXTENSION, &[1, 2, 7]).unwrap();
        assert_eq!(of(&model).unwrap(), [2].into(), "no more than the images have slaves of");
    }
}
