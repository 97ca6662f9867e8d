//! Addresses, routes and rules, as messages of netlink(7).
//!
//! ```text
//!   addresses   before a device is up: IPv6 asks nobody whether they are free (NODAD, taken back afterwards)
//!   routes      those of the kernel's own that are missing or too many as well: a plugin may have exchanged them
//!   rules       likewise
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{NetDump, NetworkExtra};
use crate::checkpoint::model::NetNamespace;
use crate::checkpoint::namespaces::net::conntrack;
use crate::checkpoint::namespaces::net::link::FIXED;
use crate::checkpoint::namespaces::net::make::Space;
use crate::sys::netlink::{
    APPEND, CREATE, Message, Netlink, REPLACE, attribute, attributes, nested, text_of, u16_at, u32_at,
};
use crate::sys::route::link;

const V6: u8 = libc::AF_INET6 as u8;
const V4: u8 = libc::AF_INET as u8;
const ADDRESS: usize = 8;
const ROUTE: usize = 12;
const RULE: usize = 12;
const NEIGHBOUR: usize = 12;
const NEXTHOP: usize = 8;
const QDISC: usize = 20;
const TCA_KIND: u16 = 1;

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

/// RTPROT_KERNEL.
const BY_KERNEL: u8 = 2;
const LOCAL_TABLE: u32 = 255;
/// RTNH_F_ONLINK, the one flag of a route that is set by hand.
const ONLINK: u32 = 4;
/// RTM_F_CLONED: learnt, not set.
const CLONED: u32 = 0x200;
const RTA_IIF: u16 = libc::RTA_IIF;
const RTA_OIF: u16 = libc::RTA_OIF;
const RTA_GATEWAY: u16 = libc::RTA_GATEWAY;
const RTA_MULTIPATH: u16 = libc::RTA_MULTIPATH;
const RTA_CACHEINFO: u16 = libc::RTA_CACHEINFO;
const RTA_TABLE: u16 = libc::RTA_TABLE;
const RTA_VIA: u16 = 18;
const RTA_ENCAP_TYPE: u16 = 21;
const RTA_ENCAP: u16 = 22;
const RTA_EXPIRES: u16 = 23;
const RTA_PAD: u16 = 24;
const RTA_NH_ID: u16 = 30;
/// FIB_RULE_INVERT, likewise.
const INVERT: u32 = 2;
const FRA_PAD: u16 = 18;
const FRA_PROTOCOL: u16 = 21;
/// The kernel's own rules of IPv6.
const NEW_RULES6: usize = 2;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_GETNEXTHOP: u16 = 106;
const NHA_GROUP: u16 = 2;
const NHA_OIF: u16 = 5;
const NHA_ENCAP: u16 = 8;
const NHA_RES_GROUP: u16 = 12;
const PERMANENT: u16 = 0x80;
const NOARP: u16 = 0x40;
const NTF_MASTER: u8 = 0x04;
const NTF_PROXY: u8 = 0x08;
const AF_BRIDGE: u8 = 7;
const NDA_MASTER: u16 = 9;
/// Address, link-layer address, vlan, protocol, further flags.
const KEPT_OF_NEIGHBOUR: [u16; 5] = [1, 2, 5, 12, 15];

/// How long the kernel may take to find addresses in order, which nobody is asked about.
const PATIENCE: Duration = Duration::from_secs(5);

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

/// Makes nexthops, routes, rules and neighbours what they were.
pub fn restore_rest(space: &Space<'_>) -> Result<()> {
    let (socket, indexes, extra) = (&space.socket, &space.indexes, &space.extra);
    for m in own(extra.nexthops.as_deref(), RTM_NEWNEXTHOP, "nexthops")? {
        let mut body = m.body.get(..NEXTHOP).unwrap_or_default().to_vec();
        // What flags tell, and the scope, are found out.
        body.get_mut(1..2).unwrap_or_default().fill(0);
        body.get_mut(4..8)
            .unwrap_or_default()
            .copy_from_slice(&(u32_at(&m.body, 4).unwrap_or(0) & ONLINK).to_ne_bytes());
        for (kind, value) in m.attributes(NEXTHOP) {
            let value = if kind == NHA_OIF { moved(value, indexes) } else { value.to_vec() };
            let full = [NHA_ENCAP, NHA_RES_GROUP].contains(&kind);
            body.extend(if full { nested(kind, &value) } else { attribute(kind, &value) });
        }
        let done = socket.change(RTM_NEWNEXTHOP, CREATE | REPLACE, &body);
        done.during("cannot make a nexthop", || "RTM_NEWNEXTHOP".into())?;
    }
    for (dump, family) in [(NetDump::Routes, V4), (NetDump::Routes6, V6)] {
        let Some(wanted) = messages(space.net, dump)? else { continue };
        let wanted: Vec<_> = wanted.iter().map(|m| route(m, indexes)).collect();
        let there: Vec<_> = routes(socket, family)?.iter().map(|m| route(m, &BTreeMap::new())).collect();
        let how = if family == V4 { CREATE | APPEND } else { CREATE };
        let change = Change {
            socket,
            what: "route",
            new: libc::RTM_NEWROUTE,
            del: libc::RTM_DELROUTE,
            how,
            passing: Some(RTA_EXPIRES),
        };
        change.all(&wanted, &there)?;
    }
    if let Some(wanted) = messages(space.net, NetDump::Rules)? {
        let change = Change {
            socket,
            what: "rule",
            new: libc::RTM_NEWRULE,
            del: libc::RTM_DELRULE,
            how: CREATE,
            passing: None,
        };
        for family in [V4, V6] {
            let wanted: Vec<_> =
                wanted.iter().filter(|m| m.body.first() == Some(&family)).map(rule).collect();
            if !wanted.is_empty() {
                let there: Vec<_> = rules(socket, family)?.iter().map(rule).collect();
                change.all(&wanted, &there)?;
            }
        }
    }
    for mut m in own(extra.neighbours.as_deref(), libc::RTM_NEWNEIGH, "neighbours")? {
        move_fixed(&mut m, indexes);
        let done = socket.change(libc::RTM_NEWNEIGH, CREATE | REPLACE, &m.body);
        done.during("cannot set a neighbour", || "RTM_NEWNEIGH".into())?;
    }
    Ok(())
}

