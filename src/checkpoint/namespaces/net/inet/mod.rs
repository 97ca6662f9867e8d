//! Addresses, routes and rules, as messages of netlink(7).
//!
//! ```text
//!   addresses   before a device is up: IPv6 asks nobody whether they are free (NODAD, taken back afterwards)
//!   routes      those of the kernel's own that are missing or too many as well: a plugin may have exchanged them
//!   rules       likewise
//! ```

mod addresses;
mod routes;

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{NetDump, NetworkExtra};
use crate::checkpoint::model::NetNamespace;
use crate::checkpoint::namespaces::net::conntrack;
use crate::checkpoint::namespaces::net::link::FIXED;
use crate::sys::netlink::{Message, Netlink, attribute, text_of, u16_at, u32_at};
use crate::sys::route::link;

pub use addresses::{restore_addresses, settle_addresses};
pub use routes::restore_rest;

const V6: u8 = libc::AF_INET6 as u8;
const V4: u8 = libc::AF_INET as u8;
const ADDRESS: usize = 8;
const ROUTE: usize = 12;
const RULE: usize = 12;
const NEIGHBOUR: usize = 12;
const NEXTHOP: usize = 8;
const QDISC: usize = 20;
const TCA_KIND: u16 = 1;

/// RTPROT_KERNEL.
const BY_KERNEL: u8 = 2;
const LOCAL_TABLE: u32 = 255;
/// RTM_F_CLONED: learnt, not set.
const CLONED: u32 = 0x200;
const RTA_TABLE: u16 = libc::RTA_TABLE;
const FRA_PROTOCOL: u16 = 21;
/// The kernel's own rules of IPv6.
const NEW_RULES6: usize = 2;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_GETNEXTHOP: u16 = 106;
const NHA_GROUP: u16 = 2;
const PERMANENT: u16 = 0x80;
const NOARP: u16 = 0x40;
const NTF_MASTER: u8 = 0x04;
const NTF_PROXY: u8 = 0x08;
const AF_BRIDGE: u8 = 7;
const NDA_MASTER: u16 = 9;
/// Address, link-layer address, vlan, protocol, further flags.
const KEPT_OF_NEIGHBOUR: [u16; 5] = [1, 2, 5, 12, 15];

fn list(socket: &Netlink, what: &str, kind: u16, body: &[u8]) -> Result<Vec<Message>> {
    match socket.dump(kind, body) {
        // Without IPv6, or without nexthops of their own.
        Err(Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT | Errno::EPFNOSUPPORT) => Ok(Vec::new()),
        all => all.during(&format!("cannot list the {what}"), || format!("netlink({kind})")),
    }
}

fn routes(socket: &Netlink, family: u8) -> Result<Vec<Message>> {
    let mut body = vec![0; ROUTE];
    body[0] = family;
    let all = list(socket, "routes", libc::RTM_GETROUTE, &body)?;
    let set = |m: &Message| m.body.first() == Some(&family) && u32_at(&m.body, 8).unwrap_or(0) & CLONED == 0;
    Ok(all.into_iter().filter(set).collect())
}

fn rules(socket: &Netlink, family: u8) -> Result<Vec<Message>> {
    let mut body = vec![0; RULE];
    body[0] = family;
    list(socket, "rules", libc::RTM_GETRULE, &body)
}

/// Whether a route comes and goes with an address.
fn is_automatic(m: &Message) -> bool {
    let table = m.attribute(ROUTE, RTA_TABLE).and_then(|value| u32_at(value, 0));
    m.body.get(5) == Some(&BY_KERNEL) && table == Some(LOCAL_TABLE)
}

/// Refuses what devices hold packets up with, unless they came with it.
pub fn queueing(socket: &Netlink) -> Result<Vec<Error>> {
    let all = list(socket, "queueing disciplines", libc::RTM_GETQDISC, &[0; QDISC])?;
    // The kernel gives its own no handle.
    let set = all.iter().filter(|m| u32_at(&m.body, 8) != Some(0));
    let error = |m: &Message| {
        let kind = m.attribute(QDISC, TCA_KIND).map(text_of).unwrap_or_default();
        let device = socket.get(libc::RTM_GETLINK, &link(u32_at(&m.body, 4).unwrap_or(0), 0, 0));
        let name = device.ok().and_then(|d| d.attribute(FIXED, libc::IFLA_IFNAME).map(text_of));
        let name = name.unwrap_or_default();
        Error::new(format!(
            "the network device {name} has the queueing discipline {kind}, which --keep-network cannot keep yet"
        ))
        .remedy(format!("remove it: tc qdisc del dev {name} root (or ingress, clsact)"))
    };
    Ok(set.map(error).collect())
}

fn addresses(socket: &Netlink) -> Result<Vec<Message>> {
    list(socket, "addresses", libc::RTM_GETADDR, &[0; ADDRESS])
}

