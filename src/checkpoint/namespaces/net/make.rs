//! Network devices, made again.
//!
//! ```text
//!   what is there already   lo, what config.json or a hook has moved in: found by its name
//!   made                    what it lies on first; of a veth pair both ends at once
//!   then, for each          its master, mtu, address, flags; port of a bridge. Up only when packet filters stand
//! ```

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use super::link::{
    ANY, AT_BIRTH, BRIDGE, FIXED, INFO_DATA, INFO_KIND, INFO_SLAVE_DATA, INFO_SLAVE_KIND, PORT, differing,
    info, made_of, only,
};
use super::peers::{External, numbered};
use super::tun;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{LinkExtra, NetDeviceEntry, NetworkExtra};
use crate::checkpoint::model::NetNamespace;
use crate::checkpoint::namespaces::enter::through;
use crate::checkpoint::namespaces::kind::Kind;
use crate::sys::netlink::{
    CREATE, EXCLUSIVE, Message, Netlink, attribute, attributes, text, text_of, u32_at,
};
use crate::sys::route::link;

const VETH_INFO_PEER: u16 = 1;
const VLAN_FLAGS: u16 = 2;
const VLAN_REORDER: u32 = 1;
const VETH: &str = "veth";
const UP: u32 = libc::IFF_UP as u32;
/// Flags that are set by hand.
const FLAGS: u32 = (libc::IFF_DEBUG
    | libc::IFF_NOARP
    | libc::IFF_PROMISC
    | libc::IFF_ALLMULTI
    | libc::IFF_MULTICAST
    | libc::IFF_DYNAMIC) as u32;

/// A namespace that is being filled.
pub struct Space<'a> {
    /// Its number.
    pub id: u32,
    /// A way in.
    pub door: OwnedFd,
    /// A socket in it.
    pub socket: Netlink,
    /// What CRIU knows of it, too.
    pub net: &'a NetNamespace,
    /// What only we do.
    pub extra: NetworkExtra,
    /// The index of each device that is there, by that of the images.
    pub indexes: BTreeMap<u32, u32>,
    /// In this order they can be switched on.
    pub order: Vec<u32>,
    /// Those that we have made.
    pub made: Vec<u32>,
}

