//! Devices whose other end is a descriptor: tun and tap.
//!
//! A new one lasts until `files/tun.rs` has attached the descriptors that the images have; what then ends with them does
//! again.

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{NetDeviceEntry, TunLinkEntry};
use crate::sys::netlink::{Message, Netlink, attributes, text, u16_at, u32_at};
use crate::sys::{route, tun};

use super::link::{FIXED, INFO_DATA, info};

/// The kernel's word for both.
pub const KIND: &str = "tun";
const OWNER: u16 = 1;
const GROUP: u16 = 2;
const TYPE: u16 = 3;
const PI: u16 = 4;
const HEADER: u16 = 5;
const PERSISTENT: u16 = 6;
const QUEUES: u16 = 7;
const IFLA_CARRIER: u16 = 33;
/// Kinds of packets that a new device has: ARPHRD_NONE of a tun, ARPHRD_ETHER of a tap.
const NEW: [u16; 2] = [0xfffe, 1];
/// What a new device has: `struct virtio_net_hdr`, no limit.
const NEW_HEADER: u32 = 10;
const NEW_SEND_BUFFER: u32 = i32::MAX as u32;

/// What a device tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunLink {
    /// How descriptors are attached, but for NAPI.
    pub modes: u32,
    /// It outlives its descriptors.
    pub persistent: bool,
    /// The cable is in.
    pub carrier: bool,
}

/// What the device of that name in this thread's network namespace tells.
pub fn tun_link(name: &str) -> Result<TunLink> {
    let socket = Netlink::open(libc::NETLINK_ROUTE);
    let body = [route::link(0, 0, 0), text(libc::IFLA_IFNAME, name)].concat();
    let link = socket.and_then(|socket| socket.get(libc::RTM_GETLINK, &body));
    let link = link.during("cannot look at a tun device", || format!("RTM_GETLINK({name})"))?;
    let entry = entry(&link);
    Ok(TunLink {
        modes: entry.flags & tun::MODES,
        persistent: entry.flags & tun::PERSIST != 0,
        carrier: link.attribute(FIXED, IFLA_CARRIER).is_none_or(|on| on.first() != Some(&0)),
    })
}

/// The record of a device. What only its descriptors know is as in a new one.
pub fn entry(link: &Message) -> TunLinkEntry {
    let data = info(link, INFO_DATA).unwrap_or_default();
    let value = |kind| attributes(data).find(|(k, _)| *k == kind).map(|(_, v)| v);
    let id = |kind| value(kind).and_then(|v| u32_at(v, 0)).map_or(-1, u32::cast_signed);
    let is = |kind, flag| if value(kind).is_some_and(|v| v.first() == Some(&1)) { flag } else { 0 };
    let tap = value(TYPE).and_then(|v| v.first()) == Some(&(tun::TAP as u8));
    let kind = if tap { tun::TAP } else { tun::TUN };
    let flags = kind
        | (is(PI, tun::NO_PI) ^ tun::NO_PI)
        | is(HEADER, tun::VNET_HDR)
        | is(PERSISTENT, tun::PERSIST)
        | is(QUEUES, tun::MULTI_QUEUE);
    TunLinkEntry { flags, owner: id(OWNER), group: id(GROUP), vnethdr: NEW_HEADER, sndbuf: NEW_SEND_BUFFER }
}

/// Refuses what a new device would not have.
pub fn refuse(name: &str, link: &Message) -> Result<()> {
    match u16_at(&link.body, 2) {
        Some(packets) if !NEW.contains(&packets) => Err(Error::new(format!(
            "the network device {name} has packets of another kind ({packets}, TUNSETLINK), which --keep-network cannot keep"
        ))
        .remedy("remove it before the checkpoint, or leave --keep-network out")),
        _ => Ok(()),
    }
}

/// Makes one. Runs in its network namespace.
pub fn make(device: &NetDeviceEntry) -> Result<()> {
    let name = &device.name;
    let what = format!("cannot make the network device {name}");
    let link = device.tun.as_ref().ok_or_else(|| {
        Error::new(format!("the images do not say what the tun device {name} was made with"))
    })?;
    let file = std::fs::File::options().read(true).write(true).open("/dev/net/tun");
    let file = file
        .during(&what, || "open(\"/dev/net/tun\", O_RDWR)".into())
        .map_err(|e| e.remedy("the kernel must have tun: leave the network out with --empty-ns network"))?;
    tun::set_index(&file, device.ifindex)
        .during(&what, || format!("ioctl(_, TUNSETIFINDEX, {})", device.ifindex))?;
    tun::attach(&file, name, link.flags).during(&what, || format!("ioctl(_, TUNSETIFF, {name:?})"))?;
    if link.owner != -1 {
        tun::set_owner(&file, link.owner.cast_unsigned())
            .during(&what, || format!("ioctl(_, TUNSETOWNER, {})", link.owner))?;
    }
    if link.group != -1 {
        tun::set_group(&file, link.group.cast_unsigned())
            .during(&what, || format!("ioctl(_, TUNSETGROUP, {})", link.group))?;
    }
    tun::set_send_buffer(&file, link.sndbuf)
        .during(&what, || format!("ioctl(_, TUNSETSNDBUF, {})", link.sndbuf))?;
    tun::set_header(&file, link.vnethdr)
        .during(&what, || format!("ioctl(_, TUNSETVNETHDRSZ, {})", link.vnethdr))?;
    tun::set_persistent(&file, true).during(&what, || "ioctl(_, TUNSETPERSIST, 1)".into())
}
