//! tun(4) and tap: /dev/net/tun, attached to a network device or not yet.
//!
//! ```text
//!   RegFileEntry    its path, flags                                              one number for both
//!   TunfileEntry    its network namespace, the device, whether its queue is detached
//!   extension `tun` how it was attached, what the program takes over             CRIU looks into the device's record
//! ```
//!
//! A device ends with its last descriptor unless it is persistent, so `--keep-network` makes it persistent until the first
//! descriptor is attached again. Without that flag, and in a namespace that config.json joins, a persistent device that
//! somebody else puts there is attached to by its name. Packets that nobody has read are lost, as they may be on the wire.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{Surroundings, device, inside, regular};
use crate::checkpoint::image::{FdTypes, FileEntry, NetDeviceEntry, RegFileEntry, TunfileEntry};
use crate::checkpoint::namespaces::{Kind, net};
use crate::checkpoint::{Error, Result};
use crate::sys::{ioctl, route, tun};

/// Name of the extension in stasis.img.
pub const EXTENSION: &str = "tun";

const LOOK: &str = "cannot look at a tun device";
const ATTACH: &str = "cannot attach to a tun device";

/// How a descriptor is attached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct More {
    id: u32,
    modes: u32,
    /// TUN_F_*.
    offload: u32,
    little: bool,
    big: bool,
    /// The cable was taken out.
    unplugged: bool,
    /// Most bytes on their way to the network from this descriptor.
    send_buffer: u32,
}

/// A descriptor that has been recorded.
#[derive(Debug)]
pub struct Tunnel {
    more: More,
    space: Option<u32>,
    device: String,
    header: u32,
}

/// What is known of an attached descriptor.
struct Told {
    attached: tun::Attached,
    link: net::TunLink,
    offload: u32,
}

/// /dev/net/tun, open.
pub fn is(live: &Live) -> bool {
    regular::is(live) && device::is_tun(live) && live.info.flags & libc::O_PATH as u32 == 0
}

fn look(live: &Live, init: i32) -> Result<Option<Told>> {
    let attached = tun::attached(&live.file).during(LOOK, || "ioctl(_, TUNGETIFF)".into());
    let Some(attached) = attached.map_err(|e| live.name(e))? else { return Ok(None) };
    let name = &attached.name;
    let told = inside::beside(&live.file, init, || {
        let link = net::tun_link(name)?;
        let offload = tun::offload(name).during(LOOK, || format!("ioctl(_, SIOCETHTOOL, {name:?})"))?;
        Ok((link, offload))
    });
    let (link, offload) = told.map_err(|e| live.name(e))?;
    Ok(Some(Told { attached, link, offload }))
}

/// Refuses descriptors whose device will not be there.
pub fn check(live: &Live, around: &Surroundings<'_>) -> Result<()> {
    regular::check(live, around)?;
    if let Ok(device) = tun::device_namespace(&live.file)
        && let Ok(own) = ioctl::socket_namespace(&live.file)
        && inode(&device)? != inode(&own)?
    {
        return Err(live
            .name(Error::new("the device of a tun descriptor was moved to another network namespace"))
            .remedy("let the program close it"));
    }
    let Some(told) = look(live, around.init)? else { return Ok(()) };
    let name = &told.attached.name;
    let refuse = |what: String, remedy: &str| Err(live.name(Error::new(what)).remedy(remedy.to_owned()));
    if told.link.modes & tun::TAP != 0
        && tun::is_filtered(&live.file).during(LOOK, || "ioctl(_, TUNGETFILTER)".into())?
    {
        let what = format!("the tap device {name} has a filter, which cannot be read");
        return refuse(what, "let the program take it off (TUNDETACHFILTER)");
    }
    let Some(source) = around.source else { return Ok(()) };
    let given = net::given(source).contains(name);
    if around.options.keep_network && !given {
        return Ok(());
    }
    let persistent = told.link.persistent;
    let private = !is_inits(live, around.init)? || Kind::Net.owned(around.init, &source.spec)?;
    if private && !given {
        let what = format!("a descriptor is attached to the network device {name}, which is not kept");
        return refuse(what, "keep it with --keep-network");
    }
    if !persistent {
        let what = format!("the network device {name} ends with the descriptor that is attached to it");
        return refuse(what, "make it persistent (TUNSETPERSIST), or let the program close it");
    }
    Ok(())
}

/// Whether a descriptor was opened in the network namespace of that process. One that cannot be asked was.
fn is_inits(live: &Live, init: i32) -> Result<bool> {
    let Ok(door) = ioctl::socket_namespace(&live.file) else { return Ok(true) };
    let path = format!("/proc/{init}/ns/net");
    let stat = nix::sys::stat::stat(path.as_str()).during(LOOK, || format!("stat({path:?})"))?;
    Ok(stat.st_ino == inode(&door)?)
}

fn inode(door: &OwnedFd) -> Result<u64> {
    nix::sys::stat::fstat(door).map(|stat| stat.st_ino).during(LOOK, || "fstat(_)".into())
}

