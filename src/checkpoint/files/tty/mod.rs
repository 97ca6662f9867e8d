//! Terminals: the container's console, ptys that its programs made, and /dev/tty.
//!
//! ```text
//!   what is open                image                                  at restore
//!   master of a pty             TtyFile -> TtyInfo (2 x index + 1)     ptmx opened until that index comes
//!   slave                       TtyFile -> TtyInfo (2 x index)         its path, once the master is there
//!   console: a slave whose      the same, with no master in the        the terminal made for the new container
//!     master the client holds     images
//!   slave that `exec --tty`       the same, and the extension            a pty of its own; its master is sent to a client,
//!     has opened                    `exec-terminals`                       or closed when all go on
//!   /dev/tty                    TtyFile -> TtyInfo (Ctty, session)     opened by the leader of its session
//!   master whose slaves were    the same, and the extension            a slave is opened and closed
//!     all closed                  `lonely-masters`
//!   slave that was hung up      TtyFile -> TtyInfo without settings    opened, and hung up: its master is closed
//! ```
//!
//! Every end has an info of its own, numbered as CRIU does; each TtyFile names a RegFile for its path.
//!
//! Sessions take their terminal while the tree grows, before the leader's children are forked: only so do they inherit
//! it. Foreground groups are set when all groups exist. What waits in the queues of a pty comes back (`queue.rs`); the
//! console's output is with its client already.

mod client;
mod hung;
mod make;
mod queue;
mod session;

pub use client::{EXTENSION, record as record_clients};
pub use make::{Terminals, open};
pub use queue::{Ends, dump as dump_queues};

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
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

/// CRIU's number of /dev/tty among terminal infos; that of a second session is the next even one, and so on. The indices
/// of ptys that this leaves room for are all that CRIU knows.
const CTTY: u32 = 2012;
/// Where infos of ptys that lie behind go on.
const BEYOND: u32 = 1 << 22;
/// Control characters of the kernel's `struct termios`.
const CONTROLS: usize = 19;
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

