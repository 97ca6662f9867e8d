//! All that is in the network namespaces of a container: saved, put back, removed.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd};

use prost::Message as _;

use super::link::{self, Link};
use super::make::{Maker, Space};
use super::{JOINED, conntrack, inet, nftables, peers, refuse, sysctl};
use crate::checkpoint::context::{Dump, Options, Restore, Source};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::files;
use crate::checkpoint::image::{
    LinkExtra, NdType, NetDeviceEntry, NetDump, NetnsEntry, NetworkExtra, NetworksExtra,
};
use crate::checkpoint::model::{Model, NetNamespace};
use crate::checkpoint::namespaces::enter::{Doors, door, through};
use crate::checkpoint::namespaces::kind::Kind;
use crate::sys::netlink::{Netlink, attribute, text, text_of};
use crate::sys::route;

/// Name of the extension in stasis.img.
pub const EXTENSION: &str = "network";

/// Refuses a namespace that is not the container's to keep.
pub fn permitted(source: &Source) -> Result<()> {
    match Kind::Net.joined(&source.spec) {
        Some(path) => Err(Error::new(format!(
            "the network namespace {} belongs to others, too, which --keep-network would save",
            path.display()
        ))
        .remedy("leave --keep-network out: the restore joins the namespace again")),
        None if !Kind::Net.private(source.init)? => {
            Err(Error::new("the container has the network of the host, which --keep-network would save")
                .remedy("leave --keep-network out"))
        }
        None => Ok(()),
    }
}

/// What can be done before the container stands still: its sysctls are opened.
pub fn open_sysctls(options: &Options, source: &Source) -> Result<Option<sysctl::Files>> {
    if !options.keep_network || permitted(source).is_err() {
        return Ok(None);
    }
    through(vec![(door(source.init, Kind::Net)?, Kind::Net)], sysctl::Files::open).map(Some)
}

/// What keeps the container's network namespace from being kept.
pub fn check(options: &Options, source: &Source) -> Vec<Error> {
    if !options.keep_network {
        return Vec::new();
    }
    match permitted(source).and_then(|()| door(source.init, Kind::Net)) {
        Ok(door) => look(vec![(door, Kind::Net)], &given(source)),
        Err(e) => vec![e],
    }
}

/// The same of one namespace.
pub fn look(doors: Doors, given: &BTreeSet<String>) -> Vec<Error> {
    let look = through(doors, || {
        let socket = open()?;
        let (_, mut refused) = link::all(&socket, given)?;
        refused.extend(inet::queueing(&socket)?);
        refused.extend(nftables::save(None)?.refused);
        refused.extend(refuse::all()?);
        Ok(refused)
    });
    look.unwrap_or_else(|e| vec![e])
}

/// Devices that config.json moves in, by their names inside.
pub fn given(source: &Source) -> BTreeSet<String> {
    given_from(source).into_keys().collect()
}

/// And by their names outside.
fn given_from(source: &Source) -> BTreeMap<String, String> {
    let devices = source.spec.linux().as_ref().and_then(|linux| linux.net_devices().as_ref());
    let all = devices.into_iter().flatten();
    let inside =
        |name: &String, new: Option<&String>| new.filter(|new| !new.is_empty()).unwrap_or(name).clone();
    all.map(|(name, device)| (inside(name, device.name().as_ref()), name.clone())).collect()
}

fn open() -> Result<Netlink> {
    Netlink::open(libc::NETLINK_ROUTE)
        .during("cannot ask for network devices", || "socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE)".into())
}

fn home() -> Result<OwnedFd> {
    door(std::process::id().cast_signed(), Kind::Net)
}

fn copy(door: &OwnedFd) -> Result<OwnedFd> {
    door.try_clone().during("cannot hold a namespace", || "fcntl(_, F_DUPFD_CLOEXEC)".into())
}

