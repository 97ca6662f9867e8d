//! bpf(2), as far as copies of maps need it.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::{Attr, bpf};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_FREEZE: libc::c_long = 22;

/// The file may only look elements up.
pub const BPF_F_RDONLY: u32 = 1 << 3;
/// The file may only change elements.
pub const BPF_F_WRONLY: u32 = 1 << 4;

/// What a map is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Info {
    /// BPF_MAP_TYPE_*.
    pub kind: u32,
    /// Its number on this host.
    pub id: u32,
    /// Bytes of a key.
    pub key: u32,
    /// Bytes of a value.
    pub value: u32,
    /// Most elements.
    pub entries: u32,
    /// BPF_F_*, but not of its files.
    pub flags: u32,
    /// BPF_OBJ_NAME_LEN with the zero.
    pub name: [u8; 16],
    /// The network device that it belongs to.
    pub ifindex: u32,
    /// The types of its elements.
    pub btf: u32,
    /// What its kind makes of it.
    pub extra: u64,
}

/// What the map behind a descriptor is.
pub fn info(map: impl AsFd) -> Result<Info, Errno> {
    // type, id, key_size, value_size, max_entries, map_flags, name[16], ifindex, vmlinux value type, netns dev (64),
    // netns ino (64), btf_id, btf key type, btf value type, vmlinux, map_extra (64)
    let mut told = [0u32; 22];
    let mut attr = Attr::new()
        .word(0, map.as_fd().as_raw_fd() as u32)
        .word(1, size_of_val(&told) as u32)
        .pointer(2, told.as_mut_ptr());
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    let mut name = [0; 16];
    for (to, word) in name.chunks_exact_mut(4).zip(&told[6..10]) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(Info {
        kind: told[0],
        id: told[1],
        key: told[2],
        value: told[3],
        entries: told[4],
        flags: told[5],
        name,
        ifindex: told[10],
        btf: told[16],
        extra: u64::from(told[20]) | u64::from(told[21]) << 32,
    })
}

/// A new map, that of no device and without types.
pub fn create(info: &Info) -> Result<OwnedFd, Errno> {
    // map_type, key_size, value_size, max_entries, map_flags, inner_map_fd, numa_node, map_name[16], ifindex, btf_fd,
    // btf key type, btf value type, vmlinux value type, map_extra (64)
    let mut attr = Attr::new()
        .word(0, info.kind)
        .word(1, info.key)
        .word(2, info.value)
        .word(3, info.entries)
        .word(4, info.flags)
        .word(16, info.extra as u32)
        .word(17, (info.extra >> 32) as u32);
    for (to, bytes) in attr.0[7..11].iter_mut().zip(info.name.chunks_exact(4)) {
        *to = bytes.try_into().map_or(0, u32::from_ne_bytes);
    }
    let fd = bpf(BPF_MAP_CREATE, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Another open file of a map; `flags` are BPF_F_RDONLY or BPF_F_WRONLY.
pub fn open(id: u32, flags: u32) -> Result<OwnedFd, Errno> {
    let fd = bpf(BPF_MAP_GET_FD_BY_ID, &mut Attr::new().word(0, id).word(2, flags))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The key that follows one; the first without one. `size` is that of the map's keys.
pub fn next_key(map: impl AsFd, key: Option<&[u8]>, size: u32) -> Result<Vec<u8>, Errno> {
    let mut next = vec![0u8; size as usize];
    if key.is_some_and(|key| key.len() != next.len()) {
        return Err(Errno::EINVAL);
    }
    let mut attr = Attr::new()
        .word(0, map.as_fd().as_raw_fd() as u32)
        .pointer(2, key.map_or(std::ptr::null(), <[u8]>::as_ptr))
        .pointer(4, next.as_mut_ptr());
    bpf(BPF_MAP_GET_NEXT_KEY, &mut attr)?;
    Ok(next)
}

/// The value under a key; `size` is that of the map's values.
pub fn lookup(map: impl AsFd, key: &[u8], size: u32) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0u8; size as usize];
    let mut attr = Attr::new()
        .word(0, map.as_fd().as_raw_fd() as u32)
        .pointer(2, key.as_ptr())
        .pointer(4, value.as_mut_ptr());
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr)?;
    Ok(value)
}

/// Sets a value under a key, both of the sizes that the map has.
pub fn update(map: impl AsFd, key: &[u8], value: &[u8]) -> Result<(), Errno> {
    let mut attr = Attr::new()
        .word(0, map.as_fd().as_raw_fd() as u32)
        .pointer(2, key.as_ptr())
        .pointer(4, value.as_ptr());
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Programs outside the kernel can change it no more.
pub fn freeze(map: impl AsFd) -> Result<(), Errno> {
    bpf(BPF_MAP_FREEZE, &mut Attr::new().word(0, map.as_fd().as_raw_fd() as u32)).map(drop)
}
