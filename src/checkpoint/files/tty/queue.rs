//! What waits in the queues of a pty: what was typed and not read yet, what a program has said and its master not heard.
//!
//! ```text
//!   checkpoint   read, and put back at once                   restore   put back before the settings
//!   master       read(2) until nothing comes                            TIOCSTI; beyond a queue's length, by its slave
//!   slave        read(2), line by line where it has lines,              TIOCSTI under settings that mean nothing but
//!                then without ICANON what is no line yet                  lines; VEOF ends those that have no newline
//! ```
//!
//! TtyDataEntry names the end that is to read the bytes, as CRIU's does. Where the lines of a slave end, which CRIU does
//! not keep, is in the extension `tty-lines`.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::{End, info_id};
use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::image::TtyDataEntry;
use crate::checkpoint::{Error, Result};
use crate::sys::ioctl::{self, Termios};

/// Name of the extension in stasis.img.
pub(super) const EXTENSION: &str = "tty-lines";
/// Most bytes in the queue of one end. Behind it wait up to twice as many that nobody has looked at.
const LONGEST: usize = 4095;
/// Most bytes that can wait.
const MOST: usize = 16 << 10;
/// How long the kernel may take to move what is in front of the queue.
const PATIENCE: Duration = Duration::from_secs(5);

const READ: &str = "cannot read what waits in a terminal";
const WRITE: &str = "cannot put back what waits in a terminal";

/// Where the lines of a slave end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lines {
    /// The slave's info.
    pub id: u32,
    /// How many bytes there are up to each end. What is behind the last is not finished.
    pub ends: Vec<usize>,
}

/// The ends of a pty that the container has open.
#[derive(Debug, Default)]
pub struct Ends {
    master: Option<OwnedFd>,
    slave: Option<OwnedFd>,
}

/// What waits in a slave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Typed {
    pub data: Vec<u8>,
    /// Of a terminal with lines: see [`Lines`].
    pub ends: Option<Vec<usize>>,
}

impl Typed {
    /// As images without the extension have it: lines end in newlines.
    pub fn guess(data: &[u8], settings: &Termios) -> Self {
        let ends = data.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
        Self { data: data.to_vec(), ends: has_lines(settings).then(|| ends.collect()) }
    }
}

/// Is it read by lines?
fn has_lines(settings: &Termios) -> bool {
    settings.lflag & (libc::ICANON | libc::EXTPROC) == libc::ICANON
}

/// Refuses what could not be put back.
pub(super) fn check(live: &Live, end: End) -> Result<()> {
    let what = "cannot look into a terminal";
    let again = "try again once it has been read";
    let master = matches!(end, End::Master(_));
    let packets =
        master && ioctl::pty_packet_mode(&live.file).during(what, || "ioctl(_, TIOCGPKT)".into())?;
    let ready = look(&live.file, PollFlags::POLLIN | PollFlags::POLLPRI)?;
    if packets && ready.contains(PollFlags::POLLPRI) {
        return Err(Error::new("a change of its slave waits in a pty with packet mode")
            .remedy(again)
            .passing());
    }
    let waiting = ioctl::readable(&live.file).during(what, || "ioctl(_, FIONREAD)".into())?;
    if !master && usize::try_from(waiting).is_ok_and(|n| n >= LONGEST) {
        return Err(Error::new(format!("{waiting} bytes and perhaps more wait in a pty"))
            .remedy(again)
            .passing());
    }
    Ok(())
}

/// Remembers an end.
pub(super) fn note(dump: &mut Dump<'_>, live: &Live, end: End) -> Result<()> {
    let (End::Master(index) | End::Slave(index) | End::Controlling(index)) = end;
    let mode = live.info.flags & libc::O_ACCMODE.cast_unsigned();
    let both = mode == libc::O_RDWR.cast_unsigned();
    let ends = dump.files.terminals.entry(index).or_default();
    let place = if matches!(end, End::Master(_)) { &mut ends.master } else { &mut ends.slave };
    if place.is_some() {
        return Ok(());
    }
    *place = if both {
        Some(live.file.try_clone().during(READ, || "fcntl(_, F_DUPFD_CLOEXEC)".into())?)
    } else if let End::Slave(_) = end {
        // A slave that is locked cannot be opened, and perhaps another descriptor can be read.
        live.reopen(OFlag::O_RDWR | OFlag::O_NONBLOCK).ok()
    } else {
        None
    };
    Ok(())
}