/// A thing that is to be there: in a form that can be compared with what is, and the kernel's own business or not.
struct Wanted {
    body: Vec<u8>,
    /// Comes and goes with addresses.
    automatic: bool,
}

/// A route, as the kernel takes it.
fn route(m: &Message, indexes: &BTreeMap<u32, u32>) -> Wanted {
    let mut body = m.body.get(..ROUTE).unwrap_or_default().to_vec();
    body.resize(ROUTE, 0);
    let flags = u32_at(&body, 8).unwrap_or(0) & ONLINK;
    body[8..].copy_from_slice(&flags.to_ne_bytes());
    let by_id = m.attribute(ROUTE, RTA_NH_ID).is_some();
    for (kind, value) in m.attributes(ROUTE) {
        let value = match kind {
            // Told beside the id of a nexthop that has them.
            RTA_OIF | RTA_GATEWAY | RTA_MULTIPATH | RTA_VIA | RTA_ENCAP | RTA_ENCAP_TYPE if by_id => continue,
            RTA_OIF | RTA_IIF => moved(value, indexes),
            RTA_MULTIPATH => hops(value, indexes),
            RTA_CACHEINFO => match u32_at(value, 8).unwrap_or(0) {
                ticks @ 1..=0x7fff_ffff => {
                    body.extend(attribute(RTA_EXPIRES, &ticks.div_ceil(100).to_ne_bytes()));
                    continue;
                }
                _ => continue,
            },
            RTA_PAD | RTA_EXPIRES => continue,
            _ => value.to_vec(),
        };
        body.extend(attribute(kind, &value));
    }
    Wanted { body, automatic: is_automatic(m) }
}

/// The ways of a route that has several.
fn hops(mut bytes: &[u8], indexes: &BTreeMap<u32, u32>) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(length) = u16_at(bytes, 0) {
        let Some(hop) = bytes.get(..usize::from(length)).filter(|hop| hop.len() >= 8) else { break };
        all.extend(&hop[..2]);
        all.extend([hop[2] & ONLINK as u8, hop[3]]);
        all.extend(moved(&hop[4..8], indexes));
        all.extend(&hop[8..]);
        all.resize(all.len().next_multiple_of(4), 0);
        bytes = bytes.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
    }
    all
}

/// A rule, as the kernel takes it.
fn rule(m: &Message) -> Wanted {
    let mut body = m.body.get(..RULE).unwrap_or_default().to_vec();
    body.resize(RULE, 0);
    let flags = u32_at(&body, 8).unwrap_or(0) & INVERT;
    body[8..].copy_from_slice(&flags.to_ne_bytes());
    for (kind, value) in m.attributes(RULE).filter(|(kind, _)| *kind != FRA_PAD) {
        body.extend(attribute(kind, value));
    }
    Wanted { body, automatic: false }
}

/// Makes what is there what it is to be.
struct Change<'a> {
    socket: &'a Netlink,
    what: &'a str,
    new: u16,
    del: u16,
    how: u16,
    /// An attribute that says nothing of whether two are the same.
    passing: Option<u16>,
}

impl Change<'_> {
    fn all(&self, wanted: &[Wanted], there: &[Wanted]) -> Result<()> {
        let lacks = |all: &[Wanted], one: &Wanted| !all.iter().any(|other| self.same(&other.body, &one.body));
        for old in there.iter().filter(|one| !one.automatic && lacks(wanted, one)) {
            match self.socket.change(self.del, 0, &old.body) {
                // Gone with another.
                Err(Errno::ESRCH | Errno::ENOENT) => Ok(()),
                done => done
                    .during(&format!("cannot remove a {}", self.what), || format!("netlink({})", self.del)),
            }?;
        }
        let mut new: Vec<_> = wanted.iter().filter(|one| !one.automatic && lacks(there, one)).collect();
        // One may lead to the gateway of another.
        loop {
            let before = new.len();
            let mut failed = None;
            new.retain(|one| match self.socket.change(self.new, self.how, &one.body) {
                Ok(()) | Err(Errno::EEXIST) => false,
                Err(errno) => {
                    failed.get_or_insert(errno);
                    true
                }
            });
            match failed {
                None => return Ok(()),
                Some(errno) if new.len() == before => {
                    return Err(errno).during(&format!("cannot make a {}", self.what), || {
                        format!("netlink({}, {:02x?})", self.new, new[0].body)
                    });
                }
                Some(_) => {}
            }
        }
    }

    /// Whether two are the same, in whatever order their attributes are.
    fn same(&self, a: &[u8], b: &[u8]) -> bool {
        let lasting = |bytes: &[u8]| {
            let all = attributes(bytes.get(ROUTE..).unwrap_or_default());
            let all = all.filter(|(kind, _)| Some(*kind) != self.passing);
            all.map(|(kind, value)| (kind, value.to_vec())).collect::<BTreeSet<_>>()
        };
        a.get(..ROUTE) == b.get(..ROUTE) && lasting(a) == lasting(b)
    }
}
