//! Multicast groups that a socket has joined.
//!
//! The kernel lists the groups of a network namespace, not those of a socket; but a socket can be asked about a group.
//!
//! ```text
//!   /proc/PID/net/igmp, igmp6 ──> (device, group) ──getsockopt(MCAST_MSFILTER)──> joined, or EADDRNOTAVAIL
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::checkpoint::error::Context;
use crate::checkpoint::files::address;
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{query, set_bytes};

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
/// Size of `struct sockaddr_storage`, which lies behind a number and its padding.
const STORAGE: usize = 128;
const BEFORE: usize = 8;

/// A group joined on a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Name of the device.
    pub device: String,
    /// Address of the group.
    pub group: IpAddr,
}

/// A group of the namespace: its device's index as well.
pub type Group = (u32, Membership);

/// All groups that somebody in the network namespace of process `pid` has joined.
pub fn groups(pid: i32) -> Vec<Group> {
    // A kernel without IPv6, or without multicast, has no such file.
    let read = |name| std::fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
    let mut found = v4(&read("igmp"));
    found.extend(read("igmp6").lines().filter_map(v6));
    found
}

/// ```text
/// 1       lo        :     1      V3
///                                 010000E0     1 0:00000000               0
/// ```
fn v4(text: &str) -> Vec<Group> {
    let (mut found, mut device) = (Vec::new(), None);
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if !line.starts_with(char::is_whitespace) {
            let name = words.next().map(|name| name.trim_end_matches(':').to_owned());
            device = first.parse::<u32>().ok().zip(name);
        } else if let (Some((index, name)), Ok(group)) = (&device, u32::from_str_radix(first, 16)) {
            // The four bytes of the address, printed as a number of this machine.
            let group = IpAddr::V4(Ipv4Addr::from(group.to_ne_bytes()));
            found.push((*index, Membership { device: name.clone(), group }));
        }
    }
    found
}

/// `1    lo              ff020000000000000000000000000001     1 0000000C 0`
fn v6(line: &str) -> Option<Group> {
    let mut words = line.split_whitespace();
    let (index, device, group) = (words.next()?.parse().ok()?, words.next()?, words.next()?);
    let group = IpAddr::V6(Ipv6Addr::from(u128::from_str_radix(group, 16).ok()?));
    Some((index, Membership { device: device.to_owned(), group }))
}

/// An index, and an address as `struct sockaddr_storage`.
fn request(index: u32, group: IpAddr) -> Vec<u8> {
    let mut bytes = vec![0; BEFORE + STORAGE];
    bytes[..4].copy_from_slice(&index.to_ne_bytes());
    let address = address::bytes(&SocketAddr::new(group, 0));
    bytes[BEFORE..BEFORE + address.len()].copy_from_slice(&address);
    bytes
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::SOL_IP } else { libc::SOL_IPV6 }
}

/// Which of these groups a socket has joined.
pub fn of(fd: &OwnedFd, v6: bool, groups: &[Group]) -> Result<Vec<Membership>> {
    let mut joined = Vec::new();
    for (index, membership) in groups.iter().filter(|(_, m)| v6 || m.group.is_ipv4()) {
        let group = membership.group;
        // Behind the address: whether sources are left out (0) or let in, and how many are named.
        let mut filter = request(*index, group);
        filter.extend([0; 8]);
        match query(fd, level(group), MCAST_MSFILTER, &mut filter) {
            Ok(_) => {}
            Err(Errno::EADDRNOTAVAIL | Errno::ENOPROTOOPT | Errno::EINVAL) => continue,
            Err(errno) => {
                return Err(Error::new("cannot look at a socket's multicast groups")
                    .call(format!("getsockopt(_, _, MCAST_MSFILTER, {group})"), errno));
            }
        }
        if filter[BEFORE + STORAGE..].iter().any(|b| *b != 0) {
            return Err(Error::new(format!(
                "a socket hears the multicast group {group} from some sources only"
            ))
            .remedy("such a membership cannot be checkpointed; let the program leave the group"));
        }
        joined.push(membership.clone());
    }
    Ok(joined)
}

/// Joins groups again, in this thread's network namespace.
pub fn join(fd: &OwnedFd, memberships: &[Membership]) -> Result<()> {
    let what = "cannot join a multicast group";
    for Membership { device, group } in memberships {
        let index = nix::net::if_::if_nametoindex(device.as_str())
            .during(what, || format!("if_nametoindex({device:?})"))
            .map_err(|e| e.remedy("the network namespace lacks a device that it was joined on"))?;
        set_bytes(fd, level(*group), MCAST_JOIN_GROUP, &request(index, *group))
            .during(what, || format!("setsockopt(_, _, MCAST_JOIN_GROUP, {{{device}, {group}}})"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket::socket;

    #[test]
    fn tables_are_read() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
            2\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
        let found = v4(text);
        assert_eq!(found.len(), 2);
        assert_eq!((found[1].0, found[1].1.device.as_str()), (2, "eth0"));
        assert_eq!(found[1].1.group.to_string(), "224.0.0.251");
        let found = v6("3    eth1            ff0200000000000000000000000000fb     1 00000004 0").unwrap();
        assert_eq!((found.0, found.1.group.to_string()), (3, "ff02::fb".into()));
        assert!(v6("").is_none());
    }

    #[test]
    fn memberships_are_found_and_joined_again() {
        for (family, group) in [(libc::AF_INET, "239.1.2.3"), (libc::AF_INET6, "ff02::1234")] {
            let new = || socket(family, libc::SOCK_DGRAM, 0);
            let (Ok(fd), Ok(other)) = (new(), new()) else { continue };
            let wanted = [Membership { device: "lo".into(), group: group.parse().unwrap() }];
            if join(&fd, &wanted).is_err() {
                // A device that is down, or without IPv6.
                continue;
            }
            let groups = groups(std::process::id().cast_signed());
            let v6 = family == libc::AF_INET6;
            assert_eq!(of(&fd, v6, &groups).unwrap(), wanted);
            assert_eq!(of(&other, v6, &groups).unwrap(), []);
            join(&other, &wanted).unwrap();
            assert_eq!(of(&other, v6, &groups).unwrap(), wanted);
        }
    }

    #[test]
    fn chosen_sources_are_refused() {
        let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap();
        // struct ip_mreq_source: group, address of the device, source.
        let request = [239, 1, 2, 4, 127, 0, 0, 1, 127, 0, 0, 1];
        if set_bytes(&fd, libc::SOL_IP, libc::IP_ADD_SOURCE_MEMBERSHIP, &request).is_ok() {
            let e = of(&fd, false, &groups(std::process::id().cast_signed())).unwrap_err().to_string();
            assert!(e.contains("239.1.2.4 from some sources"), "{e}");
        }
    }
}
