//! Making the terminals of the images again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchownat};

use super::{client, queue, settings as settings_of};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{external, regular};
use crate::checkpoint::image::{FdTypes, TtyFileEntry, TtyInfoEntry, TtyType};
use crate::checkpoint::{Error, Result};
use crate::sys::{ioctl, resolve};

/// Terminals that have sessions.
#[derive(Debug, Default)]
pub struct Terminals {
    /// By session id.
    pub(super) sessions: BTreeMap<u32, Session>,
    /// The masters of ptys that exec had made, by their indices.
    pub(super) clients: BTreeMap<u32, OwnedFd>,
}

/// The terminal of a session.
#[derive(Debug)]
pub(super) struct Session {
    /// The slave.
    pub slave: OwnedFd,
    /// Foreground process group.
    pub pgrp: u32,
    /// Descriptions of /dev/tty: ids and flags.
    pub controlling: Vec<(u32, u32)>,
}

const WHAT: &str = "cannot make a terminal";

/// Makes ptys with their old indices, and opens their slaves by path.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let files: Vec<&TtyFileEntry> = opener.of(FdTypes::Tty).filter_map(|e| e.tty.as_ref()).collect();
    let model = opener.restore.model;
    let mut infos = BTreeMap::new();
    for info in &model.tty_info {
        infos.insert(info.id, info);
    }
    if files.is_empty() && infos.is_empty() {
        return Ok(());
    }
    let find = |tty: &TtyFileEntry| {
        let info = infos.get(&tty.tty_info_id).copied();
        let info = info.ok_or_else(|| Error::new(format!("the images lack terminal {}", tty.tty_info_id)))?;
        Ok::<_, Error>((info, index(&infos, info)?))
    };
    let path = |tty: &TtyFileEntry| {
        let reg = tty.regf_id.and_then(|id| opener.regular(id));
        reg.map(|r| r.path().to_owned()).ok_or_else(|| Error::new("the images lack the path of a terminal"))
    };

    let (mut masters, mut slaves, mut controlling) = (BTreeMap::new(), Vec::new(), Vec::new());
    let mut hung: BTreeMap<u32, Vec<&TtyFileEntry>> = BTreeMap::new();
    for tty in files {
        let (info, index) = find(tty)?;
        if info.r#type == TtyType::Ctty as i32 {
            controlling.push((tty, index));
        } else if path(tty)?.ends_with("ptmx") {
            masters.entry(index).or_insert_with(Vec::new).push((tty, path(tty)?));
        } else if is_hung(info) {
            hung.entry(index).or_default().push(tty);
        } else {
            slaves.push((tty, path(tty)?));
        }
    }
    let clients = client::of(model)?;
    let wanted: BTreeSet<u32> = masters.keys().chain(hung.keys()).chain(&clients).copied().collect();
    let mut made = masters_of(opener, &wanted)?;
    for (index, ttys) in hung {
        if let Some(master) = made.remove(&index) {
            hang_up(opener, master, &ttys)?;
        }
    }
    // Before the settings, which would make something of it once more.
    let fillers = fill(opener, &infos, &made)?;
    for info in infos.values().filter(|i| i.r#type != TtyType::Ctty as i32 && !is_hung(i)) {
        let index = index(&infos, info)?;
        let end = match made.get(&index) {
            Some(master) => {
                ioctl::set_pty_locked(master, false).during(WHAT, || "ioctl(_, TIOCSPTLCK, 0)".into())?;
                if super::index_of(rdev(info)) == Some(index) {
                    own(opener, info, index)?;
                }
                master.try_clone().during(WHAT, || "fcntl(_, F_DUPFD_CLOEXEC)".into())?
            }
            None => console(opener, index)?,
        };
        configure(&end, info)?;
    }
    let mut opened = Vec::new();
    for (tty, path) in slaves {
        let flags = regular::open_flags(tty.flags) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = resolve::open_in_root(&opener.restore.target.root, &path, flags)
            .during(WHAT, || format!("openat2(root, {path:?}, {flags:?})"))
            .map_err(|e| e.path(&path))?;
        external::set_flags(&file, tty.flags)?;
        if let Some(mode) = tty.regf_id.and_then(|id| opener.regular(id)).and_then(|reg| reg.mode) {
            fchmod(&file, Mode::from_bits_truncate(mode & 0o7777))
                .during(WHAT, || format!("fchmod(_, {mode:#o})"))
                .map_err(|e| e.path(&path))?;
        }
        opened.push((tty, file));
    }
    sessions(opener, &infos, &made, &controlling)?;
    // An exclusive terminal is opened by nobody else. Only its slave can be told.
    for (tty, file) in &opened {
        if infos.get(&tty.tty_info_id).is_some_and(|info| info.exclusive) {
            ioctl::set_tty_exclusive(file).during(WHAT, || "ioctl(_, TIOCEXCL)".into())?;
        }
    }
    for (tty, file) in opened {
        opener.put_owned(tty.id, file, &tty.fown, tty.flags);
    }
    drop(fillers);
    let lonely: BTreeSet<u32> = model.extension(super::hung::LONELY)?;
    for master in lonely.iter().filter_map(|index| made.get(index)) {
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        drop(ioctl::pty_peer(master, flags).during(WHAT, || "ioctl(_, TIOCGPTPEER)".into())?);
    }
    // Last: one whose slave is locked is opened by nobody else.
    for info in infos.values().filter(|i| i.r#type == TtyType::Pty as i32) {
        let Some(master) = made.get(&index(&infos, info)?) else { continue };
        if info.packet_mode {
            ioctl::set_pty_packet_mode(master, true).during(WHAT, || "ioctl(_, TIOCPKT, 1)".into())?;
        }
        if info.locked {
            ioctl::set_pty_locked(master, true).during(WHAT, || "ioctl(_, TIOCSPTLCK, 1)".into())?;
        }
    }
    for (index, master) in made {
        if clients.contains(&index) {
            opener.files.terminals.clients.insert(index, master);
            continue;
        }
        let entries = masters.remove(&index).unwrap_or_default();
        // One pty, one open file of its master: a second open of ptmx is another pty.
        let [(tty, _)] = entries.as_slice() else {
            return Err(Error::new(format!("the images hold two masters of pty {index}")));
        };
        external::set_flags(&master, tty.flags)?;
        opener.put_owned(tty.id, master, &tty.fown, tty.flags);
    }
    Ok(())
}

