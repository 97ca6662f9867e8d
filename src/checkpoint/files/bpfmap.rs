//! Maps of BPF: hash tables, arrays and longest-prefix tables of a program that shares them with nobody.
//!
//! ```text
//!   BpfmapFileEntry (one an open file description: flags) ──map_id──> BpfmapDataEntry │ keys │ values   bpfmap-data.img
//! ```
//!
//! Values that the kernel understands (maps, programs, rings) are refused, as are maps with types (BTF), which may hold
//! locks and timers, and those of a network device. Who made a map needs CAP_BPF; so a container without it gets none.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use oci_spec::runtime::{Capability, LinuxNamespaceType, Spec};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::image::{BpfmapDataEntry, BpfmapFileEntry, FdTypes, FileEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::bpf::map::{self, BPF_F_RDONLY, BPF_F_WRONLY, Info};

const READ: &str = "cannot read a BPF map";
const MAKE: &str = "cannot make a BPF map";
/// Hash table, array, hash table that forgets, table of prefixes.
const KINDS: [u32; 4] = [1, 2, 9, 11];
/// NO_PREALLOC, NO_COMMON_LRU, ZERO_SEED, RDONLY_PROG, WRONLY_PROG, MMAPABLE.
const FLAGS: u32 = 1 | 1 << 1 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10;
/// Most bytes of keys and values.
const LARGEST: u64 = 256 << 20;

/// A map.
pub fn is(live: &Live) -> bool {
    live.is_anon("bpf-map")
}

/// Refuses maps that are more than keys and values.
pub fn check(live: &Live) -> Result<()> {
    info(live).and_then(|info| refuse(&info)).map_err(|e| live.name(e))
}

fn info(live: &Live) -> Result<Info> {
    map::info(&live.file).during(READ, || "bpf(BPF_OBJ_GET_INFO_BY_FD)".into())
}

fn refuse(info: &Info) -> Result<()> {
    let what = if !KINDS.contains(&info.kind) {
        format!("of type {}", info.kind)
    } else if info.flags & !FLAGS != 0 {
        format!("with flags {:#x}", info.flags & !FLAGS)
    } else if info.btf != 0 {
        "with types (BTF)".to_owned()
    } else if info.ifindex != 0 {
        "of a network device".to_owned()
    } else if u64::from(info.entries) * (u64::from(info.key) + u64::from(info.value)) > LARGEST {
        format!("of {} elements", info.entries)
    } else {
        return Ok(());
    };
    Err(Error::new(format!("a BPF map {what} cannot be checkpointed"))
        .remedy("let the program close it; hash tables, arrays and tables of prefixes can be"))
}