/// Devices that have something outside, to be removed with the container.
#[derive(Debug, Default)]
pub struct Hold {
    home: Option<OwnedFd>,
    /// Of each namespace a socket, and the devices.
    devices: Vec<(Netlink, Vec<Leaving>)>,
}

/// The number of a device; one with a name goes back under it instead.
type Leaving = (u32, Option<String>);

impl Hold {
    /// Removes them, as far as they are there.
    pub fn release(self) {
        let Some(home) = self.home else { return };
        for (socket, devices) in self.devices {
            for (index, back) in devices {
                // What cannot be removed goes with its namespace.
                let mut body = route::link(index, 0, libc::IFF_UP.unsigned_abs());
                let _ = match back {
                    None => socket.change(libc::RTM_DELLINK, 0, &body),
                    Some(name) => {
                        body.extend(text(libc::IFLA_IFNAME, &name));
                        body.extend(attribute(libc::IFLA_NET_NS_FD, &home.as_raw_fd().to_ne_bytes()));
                        socket.change(libc::RTM_NEWLINK, 0, &body)
                    }
                };
            }
        }
    }
}

/// Saves all namespaces, once all of them are known.
pub fn keep(dump: &mut Dump<'_>) -> Result<()> {
    if !dump.options.keep_network {
        return Ok(());
    }
    let mut doors = vec![(Kind::Net.id(true), door(dump.source.init, Kind::Net)?)];
    doors.extend(dump.spaces.networks()?);
    let around = Around { home: home()?, outside: open()?, doors: &doors, lock: files::lock_table(dump) };
    let (mut extras, mut plain, mut held) = (NetworksExtra::default(), true, Vec::new());
    let from = given_from(dump.source);
    for (id, door) in &doors {
        let own = *id == Kind::Net.id(true);
        let given = if own { from.keys().cloned().collect() } else { BTreeSet::new() };
        let opened = dump.sysctls.as_ref().filter(|_| own);
        let (socket, mut net, extra) =
            through(vec![(copy(door)?, Kind::Net)], || around.save(*id, &given, opened))?;
        files::complete_tunnels(dump.files.tunnels(), *id, &mut net.devices);
        let back = |link: &LinkExtra| {
            let device = net.devices.iter().find(|device| device.ifindex == link.ifindex)?;
            from.get(&device.name).filter(|_| link.given == Some(true)).cloned()
        };
        let leave = extra.links.iter().map(|link| (link, back(link)));
        let leave = leave.filter(|(link, back)| back.is_some() || link.outer.is_some());
        held.push((socket, leave.map(|(link, back)| (link.ifindex, back)).collect()));
        plain &= net.devices.iter().all(|device| device.r#type() != NdType::Extlink);
        plain &= extra.nexthops.is_none() && extra.neighbours.is_none() && extra.filters.is_none();
        dump.model.netns.insert(*id, net);
        extras.networks.push(extra);
    }
    dump.network = Hold { home: Some(around.home), devices: held };
    match plain {
        true => dump.model.set_extension_data(EXTENSION, extras.encode_to_vec()),
        false => dump.model.set_critical_extension_data(EXTENSION, extras.encode_to_vec()),
    }
    Ok(())
}

/// The namespaces that a device may have its other end in.
struct Around<'a> {
    home: OwnedFd,
    outside: Netlink,
    doors: &'a [(u32, OwnedFd)],
    /// The table of the network lock.
    lock: Option<String>,
}

