//! What waits in a unix socket: bytes or packets, with the descriptors passed along.
//!
//! SO_PEEK_OFF lets the whole queue be read without taking anything from it.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::dump::record;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::sockopts;
use crate::checkpoint::image::{ScmEntry, SkPacketEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{get_int, set_int};

/// Larger than any packet that a unix socket takes.
const PACKET: usize = 4 << 20;
/// As many descriptors as one message carries (SCM_MAX_FD).
const RIGHTS: usize = 253;

/// Records what waits in a socket, which it keeps.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32, kind: i32) -> Result<()> {
    let before = match get_int(&live.file, libc::SOL_SOCKET, libc::SO_PEEK_OFF) {
        Ok(offset) => offset,
        Err(errno) => {
            return Err(Error::new("cannot look into a socket's queue")
                .call("getsockopt(_, SOL_SOCKET, SO_PEEK_OFF)", errno));
        }
    };
    let set = |offset: i32| {
        set_int(&live.file, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
            .during("cannot look into a socket's queue", || format!("setsockopt(_, SO_PEEK_OFF, {offset})"))
    };
    set(0)?;
    let read = packets(live, kind);
    set(before)?;
    for (bytes, rights) in read? {
        let mut scm = Vec::new();
        if !rights.is_empty() {
            let mut ids = Vec::new();
            for file in rights {
                let passed = Live::own(file, live.vpid)?;
                let (id, _) = record(dump, &passed).map_err(|e| {
                    e.remedy("it was passed in a unix socket, and nobody has received it yet")
                })?;
                ids.push(id);
                // Later ones are compared with it.
                dump.files.held.push(passed.file);
            }
            scm.push(ScmEntry { r#type: libc::SCM_RIGHTS.cast_unsigned(), rights: ids });
        }
        let length = u32::try_from(bytes.len()).map_err(|_| Error::new("a packet is too large"))?;
        dump.model.sk_queues.push((SkPacketEntry { id_for: id, length, scm }, bytes));
    }
    Ok(())
}

type Packet = (Vec<u8>, Vec<OwnedFd>);

fn packets(live: &Live, kind: i32) -> Result<Vec<Packet>> {
    let mut found = Vec::new();
    let mut buffer = vec![0; PACKET];
    loop {
        let mut space = nix::cmsg_space!([RawFd; RIGHTS], libc::ucred);
        let mut data = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(live.file.as_raw_fd(), &mut data, Some(&mut space), flags) {
            Ok(message) => message,
            // EINVAL: listening, or not connected. ENOTCONN and ECONNRESET: nobody is there, and nothing waits.
            Err(Errno::EAGAIN | Errno::EINVAL | Errno::ENOTCONN | Errno::ECONNRESET) => return Ok(found),
            Err(Errno::EINTR) => continue,
            Err(errno) => {
                return Err(
                    Error::new("cannot look into a socket's queue").call("recvmsg(_, MSG_PEEK)", errno)
                );
            }
        };
        let mut rights = Vec::new();
        for control in message.cmsgs().during("cannot look into a socket's queue", || "recvmsg(_)".into())? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just installed these for us.
                rights.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if message.flags.contains(MsgFlags::MSG_TRUNC) || message.flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(Error::new("a packet in a unix socket is larger than can be read"));
        }
        let length = message.bytes;
        // The end of a stream, or of a connection of packets; an empty datagram is a packet of its own.
        if length == 0 && rights.is_empty() && kind != libc::SOCK_DGRAM {
            return Ok(found);
        }
        found.push((buffer[..length].to_vec(), rights));
        if length == 0 {
            // The offset does not step over an empty datagram.
            return Err(Error::new("an empty datagram waits in a unix socket")
                .remedy("try again once the program has received it"));
        }
    }
}

/// Puts a packet into the queue of the socket that `from` is connected to.
pub fn fill(from: &OwnedFd, bytes: &[u8], rights: &[RawFd]) -> Result<()> {
    let what = "cannot fill a socket's queue";
    let call = || format!("sendmsg(_, {} bytes, {} descriptors)", bytes.len(), rights.len());
    let control = [ControlMessage::ScmRights(rights)];
    let control = if rights.is_empty() { &control[..0] } else { &control[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sockopts::open_buffers(from)?;
    let sent = sendmsg::<()>(from.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
    let sent = sent.during(what, call)?;
    if sent == bytes.len() { Ok(()) } else { Err(Error::new(what).call(call(), Errno::ENOBUFS)) }
}