/// Records what waits in all of them, when all are known.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let mut lines = Vec::new();
    for (index, ends) in std::mem::take(&mut dump.files.terminals) {
        let mut keep = |id: u32, data: Vec<u8>| {
            if !data.is_empty() {
                dump.model.tty_data.push(TtyDataEntry { tty_id: id, data });
            }
        };
        // The slave's first: what it takes in it may echo.
        if let Some(slave) = &ends.slave {
            let typed = typed(slave)?;
            if let Some(ends) = typed.ends.filter(|ends| !ends.is_empty()) {
                lines.push(Lines { id: info_id(index, false), ends });
            }
            keep(info_id(index, false), typed.data);
        }
        if let Some(master) = &ends.master {
            keep(info_id(index, true), told(master)?);
        }
    }
    if lines.is_empty() { Ok(()) } else { dump.model.set_extension(EXTENSION, &lines) }
}

/// What is ready of what is asked for. Where there is nothing to read, the kernel first takes in what is on its way.
fn look(end: &OwnedFd, what: PollFlags) -> Result<PollFlags> {
    let mut ready = [PollFd::new(end.as_fd(), what)];
    poll(&mut ready, PollTimeout::ZERO).during("cannot look into a terminal", || "poll(_, 0)".into())?;
    Ok(ready[0].revents().unwrap_or(PollFlags::empty()))
}

/// One read; none where the other end is gone.
fn read(end: &OwnedFd) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 2 * LONGEST];
    match nix::unistd::read(end, &mut bytes) {
        Err(Errno::EIO) => Ok(Vec::new()),
        n => {
            bytes.truncate(n.during(READ, || "read(_, _, _)".into())?);
            Ok(bytes)
        }
    }
}

/// Reads what was typed, and puts it back.
fn typed(slave: &OwnedFd) -> Result<Typed> {
    let settings = ioctl::termios(slave).during(READ, || "ioctl(_, TCGETS)".into())?;
    let nothing = look(slave, PollFlags::POLLIN)?.is_empty()
        && ioctl::readable(slave).during(READ, || "ioctl(_, FIONREAD)".into())? == 0;
    if nothing && !has_lines(&settings) {
        return Ok(Typed::default());
    }
    let locked = ioctl::locked_termios(slave).during(READ, || "ioctl(_, TIOCGLCKTRMIOS)".into())?;
    let free = || set_locked(slave, &Termios::default());
    if locked != Termios::default() {
        free()?;
    }
    let mut typed = Typed { data: Vec::new(), ends: has_lines(&settings).then(Vec::new) };
    let outcome = drain(slave, &settings, &mut typed);
    let back = match typed.data.is_empty() && typed.ends.as_ref().is_none_or(Vec::is_empty) {
        true => set(slave, &settings),
        false => push_typed(slave, &settings, &typed).and_then(|()| set(slave, &settings)),
    };
    if locked != Termios::default() {
        set_locked(slave, &locked)?;
    }
    outcome.and(back)?;
    match typed.data.len() > LONGEST {
        true => Err(Error::new(format!("{} bytes wait in a pty", typed.data.len()))
            .remedy("try again once they have been read")
            .passing()),
        false => Ok(typed),
    }
}

fn drain(slave: &OwnedFd, settings: &Termios, typed: &mut Typed) -> Result<()> {
    if let Some(ends) = &mut typed.ends {
        while look(slave, PollFlags::POLLIN)?.contains(PollFlags::POLLIN) && typed.data.len() < MOST {
            typed.data.extend(read(slave)?);
            ends.push(typed.data.len());
        }
    }
    // What is no line yet. A read that finds nothing comes back at once.
    let mut raw = *settings;
    raw.lflag &= !libc::ICANON;
    (raw.cc[libc::VMIN], raw.cc[libc::VTIME]) = (0, 0);
    set(slave, &raw)?;
    loop {
        let bytes = read(slave)?;
        typed.data.extend_from_slice(&bytes);
        if bytes.is_empty() || typed.data.len() >= MOST {
            return Ok(());
        }
    }
}