impl Around<'_> {
    /// Runs in the namespace.
    fn save(
        &self,
        id: u32,
        given: &BTreeSet<String>,
        opened: Option<&sysctl::Files>,
    ) -> Result<(Netlink, NetNamespace, NetworkExtra)> {
        let socket = open()?;
        let (links, refused) = link::all(&socket, given)?;
        let filters = nftables::save(self.lock.as_deref())?;
        let mut refused = refused.into_iter().chain(inet::queueing(&socket)?).chain(filters.refused);
        if let Some(e) = refused.next().or(refuse::all()?.into_iter().next()) {
            return Err(e);
        }
        // Namespaces get their numbers when devices are listed.
        let mut others = BTreeMap::new();
        for (other, door) in self.doors.iter().filter(|(other, _)| *other != id) {
            others.extend(peers::number(&socket, door)?.map(|number| (number, *other)));
        }
        let home = peers::number(&socket, &self.home)?;
        let sysctls = opened.map_or_else(|| sysctl::Files::open()?.read(), sysctl::Files::read)?;
        let mut net = NetNamespace { entry: NetnsEntry::default(), ..NetNamespace::default() };
        let mut extra = NetworkExtra { id, sysctls: sysctl::records(&sysctls), ..NetworkExtra::default() };
        for Link { mut entry, extra: mut link, other, space } in links {
            let pair = link.kind.as_deref() == Some("veth");
            entry.peer_ifindex = Some(other.unwrap_or(entry.ifindex));
            entry.peer_nsid = match space {
                None => Some(id),
                Some(number) => others.get(&number).copied(),
            };
            match space {
                None if !pair => link.lower = other.filter(|other| *other != 0 && *other != entry.ifindex),
                Some(number) if home == Some(number) => link.outer = other.and_then(|other| self.name(other)),
                _ => {}
            }
            net.devices.push(entry);
            extra.links.push(link);
        }
        inet::save(&socket, &mut net, &mut extra)?;
        // Where nothing filters, nothing asks for them.
        if !filters.messages.is_empty()
            && let Some(connections) = inet::bytes(&conntrack::save()?)
        {
            net.dumps.insert(NetDump::Connections, connections);
        }
        extra.filters = inet::bytes(&filters.messages);
        sysctl::describe(&mut net, &sysctls);
        Ok((socket, net, extra))
    }

    /// The name of a device in the namespace of the runtime.
    fn name(&self, index: u32) -> Option<String> {
        let found = self.outside.get(libc::RTM_GETLINK, &route::link(index, 0, 0)).ok()?;
        found.attribute(link::FIXED, libc::IFLA_IFNAME).map(text_of)
    }
}

fn extras(model: &Model) -> Result<NetworksExtra> {
    let data = model.extension_data(EXTENSION).unwrap_or_default();
    NetworksExtra::decode(data)
        .map_err(|e| Error::new(format!("the extension {EXTENSION} of stasis.img cannot be read: {e}")))
}

fn extra_of(extras: &NetworksExtra, id: u32, net: &NetNamespace) -> Result<NetworkExtra> {
    if let Some(extra) = extras.networks.iter().find(|extra| extra.id == id) {
        return Ok(extra.clone());
    }
    let links = net.devices.iter().map(link::of_criu).collect::<Result<Vec<LinkExtra>>>()?;
    let sysctls = sysctl::records(&sysctl::of_criu(net));
    Ok(NetworkExtra { id, links, sysctls, ..NetworkExtra::default() })
}

/// Whether what the images hold of networks can be read.
pub fn validate(model: &Model) -> Result<()> {
    let extras = extras(model)?;
    for (id, net) in model.netns.iter().filter(|(_, net)| net.is_kept()) {
        let extra = extra_of(&extras, *id, net)?;
        inet::validate(net, &extra)?;
        nftables::read(extra.filters.as_deref().unwrap_or_default())?;
        let sane = |device: &NetDeviceEntry| crate::container::net_devices::is_valid(&device.name);
        if let Some(device) = net.devices.iter().find(|device| !sane(device)) {
            return Err(Error::new(format!("{:?} of netdev-{id}.img is no network device", device.name)));
        }
        let inward = |name: &str| name.split('/').all(|part| !part.is_empty() && part != ".." && part != ".");
        if let Some(sysctl) = extra.sysctls.iter().find(|sysctl| !inward(&sysctl.name)) {
            return Err(Error::new(format!("{:?} of the images is no sysctl", sysctl.name)));
        }
    }
    Ok(())
}

