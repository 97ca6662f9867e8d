//! Packet sockets, which see the frames of network devices.
//!
//! ```text
//!   getsockname(2)   protocol, device              sock_diag(7)   options, memberships, rings, fanout group
//!   restore: made deaf (protocol 0), filter and options set, only then bound and told its protocol
//! ```
//!
//! Frames that wait are lost, as they may be on the wire. Rings are refused: the kernel does not tell where in them it
//! is, and programs remember where they are. CRIU's record knows devices by index; their names, and options that it has
//! no place for, are in the extension `packet`.
//!
//! ```text
//!   sockaddr_ll          family(2) protocol(2, big-endian) index(4) hardware type(2) packet type(1) length(1) address(8)
//!   packet_diag_msg      family(1) type(1) protocol(2) inode(4) cookie(8) | attributes
//!     0 info             index, version, reserve, copy_thresh, timestamp, flags (4 each)
//!     1 memberships      index(4) count(4) type(2) length(2) address(32), each
//! ```

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{diag, external, inet, inside, sockopts};
use crate::checkpoint::image::{FdTypes, FileEntry, PacketMclist, PacketSockEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{self, get_int, set_bytes, set_int};

/// Name of the extension in stasis.img.
pub const EXTENSION: &str = "packet";

/// Since Linux 2.2 there are better ones.
const SOCK_PACKET: i32 = 10;
const SOL_PACKET: i32 = 263;
const ADD_MEMBERSHIP: i32 = 1;
const COPY_THRESH: i32 = 7;
const AUXDATA: i32 = 8;
const ORIGDEV: i32 = 9;
const VERSION: i32 = 10;
const RESERVE: i32 = 12;
const LOSS: i32 = 14;
const VNET_HDR: i32 = 15;
const TIMESTAMP: i32 = 17;
const FANOUT: i32 = 18;
/// TX_HAS_OFF, QDISC_BYPASS, IGNORE_OUTGOING, VNET_HDR_SZ: what CRIU's record has no place for.
const MORE: [i32; 4] = [19, 20, 23, 24];
/// A group whose members are chosen by a program, which cannot be read.
const FANOUT_BY_PROGRAM: [i32; 2] = [6, 7];
/// How long an address of a membership may be.
const ADDRESS_MAX: usize = 32;
/// What sock_diag is to show: info, memberships, rings, fanout.
const SHOW: u32 = 0xf;

/// What is known of a socket beside its record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct More {
    id: u32,
    /// The device that it is bound to.
    device: Option<String>,
    /// Devices of the memberships.
    devices: Vec<String>,
    options: Vec<(i32, i32)>,
    /// SO_LOCK_FILTER.
    locked: bool,
}

/// A packet socket.
pub fn is(live: &Live) -> bool {
    inet::family(live) == Some(libc::AF_PACKET)
}

/// What sock_diag tells.
#[derive(Debug, Default)]
struct Told {
    info: [u32; 6],
    memberships: Vec<PacketMclist>,
    rings: bool,
    fanout: bool,
}

/// Asks about one, in this thread's network namespace.
fn ask(inode: u32) -> Result<Told> {
    let mut request = vec![libc::AF_PACKET as u8, 0, 0, 0];
    for word in [inode, SHOW, 0, 0] {
        request.extend_from_slice(&word.to_ne_bytes());
    }
    let mut told = None;
    diag::list_here(&request, |message| {
        let (fixed, rest) = message.split_at_checked(16).ok_or_else(diag::garbled)?;
        if diag::word(fixed, 4) == inode {
            let mut found = Told::default();
            diag::attributes(rest, |number, value| match number {
                0 => found.info = std::array::from_fn(|n| diag::word(value, n * 4)),
                1 => found.memberships = value.chunks_exact(44).flat_map(membership).collect(),
                2 | 3 => found.rings = true,
                4 => found.fanout = true,
                _ => {}
            })?;
            told = Some(found);
        }
        Ok(())
    })
    .map_err(|e| e.remedy("the kernel must be built with CONFIG_PACKET_DIAG"))?;
    told.ok_or_else(|| Error::new("the kernel does not list a packet socket"))
}

/// A membership as many times as it was taken.
fn membership(bytes: &[u8]) -> Vec<PacketMclist> {
    let half = |at: usize| usize::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]));
    let entry = PacketMclist {
        index: diag::word(bytes, 0),
        r#type: half(8) as u32,
        addr: bytes[12..12 + half(10).min(ADDRESS_MAX)].to_vec(),
    };
    vec![entry; (diag::word(bytes, 4) as usize).min(64)]
}

