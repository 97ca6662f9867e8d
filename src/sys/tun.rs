//! tun(4): descriptors that are the other end of a network device, and what ethtool(8) shows of such a device.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::socket::socket;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOWNER: libc::c_ulong = 0x4004_54cc;
const TUNSETGROUP: libc::c_ulong = 0x4004_54ce;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNGETSNDBUF: libc::c_ulong = 0x8004_54d3;
const TUNSETSNDBUF: libc::c_ulong = 0x4004_54d4;
const TUNGETVNETHDRSZ: libc::c_ulong = 0x8004_54d7;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUNSETIFINDEX: libc::c_ulong = 0x4004_54da;
const TUNGETFILTER: libc::c_ulong = 0x8010_54db;
const TUNSETVNETLE: libc::c_ulong = 0x4004_54dc;
const TUNGETVNETLE: libc::c_ulong = 0x8004_54dd;
const TUNSETVNETBE: libc::c_ulong = 0x4004_54de;
const TUNGETVNETBE: libc::c_ulong = 0x8004_54df;
const TUNSETCARRIER: libc::c_ulong = 0x4004_54e2;
const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;

/// Packets of the network layer.
pub const TUN: u32 = 0x1;
/// Packets of the link layer, and not of the network layer.
pub const TAP: u32 = 0x2;
/// The device outlives its descriptors.
pub const PERSIST: u32 = 0x800;
/// This descriptor's queue takes no part.
const DETACH_QUEUE: u32 = 0x400;
/// What a descriptor is attached with.
pub const MODES: u32 = TUN | TAP | NAPI | MULTI_QUEUE | NO_PI | 0x2000 | VNET_HDR;
/// As many descriptors as there are queues.
pub const MULTI_QUEUE: u32 = 0x100;
/// Packets without their protocol before them. What is told by TUNGETIFF may mean by this bit that nothing filters.
pub const NO_PI: u32 = 0x1000;
/// Packets with a `struct virtio_net_hdr` before them.
pub const VNET_HDR: u32 = 0x4000;
/// Modes that only TUNGETIFF tells: NAPI, NAPI_FRAGS.
pub const NAPI: u32 = 0x10 | 0x20;

/// `struct ifreq` as these requests use it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// What a descriptor is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The device.
    pub name: String,
    /// NAPI, as far as it is among its modes.
    pub napi: u32,
    /// The queue is detached.
    pub detached: bool,
}