/// Saves all of the socket's namespace, for devices with these numbers.
pub fn save(socket: &Netlink, net: &mut NetNamespace, extra: &mut NetworkExtra) -> Result<()> {
    let devices: BTreeSet<u32> = net.devices.iter().map(|device| device.ifindex).collect();
    let ours = |m: &Message| u32_at(&m.body, 4).is_some_and(|index| devices.contains(&index));
    let mut keep = |dump: NetDump, all: Vec<Message>| {
        net.dumps.insert(dump, all.iter().flat_map(Message::bytes).collect());
    };
    keep(NetDump::Addresses, addresses(socket)?.into_iter().filter(ours).collect());
    let set = |all: Vec<Message>| all.into_iter().filter(|m| !is_automatic(m)).collect();
    keep(NetDump::Routes, set(routes(socket, V4)?));
    keep(NetDump::Routes6, set(routes(socket, V6)?));
    // CRIU has IPv4's only: those of IPv6 come twice there, so they are left out where they are the kernel's own.
    let mut six = rules(socket, V6)?;
    if six.len() == NEW_RULES6 && six.iter().all(|m| m.attribute(RULE, FRA_PROTOCOL) == Some(&[BY_KERNEL])) {
        six.clear();
    }
    keep(NetDump::Rules, [rules(socket, V4)?, six].concat());
    let mut nexthops = list(socket, "nexthops", RTM_GETNEXTHOP, &[0; NEXTHOP])?;
    // Groups are made of those before them.
    nexthops.sort_by_key(|m| m.attribute(NEXTHOP, NHA_GROUP).is_some());
    extra.nexthops = bytes(&nexthops);
    let mut neighbours = Vec::new();
    for (family, flags) in [(0, 0), (0, NTF_PROXY), (AF_BRIDGE, 0)] {
        let mut body = vec![0; NEIGHBOUR];
        (body[0], body[10]) = (family, flags);
        neighbours.extend(list(socket, "neighbours", libc::RTM_GETNEIGH, &body)?.into_iter().filter(ours));
    }
    extra.neighbours = bytes(&neighbours.iter().filter_map(set_by_hand).collect::<Vec<_>>());
    Ok(())
}

/// Messages one after the other; none where there are none.
pub fn bytes(all: &[Message]) -> Option<Vec<u8>> {
    let bytes: Vec<u8> = all.iter().flat_map(Message::bytes).collect();
    (!bytes.is_empty()).then_some(bytes)
}

/// A neighbour that was not learnt, as the kernel takes it.
fn set_by_hand(m: &Message) -> Option<Message> {
    let (state, flags) = (u16_at(&m.body, 8)?, *m.body.get(10)?);
    let bridge = *m.body.first()? == AF_BRIDGE;
    let wanted = match bridge {
        // Those with PERMANENT are the bridge's own.
        true => state & NOARP != 0 && m.attribute(NEIGHBOUR, NDA_MASTER).is_some(),
        false => state & PERMANENT != 0 || flags & NTF_PROXY != 0,
    };
    let mut body = m.body.get(..NEIGHBOUR)?.to_vec();
    if bridge {
        body[10] |= NTF_MASTER;
    }
    let kept = m.attributes(NEIGHBOUR).filter(|(kind, _)| KEPT_OF_NEIGHBOUR.contains(kind));
    body.extend(kept.flat_map(|(kind, value)| attribute(kind, value)));
    wanted.then_some(Message { kind: m.kind, flags: 0, body })
}

/// The messages of an image; none where there is no image.
fn messages(net: &NetNamespace, dump: NetDump) -> Result<Option<Vec<Message>>> {
    let Some(bytes) = net.dumps.get(&dump) else { return Ok(None) };
    let bad = || {
        let name = dump.image(0).replace("-0.", "-N.");
        Error::new(format!("{name} has messages that make no sense there"))
    };
    let all = Message::all(bytes).map_err(|_| bad())?;
    let kind = match dump {
        NetDump::Addresses => libc::RTM_NEWADDR,
        NetDump::Routes | NetDump::Routes6 => libc::RTM_NEWROUTE,
        NetDump::Rules => libc::RTM_NEWRULE,
        NetDump::Connections => return conntrack::read(bytes).map(Some),
    };
    let done = libc::NLMSG_DONE as u16;
    if all.iter().any(|m| m.kind != kind && m.kind != done || m.kind == kind && m.body.len() < ADDRESS) {
        return Err(bad());
    }
    Ok(Some(all.into_iter().filter(|m| m.kind == kind).collect()))
}

fn own(bytes: Option<&[u8]>, kind: u16, what: &str) -> Result<Vec<Message>> {
    let bad = || Error::new(format!("the {what} in the extension network of stasis.img make no sense"));
    let all = Message::all(bytes.unwrap_or_default()).map_err(|_| bad())?;
    if all.iter().any(|m| m.kind != kind || m.body.len() < NEXTHOP) { Err(bad()) } else { Ok(all) }
}

/// Whether what is there can be read at all.
pub fn validate(net: &NetNamespace, extra: &NetworkExtra) -> Result<()> {
    NetDump::ALL.into_iter().try_for_each(|dump| messages(net, dump).map(drop))?;
    own(extra.nexthops.as_deref(), RTM_NEWNEXTHOP, "nexthops")?;
    own(extra.neighbours.as_deref(), libc::RTM_NEWNEIGH, "neighbours").map(drop)
}

/// The same for a device that has another number here.
fn moved(value: &[u8], indexes: &BTreeMap<u32, u32>) -> Vec<u8> {
    let index = u32_at(value, 0).unwrap_or(0);
    indexes.get(&index).copied().unwrap_or(index).to_ne_bytes().to_vec()
}

fn move_fixed(m: &mut Message, indexes: &BTreeMap<u32, u32>) {
    if let Some(place) = m.body.get_mut(4..8) {
        let new = moved(place, indexes);
        place.copy_from_slice(&new);
    }
}
