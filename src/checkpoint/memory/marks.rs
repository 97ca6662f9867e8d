//! What has been put on a mapping that the image format has no place for: its name, its protection key, its seal.
//!
//! ```text
//!   maps     [anon:NAME], [anon_shmem:NAME]     prctl(PR_SET_VMA)
//!   smaps    ProtectionKey: N                   pkey_mprotect(2); which keys are taken, pkey_alloc(2) tells
//!   VmFlags  sl                                 mseal(2)
//!
//!   extension mappings   { process: { keys, marks: [{ start, end, name, key, sealed }] } }
//! ```
//!
//! A seal comes last: nothing can be done to a sealed mapping any more. Without names a process runs right; without keys
//! it would fault or fail, without seals it would be less safe than it has made itself: those are critical.
//!
//! The kernel takes a key for itself when something is mapped for execution alone: the lowest that is free. So all
//! others are taken before anything is mapped, and those that nobody had are given back in the end.

use std::collections::BTreeMap;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::VmaEntry;
use crate::checkpoint::memory::maps::{Mapping, VmFlags};
use crate::checkpoint::memory::vmas::Vma;
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::{Batch, Injection};

/// The name of this room's extension in stasis.img.
pub const EXTENSION: &str = "mappings";

const PR_SET_VMA: u64 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: u64 = 0;
const PKEY_DISABLE_ACCESS: u64 = 1;
/// Keys are 0 to 15; all memory has key 0.
const KEYS: u16 = 16;
const EXECUTE_ONLY: u32 = libc::PROT_EXEC.cast_unsigned();

/// What is on one mapping.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Mark {
    /// What the program calls it.
    pub name: Option<String>,
    /// Its protection key, if it is not 0.
    pub key: Option<u16>,
    /// It is sealed.
    pub sealed: bool,
}

impl Mark {
    /// What `maps` and `smaps` show of it.
    pub fn of(mapping: &Mapping, flags: VmFlags) -> Self {
        let name = [&b"[anon:"[..], b"[anon_shmem:"].iter().find_map(|p| mapping.name().strip_prefix(*p));
        let name = name.and_then(|name| name.strip_suffix(b"]"));
        Self {
            name: name.map(|name| String::from_utf8_lossy(name).into_owned()),
            key: Some(flags.key()).filter(|key| *key != 0),
            sealed: flags.has(b"sl"),
        }
    }
}

/// A mark and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Placed {
    start: u64,
    end: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<u16>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    sealed: bool,
}

/// The marks of a process.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// The keys that are taken: a bit each.
    #[serde(default)]
    keys: u16,
    #[serde(default)]
    marks: Vec<Placed>,
}

impl Marks {
    fn is_critical(&self) -> bool {
        self.keys != 0 || self.marks.iter().any(|mark| mark.sealed || mark.key.is_some())
    }

    /// The key that the kernel has taken for what may only be executed, as far as that can be told.
    fn execute_only(&self, vmas: &[VmaEntry]) -> Option<u16> {
        let prot = |mark: &Placed| vmas.iter().find(|vma| vma.start == mark.start).map(|vma| vma.prot);
        self.marks.iter().find(|mark| prot(mark) == Some(EXECUTE_ONLY)).and_then(|mark| mark.key)
    }
}

/// Records the marks of one process.
pub fn record(dump: &mut Dump<'_>, index: usize, found: &[Vma]) -> Result<()> {
    let Some(task) = dump.tasks.get_mut(index) else { return Ok(()) };
    let vpid = task.vpid.cast_unsigned();
    let keys = task.injection.as_mut().map_or(Ok(0), taken_keys)?;
    let placed = |vma: &Vma| {
        let Mark { name, key, sealed } = vma.mark.clone();
        let (start, end) = (vma.entry.start, vma.entry.end);
        Some(Placed { start, end, name, key, sealed }).filter(|_| vma.mark != Mark::default())
    };
    let marks = Marks { keys, marks: found.iter().filter_map(placed).collect() };
    if marks == Marks::default() {
        return Ok(());
    }
    let mut all = read(&dump.model)?;
    all.insert(vpid, marks);
    if all.values().any(Marks::is_critical) {
        dump.model.set_critical_extension(EXTENSION, &all)
    } else {
        dump.model.set_extension(EXTENSION, &all)
    }
}

/// What the images say of one process.
pub fn of(model: &Model, vpid: u32) -> Result<Marks> {
    Ok(read(model)?.remove(&vpid).unwrap_or_default())
}

fn read(model: &Model) -> Result<BTreeMap<u32, Marks>> {
    model.extension(EXTENSION)
}

/// What is lost of the images where the kernel lets memory have no names.
pub fn lost(model: &Model, can_name: bool) -> Result<Option<String>> {
    let all = read(model)?;
    let count = all.values().flat_map(|marks| &marks.marks).filter(|mark| mark.name.is_some()).count();
    let text = || {
        format!("the names of {count} mappings are lost: this kernel is built without CONFIG_ANON_VMA_NAME")
    };
    Ok((count > 0 && !can_name).then(text))
}

/// The keys that a process has: those that it does not get when it asks for all. It has what it had afterwards.
fn taken_keys(injection: &mut Injection) -> Result<u16> {
    let thread = injection.thread().clone();
    // Whoever takes a key changes its own rights to it.
    let before = thread.xstate()?;
    let mut batch = Batch::new();
    let calls: Vec<_> = (1..KEYS)
        .map(|_| {
            let call = batch.call(libc::SYS_pkey_alloc, &[0.into(), PKEY_DISABLE_ACCESS.into()]);
            batch.tolerate(call)
        })
        .collect();
    for call in &calls {
        let free = batch.call(libc::SYS_pkey_free, &[(*call).into()]);
        batch.tolerate(free);
    }
    let results = injection.run(&batch)?;
    if matches!(results.result(calls[0]), Err(Errno::EINVAL | Errno::ENOSYS | Errno::EPERM)) {
        return Ok(0);
    }
    let free =
        calls.iter().filter_map(|call| results.result(*call).ok()).fold(1, |free, key| free | 1 << key);
    if free != 1 {
        thread.set_xstate(&before)?;
    }
    Ok(!free)
}

