//! Processes and threads.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::FileExt;

use serde::Serialize;

use super::clean;
use crate::checkpoint::image::{ImageDir, MmEntry};
use crate::checkpoint::memory::pagemap;
use crate::checkpoint::model::Model;
use crate::checkpoint::task::process::{DEAD, STOPPED};

/// One process and its children.
#[derive(Debug, Serialize)]
pub struct Process {
    /// Its id inside the container.
    pub pid: u32,
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
    /// Its children.
    pub children: Vec<Process>,
}

/// More of an argument area than anybody reads.
const ARGUMENTS_MAX: u64 = 64 << 10;

/// The tree of a set that has been validated: parents come before children.
pub fn tree(images: &ImageDir, model: &Model) -> Vec<Process> {
    let mut done: BTreeMap<u32, Vec<Process>> = BTreeMap::new();
    for entry in model.pstree.iter().rev() {
        let mut process = process(images, model, entry.pid);
        (process.pgid, process.sid) = (entry.pgid, entry.sid);
        let others = entry.threads.iter().filter(|id| **id != entry.pid);
        process.threads = others.map(|id| (*id, thread_name(model, *id))).collect();
        process.children = done.remove(&entry.pid).unwrap_or_default();
        process.children.reverse();
        done.entry(entry.ppid).or_default().push(process);
    }
    let mut roots: Vec<Process> = done.into_values().flatten().collect();
    roots.sort_by_key(|p| p.pid);
    roots
}

fn thread_name(model: &Model, id: u32) -> String {
    let thread = model.cores.get(&id).and_then(|core| core.thread_core.as_ref());
    thread.and_then(|t| t.comm.as_deref()).map(clean).unwrap_or_default()
}

fn process(images: &ImageDir, model: &Model, pid: u32) -> Process {
    let core = model.cores.get(&pid);
    let state = core.and_then(|core| core.tc.as_ref()).map_or(0, |tc| tc.task_state);
    let creds = core.and_then(|core| core.thread_core.as_ref()).and_then(|t| t.creds.as_ref());
    let mm = model.mm.get(&pid);
    let executable = mm.and_then(|mm| super::files::path(model, mm.exe_file_id));
    Process {
        pid,
        pgid: 0,
        sid: 0,
        name: super::comm(model, pid),
        state: match state {
            DEAD => "zombie",
            STOPPED => "stopped",
            _ => "running",
        },
        arguments: mm.and_then(|mm| arguments(images, pid, mm)).unwrap_or_default(),
        executable,
        uid: creds.map(|c| c.uid),
        gid: creds.map(|c| c.gid),
        threads: BTreeMap::new(),
        children: Vec::new(),
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
    let text = text.strip_suffix('\0').unwrap_or(&text);
    (!text.is_empty()).then(|| text.split('\0').map(clean).collect())
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No recursion: images may have a chain of processes as long as they like.
        let mut left = vec![(self, 0)];
        while let Some((process, depth)) = left.pop() {
            let indent = "  ".repeat(depth);
            let words = match process.arguments.is_empty() {
                true => format!("[{}]", process.name),
                false => process.arguments.join(" "),
            };
            write!(f, "{indent}{} {words}", process.pid)?;
            write!(f, "  (group {}, session {}", process.pgid, process.sid)?;
            if let (Some(uid), Some(gid)) = (process.uid, process.gid) {
                write!(f, ", user {uid}:{gid}")?;
            }
            if process.state != "running" {
                write!(f, ", {}", process.state)?;
            }
            writeln!(f, ")")?;
            for (id, name) in &process.threads {
                writeln!(f, "{indent}  thread {id} {name}")?;
            }
            left.extend(process.children.iter().rev().map(|child| (child, depth + 1)));
        }
        Ok(())
    }
}