/// Puts what waited into the queues. The slaves that this took are to stay open until others are: a master notices when its
/// last slave goes.
fn fill(
    opener: &Opener<'_, '_>,
    infos: &BTreeMap<u32, &TtyInfoEntry>,
    made: &BTreeMap<u32, OwnedFd>,
) -> Result<Vec<OwnedFd>> {
    let model = opener.restore.model;
    let lines: Vec<queue::Lines> = model.extension(queue::EXTENSION)?;
    let mut waiting = queue::of_images(&model.tty_data)?;
    for line in &lines {
        waiting.entry(line.id).or_default();
    }
    let mut fillers = Vec::new();
    for (id, data) in waiting {
        let Some(info) = infos.get(&id).filter(|info| !is_hung(info)) else { continue };
        let number = index(infos, info)?;
        let slave = super::index_of(rdev(info)).is_some();
        let (Some(settings), true) = (&info.termios, slave) else {
            if let Some(master) = made.get(&number) {
                fillers.push(queue::peer(master)?);
                queue::push_told(master, data)?;
            }
            continue;
        };
        let settings = settings_of(settings)?;
        let ends = lines.iter().find(|lines| lines.id == id).map(|lines| lines.ends.clone());
        let typed = match ends {
            Some(ends) => queue::Typed { data: data.to_vec(), ends: Some(ends) },
            None => queue::Typed::guess(data, &settings),
        };
        let slave = match made.get(&number) {
            Some(master) => queue::peer(master)?,
            None => console(opener, number)?,
        };
        queue::push_typed(&slave, &settings, &typed)?;
        fillers.push(slave);
    }
    Ok(fillers)
}

/// A slave without settings: its master was gone.
fn is_hung(info: &TtyInfoEntry) -> bool {
    info.r#type == TtyType::Pty as i32 && info.termios.is_none()
}

/// Opens slaves whose master then goes.
fn hang_up(opener: &mut Opener<'_, '_>, master: OwnedFd, ttys: &[&TtyFileEntry]) -> Result<()> {
    ioctl::set_pty_locked(&master, false).during(WHAT, || "ioctl(_, TIOCSPTLCK, 0)".into())?;
    for tty in ttys {
        let flags = regular::open_flags(tty.flags) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let slave = ioctl::pty_peer(&master, flags.bits()).during(WHAT, || "ioctl(_, TIOCGPTPEER)".into())?;
        external::set_flags(&slave, tty.flags)?;
        opener.put_owned(tty.id, slave, &tty.fown, tty.flags);
    }
    Ok(())
}

