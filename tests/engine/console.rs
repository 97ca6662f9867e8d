//! The other end of `--console-socket`: takes the terminal's master and collects what comes out of it.

use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tempfile::TempDir;

/// A listening console socket, later the master it received.
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
    /// Where the socket lies: not in the build directory, whose path alone may be longer than that of a socket.
    _dir: TempDir,
    /// Kept open: a terminal whose master is closed hangs up.
    master: Option<File>,
}

impl Console {
    /// Listens in a directory of its own.
    pub fn listen() -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|e| format!("a directory for the console socket: {e}"))?;
        let path = dir.path().join("tty");
        let listener = UnixListener::bind(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        listener.set_nonblocking(true).map_err(|e| e.to_string())?;
        Ok(Self { listener, path, _dir: dir, master: None })
    }

    /// What to pass to `--console-socket`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the master that the runtime has sent, and goes on reading from it.
    pub fn receive(&mut self, into: Arc<Mutex<Vec<u8>>>, limit: Duration) -> Result<(), String> {
        let end = Instant::now() + limit;
        let stream = loop {
            match self.listener.accept() {
                Ok((stream, _)) => break stream,
                Err(e) if Instant::now() > end => return Err(format!("nobody sent a terminal: {e}")),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        stream.set_nonblocking(false).map_err(|e| e.to_string())?;
        let mut name = [0; 4096];
        let mut iov = [IoSliceMut::new(&mut name)];
        let mut space = nix::cmsg_space!([i32; 1]);
        let message =
            recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
                .map_err(|e| format!("console socket: {e}"))?;
        let mut master = None;
        for control in message.cmsgs().map_err(|e| e.to_string())? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: recvmsg has just made this descriptor, and nobody else knows it.
                master = fds.first().map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(*fd) }));
            }
        }
        let master = master.ok_or("the console socket's message holds no descriptor")?;
        let mut reader = master.try_clone().map_err(|e| e.to_string())?;
        self.master = Some(master);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if let Ok(mut all) = into.lock() {
                    all.extend_from_slice(&buffer[..n]);
                }
            }
        });
        Ok(())
    }
}
