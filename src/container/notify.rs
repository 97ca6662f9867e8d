//! sd_notify(3): the container's program says that it is ready, and the service manager that started us hears of it.
//!
//! ```text
//!   program ──> /run/notify/notify.sock, which is ROOT/ID/notify/notify.sock ──> `run` or `start` ──> $NOTIFY_SOCKET
//!                        READY=1                                                   READY=1, MAINPID=..., BARRIER=1
//! ```
//!
//! As with runc: `create` and `run` with NOTIFY_SOCKET in their environment give the container a socket; the command that
//! lets the program run stays until it has said so, or has ended.

use std::ffi::OsString;
use std::fs::{DirBuilder, Permissions, set_permissions};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};
use nix::sys::stat::{Mode, umask};
use oci_spec::runtime::{Mount, Spec};

use super::Result;
use super::store::Dir;
use crate::sys::{self, Context};

/// The directory of the socket, below the container's own.
const DIR: &str = "notify";
/// Where it is in the container.
const INSIDE: &str = "/run/notify";
const NAME: &str = "notify.sock";
/// How long the service manager may take to say that it has read everything, in milliseconds; an old one never does.
const BARRIER: u16 = 30_000;

/// The socket of whoever wants to hear when the container is ready.
pub fn manager() -> Option<OsString> {
    std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty())
}

/// Adds to config.json what the program needs to speak.
pub fn add(spec: &mut Spec, dir: &Dir) {
    let mut mount = Mount::default();
    let options = ["bind", "nosuid", "noexec", "nodev", "ro"].map(str::to_owned).to_vec();
    mount
        .set_destination(PathBuf::from(INSIDE))
        .set_typ(None)
        .set_source(Some(dir.join(DIR)))
        .set_options(Some(options));
    spec.mounts_mut().get_or_insert_default().push(mount);
    if let Some(process) = spec.process_mut() {
        process.env_mut().get_or_insert_default().push(format!("NOTIFY_SOCKET={INSIDE}/{NAME}"));
    }
}

/// Makes the directory that is mounted into the container.
pub fn make_dir(dir: &Dir) -> Result<()> {
    let path = dir.join(DIR);
    let call = || format!("mkdir {}", path.display());
    DirBuilder::new().create(&path).context(call)?;
    // The umask may have taken bits away.
    Ok(set_permissions(&path, Permissions::from_mode(0o755)).context(call)?)
}

/// Our end of what the container says.
#[derive(Debug)]
pub struct Socket(UnixDatagram);

impl Socket {
    /// Listens where the container's program speaks; nothing where its creator did not ask for it.
    pub fn listen(dir: &Dir) -> Result<Option<Self>> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let place = match open(&dir.join(DIR), flags, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(None),
            place => place.context(|| format!("open {}", dir.join(DIR).display()))?,
        };
        // By its descriptor: a socket's whole path may have 107 bytes, and the root directory's alone may have more.
        let path = format!("/proc/self/fd/{}/{NAME}", place.as_raw_fd());
        let call = || format!("bind {}", dir.join(DIR).join(NAME).display());
        // Of a `start` that was killed.
        let _ = std::fs::remove_file(&path);
        // Everybody may write to it. A chmod(2) would follow a link that the container has put there meanwhile.
        let before = umask(Mode::empty());
        let socket = UnixDatagram::bind(&path).context(call);
        umask(before);
        Ok(Some(Self(socket?)))
    }

    /// Waits until the container is ready or `init` has ended, and tells the service manager which pid to watch.
    pub fn relay(&self, manager: &Path, init: BorrowedFd<'_>, pid: i32) -> Result<()> {
        let to = dial(manager)?;
        loop {
            let mut fds =
                [PollFd::new(self.0.as_fd(), PollFlags::POLLIN), PollFd::new(init, PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                done => done.context(|| "poll")?,
            };
            let said = fds[0].any().unwrap_or(false);
            if !said {
                return Ok(());
            }
            let mut message = [0; 4096];
            let length = self.0.recv(&mut message).context(|| "read notify socket")?;
            let ready = message[..length].split(|&b| b == b'\n').find(|line| line.starts_with(b"READY="));
            if let Some(line) = ready {
                send(&to, &[line, b"\n"].concat(), &[])?;
                send(&to, format!("MAINPID={pid}\n").as_bytes(), &[])?;
                return barrier(&to);
            }
        }
    }
}

fn dial(manager: &Path) -> Result<OwnedFd> {
    let call = || format!("connect {}", manager.display());
    let name = manager.as_os_str().as_bytes();
    let address = match name.strip_prefix(b"@") {
        Some(name) => UnixAddr::new_abstract(name),
        None => UnixAddr::new(manager),
    };
    let fd =
        socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).context(|| "socket")?;
    connect(fd.as_raw_fd(), &address.context(call)?).context(call)?;
    Ok(fd)
}

fn send(to: &OwnedFd, message: &[u8], fds: &[i32]) -> Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<UnixAddr>(to.as_raw_fd(), &[IoSlice::new(message)], rights, MsgFlags::MSG_NOSIGNAL, None)
        .context(|| "notify the service manager: sendmsg")?;
    Ok(())
}

/// Waits until the manager has read what was sent: it closes the descriptor that comes last.
fn barrier(to: &OwnedFd) -> Result<()> {
    let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "pipe")?;
    send(to, b"BARRIER=1", &[theirs.as_raw_fd()])?;
    drop(theirs);
    loop {
        match poll(&mut [PollFd::new(ours.as_fd(), PollFlags::POLLIN)], BARRIER) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(sys::Error::call("poll", errno).into()),
            Ok(_) => return Ok(()),
        }
    }
}
