//! Terminals: the container's console, ptys that its programs made, and /dev/tty.
//!
//! ```text
//!   what is open                image                                  at restore
//!   master of a pty             TtyFile -> TtyInfo (Pty, index)        ptmx opened until that index comes
//!   slave                       TtyFile -> TtyInfo, RegFile (path)     its path, once the master is there
//!   console: a slave whose      the same, with no master in the        the terminal made for the new container
//!     master the client holds     images
//!   /dev/tty                    TtyFile -> TtyInfo (Ctty, index)       opened by the leader of its session
//! ```
//!
//! Sessions take their terminal while the tree grows, before the leader's children are forked: only so do they inherit
//! it. Foreground groups are set when all groups exist. What waits in the queues of a pty is refused (the console's
//! output is with its client already; what was typed ahead into it is lost).

mod make;
mod session;

pub use make::{Terminals, open};

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{major, minor};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::regular;
use crate::checkpoint::image::{
    FdTypes, FileEntry, TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType, WinsizeEntry,
};
use crate::checkpoint::{Error, Result};
use crate::sys::ioctl;

/// Number of /dev/tty among terminal infos: those of ptys are their indices plus one.
const CTTY: u32 = 0x1000_0000;
/// Index of the terminal that a container with `process.terminal` has from its start.
const CONSOLE: u32 = 0;

/// What of a terminal is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Master(u32),
    Slave(u32),
    /// /dev/tty, which stands for this slave.
    Controlling(u32),
}

/// Index of the pty with this device number.
fn index_of(rdev: u64) -> Option<u32> {
    let (major, minor) = (major(rdev), minor(rdev));
    // Eight majors of 256 in theory; the kernel puts all into the first.
    (major == 136).then(|| u32::try_from(minor).ok()).flatten()
}

/// A terminal with a driver of this kernel that we know: ptys and /dev/tty.
pub fn is(live: &Live) -> bool {
    let rdev = live.stat.st_rdev;
    live.format() == libc::S_IFCHR
        && live.info.flags & OFlag::O_PATH.bits().cast_unsigned() == 0
        && (index_of(rdev).is_some() || (major(rdev) == 5 && matches!(minor(rdev), 0 | 2)))
}

fn end(live: &Live) -> Result<End> {
    let what = "cannot look at a terminal";
    let rdev = live.stat.st_rdev;
    if let Some(index) = index_of(rdev) {
        return Ok(End::Slave(index));
    }
    if minor(rdev) == 2 {
        return ioctl::pty_index(&live.file)
            .map(End::Master)
            .during(what, || "ioctl(_, TIOCGPTN)".into())
            .map_err(|e| live.name(e));
    }
    let device = ioctl::tty_device(&live.file)
        .during(what, || "ioctl(_, TIOCGDEV)".into())
        .map_err(|e| live.name(e))?;
    index_of(device).map(End::Controlling).ok_or_else(|| {
        live.name(Error::new("/dev/tty stands for a terminal that is no pty"))
            .remedy("start the container with a terminal of its own, or with none")
    })
}

/// Nothing to look at without the other terminals: [`check_all`] does.
pub fn later(_: &Live, _: &OwnedFd) -> Result<()> {
    Ok(())
}

/// Refuses slaves whose master is outside, but for the console.
pub fn check_all(terminals: &[Live], console: bool) -> Vec<Error> {
    let mut found = Vec::new();
    let mut ends = Vec::new();
    for live in terminals {
        match end(live) {
            Ok(end) => ends.push((live, end)),
            Err(e) => found.push(e),
        }
    }
    let masters: BTreeSet<u32> =
        ends.iter().filter_map(|(_, e)| if let End::Master(n) = e { Some(*n) } else { None }).collect();
    for (live, end) in ends {
        let (End::Slave(index) | End::Controlling(index)) = end else { continue };
        let given = console && index == CONSOLE;
        if !masters.contains(&index) && !given {
            found.push(
                live.name(Error::new("a terminal belongs to somebody outside the container"))
                    .remedy("end the session that `exec --tty` opened, or wait for its end"),
            );
        }
    }
    found
}