fn get<T>(fd: impl AsFd, request: libc::c_ulong, mut value: T) -> nix::Result<T> {
    // SAFETY: private; every caller below passes the type that its request fills.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

fn set<T>(fd: impl AsFd, request: libc::c_ulong, value: &T) -> nix::Result<()> {
    // SAFETY: private; every caller below passes the type that its request reads.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw const *value) }).map(drop)
}

fn plain(fd: impl AsFd, request: libc::c_ulong, argument: libc::c_ulong) -> nix::Result<i32> {
    // SAFETY: private; every caller below passes a request whose argument is a number.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, argument) })
}

impl Request {
    fn new(name: &str, flags: u32) -> nix::Result<Self> {
        let mut request = Self { name: [0; 16], flags: flags as u16, rest: [0; 22] };
        let room =
            request.name.get_mut(..name.len()).filter(|room| room.len() < 16).ok_or(Errno::ENAMETOOLONG)?;
        room.copy_from_slice(name.as_bytes());
        Ok(request)
    }
}

/// What a descriptor is attached to, if it is.
pub fn attached(fd: impl AsFd) -> nix::Result<Option<Attached>> {
    match get(fd, TUNGETIFF, Request::new("", 0)?) {
        Err(Errno::EBADFD) => Ok(None),
        Err(errno) => Err(errno),
        Ok(told) => {
            let name = told.name.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = std::str::from_utf8(name).map_err(|_| Errno::EILSEQ)?.to_owned();
            let flags = u32::from(told.flags);
            Ok(Some(Attached { name, napi: flags & NAPI, detached: flags & DETACH_QUEUE != 0 }))
        }
    }
}

/// Attaches a descriptor to a device, in the network namespace that the descriptor was opened in. One that is not there
/// is made.
pub fn attach(fd: impl AsFd, name: &str, modes: u32) -> nix::Result<()> {
    set(fd, TUNSETIFF, &Request::new(name, modes & MODES)?)
}

/// Gives up the queue of a descriptor, which stays attached.
pub fn detach_queue(fd: impl AsFd) -> nix::Result<()> {
    set(fd, TUNSETQUEUE, &Request::new("", DETACH_QUEUE)?)
}

/// The number that the device to be made will have.
pub fn set_index(fd: impl AsFd, index: u32) -> nix::Result<()> {
    set(fd, TUNSETIFINDEX, &index)
}

/// Whether the device outlives its descriptors.
pub fn set_persistent(fd: impl AsFd, on: bool) -> nix::Result<()> {
    plain(fd, TUNSETPERSIST, libc::c_ulong::from(on)).map(drop)
}

/// Who may attach to the device beside the administrator.
pub fn set_owner(fd: impl AsFd, uid: u32) -> nix::Result<()> {
    plain(fd, TUNSETOWNER, uid.into()).map(drop)
}

/// A group that may.
pub fn set_group(fd: impl AsFd, gid: u32) -> nix::Result<()> {
    plain(fd, TUNSETGROUP, gid.into()).map(drop)
}

/// Most bytes on their way to the network.
pub fn send_buffer(fd: impl AsFd) -> nix::Result<u32> {
    get(fd, TUNGETSNDBUF, 0)
}

/// Sets it.
pub fn set_send_buffer(fd: impl AsFd, bytes: u32) -> nix::Result<()> {
    set(fd, TUNSETSNDBUF, &bytes)
}

/// Length of what stands before packets with VNET_HDR.
pub fn header(fd: impl AsFd) -> nix::Result<u32> {
    get(fd, TUNGETVNETHDRSZ, 0)
}

/// Sets it.
pub fn set_header(fd: impl AsFd, bytes: u32) -> nix::Result<()> {
    set(fd, TUNSETVNETHDRSZ, &bytes)
}

/// Whether its numbers were asked to be little-endian, and big-endian. The kernel may not know of the latter.
pub fn endian(fd: impl AsFd + Copy) -> nix::Result<[bool; 2]> {
    let big = match get(fd, TUNGETVNETBE, 0i32) {
        Err(Errno::EINVAL) => 0,
        told => told?,
    };
    Ok([get(fd, TUNGETVNETLE, 0i32)? != 0, big != 0])
}

/// Asks for it.
pub fn set_endian(fd: impl AsFd + Copy, [little, big]: [bool; 2]) -> nix::Result<()> {
    if little {
        set(fd, TUNSETVNETLE, &1i32)?;
    }
    if big {
        set(fd, TUNSETVNETBE, &1i32)?;
    }
    Ok(())
}

/// Whether a program filters what a tap receives.
pub fn is_filtered(fd: impl AsFd) -> nix::Result<bool> {
    // `struct sock_fprog`: a length of two bytes, and where the program is.
    get(fd, TUNGETFILTER, [0u64; 2]).map(|told| told[0] & 0xffff != 0)
}

/// Says that the cable is out, or in again.
pub fn set_carrier(fd: impl AsFd, on: bool) -> nix::Result<()> {
    set(fd, TUNSETCARRIER, &i32::from(on))
}

/// The network namespace that the device is in now. Since Linux 5.2.
pub fn device_namespace(fd: impl AsFd) -> nix::Result<OwnedFd> {
    let door = plain(fd, TUNGETDEVNETNS, 0)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(door) })
}

/// Sets what the program takes over from the kernel: TUN_F_*.
pub fn set_offload(fd: impl AsFd, what: u32) -> nix::Result<()> {
    plain(fd, TUNSETOFFLOAD, what.into()).map(drop)
}