impl Space<'_> {
    fn device(&self, ifindex: u32) -> Option<&NetDeviceEntry> {
        self.net.devices.iter().find(|device| device.ifindex == ifindex)
    }

    fn link(&self, ifindex: u32) -> Option<&LinkExtra> {
        self.extra.links.iter().find(|link| link.ifindex == ifindex)
    }

    /// Finds the devices that are there.
    pub fn find(&mut self) -> Result<()> {
        let links = self.socket.dump(libc::RTM_GETLINK, &[0; FIXED]);
        let links = links.during("cannot list the network devices", || "RTM_GETLINK".into())?;
        for link in links {
            let name = link.attribute(FIXED, libc::IFLA_IFNAME).map(text_of).unwrap_or_default();
            let device = self.net.devices.iter().find(|device| device.name == name);
            if let (Some(device), Some(index)) = (device, u32_at(&link.body, 4)) {
                self.indexes.insert(device.ifindex, index);
                self.order.push(device.ifindex);
            }
        }
        Ok(())
    }

    /// Does something to a device.
    fn set(&self, device: &NetDeviceEntry, what: &str, body: &[u8]) -> Result<()> {
        let done = self.socket.change(libc::RTM_NEWLINK, 0, body);
        done.during(&format!("cannot {what} the network device {}", device.name), || {
            format!("RTM_NEWLINK({})", device.name)
        })
    }

    /// Gives every device what it had, but for being up.
    pub fn dress(&self) -> Result<()> {
        for device in &self.net.devices {
            let Some(index) = self.indexes.get(&device.ifindex) else { continue };
            let extra = self.link(device.ifindex);
            let loopback = device.flags & libc::IFF_LOOPBACK.unsigned_abs() != 0;
            let flags = if loopback { 0 } else { FLAGS };
            let any = extra.and_then(|extra| extra.attributes.as_deref()).unwrap_or_default();
            let later: Vec<u16> = ANY.into_iter().filter(|kind| !AT_BIRTH.contains(kind)).collect();
            let mut wanted = own_address(device, extra);
            wanted.extend(attribute(libc::IFLA_MTU, &device.mtu.to_ne_bytes()));
            wanted.extend(only(any, &later));
            let now = self.look(device, *index)?;
            let now = now.body.get(FIXED..).unwrap_or_default();
            let body = [link(*index, device.flags & flags, flags), differing(&wanted, now, false)].concat();
            self.set(device, "set up", &body)?;
            if let Some(data) =
                extra.filter(|x| x.kind.as_deref() == Some(BRIDGE)).and_then(|x| x.data.as_ref())
            {
                let kinds = made_of(BRIDGE).unwrap_or_default();
                self.set_info(device, *index, (INFO_KIND, INFO_DATA), &only(data, kinds))?;
            }
        }
        for device in &self.net.devices {
            let (Some(index), Some(master)) = (self.indexes.get(&device.ifindex), device.master) else {
                continue;
            };
            let master = self.indexes.get(&master).ok_or_else(|| {
                Error::new(format!("the images have no master of the network device {}", device.name))
            })?;
            let mut body = link(*index, 0, 0);
            body.extend(attribute(libc::IFLA_MASTER, &master.to_ne_bytes()));
            self.set(device, "join to its master", &body)?;
            if let Some(port) = self.link(device.ifindex).and_then(|extra| extra.port.as_deref()) {
                self.set_info(device, *index, (INFO_SLAVE_KIND, INFO_SLAVE_DATA), &only(port, &PORT))?;
            }
        }
        Ok(())
    }

    fn look(&self, device: &NetDeviceEntry, index: u32) -> Result<Message> {
        let now = self.socket.get(libc::RTM_GETLINK, &link(index, 0, 0));
        now.during("cannot look at a network device", || format!("RTM_GETLINK({})", device.name))
    }

    /// Sets what of a bridge, or of its port, is other than in a new one.
    fn set_info(
        &self,
        device: &NetDeviceEntry,
        index: u32,
        (kind, data): (u16, u16),
        wanted: &[u8],
    ) -> Result<()> {
        let now = self.look(device, index)?;
        let differing = differing(wanted, info(&now, data).unwrap_or_default(), data == INFO_DATA);
        if differing.is_empty() {
            return Ok(());
        }
        let info = [text(kind, BRIDGE), attribute(data, &differing)].concat();
        let body = [link(index, 0, 0), attribute(libc::IFLA_LINKINFO, &info)].concat();
        self.set(device, "set up the kind of", &body)
    }

    /// Switches every device as it was.
    pub fn switch(&self) -> Result<()> {
        for ifindex in &self.order {
            if let (Some(index), Some(device)) = (self.indexes.get(ifindex), self.device(*ifindex)) {
                self.set(device, "switch", &link(*index, device.flags & UP, UP))?;
            }
        }
        Ok(())
    }
}

/// Who makes the devices of all namespaces.
pub struct Maker<'a> {
    /// A way to the namespace of the runtime.
    pub home: OwnedFd,
    /// A socket there.
    pub outside: Netlink,
    /// What was said of devices outside.
    pub external: &'a [External],
}

/// Where the other end of a device is to be, or is.
enum Other<'a> {
    /// The device with that index of the images, in the namespace with that place.
    Inside(usize, u32),
    /// Outside, under that name.
    Outside(&'a str),
}

