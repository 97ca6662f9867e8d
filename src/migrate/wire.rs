//! What goes over the connection.
//!
//! ```text
//!   frame = kind (1 byte), length (4 bytes, little endian), payload
//!
//!   hello    text: version and what was asked            round    number of the set that follows
//!   file     name of an image                            data     bytes of that image, in order
//!   restore  the last set is complete                    ready, commit, running   nothing
//!   failed   text
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

use crate::checkpoint::error::{Error, Result};

/// Largest payload.
pub const LARGEST: usize = 1 << 20;
const HEADER: usize = 5;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The first of each side.
    Hello = 1,
    /// A set of images begins.
    Round = 2,
    /// An image begins.
    File = 3,
    /// Its bytes.
    Data = 4,
    /// All is sent.
    Restore = 5,
    /// All is restored, and waits.
    Ready = 6,
    /// Let it go.
    Commit = 7,
    /// It runs.
    Running = 8,
    /// It is over.
    Failed = 9,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        let all = [
            Self::Hello,
            Self::Round,
            Self::File,
            Self::Data,
            Self::Restore,
            Self::Ready,
            Self::Commit,
            Self::Running,
            Self::Failed,
        ];
        all.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// A connection: a socket, or the two pipes of a command.
#[derive(Debug)]
pub struct Wire {
    input: OwnedFd,
    output: OwnedFd,
    /// How long the other side may say nothing, or take nothing.
    patience: Duration,
}

impl Wire {
    /// A connection that reads from `input` and writes to `output`, which are its own: they no longer block.
    pub fn new(input: OwnedFd, output: OwnedFd, patience: Duration) -> Self {
        for fd in [&input, &output] {
            // Where it blocks after all, only the patience with somebody who takes nothing is lost.
            let _ = fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
        }
        Self { input, output, patience }
    }

    /// Sends a frame.
    pub fn send(&self, kind: Kind, payload: &[u8]) -> Result<()> {
        let mut header = [kind as u8; HEADER];
        let len = u32::try_from(payload.len()).map_err(|_| Error::new("a frame is too large"))?;
        header[1..].copy_from_slice(&len.to_le_bytes());
        self.write_all(&header)?;
        self.write_all(payload)
    }

    /// Receives the next frame into `payload`.
    pub fn receive(&self, payload: &mut Vec<u8>) -> Result<Kind> {
        let mut header = [0; HEADER];
        self.read_exact(&mut header)?;
        let [kind, len @ ..] = header;
        let len = u32::from_le_bytes(len) as usize;
        let kind = Kind::of(kind).filter(|_| len <= LARGEST);
        let kind = kind.ok_or_else(|| Error::new("the other side does not speak as stasis does"))?;
        payload.resize(len, 0);
        self.read_exact(payload)?;
        Ok(kind)
    }

    /// Receives a frame that must be of this kind. What the other side says of its failure is the error.
    pub fn expect(&self, wanted: Kind) -> Result<Vec<u8>> {
        let mut payload = Vec::new();
        match self.receive(&mut payload)? {
            kind if kind == wanted => Ok(payload),
            Kind::Failed => Err(Error::new(format!("the other side: {}", text(&payload)))),
            other => Err(Error::new(format!("the other side says {other:?} in the place of {wanted:?}"))),
        }
    }

    fn write_all(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            self.wait(&self.output, PollFlags::POLLOUT)?;
            match write(&self.output, bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(lost("write(connection)", errno)),
            }
        }
        Ok(())
    }

    fn read_exact(&self, mut into: &mut [u8]) -> Result<()> {
        while !into.is_empty() {
            self.wait(&self.input, PollFlags::POLLIN)?;
            match read(&self.input, into) {
                Ok(0) => return Err(Error::new("the other side has closed the connection")),
                Ok(n) => into = &mut into[n..],
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(lost("read(connection)", errno)),
            }
        }
        Ok(())
    }

    fn wait(&self, fd: &OwnedFd, flags: PollFlags) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(fd.as_fd(), flags)], timeout) {
                Ok(0) => {
                    return Err(Error::new(format!(
                        "the other side has said nothing for {} s",
                        self.patience.as_secs()
                    )));
                }
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(lost("poll(connection)", errno)),
            }
        }
    }
}

fn lost(call: &str, errno: Errno) -> Error {
    Error::new("the connection is lost").call(call, errno)
}

/// Bytes of the other side, as far as they can be printed.
pub fn text(payload: &[u8]) -> String {
    let text = String::from_utf8_lossy(payload);
    text.chars().filter(|c| !c.is_control()).take(4096).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Wire, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let output = ours.try_clone().unwrap();
        (Wire::new(ours.into(), output.into(), Duration::from_secs(60)), theirs)
    }

    #[test]
    fn frames_arrive_whole() {
        let (wire, other) = pair();
        let back = Wire::new(other.try_clone().unwrap().into(), other.into(), Duration::from_secs(60));
        let large = vec![7; LARGEST];
        let sender = std::thread::spawn(move || {
            wire.send(Kind::File, b"pages-1.img")?;
            wire.send(Kind::Data, &large)?;
            wire.send(Kind::Failed, b"no\x1bdisk")
        });
        let mut payload = Vec::new();
        assert_eq!(back.receive(&mut payload).unwrap(), Kind::File);
        assert_eq!(payload, b"pages-1.img");
        assert_eq!(back.receive(&mut payload).unwrap(), Kind::Data);
        assert!(payload.len() == LARGEST && payload.iter().all(|b| *b == 7));
        assert!(back.expect(Kind::Ready).unwrap_err().to_string().contains("nodisk"));
        sender.join().unwrap().unwrap();
    }

    #[test]
    fn strangers_are_not_understood() {
        use std::io::Write;
        for bytes in [&b"GET / HTTP/1.1"[..], &[4, 1, 0, 16, 0], &[0, 0, 0, 0, 0], &[1, 9]] {
            let (wire, mut other) = pair();
            other.write_all(bytes).unwrap();
            drop(other);
            assert!(wire.receive(&mut Vec::new()).is_err(), "{bytes:?}");
        }
    }
}
