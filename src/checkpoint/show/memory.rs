//! Address spaces, and how much of each mapping the images have.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::{Serialize, Serializer};

use super::size;
use crate::checkpoint::image::{ImageDir, VmaEntry, vma};
use crate::checkpoint::memory::pagemap::{self, Run};
use crate::checkpoint::model::Model;

/// The memory of one process.
#[derive(Debug, Serialize)]
pub struct Space {
    /// The process.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// Bytes that are mapped.
    pub mapped_bytes: u64,
    /// Bytes in this set.
    pub saved_bytes: u64,
    /// Bytes in earlier sets.
    pub parent_bytes: u64,
    /// Its mappings.
    pub mappings: Vec<Mapping>,
}

/// One mapping.
#[derive(Debug, Serialize)]
pub struct Mapping {
    /// First byte.
    #[serde(serialize_with = "hex")]
    pub start: u64,
    /// First byte behind.
    #[serde(serialize_with = "hex")]
    pub end: u64,
    /// As /proc/PID/maps shows them: `rwxp`.
    pub permissions: String,
    /// What it is.
    pub kind: &'static str,
    /// The file, and where in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Where in the file.
    pub offset: u64,
    /// Bytes of it in the images.
    pub saved_bytes: u64,
}

/// Paths of files by id.
type Paths = BTreeMap<u64, String>;

/// Numbers that JSON cannot hold.
fn hex<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format!("{number:#x}"))
}

/// The memory of every process that has any.
pub fn memory(images: &ImageDir, model: &Model) -> Vec<Space> {
    let paths: Paths =
        model.files.iter().filter_map(|f| Some((u64::from(f.id), super::files::name(f)?))).collect();
    let mut shared = BTreeMap::new();
    let space = |(&pid, mm): (&u32, &crate::checkpoint::image::MmEntry)| {
        let runs = pagemap::open(images, &pagemap::of_task(pid)).map(|p| p.runs).unwrap_or_default();
        let mappings: Vec<Mapping> = mm
            .vmas
            .iter()
            .filter(|entry| entry.status & vma::GUARD == 0)
            .map(|entry| {
                let stack = (entry.start..entry.end).contains(&mm.mm_start_stack);
                let mapping = mapping(images, &paths, entry, &runs, &mut shared);
                if stack { Mapping { kind: "stack", ..mapping } } else { mapping }
            })
            .collect();
        let of = |here: bool| runs.iter().filter(|r| (r.file == 0) == here).map(|r| length(&r.range)).sum();
        Space {
            pid,
            name: super::comm(model, pid),
            mapped_bytes: mappings.iter().map(|m| m.end.saturating_sub(m.start)).sum(),
            saved_bytes: of(true),
            parent_bytes: of(false),
            mappings,
        }
    };
    model.mm.iter().map(space).collect()
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

fn mapping(
    images: &ImageDir,
    paths: &Paths,
    entry: &VmaEntry,
    runs: &[Run],
    known: &mut BTreeMap<u64, Vec<Run>>,
) -> Mapping {
    let has = |bits: u32| entry.status & bits != 0;
    let saved = match has(vma::ANON_SHARED | vma::SYSVIPC | vma::MEMFD) {
        // Once for all who map it.
        true => {
            let pages = known.entry(entry.shmid).or_insert_with(|| {
                pagemap::open(images, &pagemap::of_shared(entry.shmid)).map(|p| p.runs).unwrap_or_default()
            });
            let length = entry.end.saturating_sub(entry.start);
            bytes_in(pages, &(entry.pgoff..entry.pgoff.saturating_add(length)))
        }
        false => bytes_in(runs, &(entry.start..entry.end)),
    };
    let file = has(vma::FILE_PRIVATE | vma::FILE_SHARED);
    Mapping {
        start: entry.start,
        end: entry.end,
        permissions: permissions(entry),
        kind: kind(entry.status),
        file: file.then(|| paths.get(&entry.shmid).cloned()).flatten(),
        offset: entry.pgoff,
        saved_bytes: saved,
    }
}

/// How much of a range the images have. Runs lie in order.
fn bytes_in(runs: &[Run], range: &Range<u64>) -> u64 {
    let first = runs.partition_point(|run| run.range.end <= range.start);
    let inside = runs[first..].iter().take_while(|run| run.range.start < range.end);
    inside.map(|run| length(&(run.range.start.max(range.start)..run.range.end.min(range.end)))).sum()
}

fn permissions(entry: &VmaEntry) -> String {
    let prot = entry.prot.cast_signed();
    let bit = |bit, letter| if prot & bit != 0 { letter } else { '-' };
    let shared = if entry.flags.cast_signed() & libc::MAP_SHARED != 0 { 's' } else { 'p' };
    [bit(libc::PROT_READ, 'r'), bit(libc::PROT_WRITE, 'w'), bit(libc::PROT_EXEC, 'x'), shared]
        .iter()
        .collect()
}

fn kind(status: u32) -> &'static str {
    let kinds = [
        (vma::VDSO, "vdso"),
        (vma::VVAR, "vvar"),
        (vma::VSYSCALL, "vsyscall"),
        (vma::UPROBES, "uprobes"),
        (vma::AIORING, "aio ring"),
        (vma::SHSTK, "shadow stack"),
        (vma::HEAP, "heap"),
        (vma::STACK, "stack"),
        (vma::SYSVIPC, "System V shared memory"),
        (vma::MEMFD, "memfd"),
        (vma::SOCKET, "packet socket"),
        (vma::FILE_PRIVATE, "file"),
        (vma::FILE_SHARED, "file"),
        (vma::ANON_SHARED, "shared memory"),
        (vma::ANON_PRIVATE, "anonymous"),
    ];
    kinds.iter().find(|(bit, _)| status & bit != 0).map_or("unknown", |(_, name)| name)
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parent = match self.parent_bytes {
            0 => String::new(),
            bytes => format!(", {} in earlier sets", size(bytes)),
        };
        let (mapped, saved) = (size(self.mapped_bytes), size(self.saved_bytes));
        writeln!(f, "{} {}: {mapped} mapped, {saved} here{parent}", self.pid, self.name)?;
        for m in &self.mappings {
            let what = m
                .file
                .as_deref()
                .map_or_else(|| format!("[{}]", m.kind), |path| format!("{path} +{:#x}", m.offset));
            writeln!(
                f,
                "  {:016x}-{:016x} {} {:>10}  {what}",
                m.start,
                m.end,
                m.permissions,
                size(m.saved_bytes)
            )?;
        }
        Ok(())
    }
}