/// Types it. The settings are then others than those that the terminal is to have.
pub(super) fn push_typed(slave: &OwnedFd, settings: &Termios, typed: &Typed) -> Result<()> {
    // A byte that ends a line and is not among those that were typed.
    let unused = |byte: &u8| !typed.data.contains(byte);
    let own = settings.cc[libc::VEOF];
    let end = [own].into_iter().chain(1..=255).filter(|byte| *byte != 0 && *byte != b'\n').find(unused);
    let end = end.ok_or_else(|| Error::new("every byte there is waits in a terminal with lines"))?;
    let mut plain = *settings;
    // Without IXON the kernel would let go what is held up.
    plain.iflag &= libc::IXON;
    plain.lflag &= libc::ICANON | libc::EXTPROC;
    plain.cc = [0; 19];
    plain.cc[libc::VMIN] = 1;
    plain.cc[libc::VEOF] = if typed.ends.is_some() { end } else { 1 };
    set(slave, &plain)?;
    let mut from = 0;
    for to in typed.ends.iter().flatten() {
        let line =
            typed.data.get(from..*to).ok_or_else(|| Error::new("the lines of a terminal make no sense"))?;
        push(slave, line)?;
        if line.last() != Some(&b'\n') {
            push(slave, &[end])?;
        }
        from = *to;
    }
    push(slave, &typed.data[from..])
}

/// Reads what a slave has said, and puts it back.
fn told(master: &OwnedFd) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    if !look(master, PollFlags::POLLIN)?.contains(PollFlags::POLLIN) {
        return Ok(data);
    }
    let mode = "ioctl(_, TIOCPKT)";
    let packets = ioctl::pty_packet_mode(master).during(READ, || mode.into())?;
    if packets {
        ioctl::set_pty_packet_mode(master, false).during(READ, || mode.into())?;
    }
    let outcome = loop {
        match look(master, PollFlags::POLLIN).map(|ready| ready.contains(PollFlags::POLLIN)) {
            Ok(true) if data.len() < MOST => {}
            Ok(_) => break Ok(()),
            Err(e) => break Err(e),
        }
        match read(master) {
            Ok(bytes) if bytes.is_empty() => break Ok(()),
            Ok(bytes) => data.extend(bytes),
            Err(e) => break Err(e),
        }
    };
    let back = push_told(master, &data);
    if packets {
        ioctl::set_pty_packet_mode(master, true).during(WRITE, || mode.into())?;
    }
    outcome.and(back).map(|()| data)
}

/// Says it, as if a slave had.
pub(super) fn push_told(master: &OwnedFd, data: &[u8]) -> Result<()> {
    let (first, rest) = data.split_at(data.len().min(LONGEST));
    push(master, first)?;
    if rest.is_empty() {
        return Ok(());
    }
    // What is behind the queue comes from a slave.
    let slave = peer(master)?;
    let settings = ioctl::termios(&slave).during(WRITE, || "ioctl(_, TCGETS)".into())?;
    set(&slave, &Termios { oflag: 0, ..settings })?;
    let outcome = write_all(&slave, rest);
    set(&slave, &settings)?;
    outcome
}

/// A slave of that master, whether it is locked or not.
pub(super) fn peer(master: &OwnedFd) -> Result<OwnedFd> {
    let locked = ioctl::pty_locked(master).during(WRITE, || "ioctl(_, TIOCGPTLCK)".into())?;
    let lock = |locked| {
        ioctl::set_pty_locked(master, locked).during(WRITE, || format!("ioctl(_, TIOCSPTLCK, {locked})"))
    };
    if locked {
        lock(false)?;
    }
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let slave = ioctl::pty_peer(master, flags).during(WRITE, || "ioctl(_, TIOCGPTPEER)".into());
    if locked {
        lock(true)?;
    }
    slave
}

fn write_all(slave: &OwnedFd, mut bytes: &[u8]) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !bytes.is_empty() {
        match nix::unistd::write(slave, bytes) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(Errno::EAGAIN | Errno::EINTR) if Instant::now() < until => {
                let mut room = [PollFd::new(slave.as_fd(), PollFlags::POLLOUT)];
                poll(&mut room, 10u8).during(WRITE, || "poll(_, POLLOUT)".into())?;
            }
            Err(errno) => return Err(Error::new(WRITE).call(format!("write(_, _, {})", bytes.len()), errno)),
        }
    }
    Ok(())
}

