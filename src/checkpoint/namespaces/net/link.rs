//! One network device: what is recorded of it, and what is refused.

use std::collections::BTreeSet;

use super::tun;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{LinkExtra, MacvlanLinkEntry, NdType, NetDeviceEntry};
use crate::sys::netlink::{Message, Netlink, attribute, attributes, text_of, u16_at, u32_at};

/// Length of the fixed part of a message about a device.
pub const FIXED: usize = 16;
/// In IFLA_LINKINFO.
pub const INFO_KIND: u16 = 1;
pub const INFO_DATA: u16 = 2;
pub const INFO_SLAVE_KIND: u16 = 4;
pub const INFO_SLAVE_DATA: u16 = 5;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const MACVLAN_MODE: u16 = 1;
const MACVLAN_FLAGS: u16 = 2;
/// A macvlan that takes packets of listed senders only.
const MACVLAN_SOURCE: u32 = 16;
const BRIDGE_VLAN_FILTERING: u16 = 7;
const BRIDGE_SWITCHES: u16 = 46;
pub const BRIDGE: &str = "bridge";

/// What is kept of any device, besides name, address and mtu: length of its queue, alias, group, numbers of queues,
/// limits of offloaded segments.
pub const ANY: [u16; 7] = [libc::IFLA_TXQLEN, libc::IFLA_IFALIAS, libc::IFLA_GROUP, 31, 32, 40, 41];
/// What of it the kernel takes only when the device is made.
pub const AT_BIRTH: [u16; 2] = [31, 32];

/// Devices that a new network namespace has by itself, as far as the kernel's modules are there.
pub const NEW: [&str; 11] = [
    "lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0", "teql0",
];

/// The attributes that make a device of a kind what it is, as the kernel tells and takes them; none where the kind cannot
/// be kept.
pub fn made_of(kind: &str) -> Option<&'static [u16]> {
    Some(match kind {
        // Of a tun the record has all.
        "veth" | "dummy" | "ifb" | tun::KIND => &[],
        // Without what is state, and what is there once only.
        BRIDGE => &[
            1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 22, 23, 24, 25, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38,
            39, 41, 42, 43, 44, 45, 46,
        ],
        "macvlan" => &[MACVLAN_MODE, MACVLAN_FLAGS, 7],
        "ipvlan" => &[1, 2],
        "vlan" => &[1, 2, 3, 4, 5],
        "vrf" => &[1],
        _ => return None,
    })
}

/// What is kept of a port of a bridge.
pub const PORT: [u16; 20] = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 25, 27, 28, 29, 30, 31, 32, 33, 40];

/// Some of these attributes.
pub fn only(bytes: &[u8], kinds: &[u16]) -> Vec<u8> {
    let kept = attributes(bytes).filter(|(kind, _)| kinds.contains(kind));
    kept.flat_map(|(kind, value)| attribute(kind, value)).collect()
}

/// What of some attributes is other than in a new device: the kernel may have no way to set to 0 what it does not know. Of
/// the switches of a bridge those that are on.
pub fn differing(wanted: &[u8], new: &[u8], bridge: bool) -> Vec<u8> {
    let differs = |kind, value: &[u8]| !attributes(new).any(|(k, v)| k == kind && v == value);
    let one = |(kind, value): (u16, &[u8])| match value.first_chunk::<4>() {
        Some(on) if bridge && kind == BRIDGE_SWITCHES => attribute(kind, &[*on, *on].concat()),
        _ => attribute(kind, value),
    };
    attributes(wanted).filter(|(kind, value)| differs(*kind, value)).flat_map(one).collect()
}

/// A device as it is.
#[derive(Debug)]
pub struct Link {
    /// For CRIU, too.
    pub entry: NetDeviceEntry,
    /// For us.
    pub extra: LinkExtra,
    /// Its peer, or what it lies on.
    pub other: Option<u32>,
    /// The number of the namespace in which that is; none where it is in the same.
    pub space: Option<i32>,
}