impl Maker<'_> {
    /// Makes all devices that are not there.
    pub fn make(&self, spaces: &mut [Space<'_>]) -> Result<()> {
        loop {
            let (mut made, mut waiting) = (0, None);
            for place in 0..spaces.len() {
                for device in &spaces[place].net.devices {
                    if spaces[place].indexes.contains_key(&device.ifindex) {
                        continue;
                    }
                    match self.one(spaces, place, device)? {
                        true => made += 1,
                        false => waiting = Some(device),
                    }
                }
            }
            match waiting {
                None => return Ok(()),
                Some(device) if made == 0 => {
                    return Err(Error::new(format!(
                        "the images have the network device {}, but not what it lies on",
                        device.name
                    )));
                }
                Some(_) => {}
            }
        }
    }

    /// Makes one; false where something else must be made before.
    fn one(&self, spaces: &mut [Space<'_>], place: usize, device: &NetDeviceEntry) -> Result<bool> {
        let name = &device.name;
        let space = &spaces[place];
        let extra = space.link(device.ifindex).cloned().unwrap_or_default();
        let Some((kind, kinds)) = extra.kind.as_deref().and_then(|kind| Some((kind, made_of(kind)?))) else {
            return Err(Error::new(format!(
                "the network device {name} of the checkpoint is not there, and cannot be made"
            ))
            .remedy("have config.json (linux.netDevices) or a createRuntime hook move it in"));
        };
        if kind == tun::KIND {
            let ifindex = free(space, device.ifindex)?;
            let door = space.door.try_clone();
            let door = door.during("cannot hold a namespace", || "fcntl(_, F_DUPFD_CLOEXEC)".into())?;
            through(vec![(door, Kind::Net)], || tun::make(device))?;
            spaces[place].indexes.insert(ifindex, ifindex);
            spaces[place].order.push(ifindex);
            spaces[place].made.push(ifindex);
            return Ok(true);
        }
        let other = self.other(spaces, place, device, &extra, kind)?;
        let mut body = link(free(space, device.ifindex)?, 0, 0);
        body.extend(text(libc::IFLA_IFNAME, name));
        body.extend(attribute(libc::IFLA_MTU, &device.mtu.to_ne_bytes()));
        body.extend(own_address(device, Some(&extra)));
        body.extend(only(extra.attributes.as_deref().unwrap_or_default(), &AT_BIRTH));
        let mut data = match kind {
            // Set afterwards.
            BRIDGE => Vec::new(),
            "vlan" => vlan(&only(extra.data.as_deref().unwrap_or_default(), kinds)),
            _ => only(extra.data.as_deref().unwrap_or_default(), kinds),
        };
        match &other {
            Some(Other::Inside(at, index)) if kind == VETH => {
                data = attribute(VETH_INFO_PEER, &inner_peer(&spaces[*at], *index)?);
            }
            Some(Other::Outside(peer)) if kind == VETH => {
                let mut info = link(0, 0, 0);
                info.extend(text(libc::IFLA_IFNAME, peer));
                info.extend(attribute(libc::IFLA_NET_NS_FD, &self.home.as_raw_fd().to_ne_bytes()));
                data = attribute(VETH_INFO_PEER, &info);
            }
            Some(Other::Inside(at, index)) => {
                let Some(index) = spaces[*at].indexes.get(index) else { return Ok(false) };
                body.extend(attribute(libc::IFLA_LINK, &index.to_ne_bytes()));
                if *at != place {
                    let number = numbered(&space.socket, &spaces[*at].door)?;
                    body.extend(attribute(libc::IFLA_LINK_NETNSID, &number.to_ne_bytes()));
                }
            }
            Some(Other::Outside(lower)) => {
                let index = self.index(lower)?;
                let number = numbered(&space.socket, &self.home)?;
                body.extend(attribute(libc::IFLA_LINK, &index.to_ne_bytes()));
                body.extend(attribute(libc::IFLA_LINK_NETNSID, &number.to_ne_bytes()));
            }
            None => {}
        }
        let info = [text(INFO_KIND, kind), attribute(INFO_DATA, &data)].concat();
        body.extend(attribute(libc::IFLA_LINKINFO, &info));
        let done = space.socket.change(libc::RTM_NEWLINK, CREATE | EXCLUSIVE, &body);
        done.during(&format!("cannot make the network device {name}"), || format!("RTM_NEWLINK({kind})")).map_err(
            |e| match (e.errno(), &other) {
                (Some(Errno::EEXIST), Some(Other::Outside(peer))) => {
                    e.remedy(format!("is there a {peer} already? Name another: --external veth[{name}]=NAME"))
                }
                (Some(Errno::EOPNOTSUPP), _) => {
                    e.remedy(format!("the kernel has no devices of the kind {kind}: leave the network out with --empty-ns network"))
                }
                _ => e,
            },
        )?;
        let inside = match other {
            Some(Other::Inside(at, index)) if kind == VETH => Some((at, index)),
            _ => None,
        };
        for (at, ifindex) in inside.into_iter().chain([(place, device.ifindex)]) {
            spaces[at].indexes.insert(ifindex, ifindex);
            spaces[at].order.push(ifindex);
            spaces[at].made.push(ifindex);
        }
        Ok(true)
    }

    /// Where the peer of a device is, or what it lies on.
    fn other<'n>(
        &'n self,
        spaces: &[Space<'_>],
        place: usize,
        device: &NetDeviceEntry,
        extra: &'n LinkExtra,
        kind: &str,
    ) -> Result<Option<Other<'n>>> {
        let name = &device.name;
        if !matches!(kind, VETH | "macvlan" | "ipvlan" | "vlan") {
            return Ok(None);
        }
        if let Some(external) = self.external.iter().find(|e| e.kind == kind && e.inside == *name) {
            return Ok(Some(Other::Outside(&external.outside)));
        }
        if let Some(lower) = extra.lower {
            return Ok(Some(Other::Inside(place, lower)));
        }
        if let (Some(id), Some(index)) = (device.peer_nsid, device.peer_ifindex)
            && let Some(at) = spaces.iter().position(|space| space.id == id)
            && spaces[at].device(index).is_some_and(|other| (at, other.ifindex) != (place, device.ifindex))
        {
            return Ok(Some(Other::Inside(at, index)));
        }
        match extra.outer.as_deref() {
            // What the container lies on is for its new place to say.
            Some(outer) if kind == VETH && crate::container::net_devices::is_valid(outer) => {
                Ok(Some(Other::Outside(outer)))
            }
            outer => {
                let was = outer.map(|outer| format!(", which was {outer}")).unwrap_or_default();
                let what =
                    if kind == VETH { "its other end outside" } else { "a device outside that it lies on" };
                Err(Error::new(format!("the network device {name} of the checkpoint needs {what}{was}"))
                    .remedy(format!("name it: --external {kind}[{name}]=NAME")))
            }
        }
    }

    fn index(&self, name: &str) -> Result<u32> {
        let body = [link(0, 0, 0), text(libc::IFLA_IFNAME, name)].concat();
        let found = self.outside.get(libc::RTM_GETLINK, &body);
        let found =
            found.during(&format!("there is no network device {name}"), || format!("RTM_GETLINK({name})"))?;
        u32_at(&found.body, 4).ok_or_else(|| Error::new(format!("the network device {name} has no number")))
    }

    /// Switches on what was named outside, as a port of its bridge where one was named.
    pub fn connect(&self, spaces: &[Space<'_>]) -> Result<()> {
        for external in self.external.iter().filter(|external| external.kind == VETH) {
            let here =
                |space: &Space<'_>| space.net.devices.iter().any(|device| device.name == external.inside);
            if !spaces.iter().any(here) {
                continue;
            }
            let name = &external.outside;
            let mut body = link(self.index(name)?, UP, UP);
            if let Some(bridge) = &external.bridge {
                body.extend(attribute(libc::IFLA_MASTER, &self.index(bridge)?.to_ne_bytes()));
            }
            let done = self.outside.change(libc::RTM_NEWLINK, 0, &body);
            done.during(&format!("cannot connect the network device {name}"), || {
                format!("RTM_NEWLINK({name})")
            })?;
        }
        Ok(())
    }
}

/// The flags of a vlan mean those that are on, and the one that a new vlan has; the kernel tells that all are meant, and
/// does not take it.
fn vlan(data: &[u8]) -> Vec<u8> {
    let one = |(kind, value): (u16, &[u8])| match u32_at(value, 0) {
        Some(flags) if kind == VLAN_FLAGS => {
            attribute(kind, &[flags.to_ne_bytes(), (flags | VLAN_REORDER).to_ne_bytes()].concat())
        }
        _ => attribute(kind, value),
    };
    attributes(data).flat_map(one).collect()
}

/// The link-layer address of a device, which some take only when they are made. That of an ipvlan is the one below's.
fn own_address(device: &NetDeviceEntry, extra: Option<&LinkExtra>) -> Vec<u8> {
    let own = extra.is_none_or(|extra| extra.kind.as_deref() != Some("ipvlan"));
    let address = device.address.as_ref().filter(|address| own && !address.is_empty());
    address.map(|address| attribute(libc::IFLA_ADDRESS, address)).unwrap_or_default()
}

/// The other end of a pair, in a namespace of the images.
fn inner_peer(space: &Space<'_>, index: u32) -> Result<Vec<u8>> {
    let peer = space.device(index).filter(|_| !space.indexes.contains_key(&index));
    let peer = peer.ok_or_else(|| Error::new("two network devices of the images have the same other end"))?;
    let mut info = link(free(space, index)?, 0, 0);
    info.extend(text(libc::IFLA_IFNAME, &peer.name));
    info.extend(own_address(peer, None));
    info.extend(attribute(libc::IFLA_NET_NS_FD, &space.door.as_raw_fd().to_ne_bytes()));
    Ok(info)
}

/// The number of a device, which programs and packet filters may know it by.
fn free(space: &Space<'_>, ifindex: u32) -> Result<u32> {
    if ifindex == 0 || space.indexes.values().any(|taken| *taken == ifindex) {
        return Err(Error::new(format!("another network device has the number {ifindex} already")));
    }
    Ok(ifindex)
}