/// Number of the info of a pty's end.
fn info_id(index: u32, master: bool) -> u32 {
    let id = 2 * index + u32::from(master);
    if id < CTTY { id } else { BEYOND + id }
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

/// Refuses slaves whose master is outside, but for the console, and, where those of exec are kept, theirs; also what waits
/// to be read and could not be put back.
pub fn check_all(terminals: &[Live], console: bool, keep_exec: bool) -> Vec<Error> {
    let mut found = Vec::new();
    let mut ends = Vec::new();
    for live in terminals.iter().filter(|live| !hung::is_hung(live)) {
        match end(live) {
            Ok(end) => ends.push((live, end)),
            Err(e) => found.push(e),
        }
    }
    let masters: BTreeSet<u32> =
        ends.iter().filter_map(|(_, e)| if let End::Master(n) = e { Some(*n) } else { None }).collect();
    let mut seen = BTreeSet::new();
    for (live, end) in ends {
        let master = matches!(end, End::Master(_));
        let (End::Master(index) | End::Slave(index) | End::Controlling(index)) = end;
        let given = console && index == CONSOLE && !master;
        if seen.insert((index, master)) {
            found.extend(queue::check(live, end).err().map(|e| live.name(e)));
        }
        if !given && !master && !keep_exec && !masters.contains(&index) {
            found.push(client::refusal(live));
        }
    }
    found
}

/// Records an open terminal.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let end = end(live)?;
    let regf_id = dump.new_id();
    let tty_info_id = if let (End::Slave(index), true) = (end, hung::is_hung(live)) {
        hung::record(dump, live, index, regf_id)?
    } else {
        let id = describe(dump, live, end)?;
        let path = regular::entry(dump, live, regf_id)?;
        dump.model.files.push(path);
        id
    };
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

/// Adds what this descriptor tells to the info of its end, and gives that one's number. Only a master tells of locks and
/// packet mode, only a slave whether it is exclusive.
fn describe(dump: &mut Dump<'_>, live: &Live, end: End) -> Result<u32> {
    let what = "cannot read the settings of a terminal";
    let (End::Master(index) | End::Slave(index) | End::Controlling(index)) = end;
    let master = matches!(end, End::Master(_));
    queue::check(live, end)?;
    queue::note(dump, live, end)?;
    if master && hung::is_lonely(live)? {
        let mut all: BTreeSet<u32> = dump.model.extension(hung::LONELY)?;
        all.insert(index);
        dump.model.set_extension(hung::LONELY, &all)?;
    }
    let (sid, pgrp) = session::of(dump, index)?;
    let id = match end {
        End::Controlling(_) => controlling_id(&dump.model.tty_info, sid),
        _ => info_id(index, master),
    };
    let exclusive =
        !master && ioctl::tty_exclusive(&live.file).during(what, || "ioctl(_, TIOCGEXCL)".into())?;
    if let Some(known) = dump.model.tty_info.iter_mut().find(|known| known.id == id) {
        known.exclusive |= exclusive;
        return Ok(id);
    }
    let termios = ioctl::termios(&live.file).during(what, || "ioctl(_, TCGETS)".into())?;
    let locked = ioctl::locked_termios(&live.file).during(what, || "ioctl(_, TIOCGLCKTRMIOS)".into())?;
    let [ws_row, ws_col, ws_xpixel, ws_ypixel] =
        ioctl::window_size(&live.file).during(what, || "ioctl(_, TIOCGWINSZ)".into())?.map(u32::from);
    let info = TtyInfoEntry {
        id,
        r#type: TtyType::Pty as i32,
        locked: false,
        exclusive,
        packet_mode: false,
        sid,
        pgrp,
        rdev: u32::try_from(live.stat.st_rdev).unwrap_or(0),
        termios: Some(record(&termios)),
        termios_locked: Some(record(&locked)),
        winsize: Some(WinsizeEntry { ws_row, ws_col, ws_xpixel, ws_ypixel }),
        pty: Some(TtyPtyEntry { index }),
        dev: None,
        uid: Some(live.stat.st_uid),
        gid: Some(live.stat.st_gid),
    };
    if !matches!(end, End::Slave(_)) {
        // Of the slave the owner is to be kept, and the session, also where nobody has it open.
        let rdev = nix::sys::stat::makedev(136, index.into());
        let (uid, gid) = owner(dump.files.root()?, index, rdev).unzip();
        let rdev = u32::try_from(rdev).unwrap_or(0);
        slave_info(dump, TtyInfoEntry { id: info_id(index, false), rdev, uid, gid, ..info.clone() });
    }
    match end {
        End::Controlling(_) => {
            dump.model.tty_info.push(TtyInfoEntry { r#type: TtyType::Ctty as i32, pty: None, ..info });
        }
        End::Slave(_) => slave_info(dump, info),
        End::Master(_) => {
            let locked = ioctl::pty_locked(&live.file).during(what, || "ioctl(_, TIOCGPTLCK)".into())?;
            let packet_mode =
                ioctl::pty_packet_mode(&live.file).during(what, || "ioctl(_, TIOCGPKT)".into())?;
            dump.model.tty_info.push(TtyInfoEntry { locked, packet_mode, ..info });
        }
    }
    Ok(id)
}

/// Adds the info of a slave, if it is not known already.
fn slave_info(dump: &mut Dump<'_>, info: TtyInfoEntry) {
    if !dump.model.tty_info.iter().any(|known| known.id == info.id) {
        dump.model.tty_info.push(info);
    }
}

/// Number of the info of /dev/tty in this session.
fn controlling_id(known: &[TtyInfoEntry], sid: u32) -> u32 {
    let mut all = known.iter().filter(|i| i.r#type == TtyType::Ctty as i32);
    let last = all.clone().map(|i| i.id).max();
    all.find(|i| i.sid == sid).map(|i| i.id).unwrap_or(last.map_or(CTTY, |last| last + 2))
}

/// Who owns a slave, where it is in its usual place.
fn owner(root: &OwnedFd, index: u32, rdev: u64) -> Option<(u32, u32)> {
    let node = crate::sys::resolve::open_in_root(root, format!("/dev/pts/{index}"), OFlag::O_PATH).ok()?;
    let stat = nix::sys::stat::fstat(&node).ok()?;
    (stat.st_rdev == rdev).then_some((stat.st_uid, stat.st_gid))
}

/// In CRIU's images the control characters are packed: four lie in every number, as they lie in memory.
fn record(t: &ioctl::Termios) -> TermiosEntry {
    let mut c_cc = vec![0; CONTROLS];
    for (word, bytes) in c_cc.iter_mut().zip(t.cc.chunks(4)) {
        let mut packed = [0; 4];
        packed[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(packed);
    }
    TermiosEntry {
        c_iflag: t.iflag,
        c_oflag: t.oflag,
        c_cflag: t.cflag,
        c_lflag: t.lflag,
        c_line: t.line.into(),
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc,
    }
}

fn settings(t: &TermiosEntry) -> Result<ioctl::Termios> {
    let bad = || Error::new("the images hold terminal settings that make no sense");
    let mut cc = [0; CONTROLS];
    let packed = t.c_cc.iter().flat_map(|word| word.to_le_bytes());
    // Behind those of the kernel stands whatever CRIU's memory held.
    if t.c_cc.len() < CONTROLS.div_ceil(4) {
        return Err(bad());
    }
    for (to, from) in cc.iter_mut().zip(packed) {
        *to = from;
    }
    let (iflag, oflag, cflag, lflag) = (t.c_iflag, t.c_oflag, t.c_cflag, t.c_lflag);
    let line = u8::try_from(t.c_line).map_err(|_| bad())?;
    Ok(ioctl::Termios { iflag, oflag, cflag, lflag, line, cc })
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
        let alone = check_all(std::slice::from_ref(&slave), false, false);
        assert_eq!(alone.len(), 1);
        assert!(check_all(std::slice::from_ref(&slave), false, true).is_empty());
        assert!(check_all(&[slave, master], false, false).is_empty());
    }

    #[test]
    fn settings_survive_the_record() {
        let (_master, slave) = pty();
        let mut t = ioctl::termios(&slave.file).unwrap();
        t.cc[3] = 99;
        assert_eq!(settings(&record(&t)).unwrap(), t);
        assert!(settings(&TermiosEntry { c_line: 300, ..record(&t) }).is_err());
        assert!(settings(&TermiosEntry { c_cc: vec![1; 3], ..record(&t) }).is_err());
    }

    #[test]
    fn control_characters_are_packed_as_criu_does() {
        // What CRIU 4.2 writes for a new pty: ^C ^\ DEL ^U, and its memory behind the 32 that glibc has.
        let criu =
            [360_651_779, 65_540, 1_708_817, 370_609_938, 0, 0, 0, 0, 0, 0, 49, 0, 796_859_616, 32_752];
        let criu = [&criu[..], &[0; 5]].concat();
        let read = settings(&TermiosEntry { c_cc: criu.clone(), ..TermiosEntry::default() }).unwrap();
        assert_eq!(read.cc[..6], [3, 0x1c, 0x7f, 0x15, 4, 0]);
        assert_eq!(record(&read).c_cc[..8], criu[..8]);
        assert_eq!(record(&read).c_cc.len(), 19);
    }

    #[test]
    fn ends_have_numbers_of_their_own() {
        assert_eq!((info_id(3, false), info_id(3, true)), (6, 7));
        let ctty =
            |id, sid| TtyInfoEntry { id, sid, r#type: TtyType::Ctty as i32, ..TtyInfoEntry::default() };
        let known = [ctty(2012, 1), ctty(2014, 9)];
        assert_eq!([1, 9, 5].map(|sid| controlling_id(&known, sid)), [2012, 2014, 2016]);
        let far = [info_id(1005, true), info_id(1006, false), info_id(1 << 20, true)];
        assert_eq!(far, [2011, BEYOND + 2012, BEYOND + (1 << 21) + 1]);
    }
}