/// Refuses what cannot be made again.
pub fn check(live: &Live, init: i32) -> Result<()> {
    let file = &live.file;
    let refuse = |what: &str| {
        Err(live
            .name(Error::new(format!("a packet socket {what}, which cannot be checkpointed")))
            .remedy("let the program close it, or stop it"))
    };
    if get_int(file, libc::SOL_SOCKET, libc::SO_TYPE) == Ok(SOCK_PACKET) {
        return refuse("is of the old type SOCK_PACKET");
    }
    let inode = live.stat.st_ino as u32;
    let told = inside::beside(file, init, || ask(inode)).map_err(|e| live.name(e))?;
    if told.rings {
        return refuse("has a ring of packets");
    }
    let group = get_int(file, SOL_PACKET, FANOUT).unwrap_or(0);
    if told.fanout && FANOUT_BY_PROGRAM.contains(&(group >> 16 & 0xff)) {
        return refuse("is in a fanout group that a program divides");
    }
    sockopts::filter(file).map(drop).map_err(|e| live.name(e))
}

/// Records a socket.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let (ns_id, _) = dump.spaces.of_socket(dump.source.init, &live.file)?;
    let inode = live.stat.st_ino as u32;
    let (told, more) = inside::beside(&live.file, dump.source.init, || {
        let told = ask(inode)?;
        let more = more(&live.file, &told, id)?;
        Ok((told, more))
    })?;
    let entry = PacketSockEntry {
        id,
        flags: live.info.flags,
        fown: live.fown(&dump.files.pids)?,
        ns_id,
        ..entry(&live.file, told)?
    };
    dump.files.packets.extend((more != More { id, ..More::default() }).then_some(more));
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Packetsk as i32,
        id,
        psk: Some(entry),
        ..FileEntry::default()
    });
    Ok(())
}

fn entry(fd: &OwnedFd, told: Told) -> Result<PacketSockEntry> {
    let what = "cannot look at a packet socket";
    let kind = get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE)
        .during(what, || "getsockopt(_, SOL_SOCKET, SO_TYPE, _, _)".into())?;
    let name = sockopt::name(fd).during(what, || "getsockname(_, _, _)".into())?;
    let [index, version, reserve, copy_thresh, timestamp, flags] = told.info;
    let fanout = get_int(fd, SOL_PACKET, FANOUT).ok().map(i32::cast_unsigned);
    Ok(PacketSockEntry {
        r#type: kind.cast_unsigned(),
        // As the kernel has it, big-endian.
        protocol: name.get(2..4).map_or(0, |p| u32::from(u16::from_ne_bytes([p[0], p[1]]))),
        ifindex: index,
        opts: sockopts::dump(fd, libc::AF_PACKET)?,
        version,
        reserve,
        aux_data: flags & 2 != 0,
        orig_dev: flags & 4 != 0,
        vnet_hdr: flags & 8 != 0,
        loss: flags & 16 != 0,
        timestamp,
        copy_thresh,
        mclist: told.memberships,
        fanout: fanout.filter(|_| told.fanout),
        ..PacketSockEntry::default()
    })
}

fn more(fd: &OwnedFd, told: &Told, id: u32) -> Result<More> {
    let name = |index: u32| {
        nix::net::if_::if_indextoname(index)
            .during("cannot name a network device", || format!("if_indextoname({index})"))
            .map(|name| name.to_string_lossy().into_owned())
            .map_err(|e| {
                e.remedy("a packet socket is bound to a device that is gone; let the program close it")
            })
    };
    let set = |option: &i32| get_int(fd, SOL_PACKET, *option).ok().map(|v| (*option, v)).filter(|o| o.1 != 0);
    Ok(More {
        id,
        device: if told.info[0] == 0 { None } else { Some(name(told.info[0])?) },
        devices: told.memberships.iter().map(|m| name(m.index)).collect::<Result<_>>()?,
        options: MORE.iter().filter_map(set).collect(),
        locked: sockopts::is_locked(fd),
    })
}