/// Puts back what was kept, in all namespaces of the container. `hold` is what a failure of the restore has to remove.
/// Returns what could not be put back.
pub fn restore(restore: &Restore<'_>, hold: &mut Hold) -> Result<Vec<String>> {
    let (model, target) = (restore.model, restore.target);
    let (own, extras) = (Kind::Net.inits(model), extras(model)?);
    let mut spaces = Vec::new();
    for (id, net) in model.netns.iter().filter(|(_, net)| net.is_kept()) {
        let inits = *id == own;
        if inits && restore.options.empty_network {
            continue;
        }
        if inits && !Kind::Net.owned(target.init, &target.spec)? {
            let what = match Kind::Net.joined(&target.spec) {
                Some(path) => format!("joins the network namespace {}, which stays as it is", path.display()),
                None => "gives the container no network namespace of its own".into(),
            };
            return Err(Error::new(format!(
                "config.json {what}, and the checkpoint has the contents of one (--keep-network)"
            ))
            .remedy("leave them out: --empty-ns network"));
        }
        if let Some(text) = &net.text {
            return Err(Error::new(format!(
                "the images have packet filters as a text, {text}, which only CRIU's tools can put back"
            ))
            .remedy("restore them with CRIU, or leave the network out: --empty-ns network"));
        }
        let door = if inits { door(target.init, Kind::Net)? } else { inner(restore, *id)? };
        let socket = through(vec![(copy(&door)?, Kind::Net)], open)?;
        let (indexes, order, made) = (BTreeMap::new(), Vec::new(), Vec::new());
        let extra = extra_of(&extras, *id, net)?;
        spaces.push(Space { id: *id, door, socket, net, extra, indexes, order, made });
    }
    if spaces.is_empty() {
        return Ok(Vec::new());
    }
    let maker = Maker { home: home()?, outside: open()?, external: &restore.options.external };
    let result = fill(restore, &maker, &mut spaces, own);
    // A device of ours has the number of the images.
    let made =
        spaces.into_iter().map(|space| (space.socket, space.made.iter().map(|i| (*i, None)).collect()));
    *hold = Hold { home: Some(maker.home), devices: made.collect() };
    result
}

fn inner(restore: &Restore<'_>, id: u32) -> Result<OwnedFd> {
    let door = restore.made.door(id)?;
    door.ok_or_else(|| Error::new(format!("network namespace {id} of the images was not made ({JOINED})")))
}

fn fill(restore: &Restore<'_>, maker: &Maker<'_>, spaces: &mut [Space<'_>], own: u32) -> Result<Vec<String>> {
    for space in spaces.iter_mut() {
        space.find()?;
    }
    maker.make(spaces)?;
    let mut left = Vec::new();
    for space in spaces.iter() {
        space.dress()?;
        let wanted = space.extra.sysctls.iter().map(|s| (s.name.clone(), s.value.clone())).collect();
        let spec = (space.id == own).then_some(&restore.target.spec);
        let door = vec![(copy(&space.door)?, Kind::Net)];
        let filters = nftables::read(space.extra.filters.as_deref().unwrap_or_default())?;
        let connections = space.net.dumps.get(&NetDump::Connections);
        let connections = conntrack::read(connections.map_or(&[][..], Vec::as_slice))?;
        left.extend(through(door, || {
            nftables::restore(&filters)?;
            conntrack::restore(&connections)?;
            Ok(sysctl::restore(&wanted, spec))
        })?);
        inet::restore_addresses(space)?;
    }
    for space in spaces.iter() {
        space.switch()?;
    }
    for space in spaces.iter() {
        inet::settle_addresses(space)?;
        inet::restore_rest(space)?;
    }
    maker.connect(spaces)?;
    let warning =
        || format!("sysctls of the network that could not be set as they were: {}", left.join(", "));
    Ok(if left.is_empty() { Vec::new() } else { vec![warning()] })
}
