//! Addresses, put back before a device is up.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{ADDRESS, V6, addresses, messages, move_fixed};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::NetDump;
use crate::checkpoint::namespaces::net::make::Space;
use crate::sys::netlink::{CREATE, Message, REPLACE, attribute, u32_at};

const IFA_PROTO: u16 = 11;
const KEPT_OF_ADDRESS: [u16; 9] = [
    libc::IFA_ADDRESS,
    libc::IFA_LOCAL,
    libc::IFA_LABEL,
    libc::IFA_BROADCAST,
    libc::IFA_ANYCAST,
    libc::IFA_CACHEINFO,
    libc::IFA_FLAGS,
    9, // IFA_RT_PRIORITY
    IFA_PROTO,
];
const NODAD: u32 = 0x02;
const TENTATIVE: u32 = 0x40;
/// What the kernel finds out by itself: secondary, optimistic, dadfailed, tentative.
const FOUND_OUT: u32 = 0x01 | 0x04 | 0x08 | TENTATIVE;

/// How long the kernel may take to find addresses in order, which nobody is asked about.
const PATIENCE: Duration = Duration::from_secs(5);

/// Gives the devices their addresses.
pub fn restore_addresses(space: &Space<'_>) -> Result<()> {
    for m in messages(space.net, NetDump::Addresses)?.unwrap_or_default() {
        add_address(space, &m, CREATE, FOUND_OUT, NODAD)?;
    }
    Ok(())
}

/// Waits until the addresses may be used, and takes back what was said for that.
pub fn settle_addresses(space: &Space<'_>) -> Result<()> {
    let all: Vec<_> = messages(space.net, NetDump::Addresses)?.unwrap_or_default();
    let v6: Vec<_> = all.iter().filter(|m| m.body.first() == Some(&V6)).collect();
    if v6.is_empty() {
        return Ok(());
    }
    let unsettled = |m: &Message| {
        let wanted = |other: &&&Message| {
            other.attribute(ADDRESS, libc::IFA_ADDRESS) == m.attribute(ADDRESS, libc::IFA_ADDRESS)
        };
        flags_of(m) & TENTATIVE != 0 && v6.iter().any(|other| wanted(&other))
    };
    let until = Instant::now() + PATIENCE;
    while addresses(&space.socket)?.iter().any(unsettled) {
        if Instant::now() > until {
            return Err(Error::new("the kernel does not get done with an address of IPv6"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    for m in v6.into_iter().filter(|m| flags_of(m) & NODAD == 0) {
        add_address(space, m, REPLACE, FOUND_OUT, 0)?;
    }
    Ok(())
}

fn flags_of(m: &Message) -> u32 {
    let long = m.attribute(ADDRESS, libc::IFA_FLAGS).and_then(|value| u32_at(value, 0));
    long.unwrap_or_else(|| m.body.get(2).copied().unwrap_or(0).into())
}

fn add_address(space: &Space<'_>, m: &Message, how: u16, without: u32, with: u32) -> Result<()> {
    let v6 = m.body.first() == Some(&V6);
    let flags = flags_of(m) & !without | if v6 { with } else { 0 };
    let mut new = Message { body: m.body.get(..ADDRESS).unwrap_or_default().to_vec(), ..m.clone() };
    move_fixed(&mut new, &space.indexes);
    new.body[2] = (flags & 0xff) as u8;
    for (kind, value) in m.attributes(ADDRESS).filter(|(kind, _)| KEPT_OF_ADDRESS.contains(kind)) {
        let value = if kind == libc::IFA_FLAGS { &flags.to_ne_bytes() } else { value };
        new.body.extend(attribute(kind, value));
    }
    match space.socket.change(libc::RTM_NEWADDR, how, &new.body) {
        Err(Errno::EEXIST) => Ok(()),
        done => {
            done.during("cannot give a network device its address", || format!("RTM_NEWADDR({})", named(m)))
        }
    }
}

/// An address, for messages.
fn named(m: &Message) -> String {
    let value = m.attribute(ADDRESS, libc::IFA_LOCAL).or_else(|| m.attribute(ADDRESS, libc::IFA_ADDRESS));
    let value = value.unwrap_or_default();
    let v4 = <[u8; 4]>::try_from(value).map(|a| std::net::Ipv4Addr::from(a).to_string());
    let v6 = || <[u8; 16]>::try_from(value).map(|a| std::net::Ipv6Addr::from(a).to_string());
    v4.or_else(|_| v6()).unwrap_or_default()
}
