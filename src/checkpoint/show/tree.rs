//! Processes and threads.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::FileExt;

use serde::Serialize;

use super::clean;
use crate::checkpoint::image::{ImageDir, MmEntry, PstreeEntry};
use crate::checkpoint::memory::pagemap;
use crate::checkpoint::model::Model;
use crate::checkpoint::task::process::{DEAD, STOPPED};

/// One process. Those of a tree stand in one list, each before its children: images may have a chain of processes as long
/// as they like, and what is nested is walked by recursion when it is printed, read and dropped.
#[derive(Debug, Serialize)]
pub struct Process {
    /// Its id inside the container.
    pub pid: u32,
    /// Its parent; 0 for a root.
    pub ppid: u32,
    /// Its process group.
    pub pgid: u32,
    /// Its session.
    pub sid: u32,
    /// Its name.
    pub name: String,
    /// What it was doing: running, stopped, zombie.
    pub state: &'static str,
    /// Its arguments, where the images have that memory.
    pub arguments: Vec<String>,
    /// Its executable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub executable: Option<String>,
    /// Its user, as the container sees it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Its group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Threads beside the first, with their names.
    pub threads: BTreeMap<u32, String>,
    /// How many parents it has.
    #[serde(skip)]
    depth: usize,
}

/// More of an argument area than anybody reads.
const ARGUMENTS_MAX: u64 = 64 << 10;
/// Deeper processes are not indented further: the lines of a long chain would be a square.
const DEPTH_MAX: usize = 64;
/// Another state of a process that has ended, in CRIU's images.
const ZOMBIE: u32 = 6;

/// The tree of a set that has been validated: every parent is among its processes.
pub fn tree(images: &ImageDir, model: &Model) -> Vec<Process> {
    let mut children: BTreeMap<u32, Vec<&PstreeEntry>> = BTreeMap::new();
    for entry in model.pstree.iter().rev() {
        children.entry(entry.ppid).or_default().push(entry);
    }
    let mut roots = children.remove(&0).unwrap_or_default();
    roots.sort_by_key(|entry| std::cmp::Reverse(entry.pid));
    let mut left: Vec<(&PstreeEntry, usize)> = roots.into_iter().map(|entry| (entry, 0)).collect();
    let mut all = Vec::with_capacity(model.pstree.len());
    while let Some((entry, depth)) = left.pop() {
        let others = entry.threads.iter().filter(|id| **id != entry.pid);
        all.push(Process {
            threads: others.map(|id| (*id, thread_name(model, *id))).collect(),
            depth,
            ..process(images, model, entry)
        });
        let own = children.remove(&entry.pid).unwrap_or_default();
        left.extend(own.into_iter().map(|child| (child, depth + 1)));
    }
    all
}

fn thread_name(model: &Model, id: u32) -> String {
    let thread = model.cores.get(&id).and_then(|core| core.thread_core.as_ref());
    thread
        .and_then(|t| t.comm.as_deref())
        .map(|name| clean(&String::from_utf8_lossy(name)))
        .unwrap_or_default()
}

fn process(images: &ImageDir, model: &Model, entry: &PstreeEntry) -> Process {
    let pid = entry.pid;
    let core = model.cores.get(&pid);
    let state = core.and_then(|core| core.tc.as_ref()).map_or(0, |tc| tc.task_state);
    let creds = core.and_then(|core| core.thread_core.as_ref()).and_then(|t| t.creds.as_ref());
    let mm = model.mm.get(&pid);
    let executable = mm.and_then(|mm| super::files::path(model, mm.exe_file_id));
    Process {
        pid,
        ppid: entry.ppid,
        pgid: entry.pgid,
        sid: entry.sid,
        name: super::comm(model, pid),
        state: match state {
            DEAD | ZOMBIE => "zombie",
            STOPPED => "stopped",
            _ => "running",
        },
        arguments: mm.and_then(|mm| arguments(images, pid, mm)).unwrap_or_default(),
        executable,
        uid: creds.map(|c| c.uid),
        gid: creds.map(|c| c.gid),
        threads: BTreeMap::new(),
        depth: 0,
    }
}

/// The argument area, from the pages of the images.
fn arguments(images: &ImageDir, pid: u32, mm: &MmEntry) -> Option<Vec<String>> {
    let pages = pagemap::open(images, &pagemap::of_task(pid)).ok()?;
    let end = mm.mm_arg_end.min(mm.mm_arg_start.saturating_add(ARGUMENTS_MAX));
    let mut area = Vec::new();
    for run in &pages.runs {
        let (from, to) = (run.range.start.max(mm.mm_arg_start), run.range.end.min(end));
        if from >= to {
            continue;
        }
        let start = area.len();
        area.resize(start + usize::try_from(to - from).ok()?, 0);
        pages
            .files
            .get(run.file)?
            .read_exact_at(&mut area[start..], run.offset + (from - run.range.start))
            .ok()?;
    }
    let text = String::from_utf8_lossy(&area);
    // Blanks and zeros behind: what a title has left of the arguments that it was written over.
    let text = text.trim_end_matches(['\0', ' ']);
    (!text.is_empty()).then(|| text.split('\0').map(clean).collect())
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let indent = "  ".repeat(self.depth.min(DEPTH_MAX));
        let words = match self.arguments.is_empty() {
            true => format!("[{}]", self.name),
            false => self.arguments.join(" "),
        };
        write!(f, "{indent}{} {words}", self.pid)?;
        write!(f, "  (group {}, session {}", self.pgid, self.sid)?;
        if let (Some(uid), Some(gid)) = (self.uid, self.gid) {
            write!(f, ", user {uid}:{gid}")?;
        }
        if self.state != "running" {
            write!(f, ", {}", self.state)?;
        }
        writeln!(f, ")")?;
        self.threads.iter().try_for_each(|(id, name)| writeln!(f, "{indent}  thread {id} {name}"))
    }
}