/// Puts bytes into the queue of an end.
fn push(end: &OwnedFd, bytes: &[u8]) -> Result<()> {
    bytes
        .iter()
        .try_for_each(|byte| ioctl::push_input(end, *byte).during(WRITE, || "ioctl(_, TIOCSTI)".into()))
}

fn set(end: &OwnedFd, settings: &Termios) -> Result<()> {
    ioctl::set_termios(end, settings).during(WRITE, || "ioctl(_, TCSETS)".into())
}

fn set_locked(end: &OwnedFd, locked: &Termios) -> Result<()> {
    ioctl::set_locked_termios(end, locked).during(WRITE, || "ioctl(_, TIOCSLCKTRMIOS)".into())
}

/// What the images have for the queues, by the number of the end's info.
pub(super) fn of_images(all: &[TtyDataEntry]) -> Result<BTreeMap<u32, &[u8]>> {
    let mut found = BTreeMap::new();
    for entry in all {
        if found.insert(entry.tty_id, &entry.data[..]).is_some() || entry.data.len() > MOST {
            return Err(Error::new(format!("more waits in terminal {} than can", entry.tty_id)));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pty() -> (OwnedFd, OwnedFd) {
        let master = std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        ioctl::set_pty_locked(&master, false).unwrap();
        let slave = ioctl::pty_peer(&master, libc::O_RDWR | libc::O_NOCTTY).unwrap();
        (master.into(), slave)
    }

    #[test]
    fn lines_are_read_and_stay() {
        let (master, slave) = pty();
        let settings = ioctl::termios(&slave).unwrap();
        nix::unistd::write(&master, b"one\n\x04two\x04thr").unwrap();
        // The echo tells that all has been taken in.
        let mut echo = Vec::new();
        while !echo.ends_with(b"thr") {
            echo.extend(read(&master).unwrap());
        }
        let wanted = Typed { data: b"one\ntwothr".to_vec(), ends: Some(vec![4, 4, 7]) };
        for _ in 0..3 {
            assert_eq!(typed(&slave).unwrap(), wanted);
            assert_eq!(ioctl::termios(&slave).unwrap(), settings);
            assert_eq!(told(&master).unwrap(), b"", "an echo");
        }
        nix::unistd::write(&master, b"\x7f\x7free\n").unwrap();
        let lines: Vec<Vec<u8>> = (0..4).map(|_| read(&slave).unwrap()).collect();
        assert_eq!(lines, [&b"one\n"[..], b"", b"two", b"tree\n"]);
    }

    #[test]
    fn more_than_a_queue_stays() {
        let (master, slave) = pty();
        let mut t = ioctl::termios(&slave).unwrap();
        let text: Vec<u8> = (0..9000u32).map(|n| (n % 251) as u8).collect();
        t.oflag = 0;
        ioctl::set_termios(&slave, &t).unwrap();
        write_all(&slave, &text).unwrap();
        t.oflag = libc::OPOST | libc::ONLCR;
        ioctl::set_termios(&slave, &t).unwrap();
        ioctl::set_pty_packet_mode(&master, true).unwrap();
        for _ in 0..3 {
            assert!(told(&master).unwrap() == text);
            assert!(ioctl::pty_packet_mode(&master).unwrap());
        }
    }

    #[test]
    fn bytes_without_lines_stay() {
        let (master, slave) = pty();
        let mut t = ioctl::termios(&slave).unwrap();
        t.lflag &= !(libc::ICANON | libc::ECHO);
        t.cc[libc::VMIN] = 100;
        ioctl::set_termios(&slave, &t).unwrap();
        let bytes = b"a\n\x13\x00\x7f\x16z";
        nix::unistd::write(&master, &bytes[..2]).unwrap();
        let wanted = Typed { data: bytes[..2].to_vec(), ends: None };
        while ioctl::readable(&slave).unwrap() < 2 {
            std::thread::yield_now();
        }
        assert_eq!(typed(&slave).unwrap(), wanted);
        assert_eq!(ioctl::termios(&slave).unwrap(), t);
        push_typed(&slave, &t, &Typed { data: bytes[2..].to_vec(), ends: None }).unwrap();
        set(&slave, &t).unwrap();
        assert_eq!(typed(&slave).unwrap().data, bytes);
    }
}
