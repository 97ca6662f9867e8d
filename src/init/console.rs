//! The terminal of a container: made inside it, so that it belongs to its devpts, and handed out by its master.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::Mode;
use nix::sys::statfs::fstatfs;
use nix::sys::termios::{OutputFlags, SetArg, tcgetattr, tcsetattr};

use crate::sys::{Context, Error, Result, ioctl, tty};

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;
const MASTER: &str = "/dev/pts/ptmx";

/// Where the master of a terminal goes.
#[derive(Debug)]
pub struct Console {
    /// A connected socket.
    pub socket: OwnedFd,
    /// To the command itself, which copies what it reads to its own standard output.
    pub copied: bool,
}

/// Makes a pseudoterminal, sends its master to `console`, and returns its slave.
pub fn create(console: &Console, size: Option<(u16, u16)>) -> Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = open(MASTER, flags, Mode::empty()).context(|| format!("open {MASTER}"))?;
    let kind = fstatfs(&master).context(|| format!("fstatfs {MASTER}"))?.filesystem_type().0;
    if kind != DEVPTS_SUPER_MAGIC {
        return Err(Error::new(format!("{MASTER} is not a terminal of a devpts")));
    }
    let slave = tty::open_slave(&master).context(|| "ioctl(TIOCGPTPEER)")?;
    if let Some((rows, columns)) = size {
        ioctl::set_window_size(&slave, &[rows, columns, 0, 0]).context(|| "ioctl(TIOCSWINSZ)")?;
    }
    if console.copied {
        // Line feeds stay alone: what is copied to may be no terminal, and otherwise adds the carriage returns.
        let mut settings = tcgetattr(&slave).context(|| "tcgetattr")?;
        settings.output_flags.remove(OutputFlags::ONLCR);
        tcsetattr(&slave, SetArg::TCSANOW, &settings).context(|| "tcsetattr")?;
    }
    send(console.socket.as_fd(), MASTER.as_bytes(), master.as_fd())?;
    Ok(slave)
}

/// Makes the slave this session's controlling terminal and its standard input, output and error.
pub fn adopt(slave: &OwnedFd) -> Result<()> {
    nix::unistd::dup2_stdin(slave).context(|| "dup2 of the terminal")?;
    nix::unistd::dup2_stdout(slave).context(|| "dup2 of the terminal")?;
    nix::unistd::dup2_stderr(slave).context(|| "dup2 of the terminal")?;
    tty::set_controlling(slave).context(|| "ioctl(setctty)")
}

/// Sends a descriptor with a few bytes over a stream socket.
pub fn send(socket: BorrowedFd<'_>, data: &[u8], fd: BorrowedFd<'_>) -> Result<()> {
    let fds = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    loop {
        let sent =
            sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(data)], &rights, MsgFlags::MSG_NOSIGNAL, None);
        match sent {
            Err(nix::errno::Errno::EINTR) => {}
            done => return done.map(drop).context(|| "sendmsg of a descriptor"),
        }
    }
}