/// Features of a device and the TUN_F_* that they come of.
const FEATURES: [(&[u8], u32); 7] = [
    (b"tx-checksum-ip-generic", 0x1),
    (b"tx-tcp-segmentation", 0x2),
    (b"tx-tcp6-segmentation", 0x4),
    (b"tx-tcp-ecn-segmentation", 0x8),
    (b"tx-udp-segmentation", 0x20 | 0x40),
    (b"tx-udp_tnl-segmentation", 0x80),
    (b"tx-udp_tnl-csum-segmentation", 0x100),
];

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETH_SS_FEATURES: u32 = 4;
/// Bytes of a name.
const NAME: usize = 32;

/// `struct ifreq` with a pointer.
#[repr(C)]
struct Pointing {
    name: [u8; 16],
    data: *mut u32,
    rest: [u8; 16],
}

fn ethtool(socket: &OwnedFd, name: &str, data: &mut [u32]) -> nix::Result<()> {
    let request = Pointing { name: Request::new(name, 0)?.name, data: data.as_mut_ptr(), rest: [0; 16] };
    // SAFETY: private; every caller below gives its request the room that it fills.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw const request) }).map(drop)
}

/// What TUNSETOFFLOAD was last given for a device of this thread's network namespace.
pub fn offload(name: &str) -> nix::Result<u32> {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // command, reserved, mask of sets (64), numbers of strings
    let mut count = [ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0, 0];
    ethtool(&socket, name, &mut count)?;
    let features = count[4] as usize;
    // command, set, count, names
    let mut names = vec![0u32; 3 + features * NAME / 4];
    names[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count[4]]);
    ethtool(&socket, name, &mut names)?;
    // command, count, then four words for every 32 features: available, requested, active, never changed
    let blocks = features.div_ceil(32);
    let mut told = vec![0u32; 2 + 4 * blocks];
    told[..2].copy_from_slice(&[ETHTOOL_GFEATURES, blocks as u32]);
    ethtool(&socket, name, &mut told)?;
    let names: Vec<u8> = names[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut what = 0;
    for (n, text) in names.chunks_exact(NAME).enumerate() {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let active = told.get(2 + n / 32 * 4 + 2).is_some_and(|word| word >> (n % 32) & 1 != 0);
        what |=
            FEATURES.iter().filter(|(name, _)| active && *name == text).map(|(_, bits)| bits).sum::<u32>();
    }
    Ok(what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;

    #[test]
    fn a_device_tells_what_it_was_given() {
        if !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("SKIPPED: there is no /dev/net/tun");
            return;
        }
        in_child(libc::CLONE_NEWNET, || {
            let open = || std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
            let (first, second) = (open(), open());
            assert_eq!(attached(&first).unwrap(), None);
            set_index(&first, 77).unwrap();
            let modes = TAP | MULTI_QUEUE | NO_PI | VNET_HDR;
            attach(&first, "some", modes).unwrap();
            attach(&second, "some", modes).unwrap();
            assert_eq!(crate::sys::route::index("some"), Ok(77));
            detach_queue(&second).unwrap();
            let told = |file| attached(file).unwrap().unwrap();
            let some = Attached { name: "some".into(), napi: 0, detached: false };
            assert_eq!((told(&first), told(&second)), (some.clone(), Attached { detached: true, ..some }));
            assert_eq!(offload("some").unwrap(), 0);
            set_offload(&first, 0x1 | 0x2 | 0x4).unwrap();
            assert_eq!(offload("some").unwrap(), 0x7);
            set_header(&first, 12).unwrap();
            set_send_buffer(&first, 54321).unwrap();
            set_endian(&first, [true, false]).unwrap();
            assert_eq!((header(&second).unwrap(), send_buffer(&first).unwrap()), (12, 54321));
            assert_eq!(endian(&first).unwrap(), [true, false]);
            assert!(!is_filtered(&first).unwrap());
            set_persistent(&first, true).unwrap();
            drop((first, second));
            assert_eq!(crate::sys::route::index("some"), Ok(77));
        });
    }
}
