//! Where a process's standard input, output and error come from, and the terminal in their place.
//!
//! ```text
//!                  terminal: false            terminal: true
//!   detached       ours, inherited            made inside; its master goes to --console-socket
//!   foreground     three pipes, copied        made inside; its master comes to us, copied
//! ```
//!
//! Pipes rather than our own descriptors in the foreground, so that a checkpoint has nothing of our terminal in it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};
use nix::unistd::{Gid, Uid, fchown, pipe2};

use super::{Error, Result};
use crate::init::console::Console;
use crate::sys::Context;

/// Standard descriptors, prepared on both sides.
#[derive(Debug, Default)]
pub struct Stdio {
    /// What the process gets in place of our descriptors.
    pub theirs: Option<[OwnedFd; 3]>,
    /// Where the process sends its terminal's master.
    pub console: Option<Console>,
    /// What stays with us.
    pub ours: Ours,
}

/// Our side of a process's standard descriptors.
#[derive(Debug, Default)]
pub enum Ours {
    /// Nothing: inherited, or somebody else's terminal.
    #[default]
    Nothing,
    /// The other ends of its pipes: input, output, error.
    Pipes([OwnedFd; 3]),
    /// Where the master of its terminal will arrive.
    Terminal(OwnedFd),
}

impl Stdio {
    /// Prepares for a process that detaches or not, has a terminal or not. `owner` is the host's id of its root.
    pub fn new(detach: bool, terminal: bool, socket: Option<&Path>, owner: (u32, u32)) -> Result<Self> {
        if detach && terminal && socket.is_none() {
            return Err(Error::new(
                "cannot allocate tty if stasis will detach without setting console socket",
            ));
        }
        if (!detach || !terminal) && socket.is_some() {
            return Err(Error::new("cannot use console socket if stasis will not detach or allocate tty"));
        }
        match (terminal, socket) {
            (true, Some(path)) => {
                let socket =
                    UnixStream::connect(path).context(|| format!("dial unix {}: connect", path.display()))?;
                Ok(Self {
                    theirs: None,
                    console: Some(Console { socket: socket.into(), copied: false }),
                    ours: Ours::Nothing,
                })
            }
            (true, None) => {
                let (ours, theirs) =
                    socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
                        .context(|| "socketpair")?;
                let console = Some(Console { socket: theirs, copied: true });
                Ok(Self { theirs: None, console, ours: Ours::Terminal(ours) })
            }
            (false, _) if detach => Ok(Self::default()),
            (false, _) => Self::pipes(owner),
        }
    }

    fn pipes((uid, gid): (u32, u32)) -> Result<Self> {
        let pipe = || pipe2(OFlag::O_CLOEXEC).context(|| "pipe2");
        let (input, to) = pipe()?;
        let (from, output) = pipe()?;
        let (from_error, error) = pipe()?;
        if uid != 0 || gid != 0 {
            for fd in [&input, &output, &error] {
                fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                    .context(|| "fchown of a pipe")?;
            }
        }
        Ok(Self {
            theirs: Some([input, output, error]),
            console: None,
            ours: Ours::Pipes([to, from, from_error]),
        })
    }
}

/// Receives the one descriptor that a process sends of its terminal.
pub fn receive_master(socket: &OwnedFd) -> Result<OwnedFd> {
    let mut name = [0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut data = [std::io::IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
        .context(|| "recvmsg of the terminal")?;
    for control in message.cmsgs().context(|| "recvmsg of the terminal")? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just installed these for us.
            let mut fds = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            if let Some(master) = fds.next() {
                return Ok(master);
            }
        }
    }
    Err(Error::new("the process sent no terminal"))
}