/// Records a descriptor.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let (ns_id, _) = dump.spaces.of_socket(dump.source.init, &live.file)?;
    let path = regular::entry(dump, live, id)?;
    dump.model.files.push(path);
    let mut entry = TunfileEntry { id, ns_id, ..TunfileEntry::default() };
    if let Some(told) = look(live, dump.source.init)? {
        let [little, big] = tun::endian(&live.file).during(LOOK, || "ioctl(_, TUNGETVNETLE)".into())?;
        let more = More {
            id,
            modes: told.link.modes | told.attached.napi,
            offload: told.offload,
            little,
            big,
            unplugged: !told.link.carrier && !told.attached.detached,
            send_buffer: tun::send_buffer(&live.file).during(LOOK, || "ioctl(_, TUNGETSNDBUF)".into())?,
        };
        dump.files.tunnels.push(Tunnel {
            more,
            space: ns_id,
            device: told.attached.name.clone(),
            header: tun::header(&live.file).during(LOOK, || "ioctl(_, TUNGETVNETHDRSZ)".into())?,
        });
        entry.netdev = Some(told.attached.name);
        entry.detached = told.attached.detached.then_some(true);
    }
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Tunf as i32,
        id,
        tunf: Some(entry),
        ..FileEntry::default()
    });
    Ok(())
}

/// Writes how all of them were attached.
pub fn describe(dump: &mut Dump<'_>) -> Result<()> {
    let all: Vec<&More> = dump.files.tunnels.iter().map(|tunnel| &tunnel.more).collect();
    if all.is_empty() { Ok(()) } else { dump.model.set_extension(EXTENSION, &all) }
}

/// Adds to the records of devices what only their descriptors tell.
pub fn complete(tunnels: &[Tunnel], space: u32, devices: &mut [NetDeviceEntry]) {
    for device in devices {
        let tunnel = tunnels.iter().find(|t| t.space == Some(space) && t.device == device.name);
        if let (Some(link), Some(tunnel)) = (&mut device.tun, tunnel) {
            link.flags |= tunnel.more.modes & tun::NAPI;
            (link.sndbuf, link.vnethdr) = (tunnel.more.send_buffer, tunnel.header);
        }
    }
}

/// Opens all of them in the container's network namespaces.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let entries: Vec<&TunfileEntry> = opener.of(FdTypes::Tunf).filter_map(|e| e.tunf.as_ref()).collect();
    if entries.is_empty() {
        return Ok(());
    }
    let all: Vec<More> = opener.restore.model.extension(EXTENSION)?;
    for (network, some) in opener.by_network(entries, |e| e.ns_id)? {
        for entry in some {
            let path = opener.tunnel_path(entry.id).ok_or_else(|| {
                Error::new(format!("the images lack the path of file {}, a tun descriptor", entry.id))
            })?;
            let more = all.iter().find(|more| more.id == entry.id);
            let restore = opener.restore;
            let work = || attach(restore, path, entry, more);
            let file = match &network {
                Some(door) => inside::in_space(door, work),
                None => inside::in_network(restore.target.init, work),
            };
            opener.put_owned(entry.id, file.map_err(|e| e.path(path.path()))?, &path.fown, path.flags);
        }
    }
    Ok(())
}

/// Runs in the network namespace.
fn attach(
    restore: &Restore<'_>,
    path: &RegFileEntry,
    entry: &TunfileEntry,
    more: Option<&More>,
) -> Result<OwnedFd> {
    let file = regular::open(restore, path)?;
    let Some(name) = &entry.netdev else { return Ok(file) };
    let space = entry.ns_id.unwrap_or_else(|| Kind::Net.inits(restore.model));
    let devices = restore.model.netns.get(&space).map_or(&[][..], |net| &net.devices);
    let kept = devices.iter().find(|device| device.name == *name).and_then(|device| device.tun.as_ref());
    let modes = more.map(|more| more.modes).or(kept.map(|link| link.flags)).ok_or_else(|| {
        Error::new(format!("the images do not say how a descriptor is attached to the network device {name}"))
    })?;
    // To attach to one that is not there makes it.
    route::index(name)
        .during(ATTACH, || format!("if_nametoindex({name:?})"))
        .map_err(|e| e.remedy(format!("the network namespace must have the network device {name}")))?;
    tun::attach(&file, name, modes).during(ATTACH, || format!("ioctl(_, TUNSETIFF, {name:?})")).map_err(
        |e| match e.errno() {
            Some(Errno::EBUSY) => e.remedy(format!("another descriptor is attached to {name}: end it")),
            Some(Errno::EINVAL) => e.remedy(format!("{name} must be a device as it was at the checkpoint")),
            _ => e,
        },
    )?;
    // A new descriptor has no limit, whatever the device has.
    let wanted =
        more.map(|more| more.send_buffer).or(kept.map(|link| link.sndbuf)).filter(|bytes| *bytes != 0);
    if let Some(bytes) = wanted
        && bytes != tun::send_buffer(&file).during(ATTACH, || "ioctl(_, TUNGETSNDBUF)".into())?
    {
        tun::set_send_buffer(&file, bytes).during(ATTACH, || format!("ioctl(_, TUNSETSNDBUF, {bytes})"))?;
    }
    if let (Some(more), Some(_)) = (more, kept) {
        tun::set_offload(&file, more.offload)
            .during(ATTACH, || format!("ioctl(_, TUNSETOFFLOAD, {:#x})", more.offload))?;
        tun::set_endian(&file, [more.little, more.big])
            .during(ATTACH, || "ioctl(_, TUNSETVNETLE or TUNSETVNETBE, 1)".into())?;
        if more.unplugged {
            tun::set_carrier(&file, false).during(ATTACH, || "ioctl(_, TUNSETCARRIER, 0)".into())?;
        }
    }
    if entry.detached == Some(true) {
        tun::detach_queue(&file).during(ATTACH, || "ioctl(_, TUNSETQUEUE, IFF_DETACH_QUEUE)".into())?;
    }
    if kept.is_some_and(|link| link.flags & tun::PERSIST == 0) {
        tun::set_persistent(&file, false).during(ATTACH, || "ioctl(_, TUNSETPERSIST, 0)".into())?;
    }
    Ok(file)
}