/// Records a descriptor and, once for each map, what it holds.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    check(live)?;
    let info = info(live)?;
    if dump.model.bpf_data.iter().all(|(data, _)| data.map_id != info.id) {
        dump.model.bpf_data.push(contents(&info).map_err(|e| live.name(e))?);
    }
    let name: Vec<u8> = info.name.iter().copied().take_while(|byte| *byte != 0).collect();
    let number = |key| live.info.number(key, 10);
    let bpf = BpfmapFileEntry {
        id,
        flags: live.info.flags,
        pos: live.info.pos,
        fown: live.fown(&dump.files.pids)?,
        map_type: info.kind,
        key_size: info.key,
        value_size: info.value,
        map_id: info.id,
        max_entries: info.entries,
        map_flags: info.flags,
        memlock: number("memlock")?,
        frozen: number("frozen")? != 0,
        map_name: String::from_utf8_lossy(&name).into_owned(),
        ifindex: 0,
        mnt_id: None,
        map_extra: Some(info.extra),
    };
    let r#type = FdTypes::Bpfmap as i32;
    dump.model.files.push(FileEntry { r#type, id, bpf: Some(bpf), ..FileEntry::default() });
    Ok(())
}

/// Keys, then values. What a program of BPF takes out meanwhile is left out.
fn contents(info: &Info) -> Result<(BpfmapDataEntry, Vec<u8>)> {
    // The container's own descriptor may be for writing only.
    let file = map::open(info.id, BPF_F_RDONLY).during(READ, || "bpf(BPF_MAP_GET_FD_BY_ID)".into())?;
    let mut elements = BTreeMap::new();
    let mut order = Vec::new();
    let mut last: Option<Vec<u8>> = None;
    // The key after one that has gone meanwhile is the first.
    for step in 0_u64.. {
        let key = match map::next_key(&file, last.as_deref(), info.key) {
            Err(Errno::ENOENT) => break,
            key => key.during(READ, || "bpf(BPF_MAP_GET_NEXT_KEY)".into())?,
        };
        match map::lookup(&file, &key, info.value) {
            Err(Errno::ENOENT) => {}
            value => {
                let value = value.during(READ, || "bpf(BPF_MAP_LOOKUP_ELEM)".into())?;
                if elements.insert(key.clone(), value).is_none() {
                    order.push(key.clone());
                }
            }
        }
        if order.len() > info.entries as usize || step > 4 * u64::from(info.entries) {
            return Err(Error::new(format!("{READ}: it changes while it is read"))
                .remedy("let the program of BPF that fills it pause"));
        }
        last = Some(key);
    }
    let values = order.iter().filter_map(|key| elements.get(key)).flatten();
    let data: Vec<u8> = order.iter().flatten().chain(values).copied().collect();
    let count = order.len() as u32;
    let bytes = |size: u32| count.checked_mul(size).ok_or_else(|| Error::new(format!("{READ}: too large")));
    let (keys_bytes, values_bytes) = (bytes(info.key)?, bytes(info.value)?);
    Ok((BpfmapDataEntry { map_id: info.id, keys_bytes, values_bytes, count }, data))
}

/// Makes maps with what they held.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let mut made: BTreeMap<u32, OwnedFd> = BTreeMap::new();
    let allowed = is_allowed(&opener.restore.target.spec);
    for e in opener.of(FdTypes::Bpfmap).filter_map(|e| e.bpf.as_ref()) {
        if !allowed {
            return Err(Error::new("the images have a BPF map, and the container has not CAP_BPF")
                .remedy("allow CAP_BPF or CAP_SYS_ADMIN in config.json"));
        }
        if let std::collections::btree_map::Entry::Vacant(place) = made.entry(e.map_id) {
            let data = opener.restore.model.bpf_data.iter().find(|(data, _)| data.map_id == e.map_id);
            place.insert(make(e, data)?);
        }
        let Some(whole) = made.get(&e.map_id) else { continue };
        let access = match e.flags & libc::O_ACCMODE.cast_unsigned() {
            0 => BPF_F_RDONLY,
            1 => BPF_F_WRONLY,
            _ => 0,
        };
        let told = map::info(whole).during(MAKE, || "bpf(BPF_OBJ_GET_INFO_BY_FD)".into())?;
        let file = map::open(told.id, access).during(MAKE, || "bpf(BPF_MAP_GET_FD_BY_ID)".into())?;
        opener.put_owned(e.id, file, &e.fown, e.flags);
    }
    Ok(())
}

/// Could a program of the container have made a map?
fn is_allowed(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let user = namespaces.is_some_and(|all| all.iter().any(|n| n.typ() == LinuxNamespaceType::User));
    let capabilities = spec.process().as_ref().and_then(|p| p.capabilities().as_ref());
    let bounding = capabilities.and_then(|c| c.bounding().as_ref());
    let needed = [Capability::Bpf, Capability::SysAdmin];
    !user && bounding.is_some_and(|set| needed.iter().any(|cap| set.contains(cap)))
}

fn make(e: &BpfmapFileEntry, data: Option<&(BpfmapDataEntry, Vec<u8>)>) -> Result<OwnedFd> {
    let mut name = [0; 16];
    for (to, byte) in name[..15].iter_mut().zip(e.map_name.bytes()) {
        *to = byte;
    }
    let info = Info {
        kind: e.map_type,
        key: e.key_size,
        value: e.value_size,
        entries: e.max_entries,
        flags: e.map_flags,
        name,
        ifindex: e.ifindex,
        extra: e.map_extra.unwrap_or(0),
        ..Info::default()
    };
    refuse(&info)?;
    let file = map::create(&info).during(MAKE, || format!("bpf(BPF_MAP_CREATE, type {})", e.map_type))?;
    if let Some((data, bytes)) = data.filter(|(data, _)| data.count != 0) {
        fill(file.as_fd(), &info, data, bytes)?;
    }
    if e.frozen {
        map::freeze(&file).during(MAKE, || "bpf(BPF_MAP_FREEZE)".into())?;
    }
    Ok(file)
}

fn fill(file: impl AsFd + Copy, info: &Info, data: &BpfmapDataEntry, bytes: &[u8]) -> Result<()> {
    let (key, value) = (info.key as usize, info.value as usize);
    let wrong = || Error::new(format!("the images have malformed elements of BPF map {}", data.map_id));
    let (keys, values) = bytes.split_at_checked(data.keys_bytes as usize).ok_or_else(wrong)?;
    let count = data.count as usize;
    let fits = |bytes: &[u8], size: usize| size != 0 && count.checked_mul(size) == Some(bytes.len());
    if !fits(keys, key) || !fits(values, value) {
        return Err(wrong());
    }
    for (key, value) in keys.chunks_exact(key).zip(values.chunks_exact(value)) {
        map::update(file, key, value).during(MAKE, || "bpf(BPF_MAP_UPDATE_ELEM)".into())?;
    }
    Ok(())
}