/// Records an open terminal.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let end = end(live)?;
    let (End::Master(index) | End::Slave(index) | End::Controlling(index)) = end;
    let tty_info_id = match end {
        End::Controlling(_) => CTTY + index,
        _ => index + 1,
    };
    describe(dump, live, end, tty_info_id)?;
    let regf_id = dump.new_id();
    let path = regular::entry(dump, live, regf_id)?;
    dump.model.files.push(path);
    let tty = TtyFileEntry {
        id,
        tty_info_id,
        flags: live.info.flags,
        fown: live.fown(&dump.files.pids)?,
        regf_id: Some(regf_id),
    };
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Tty as i32,
        id,
        tty: Some(tty),
        ..FileEntry::default()
    });
    Ok(())
}

/// Adds what this descriptor tells to the terminal's info. Only a master tells of locks and packet mode, only a slave
/// whether it is exclusive.
fn describe(dump: &mut Dump<'_>, live: &Live, end: End, id: u32) -> Result<()> {
    let what = "cannot read the settings of a terminal";
    let (End::Master(index) | End::Slave(index) | End::Controlling(index)) = end;
    let master = matches!(end, End::Master(_));
    let given = dump.source.spec.process().as_ref().and_then(|p| p.terminal()).unwrap_or(false);
    if !(given && index == CONSOLE && !master) {
        empty(live)?;
    }
    let new = dump.files.ttys.insert(id);
    let exclusive =
        !master && ioctl::tty_exclusive(&live.file).during(what, || "ioctl(_, TIOCGEXCL)".into())?;
    if let Some(known) = dump.model.tty_info.iter_mut().find(|known| known.id == id) {
        known.exclusive |= exclusive;
    }
    if !new && !master {
        return Ok(());
    }
    let (sid, pgrp) = session::of(dump, index)?;
    let termios = ioctl::termios(&live.file).during(what, || "ioctl(_, TCGETS)".into())?;
    let locked = ioctl::locked_termios(&live.file).during(what, || "ioctl(_, TIOCGLCKTRMIOS)".into())?;
    let [ws_row, ws_col, ws_xpixel, ws_ypixel] =
        ioctl::window_size(&live.file).during(what, || "ioctl(_, TIOCGWINSZ)".into())?.map(u32::from);
    let rdev = nix::sys::stat::makedev(136, index.into());
    let owner = owner(dump.files.root()?, index, rdev);
    let mut info = TtyInfoEntry {
        id,
        r#type: TtyType::Pty as i32,
        locked: false,
        exclusive,
        packet_mode: false,
        sid,
        pgrp,
        rdev: u32::try_from(if master { rdev } else { live.stat.st_rdev }).unwrap_or(0),
        termios: Some(record(&termios)),
        termios_locked: Some(record(&locked)),
        winsize: Some(WinsizeEntry { ws_row, ws_col, ws_xpixel, ws_ypixel }),
        pty: Some(TtyPtyEntry { index }),
        dev: None,
        uid: owner.map(|o| o.0),
        gid: owner.map(|o| o.1),
    };
    match end {
        End::Master(_) => {
            info.locked = ioctl::pty_locked(&live.file).during(what, || "ioctl(_, TIOCGPTLCK)".into())?;
            info.packet_mode =
                ioctl::pty_packet_mode(&live.file).during(what, || "ioctl(_, TIOCGPKT)".into())?;
        }
        End::Slave(_) => {}
        End::Controlling(_) => info.r#type = TtyType::Ctty as i32,
    }
    match dump.model.tty_info.iter_mut().find(|known| known.id == id) {
        Some(known) => *known = TtyInfoEntry { exclusive: known.exclusive, ..info },
        None => dump.model.tty_info.push(info),
    }
    Ok(())
}

