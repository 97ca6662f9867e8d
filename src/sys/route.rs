//! rtnetlink(7): moving a network device with its addresses.
//!
//! ```text
//!   message:  nlmsghdr (16) | ifinfomsg (16) or ifaddrmsg (8) | attributes: length, type, bytes, padding to 4
//! ```

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::socket::socket;

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const EXCLUSIVE: u16 = 0x200;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// Set by hand, not learnt from the network.
const PERMANENT: u8 = 0x80;
/// RT_SCOPE_UNIVERSE.
const EVERYWHERE: u8 = 0;

/// An address of a device, as the kernel tells and takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    family: u8,
    prefix: u8,
    attributes: Vec<u8>,
}

/// A socket for the devices of one network namespace: that in which it was made.
#[derive(Debug)]
pub struct Route(OwnedFd);

impl Route {
    /// A socket for our own network namespace.
    pub fn open() -> Result<Self, Errno> {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).map(Self)
    }

    /// Switches a device on or off.
    pub fn switch(&self, device: u32, on: bool) -> Result<(), Errno> {
        let up = libc::IFF_UP as u32;
        self.change(RTM_NEWLINK, 0, &link(device, if on { up } else { 0 }, up))
    }

    /// Moves a device to another namespace, under that name.
    pub fn relocate(&self, device: u32, name: &str, namespace: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut body = link(device, 0, 0);
        let fd = namespace.as_raw_fd().to_ne_bytes();
        body.extend(attribute(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat()));
        body.extend(attribute(IFLA_NET_NS_FD, &fd));
        self.change(RTM_NEWLINK, 0, &body)
    }

    /// The addresses of a device that make sense elsewhere: permanent ones, not bound to this link or host.
    pub fn addresses(&self, device: u32) -> Result<Vec<Address>, Errno> {
        self.ask(RTM_GETADDR, DUMP, &[0; 8])?;
        let mut all = vec![];
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            if take(&buffer[..length], device, &mut all)? {
                return Ok(all);
            }
        }
    }

    /// Gives a device an address.
    pub fn add_address(&self, device: u32, address: &Address) -> Result<(), Errno> {
        let mut body = vec![address.family, address.prefix, PERMANENT, EVERYWHERE];
        body.extend(device.to_ne_bytes());
        body.extend(&address.attributes);
        self.change(RTM_NEWADDR, CREATE | EXCLUSIVE, &body)
    }

    /// Sends a request, and waits for the answer that it has been done.
    fn change(&self, kind: u16, flags: u16, body: &[u8]) -> Result<(), Errno> {
        self.ask(kind, ACK | flags, body)?;
        let mut buffer = [0; 4096];
        let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        take(&buffer[..length], 0, &mut vec![]).map(drop)
    }

    fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> Result<(), Errno> {
        send(self.0.as_raw_fd(), &message(kind, flags, body), MsgFlags::empty()).map(drop)
    }
}

/// The index of a device of our own network namespace.
pub fn index(name: &str) -> Result<u32, Errno> {
    nix::net::if_::if_nametoindex(name)
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]); // sequence, port
    bytes.extend(body);
    bytes
}

fn link(device: u32, flags: u32, mask: u32) -> Vec<u8> {
    let mut body = vec![0; 4]; // family, padding, type
    for word in [device, flags, mask] {
        body.extend(word.to_ne_bytes());
    }
    body
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Takes the addresses of a device out of one datagram. True at the end, or once a request has been answered.
fn take(mut datagram: &[u8], device: u32, all: &mut Vec<Address>) -> Result<bool, Errno> {
    while !datagram.is_empty() {
        let length = u32_at(datagram, 0).ok_or(Errno::EBADMSG)? as usize;
        let message = datagram.get(HEADER..length).ok_or(Errno::EBADMSG)?;
        match u16_at(datagram, 4) {
            Some(NLMSG_DONE) => return Ok(true),
            Some(NLMSG_ERROR) => {
                let code = u32_at(message, 0).ok_or(Errno::EBADMSG)? as i32;
                return if code == 0 { Ok(true) } else { Err(Errno::from_raw(-code)) };
            }
            Some(RTM_NEWADDR) => all.extend(address(message, device)),
            _ => {}
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The address in a message, if it is of that device and can be taken along.
fn address(message: &[u8], device: u32) -> Option<Address> {
    let [family, prefix, flags, scope] = *message.first_chunk()?;
    if u32_at(message, 4)? != device || flags & PERMANENT == 0 || scope != EVERYWHERE {
        return None;
    }
    let (mut rest, mut attributes) = (message.get(8..)?, vec![]);
    while rest.len() >= 4 {
        let length = usize::from(u16_at(rest, 0)?);
        let value = rest.get(4..length)?;
        let kind = u16_at(rest, 2)?;
        if [IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST].contains(&kind) {
            attributes.extend(attribute(kind, value));
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Address { family, prefix, attributes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::network::loopback_up;
    use crate::sys::testing::in_child;

    #[test]
    fn addresses_come_and_go_with_a_device() {
        in_child(libc::CLONE_NEWNET, || {
            loopback_up().unwrap();
            let route = Route::open().unwrap();
            let lo = index("lo").unwrap();
            let attributes =
                [attribute(IFA_LOCAL, &[10, 7, 0, 1]), attribute(IFA_ADDRESS, &[10, 7, 0, 1])].concat();
            let ours = Address { family: libc::AF_INET as u8, prefix: 24, attributes };
            assert!(!route.addresses(lo).unwrap().contains(&ours));
            route.add_address(lo, &ours).unwrap();
            let all = route.addresses(lo).unwrap();
            // 127.0.0.1 and ::1 are this host's, and stay.
            assert_eq!(all.len(), 1);
            assert_eq!((all[0].family, all[0].prefix), (ours.family, 24));
            assert_eq!(route.add_address(lo, &ours), Err(Errno::EEXIST));
            assert_eq!(route.switch(lo + 1000, true), Err(Errno::ENODEV));
        });
    }

    #[test]
    fn garbage_is_refused() {
        for bytes in [&[1, 0, 0, 0][..], &[200, 0, 0, 0, 0, 0, 0, 0], &[7]] {
            assert!(take(bytes, 1, &mut vec![]).is_err(), "{bytes:?}");
        }
        assert_eq!(address(&[2, 24, PERMANENT, 0, 1, 0, 0, 0, 200, 0, 1, 0], 1), None);
    }
}
