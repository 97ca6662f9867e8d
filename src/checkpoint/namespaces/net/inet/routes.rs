//! Nexthops, routes, rules and neighbours, made what they were.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use super::{
    NEXTHOP, ROUTE, RTM_NEWNEXTHOP, RULE, V4, V6, is_automatic, messages, move_fixed, moved, own, routes,
    rules,
};
use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::NetDump;
use crate::checkpoint::namespaces::net::make::Space;
use crate::sys::netlink::{
    APPEND, CREATE, Message, Netlink, REPLACE, attribute, attributes, nested, u16_at, u32_at,
};

/// RTNH_F_ONLINK, the one flag of a route that is set by hand.
const ONLINK: u32 = 4;
const RTA_IIF: u16 = libc::RTA_IIF;
const RTA_OIF: u16 = libc::RTA_OIF;
const RTA_GATEWAY: u16 = libc::RTA_GATEWAY;
const RTA_MULTIPATH: u16 = libc::RTA_MULTIPATH;
const RTA_CACHEINFO: u16 = libc::RTA_CACHEINFO;
const RTA_VIA: u16 = 18;
const RTA_ENCAP_TYPE: u16 = 21;
const RTA_ENCAP: u16 = 22;
const RTA_EXPIRES: u16 = 23;
const RTA_PAD: u16 = 24;
const RTA_NH_ID: u16 = 30;
/// FIB_RULE_INVERT, likewise.
const INVERT: u32 = 2;
const FRA_PAD: u16 = 18;
const NHA_OIF: u16 = 5;
const NHA_ENCAP: u16 = 8;
const NHA_RES_GROUP: u16 = 12;

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