/// Who owns a slave, where it is in its usual place.
fn owner(root: &OwnedFd, index: u32, rdev: u64) -> Option<(u32, u32)> {
    let node = crate::sys::resolve::open_in_root(root, format!("/dev/pts/{index}"), OFlag::O_PATH).ok()?;
    let stat = nix::sys::stat::fstat(&node).ok()?;
    (stat.st_rdev == rdev).then_some((stat.st_uid, stat.st_gid))
}

/// Refuses to lose what somebody has written and nobody has read.
///
/// What is written to one end reaches the other by a worker of the kernel, and FIONREAD does not wait for that one; poll(2)
/// does, when it finds nothing.
fn empty(live: &Live) -> Result<()> {
    let mut ready = [PollFd::new(live.file.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::ZERO).during("cannot look into a terminal", || "poll(_, POLLIN)".into())?;
    match ioctl::readable(&live.file).during("cannot look into a terminal", || "ioctl(_, FIONREAD)".into())? {
        0 => Ok(()),
        n => Err(Error::new(format!("{n} bytes wait in a pty")).remedy("try again once they have been read")),
    }
}

fn record(t: &ioctl::Termios) -> TermiosEntry {
    TermiosEntry {
        c_iflag: t.iflag,
        c_oflag: t.oflag,
        c_cflag: t.cflag,
        c_lflag: t.lflag,
        c_line: t.line.into(),
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc: t.cc.iter().map(|c| u32::from(*c)).collect(),
    }
}

fn settings(t: &TermiosEntry) -> Result<ioctl::Termios> {
    let bad = || Error::new("the images hold terminal settings that make no sense");
    let byte = |n: u32| u8::try_from(n).map_err(|_| bad());
    let mut cc = [0; 19];
    // Room for 32, of which the kernel's own structure has 19.
    if t.c_cc.len() < cc.len() {
        return Err(bad());
    }
    for (to, from) in cc.iter_mut().zip(&t.c_cc) {
        *to = byte(*from)?;
    }
    let (iflag, oflag, cflag, lflag) = (t.c_iflag, t.c_oflag, t.c_cflag, t.c_lflag);
    Ok(ioctl::Termios { iflag, oflag, cflag, lflag, line: byte(t.c_line)?, cc })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pty() -> (Live, Live) {
        let master = std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        ioctl::set_pty_locked(&master, false).unwrap();
        let slave = ioctl::pty_peer(&master, libc::O_RDWR | libc::O_NOCTTY).unwrap();
        (Live::own(master.into(), 3).unwrap(), Live::own(slave, 3).unwrap())
    }

    #[test]
    fn ends_know_their_index() {
        let (master, slave) = pty();
        assert!(is(&master) && is(&slave));
        let End::Master(index) = end(&master).unwrap() else { panic!("no master") };
        assert_eq!(end(&slave).unwrap(), End::Slave(index));
        let null = Live::own(std::fs::File::open("/dev/null").unwrap().into(), 3).unwrap();
        assert!(!is(&null));
    }

    #[test]
    fn a_slave_needs_its_master() {
        let (master, slave) = pty();
        let alone = check_all(std::slice::from_ref(&slave), false);
        assert_eq!(alone.len(), 1);
        assert!(check_all(&[slave, master], false).is_empty());
    }

    #[test]
    fn settings_survive_the_record() {
        let (_master, slave) = pty();
        let mut t = ioctl::termios(&slave.file).unwrap();
        t.cc[3] = 99;
        assert_eq!(settings(&record(&t)).unwrap(), t);
        assert!(settings(&TermiosEntry { c_cc: vec![300; 19], ..record(&t) }).is_err());
        assert!(settings(&TermiosEntry { c_cc: vec![1; 3], ..record(&t) }).is_err());
    }

    #[test]
    fn what_waits_is_not_lost() {
        // Often, for the kernel's worker may be quicker or slower than we are.
        for _ in 0..200 {
            let (master, slave) = pty();
            empty(&master).unwrap();
            nix::unistd::write(&slave.file, b"hello").unwrap();
            assert!(empty(&master).unwrap_err().to_string().contains("5 bytes wait"));
        }
    }
}
