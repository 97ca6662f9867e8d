//! Netlink sockets on which nothing is going on.
//!
//! ```text
//!   sockaddr_nl   family(2) pad(2) port(4) groups(4)
//! ```

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{external, inet, inside, sockopts};
use crate::checkpoint::image::{FdTypes, FileEntry, NetlinkSkEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{self, get_bytes, get_int};

/// NETLINK_CONNECTED.
const CONNECTED: u32 = 1;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
/// Name of the extension in stasis.img: what CRIU's records have no place for.
pub const EXTENSION: &str = "netlink";
/// Level and number of options that are a flag, in the order in which they are set: PKTINFO, BROADCAST_ERROR, NO_ENOBUFS,
/// LISTEN_ALL_NSID, CAP_ACK, EXT_ACK, GET_STRICT_CHK; SO_LOCK_FILTER, when the filter is in its place.
const FLAGS: [(i32, i32); 8] = [
    (libc::SOL_NETLINK, 3),
    (libc::SOL_NETLINK, 4),
    (libc::SOL_NETLINK, 5),
    (libc::SOL_NETLINK, 8),
    (libc::SOL_NETLINK, 10),
    (libc::SOL_NETLINK, 11),
    (libc::SOL_NETLINK, 12),
    (libc::SOL_SOCKET, libc::SO_LOCK_FILTER),
];

/// Flags that are set on a socket: its id, and level and number of each.
pub type Flags = (u32, Vec<(i32, i32)>);

/// Room for all groups of a family: generic netlink has the most, one for each kind of message of each subsystem.
const GROUPS: usize = 512;

/// A netlink socket.
pub fn is(live: &Live) -> bool {
    inet::family(live) == Some(libc::AF_NETLINK)
}

/// Refuses answers that have not been read.
pub fn check(live: &Live) -> Result<()> {
    let refuse = |what: &str, remedy: &str| Err(live.name(Error::new(what)).remedy(remedy).passing());
    match recv(live.file.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Err(Errno::EAGAIN) => {}
        Ok(_) => {
            return refuse("a netlink socket has messages that were not read", "try again when they are");
        }
        Err(_) => return refuse("a netlink socket has an error that was not read", "try again when it is"),
    }
    Ok(())
}

/// The groups it is a member of, one bit each, 32 to a word. CRIU restores those of the first word.
fn memberships(fd: &OwnedFd) -> Vec<u32> {
    // Linux before 6.5 fills in all groups and tells a length that is too short.
    let Ok((groups, _)) = get_bytes::<GROUPS>(fd, libc::SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS) else {
        return Vec::new();
    };
    let words = groups.as_chunks::<4>().0.iter();
    let mut words: Vec<u32> = words.map(|word| u32::from_ne_bytes(*word)).collect();
    while words.last() == Some(&0) {
        words.pop();
    }
    words
}

/// Port and groups of a sockaddr_nl.
fn ends(bytes: &[u8]) -> (u32, u32) {
    let word = |at: usize| bytes.iter().skip(at).take(4).rev().fold(0u32, |n, b| n << 8 | u32::from(*b));
    (word(4), word(8))
}

fn address(port: u32, groups: u32) -> Vec<u8> {
    let family = (libc::AF_NETLINK as u16).to_ne_bytes();
    family.into_iter().chain([0, 0]).chain(port.to_ne_bytes()).chain(groups.to_ne_bytes()).collect()
}

/// Records a socket.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let entry = NetlinkSkEntry {
        id,
        ino: live.stat.st_ino as u32,
        flags: live.info.flags,
        fown: live.fown(&dump.files.pids)?,
        ns_id: dump.spaces.of_socket(dump.source.init, &live.file)?.0,
        ..entry(&live.file)?
    };
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Netlinksk as i32,
        id,
        nlsk: Some(entry),
        ..FileEntry::default()
    });
    let flags = flags(&live.file);
    dump.files.netlink.extend((!flags.is_empty()).then_some((id, flags)));
    Ok(())
}

fn flags(fd: &OwnedFd) -> Vec<(i32, i32)> {
    // Older kernels do not know all of them, and nobody can have set those.
    FLAGS
        .into_iter()
        .filter(|&(level, name)| get_int(fd, level, name).is_ok_and(|value| value != 0))
        .collect()
}

fn entry(fd: &OwnedFd) -> Result<NetlinkSkEntry> {
    let what = "cannot look at a netlink socket";
    let protocol = get_int(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)
        .during(what, || "getsockopt(_, SOL_SOCKET, SO_PROTOCOL, _, _)".into())?;
    let (portid, _) = ends(&sockopt::name(fd).during(what, || "getsockname(_, _, _)".into())?);
    let (dst_portid, dst_group) = ends(&sockopt::peer(fd).during(what, || "getpeername(_, _, _)".into())?);
    Ok(NetlinkSkEntry {
        protocol: protocol.cast_unsigned(),
        state: if dst_portid != 0 || dst_group != 0 { CONNECTED } else { 0 },
        portid,
        groups: memberships(fd),
        dst_portid,
        dst_group,
        opts: sockopts::dump(fd, libc::AF_NETLINK)?,
        ..NetlinkSkEntry::default()
    })
}