/// Gives a slave its owner.
fn own(opener: &Opener<'_, '_>, info: &TtyInfoEntry, index: u32) -> Result<()> {
    let (Some(uid), Some(gid)) = (info.uid, info.gid) else { return Ok(()) };
    let path = format!("/dev/pts/{index}");
    let node = resolve::open_in_root(&opener.restore.target.root, &path, OFlag::O_PATH | OFlag::O_NOFOLLOW)
        .during(WHAT, || format!("openat2(root, {path:?}, O_PATH)"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    fchownat(&node, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
        .during(WHAT, || format!("fchownat({path:?}, {uid}, {gid})"))
}

/// The pty that an info is about. Of /dev/tty only the session is known.
fn index(infos: &BTreeMap<u32, &TtyInfoEntry>, info: &TtyInfoEntry) -> Result<u32> {
    let ctty = info.r#type == TtyType::Ctty as i32;
    let same = |other: &TtyInfoEntry| other.sid == info.sid && other.pty.is_some();
    let pty = match &info.pty {
        None if ctty && info.sid != 0 => infos.values().find(|i| same(i)).and_then(|i| i.pty.as_ref()),
        own => own.as_ref(),
    };
    match pty {
        Some(pty) if pty.index < 1 << 20 => Ok(pty.index),
        None if ctty => Err(Error::new("the images hold a /dev/tty, but no terminal of its session")
            .remedy("start the container with a terminal of its own, or with none")),
        _ => Err(Error::new("the images hold a terminal that is no pty")
            .remedy("start the container with a terminal of its own, or with none")),
    }
}

/// Device number as stat(2) gives it.
fn rdev(info: &TtyInfoEntry) -> u64 {
    info.rdev.into()
}

/// Opens ptmx until every wanted index has come; the kernel gives out the lowest that is free.
fn masters_of(opener: &Opener<'_, '_>, wanted: &BTreeSet<u32>) -> Result<BTreeMap<u32, OwnedFd>> {
    let mut made = BTreeMap::new();
    let mut others = Vec::new();
    let root = &opener.restore.target.root;
    while made.len() < wanted.len() {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let path = "/dev/pts/ptmx";
        let master = resolve::open_in_root(root, path, flags)
            .during(WHAT, || format!("openat2(root, {path:?}, {flags:?})"))?;
        let index = ioctl::pty_index(&master).during(WHAT, || "ioctl(_, TIOCGPTN)".into())?;
        if wanted.contains(&index) {
            made.insert(index, master);
        } else if wanted.last().is_none_or(|last| index > *last) {
            return Err(Error::new(format!("pty {index} came, and an index of {wanted:?} is taken"))
                .remedy("the new container's /dev/pts must be its own"));
        } else {
            others.push(master);
        }
    }
    Ok(made)
}

/// The new container's terminal, in the place of the old one's.
fn console(opener: &Opener<'_, '_>, index: u32) -> Result<OwnedFd> {
    let missing = || {
        Error::new(format!(
            "the checkpointed container had a terminal (/dev/pts/{index}), and the new one has none"
        ))
        .remedy("set process.terminal in config.json, and give restore a --console-socket")
    };
    let console = opener.restore.target.console.as_ref().ok_or_else(missing)?;
    let stat = nix::sys::stat::fstat(console).during(WHAT, || "fstat(console)".into())?;
    if super::index_of(stat.st_rdev) != Some(index) {
        return Err(Error::new(format!("the new container's terminal is not /dev/pts/{index}")));
    }
    console.try_clone().during(WHAT, || "fcntl(_, F_DUPFD_CLOEXEC)".into())
}

fn configure(end: &OwnedFd, info: &TtyInfoEntry) -> Result<()> {
    if let Some(t) = &info.termios {
        ioctl::set_termios(end, &settings_of(t)?).during(WHAT, || "ioctl(_, TCSETS)".into())?;
    }
    if let Some(t) = &info.termios_locked {
        let locked = settings_of(t)?;
        if locked != ioctl::Termios::default() {
            ioctl::set_locked_termios(end, &locked).during(WHAT, || "ioctl(_, TIOCSLCKTRMIOS)".into())?;
        }
    }
    if let Some(size) = &info.winsize {
        let cell = |n: u32| u16::try_from(n).map_err(|_| Error::new("a window of the images is too large"));
        let size = [cell(size.ws_row)?, cell(size.ws_col)?, cell(size.ws_xpixel)?, cell(size.ws_ypixel)?];
        ioctl::set_window_size(end, &size).during(WHAT, || "ioctl(_, TIOCSWINSZ)".into())?;
    }
    Ok(())
}

/// A descriptor of every slave that a session has as its terminal.
fn sessions(
    opener: &mut Opener<'_, '_>,
    infos: &BTreeMap<u32, &TtyInfoEntry>,
    masters: &BTreeMap<u32, OwnedFd>,
    controlling: &[(&TtyFileEntry, u32)],
) -> Result<()> {
    for info in infos.values().filter(|i| i.sid != 0) {
        let index = index(infos, info)?;
        if opener.files.terminals.sessions.contains_key(&info.sid) {
            continue;
        }
        let slave = match masters.get(&index) {
            Some(master) => ioctl::pty_peer(master, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC)
                .during(WHAT, || "ioctl(_, TIOCGPTPEER)".into())?,
            None => console(opener, index)?,
        };
        let controlling =
            controlling.iter().filter(|(_, i)| *i == index).map(|(tty, _)| (tty.id, tty.flags)).collect();
        opener.files.terminals.sessions.insert(info.sid, Session { slave, pgrp: info.pgrp, controlling });
    }
    for (tty, index) in controlling {
        let known = opener.files.terminals.sessions.values();
        if !known.flat_map(|s| &s.controlling).any(|(id, _)| *id == tty.id) {
            return Err(Error::new(format!("/dev/tty stands for /dev/pts/{index}, which no session has")));
        }
    }
    Ok(())
}