/// All devices of the socket's namespace but those that every namespace has, and what keeps others from being kept. `given`
/// are those that config.json moves in.
pub fn all(socket: &Netlink, given: &BTreeSet<String>) -> Result<(Vec<Link>, Vec<Error>)> {
    let links = socket.dump(libc::RTM_GETLINK, &[0; FIXED]);
    let links = links.during("cannot list the network devices", || "RTM_GETLINK".into())?;
    let (mut found, mut refused) = (Vec::new(), Vec::new());
    for link in links.iter().map(|link| look(link, given)) {
        match link {
            Ok(link) => found.extend(link),
            Err(e) => refused.push(e),
        }
    }
    Ok((found, refused))
}

/// What a device says of its kind.
pub fn info(link: &Message, kind: u16) -> Option<&[u8]> {
    let info = link.attribute(FIXED, libc::IFLA_LINKINFO)?;
    attributes(info).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

fn look(link: &Message, given: &BTreeSet<String>) -> Result<Option<Link>> {
    let top = |kind| link.attribute(FIXED, kind);
    let word = |kind| top(kind).and_then(|value| u32_at(value, 0));
    let name = top(libc::IFLA_IFNAME).map(text_of).unwrap_or_default();
    let ifindex = u32_at(&link.body, 4).unwrap_or(0);
    let flags = u32_at(&link.body, 8).unwrap_or(0);
    let info = |kind| info(link, kind);
    let kind = info(INFO_KIND).map(text_of);
    let loopback = flags & libc::IFF_LOOPBACK.unsigned_abs() != 0;
    if NEW.contains(&name.as_str()) && !loopback {
        return Ok(None);
    }
    let given = given.contains(&name);
    let data = info(INFO_DATA).unwrap_or_default();
    let of_kind = kind.as_deref().and_then(made_of);
    if !loopback && !given {
        refuse(&name, kind.as_deref(), data)?;
    }
    let tunnel = !loopback && !given && kind.as_deref() == Some(tun::KIND);
    if tunnel {
        tun::refuse(&name, link)?;
    }
    let xdp = top(IFLA_XDP).and_then(|x| attributes(x).find(|(k, _)| *k == IFLA_XDP_ATTACHED));
    if xdp.is_some_and(|(_, attached)| attached.first().is_some_and(|mode| *mode != 0)) {
        return Err(Error::new(format!(
            "the network device {name} has an XDP program, which cannot be kept"
        ))
        .remedy(format!("ip link set dev {name} xdp off")));
    }
    let port = (info(INFO_SLAVE_KIND).map(text_of).as_deref() == Some(BRIDGE))
        .then(|| only(info(INFO_SLAVE_DATA).unwrap_or_default(), &PORT));
    let entry = NetDeviceEntry {
        r#type: kind_for_criu(loopback, if given { None } else { kind.as_deref() }).into(),
        ifindex,
        mtu: word(libc::IFLA_MTU).unwrap_or(0),
        flags,
        address: top(libc::IFLA_ADDRESS).filter(|_| !loopback).map(<[u8]>::to_vec),
        macvlan: (kind.as_deref() == Some("macvlan")).then(|| macvlan(data)),
        master: word(libc::IFLA_MASTER),
        tun: tunnel.then(|| tun::entry(link)),
        name,
        ..NetDeviceEntry::default()
    };
    let extra = LinkExtra {
        ifindex,
        kind: kind.filter(|_| !given && !loopback),
        data: of_kind.map(|kinds| only(data, kinds)),
        port,
        attributes: Some(only(link.body.get(FIXED..).unwrap_or_default(), &ANY)),
        given: given.then_some(true),
        ..LinkExtra::default()
    };
    let space = word(libc::IFLA_LINK_NETNSID).map(u32::cast_signed);
    Ok(Some(Link { entry, extra, other: word(libc::IFLA_LINK), space }))
}

fn refuse(name: &str, kind: Option<&str>, data: &[u8]) -> Result<()> {
    let number = |kind| attributes(data).find(|(k, _)| *k == kind).map(|(_, v)| v);
    let remedy = "remove it before the checkpoint, or leave --keep-network out";
    let what = match kind {
        None => {
            return Err(Error::new(format!(
                "the network device {name} is none that could be made again, which --keep-network would have to do"
            ))
            .remedy("name it in linux.netDevices of config.json, or move it out before the checkpoint"));
        }
        Some(kind) if made_of(kind).is_none() => format!("is of the kind {kind}"),
        Some("macvlan") if number(MACVLAN_MODE).and_then(|v| u32_at(v, 0)) == Some(MACVLAN_SOURCE) => {
            "is a macvlan in source mode".into()
        }
        Some(BRIDGE) if number(BRIDGE_VLAN_FILTERING).is_some_and(|v| v.first() != Some(&0)) => {
            "is a bridge with vlan_filtering".into()
        }
        Some(_) => return Ok(()),
    };
    Err(Error::new(format!("the network device {name} {what}, which --keep-network cannot keep yet"))
        .remedy(remedy))
}

fn macvlan(data: &[u8]) -> MacvlanLinkEntry {
    let value = |kind| attributes(data).find(|(k, _)| *k == kind).map(|(_, v)| v);
    MacvlanLinkEntry {
        mode: value(MACVLAN_MODE).and_then(|v| u32_at(v, 0)).unwrap_or(0),
        flags: value(MACVLAN_FLAGS).and_then(|v| u16_at(v, 0)).map(u32::from),
    }
}

fn kind_for_criu(loopback: bool, kind: Option<&str>) -> NdType {
    match kind {
        _ if loopback => NdType::Loopback,
        Some("veth") => NdType::Veth,
        Some(BRIDGE) => NdType::Bridge,
        Some("macvlan") => NdType::Macvlan,
        Some(tun::KIND) => NdType::Tun,
        // Whoever restores it must have made the device.
        _ => NdType::Extlink,
    }
}

/// What we would have recorded of a device in images of CRIU's.
pub fn of_criu(device: &NetDeviceEntry) -> Result<LinkExtra> {
    let (kind, data) = match device.r#type() {
        NdType::Loopback | NdType::Extlink => (None, Vec::new()),
        NdType::Veth => (Some("veth"), Vec::new()),
        NdType::Bridge => (Some(BRIDGE), Vec::new()),
        NdType::Tun => (Some(tun::KIND), Vec::new()),
        NdType::Macvlan => {
            let macvlan = device.macvlan.clone().unwrap_or_default();
            let flags = macvlan.flags.and_then(|flags| u16::try_from(flags).ok());
            let flags = flags.map(|flags| attribute(MACVLAN_FLAGS, &flags.to_ne_bytes()));
            let mode = attribute(MACVLAN_MODE, &macvlan.mode.to_ne_bytes());
            (Some("macvlan"), [mode, flags.unwrap_or_default()].concat())
        }
        kind @ (NdType::Venet | NdType::Sit) => {
            return Err(Error::new(format!(
                "the images have the network device {} of the kind {kind:?}, which cannot be restored yet",
                device.name
            ))
            .remedy("leave the network out: --empty-ns network"));
        }
    };
    let given = (device.r#type() == NdType::Extlink).then_some(true);
    Ok(LinkExtra {
        ifindex: device.ifindex,
        kind: kind.map(str::to_owned),
        data: Some(data),
        given,
        ..LinkExtra::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_listed_is_not_made() {
        // Kinds that would reach the host or beyond: tunnels, devices of other files, modules that it need not have.
        for kind in [
            "vxlan",
            "geneve",
            "gre",
            "ipip",
            "wireguard",
            "macvtap",
            "bond",
            "team",
            "can",
            "xfrm",
            "nlmon",
            "",
        ] {
            assert_eq!(made_of(kind), None, "{kind}");
        }
        // A veth is made without anything that an image says of its peer, a device without what names a namespace.
        let foreign = [
            attribute(1, b"peer"),
            attribute(libc::IFLA_NET_NS_FD, &[3, 0, 0, 0]),
            attribute(libc::IFLA_NET_NS_PID, &[1, 0, 0, 0]),
        ];
        let foreign = foreign.concat();
        assert_eq!(only(&foreign, made_of("veth").unwrap()), b"");
        for kinds in [&ANY[..], &AT_BIRTH] {
            assert_eq!(only(&foreign, kinds), b"");
        }
        let length = attribute(libc::IFLA_TXQLEN, &[7, 0, 0, 0]);
        assert_eq!(only(&[foreign, length.clone()].concat(), &ANY), length);
    }
}