/// Makes all sockets in the container's network namespace.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let entries: Vec<&NetlinkSkEntry> =
        opener.of(FdTypes::Netlinksk).filter_map(|e| e.nlsk.as_ref()).collect();
    if entries.is_empty() {
        return Ok(());
    }
    let all: Vec<Flags> = opener.restore.model.extension(EXTENSION)?;
    let all: BTreeMap<u32, Vec<(i32, i32)>> = all.into_iter().collect();
    let flags = |id: u32| all.get(&id).map_or(&[][..], Vec::as_slice);
    for (network, some) in opener.by_network(entries, |e| e.ns_id)? {
        let made = inside::inside(opener.restore.target, network, || {
            some.iter().map(|e| make(e, flags(e.id))).collect::<Result<Vec<_>>>()
        })?;
        for (entry, file) in some.iter().zip(made) {
            opener.put_owned(entry.id, file, &entry.fown, entry.flags);
        }
    }
    Ok(())
}

fn make(e: &NetlinkSkEntry, flags: &[(i32, i32)]) -> Result<OwnedFd> {
    let what = "cannot make a netlink socket";
    let fd = crate::sys::socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, e.protocol.cast_signed())
        .during(what, || format!("socket(AF_NETLINK, SOCK_RAW, {})", e.protocol))?;
    if e.portid != 0 {
        sockopt::bind(&fd, &address(e.portid, 0))
            .during(what, || format!("bind(_, {{{}, 0}})", e.portid))
            .map_err(|e| e.remedy("another netlink socket of this network namespace may have this port"))?;
    }
    for (index, word) in (0i32..).zip(&e.groups) {
        for bit in (0..32).filter(|bit| word & 1 << bit != 0) {
            let group = index.saturating_mul(32).saturating_add(bit + 1);
            sockopt::set_int(&fd, libc::SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
                .during(what, || format!("setsockopt(_, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, {group})"))?;
        }
    }
    if e.state == CONNECTED {
        sockopt::connect(&fd, &address(e.dst_portid, e.dst_group))
            .during(what, || format!("connect(_, {{{}, {:#x}}})", e.dst_portid, e.dst_group))?;
    }
    sockopts::restore(&fd, &e.opts, libc::AF_NETLINK)?;
    for (level, name) in FLAGS.into_iter().filter(|flag| flags.contains(flag)) {
        sockopt::set_int(&fd, level, name, 1)
            .during(what, || format!("setsockopt(_, {level}, {name}, 1)"))?;
    }
    external::set_flags(&fd, e.flags)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route() -> OwnedFd {
        crate::sys::socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).unwrap()
    }

    #[test]
    fn port_and_groups_come_back() {
        let fd = route();
        sockopt::bind(&fd, &address(4_000_001, 1)).unwrap();
        let live = Live::own(fd, 2).unwrap();
        assert!(is(&live));
        check(&live).unwrap();
        let was = entry(&live.file).unwrap();
        assert_eq!((was.portid, was.groups.as_slice()), (4_000_001, [1].as_slice()));
        drop(live);
        assert_eq!(entry(&make(&was, &[]).unwrap()).unwrap(), was);
    }

    #[test]
    fn flags_come_back() {
        let fd = route();
        let set = [FLAGS[1], FLAGS[5], FLAGS[7]];
        for (level, name) in set {
            sockopt::set_int(&fd, level, name, 1).unwrap();
        }
        assert_eq!(flags(&fd), set);
        assert_eq!(flags(&make(&entry(&fd).unwrap(), &flags(&fd)).unwrap()), set);
    }

    #[test]
    fn an_unread_answer_is_refused() {
        let fd = route();
        // RTM_GETLINK for device 1: length, type, flags (REQUEST), sequence, port; family, ..., index, flags, change
        let mut request = Vec::new();
        request.extend(32u32.to_ne_bytes());
        request.extend(18u16.to_ne_bytes());
        request.extend(1u16.to_ne_bytes());
        request.extend([0; 12]);
        request.extend(1u32.to_ne_bytes());
        request.extend([0; 8]);
        nix::sys::socket::send(fd.as_raw_fd(), &request, MsgFlags::empty()).unwrap();
        let live = Live::own(fd, 2).unwrap();
        assert!(check(&live).unwrap_err().to_string().contains("not read"));
    }
}