/// Takes all keys but the one that the kernel is to take, before anything is mapped.
pub fn reserve(batch: &mut Batch, marks: &Marks, vmas: &[VmaEntry]) {
    if marks.keys == 0 {
        return;
    }
    batch.about("cannot take memory protection keys");
    for _ in 1..KEYS {
        let call = batch.call(libc::SYS_pkey_alloc, &[0.into(), 0.into()]);
        batch.tolerate(call);
    }
    if let Some(key) = marks.execute_only(vmas) {
        free(batch, key);
    }
}

fn free(batch: &mut Batch, key: u16) {
    let call = batch.call(libc::SYS_pkey_free, &[key.into()]);
    batch.tolerate(call);
}

/// Puts them back, when all else is done. `inherited`: the process may have keys of its parent.
pub fn restore(injection: &mut Injection, marks: &Marks, vmas: &[VmaEntry], inherited: bool) -> Result<()> {
    let mut batch = Batch::new();
    let own = marks.execute_only(vmas);
    for Placed { start, end, name, key, .. } in &marks.marks {
        let vma = vmas.iter().find(|vma| vma.start == *start && vma.end == *end);
        let vma = vma.ok_or_else(|| {
            Error::new(format!("the image has a mark of a mapping at {start:#x} that it does not have"))
        })?;
        let length = end - start;
        if let Some(name) = name {
            batch.about("cannot name memory");
            let name = batch.string(name.as_bytes());
            let args = [PR_SET_VMA.into(), PR_SET_VMA_ANON_NAME.into(), (*start).into(), length.into(), name];
            let call = batch.call(libc::SYS_prctl, &args);
            // A kernel without CONFIG_ANON_VMA_NAME, of which `lost` tells.
            batch.tolerate(call);
        }
        // What may only be executed has got its key already, where there are keys.
        if let Some(key) = key.filter(|key| vma.prot != EXECUTE_ONLY || Some(*key) != own) {
            batch.about("cannot give memory its protection key, which this processor or kernel may lack");
            let args = [(*start).into(), length.into(), vma.prot.into(), key.into()];
            batch.call(libc::SYS_pkey_mprotect, &args);
        }
    }
    if marks.keys != 0 || inherited {
        let spare = (1..KEYS).filter(|key| marks.keys & 1 << key == 0);
        spare.for_each(|key| free(&mut batch, key));
    }
    for Placed { start, end, .. } in marks.marks.iter().filter(|mark| mark.sealed) {
        batch.about("cannot seal memory, for which the kernel must have mseal");
        batch.call(libc::SYS_mseal, &[(*start).into(), (end - start).into(), 0.into()]);
    }
    if batch.is_empty() { Ok(()) } else { injection.run(&batch).map(drop) }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn mapping(name: &str) -> Mapping {
        let name = OsString::from(name);
        Mapping {
            start: 0x1000,
            end: 0x2000,
            prot: 3,
            shared: false,
            offset: 0,
            device: (0, 0),
            inode: 0,
            name,
        }
    }

    #[test]
    fn marks_are_what_maps_shows() {
        let name = |text| Mark::of(&mapping(text), VmFlags::default()).name;
        assert_eq!(name("[anon: a name]").as_deref(), Some(" a name"));
        assert_eq!(name("[anon_shmem:x]").as_deref(), Some("x"));
        assert_eq!((name("[heap]"), name("/[anon:x]")), (None, None));
        assert!(Mark::of(&mapping(""), VmFlags::parse(b"rd sl")).sealed);
    }

    #[test]
    fn names_alone_are_not_critical() {
        let mark = Placed { start: 1, end: 2, name: Some("x".into()), key: None, sealed: false };
        let with = |change: fn(&mut Placed)| {
            let mut mark = mark.clone();
            change(&mut mark);
            Marks { keys: 0, marks: vec![mark] }.is_critical()
        };
        assert!(!with(|_| ()) && with(|mark| mark.sealed = true) && with(|mark| mark.key = Some(3)));
        assert!(Marks { keys: 2, marks: vec![] }.is_critical());
    }

    #[test]
    fn lost_names_are_counted() {
        let mut model = Model::default();
        let text =
            r#"{"marks":[{"start":4096,"end":8192,"name":"x"},{"start":8192,"end":12288,"sealed":true}]}"#;
        let marks: Marks = serde_json::from_str(text).unwrap();
        assert_eq!(lost(&model, false).unwrap(), None);
        model.set_extension(EXTENSION, &BTreeMap::from([(1, marks)])).unwrap();
        assert_eq!(lost(&model, true).unwrap(), None);
        assert!(lost(&model, false).unwrap().is_some_and(|text| text.contains("of 1 mappings")));
    }

    #[test]
    fn a_mark_of_no_mapping_is_refused() {
        let text = r#"{"marks":[{"start":4096,"end":8192,"name":"x"}]}"#;
        let marks: Marks = serde_json::from_str(text).unwrap();
        assert_eq!((marks.keys, marks.execute_only(&[])), (0, None));
        let vma = VmaEntry { start: 4096, end: 8192, prot: 4, ..VmaEntry::default() };
        let marks = Marks { marks: vec![Placed { key: Some(2), ..marks.marks[0].clone() }], keys: 4 };
        assert_eq!(marks.execute_only(&[vma]), Some(2));
    }
}
