//! The conversation between a command and the process it makes.
//!
//! ```text
//!   command                              init (or an exec'ed process)
//!      | -- Go -------------------------> |   in its control groups, ids mapped
//!      | <------------------- Clocks ---- |   a time namespace is made, and can be set
//!      | -- Go -------------------------> |
//!      | <------------- Source(index) --- |   a bind mount's source can be opened only now, and not by the process
//!      | -- Go, with the descriptor ----> |
//!      | <------------------ Mounted ---- |   mounts in place: time for prestart and createRuntime hooks
//!      | -- Go -------------------------> |
//!      | <----- Descriptor (restore) ---- |   the slave of its new terminal
//!      | <-------------------- Ready ---- |   all but credentials and seccomp
//!      | -- Go -------------------------> |   state.json is written
//!      | <----------- Listener(fd) ------ |   seccomp with a listener: the command fetches the descriptor
//!      | -- Go -------------------------> |
//!      | <---------------- end of file -- |   nothing can fail any more but execve(2)
//! ```
//!
//! At any point the process may say `Failed` instead. A SEQPACKET socket keeps messages apart.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

use crate::sys::{Context, Error, Result};

/// One end of the conversation.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// What the new process says.
#[derive(Debug)]
pub enum Message {
    /// The pid that the helper which joined the namespaces gave the process proper, and whether that was born in its
    /// control group.
    Pid(i32, bool),
    /// There is a time namespace whose clocks want to be set.
    Clocks,
    /// The source of the mount with that index is to be opened now, in the process's mount namespace.
    Source(usize),
    /// All mounts are in place, below the root file system to be.
    Mounted,
    /// What the process was made for: the slave of its terminal, or a mount.
    Descriptor(OwnedFd),
    /// Everything is set up but for what takes privileges away.
    Ready,
    /// A seccomp filter with a listener is in force; this is the listener's number in the process.
    Listener(RawFd),
    /// The process has given up.
    Failed(String),
}

/// An error message longer than this is cut.
const LONGEST: usize = 16 << 10;

impl Channel {
    /// Both ends: the command's, and the process's.
    pub fn pair() -> Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .context(|| "socketpair")?;
        Ok((Self(a), Self(b)))
    }

    /// Sends a message of the process.
    pub fn tell(&self, message: &Message) -> Result<()> {
        match message {
            Message::Pid(pid, false) => self.send(b'P', &pid.to_ne_bytes(), None),
            Message::Pid(pid, true) => self.send(b'B', &pid.to_ne_bytes(), None),
            Message::Clocks => self.send(b'T', &[], None),
            Message::Source(index) => {
                self.send(b'S', &i32::try_from(*index).unwrap_or(-1).to_ne_bytes(), None)
            }
            Message::Mounted => self.send(b'M', &[], None),
            Message::Descriptor(fd) => self.send(b'C', &[], Some(fd.as_raw_fd())),
            Message::Ready => self.send(b'R', &[], None),
            Message::Listener(fd) => self.send(b'L', &fd.to_ne_bytes(), None),
            Message::Failed(text) => {
                let end = text.floor_char_boundary(LONGEST);
                self.send(b'F', &text.as_bytes()[..end], None)
            }
        }
    }

    /// Waits for a message of the process; None when it has closed its end.
    pub fn listen(&self) -> Result<Option<Message>> {
        let (bytes, fd) = self.receive()?;
        let Some((tag, payload)) = bytes.split_first() else { return Ok(None) };
        let number = || payload.try_into().map(i32::from_ne_bytes).map_err(|_| garbled());
        Ok(Some(match (tag, fd) {
            (b'P', _) => Message::Pid(number()?, false),
            (b'B', _) => Message::Pid(number()?, true),
            (b'T', _) => Message::Clocks,
            (b'S', _) => Message::Source(usize::try_from(number()?).map_err(|_| garbled())?),
            (b'M', _) => Message::Mounted,
            (b'C', Some(fd)) => Message::Descriptor(fd),
            (b'R', _) => Message::Ready,
            (b'L', _) => Message::Listener(number()?),
            (b'F', _) => Message::Failed(String::from_utf8_lossy(payload).into_owned()),
            _ => return Err(garbled()),
        }))
    }

    /// Lets the process go on.
    pub fn go(&self) -> Result<()> {
        self.send(b'G', &[], None)
    }

    /// The same, with a descriptor that it has asked for.
    pub fn go_with(&self, fd: Option<OwnedFd>) -> Result<()> {
        self.send(b'G', &[], fd.as_ref().map(AsRawFd::as_raw_fd))
    }

    /// Waits for leave to go on. The death of the command is a failure.
    pub fn wait(&self) -> Result<()> {
        self.wait_for_descriptor().map(drop)
    }

    /// The same, for a descriptor, which may not come.
    pub fn wait_for_descriptor(&self) -> Result<Option<OwnedFd>> {
        let (bytes, fd) = self.receive()?;
        match bytes.as_slice() {
            b"G" => Ok(fd),
            [] => Err(Error::new("the command that makes the container has died")),
            _ => Err(garbled()),
        }
    }

    fn send(&self, tag: u8, payload: &[u8], fd: Option<RawFd>) -> Result<()> {
        let head = [tag];
        let data = [IoSlice::new(&head), IoSlice::new(payload)];
        let fds: Vec<RawFd> = fd.into_iter().collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &data, control, MsgFlags::MSG_NOSIGNAL, None) {
                Err(Errno::EINTR) => {}
                done => return done.map(drop).context(|| "sending over the init channel"),
            }
        }
    }

    fn receive(&self) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut buffer = vec![0; LONGEST + 1];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        loop {
            let mut data = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let (bytes, fd) = match recvmsg::<()>(self.0.as_raw_fd(), &mut data, Some(&mut space), flags) {
                Err(Errno::EINTR) => continue,
                // The peer died with our message unread.
                Err(Errno::ECONNRESET) => return Ok((vec![], None)),
                Err(errno) => return Err(Error::call("receiving over the init channel", errno)),
                Ok(message) => {
                    let mut fds = vec![];
                    for control in message.cmsgs().map_err(|_| garbled())? {
                        if let ControlMessageOwned::ScmRights(got) = control {
                            // SAFETY: the kernel has just installed these for us.
                            fds.extend(got.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                        }
                    }
                    (message.bytes, fds.pop())
                }
            };
            buffer.truncate(bytes);
            return Ok((buffer, fd));
        }
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn garbled() -> Error {
    Error::new("garbled message on the init channel")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_with_their_descriptors() {
        let (command, process) = Channel::pair().unwrap();
        process.tell(&Message::Pid(7, true)).unwrap();
        process.tell(&Message::Descriptor(std::fs::File::open("/dev/null").unwrap().into())).unwrap();
        process.tell(&Message::Failed("ä".repeat(LONGEST))).unwrap();
        assert!(matches!(command.listen(), Ok(Some(Message::Pid(7, true)))));
        assert!(matches!(command.listen(), Ok(Some(Message::Descriptor(_)))));
        let Ok(Some(Message::Failed(text))) = command.listen() else { panic!() };
        assert_eq!(text.chars().count(), LONGEST / 2);
        command.go().unwrap();
        process.wait().unwrap();
        drop(process);
        assert!(matches!(command.listen(), Ok(None)));
    }

    #[test]
    fn the_death_of_the_command_is_noticed() {
        let (command, process) = Channel::pair().unwrap();
        drop(command);
        assert!(process.wait().is_err());
    }
}
