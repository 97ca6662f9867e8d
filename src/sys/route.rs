//! rtnetlink(7): moving a network device with its addresses.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use super::netlink::{CREATE, EXCLUSIVE, Message, Netlink, attribute, text, u32_at};

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
pub struct Route(Netlink);

impl Route {
    /// A socket for our own network namespace.
    pub fn open() -> Result<Self, Errno> {
        Netlink::open(libc::NETLINK_ROUTE).map(Self)
    }

    /// Switches a device on or off.
    pub fn switch(&self, device: u32, on: bool) -> Result<(), Errno> {
        let up = libc::IFF_UP as u32;
        self.0.change(libc::RTM_NEWLINK, 0, &link(device, if on { up } else { 0 }, up))
    }

    /// Whether a device is switched on.
    pub fn is_on(&self, device: u32) -> Result<bool, Errno> {
        let device = self.0.get(libc::RTM_GETLINK, &link(device, 0, 0))?;
        Ok(u32_at(&device.body, 8).unwrap_or(0) & libc::IFF_UP as u32 != 0)
    }

    /// Moves a device to another namespace, under that name.
    pub fn relocate(&self, device: u32, name: &str, namespace: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut body = link(device, 0, 0);
        body.extend(text(libc::IFLA_IFNAME, name));
        body.extend(attribute(libc::IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes()));
        self.0.change(libc::RTM_NEWLINK, 0, &body)
    }

    /// The addresses of a device that make sense elsewhere: permanent ones, not bound to this link or host.
    pub fn addresses(&self, device: u32) -> Result<Vec<Address>, Errno> {
        let all = self.0.dump(libc::RTM_GETADDR, &[0; 8])?;
        Ok(all.iter().filter_map(|message| address(message, device)).collect())
    }

    /// Gives a device an address.
    pub fn add_address(&self, device: u32, address: &Address) -> Result<(), Errno> {
        let mut body = vec![address.family, address.prefix, PERMANENT, EVERYWHERE];
        body.extend(device.to_ne_bytes());
        body.extend(&address.attributes);
        self.0.change(libc::RTM_NEWADDR, CREATE | EXCLUSIVE, &body)
    }
}

/// The index of a device of our own network namespace.
pub fn index(name: &str) -> Result<u32, Errno> {
    nix::net::if_::if_nametoindex(name)
}

/// The fixed part of a message about a device: which flags of it are to be, and which of them are meant.
pub fn link(device: u32, flags: u32, mask: u32) -> Vec<u8> {
    let mut body = vec![0; 4]; // family, padding, type
    for word in [device, flags, mask] {
        body.extend(word.to_ne_bytes());
    }
    body
}

/// The address in a message, if it is of that device and can be taken along.
fn address(message: &Message, device: u32) -> Option<Address> {
    let [family, prefix, flags, scope] = *message.body.first_chunk()?;
    if u32_at(&message.body, 4)? != device || flags & PERMANENT == 0 || scope != EVERYWHERE {
        return None;
    }
    let wanted = [libc::IFA_ADDRESS, libc::IFA_LOCAL, libc::IFA_BROADCAST];
    let attributes = message.attributes(8).filter(|(kind, _)| wanted.contains(kind));
    let attributes = attributes.flat_map(|(kind, value)| attribute(kind, value)).collect();
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
                [attribute(libc::IFA_LOCAL, &[10, 7, 0, 1]), attribute(libc::IFA_ADDRESS, &[10, 7, 0, 1])]
                    .concat();
            let ours = Address { family: libc::AF_INET as u8, prefix: 24, attributes };
            assert!(!route.addresses(lo).unwrap().contains(&ours));
            route.add_address(lo, &ours).unwrap();
            let all = route.addresses(lo).unwrap();
            // 127.0.0.1 and ::1 are this host's, and stay.
            assert_eq!(all.len(), 1);
            assert_eq!((all[0].family, all[0].prefix), (ours.family, 24));
            assert_eq!(route.add_address(lo, &ours), Err(Errno::EEXIST));
            assert_eq!(route.switch(lo + 1000, true), Err(Errno::ENODEV));
            assert_eq!((route.is_on(lo), route.is_on(lo + 1000)), (Ok(true), Err(Errno::ENODEV)));
            route.switch(lo, false).unwrap();
            assert_eq!(route.is_on(lo), Ok(false));
        });
    }
}
