//! In which directions UDP sockets are shut down: no socket tells, poll(2) only of receiving. sock_diag(7) lists it of
//! sockets that have a port.
//!
//! ```text
//!   request:  inet_diag_req_v2 (56): family, protocol, what to show, _, states, addresses (none: all)
//!   answer:   inet_diag_msg (72): ..., inode | attributes: len, type, bytes
//! ```

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::checkpoint::Result;
use crate::checkpoint::files::diag;

const INET_DIAG_SHUTDOWN: u16 = 8;
const MESSAGE: usize = 72;
const INODE: usize = 68;

/// What was shut down, by inode: 1 receiving, 2 sending.
pub type Shut = BTreeMap<u32, u8>;

/// All sockets of a family and protocol, in the network namespace of that process. A kernel without
/// CONFIG_INET_UDP_DIAG has none to tell of.
pub fn read(pid: i32, family: i32, protocol: i32) -> Result<Shut> {
    let mut request = vec![family as u8, protocol as u8, 0, 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&[0; 48]);
    let mut shut = Shut::new();
    let listed = diag::list(pid, &request, |message| {
        let (fixed, rest) = message.split_at_checked(MESSAGE).ok_or_else(diag::garbled)?;
        diag::attributes(rest, |number, value| {
            if let (INET_DIAG_SHUTDOWN, [how, ..]) = (number, value) {
                shut.insert(diag::word(fixed, INODE), *how);
            }
        })
    });
    match listed {
        Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(Shut::new()),
        other => other.map(|()| shut),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Shutdown, shutdown};
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    #[test]
    fn directions_are_told_by_inode() {
        let to = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sockets = [None, Some(Shutdown::Read), Some(Shutdown::Write), Some(Shutdown::Both)].map(|how| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(to.local_addr().unwrap()).unwrap();
            if let Some(how) = how {
                shutdown(socket.as_raw_fd(), how).unwrap();
            }
            socket
        });
        // It says that it is not connected, and is shut down all the same.
        assert_eq!(shutdown(to.as_raw_fd(), Shutdown::Write), Err(Errno::ENOTCONN));
        let all = read(std::process::id().cast_signed(), libc::AF_INET, libc::IPPROTO_UDP).unwrap();
        let told = |socket: &UdpSocket| all[&(nix::sys::stat::fstat(socket).unwrap().st_ino as u32)];
        assert_eq!(sockets.each_ref().map(told), [0, 1, 2, 3]);
        assert_eq!(told(&to), 2);
    }
}