/// Makes all sockets in the container's network namespaces.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let entries: Vec<&PacketSockEntry> =
        opener.of(FdTypes::Packetsk).filter_map(|e| e.psk.as_ref()).collect();
    if entries.is_empty() {
        return Ok(());
    }
    let all: Vec<More> = opener.restore.model.extension(EXTENSION)?;
    let of = |id: u32| all.iter().find(|more| more.id == id).cloned().unwrap_or_default();
    for (network, some) in opener.by_network(entries, |e| e.ns_id)? {
        let made = inside::inside(opener.restore.target, network, || {
            some.iter().map(|e| make(e, &of(e.id))).collect::<Result<Vec<_>>>()
        })?;
        for (entry, file) in some.iter().zip(made) {
            opener.put_owned(entry.id, file, &entry.fown, entry.flags);
        }
    }
    Ok(())
}

/// The index of a device: by its name where that is known.
fn index(name: Option<&String>, index: u32) -> Result<u32> {
    let Some(name) = name else { return Ok(index) };
    nix::net::if_::if_nametoindex(name.as_str())
        .during("cannot put a packet socket in its place", || format!("if_nametoindex({name:?})"))
        .map_err(|e| e.remedy("the network namespace lacks a device that the socket is bound to"))
}

fn make(e: &PacketSockEntry, more: &More) -> Result<OwnedFd> {
    let what = "cannot make a packet socket";
    if e.rx_ring.is_some() || e.tx_ring.is_some() {
        return Err(Error::new("the images hold a packet socket with a ring, which is not supported"));
    }
    let kind = e.r#type.cast_signed();
    if !matches!(kind, libc::SOCK_RAW | libc::SOCK_DGRAM) {
        return Err(Error::new(format!("the images hold a packet socket of type {kind}")));
    }
    let fd = crate::sys::socket::socket(libc::AF_PACKET, kind, 0)
        .during(what, || format!("socket(AF_PACKET, {kind}, 0)"))?;
    let set = |name: i32, value: i32| {
        set_int(&fd, SOL_PACKET, name, value)
            .during(what, || format!("setsockopt(_, SOL_PACKET, {name}, {value})"))
    };
    let flag = |v: bool| u32::from(v);
    let options = [
        (VERSION, e.version),
        (RESERVE, e.reserve),
        (COPY_THRESH, e.copy_thresh),
        (TIMESTAMP, e.timestamp),
        (AUXDATA, flag(e.aux_data)),
        (ORIGDEV, flag(e.orig_dev)),
        (VNET_HDR, flag(e.vnet_hdr)),
        (LOSS, flag(e.loss)),
    ];
    for (name, value) in options.into_iter().filter(|option| option.1 != 0) {
        set(name, value.cast_signed())?;
    }
    for (name, value) in &more.options {
        if !MORE.contains(name) {
            return Err(Error::new(format!("the images set option {name} of a packet socket")));
        }
        set(*name, *value)?;
    }
    sockopts::restore(&fd, &e.opts, libc::AF_PACKET)?;
    if more.locked {
        sockopts::lock(&fd)?;
    }
    for (n, member) in e.mclist.iter().enumerate() {
        let index = index(more.devices.get(n), member.index)?;
        set_bytes(&fd, SOL_PACKET, ADD_MEMBERSHIP, &request(index, member)?)
            .during(what, || format!("setsockopt(_, SOL_PACKET, PACKET_ADD_MEMBERSHIP, {index})"))?;
    }
    if e.protocol != 0 || e.ifindex != 0 {
        let index = index(more.device.as_ref(), e.ifindex)?;
        sockopt::bind(&fd, &address(e.protocol as u16, index))
            .during(what, || format!("bind(_, {{AF_PACKET, {:#06x}, {index}}})", e.protocol))?;
    }
    if let Some(group) = e.fanout.filter(|group| *group != u32::MAX) {
        set(FANOUT, group.cast_signed())?;
    }
    external::set_flags(&fd, e.flags)?;
    Ok(fd)
}

fn address(protocol: u16, index: u32) -> Vec<u8> {
    let family = (libc::AF_PACKET as u16).to_ne_bytes();
    let head = family.into_iter().chain(protocol.to_ne_bytes()).chain(index.to_ne_bytes());
    head.chain([0; 12]).collect()
}

/// `struct packet_mreq` with room for the longest address.
fn request(index: u32, member: &PacketMclist) -> Result<Vec<u8>> {
    let (kind, length) = (u16::try_from(member.r#type), u16::try_from(member.addr.len()));
    let (Ok(kind), Ok(length), true) = (kind, length, member.addr.len() <= ADDRESS_MAX) else {
        return Err(Error::new("the images have a membership of a packet socket that cannot be"));
    };
    let mut bytes = index.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(&member.addr);
    bytes.resize(8 + ADDRESS_MAX, 0);
    Ok(bytes)
}
