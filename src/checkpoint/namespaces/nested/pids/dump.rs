//! What the processes of a live container are called in the namespaces that they have made.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::{EXTENSION, Ids, Level, Pids};
use crate::checkpoint::context::Dump;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::Kind;
use crate::checkpoint::namespaces::enter::through;
use crate::checkpoint::namespaces::kind::link;
use crate::checkpoint::namespaces::nested::spaces::copy;
use crate::checkpoint::task::status::{self, Status};
use crate::sys::last_pid;

/// Where the children of a thread are born.
const CHILDREN: &str = "pid_for_children";

/// The namespace that a process and all of its threads are in.
fn own(pid: i32) -> Result<Option<PathBuf>> {
    link(&pid.to_string(), Kind::Pid.name())
}

/// The namespace that a thread's children are born in, where it is not `own`, that of the process; none where it is still
/// to be made.
fn elsewhere(pid: i32, tid: i32, own: Option<&Path>) -> Result<Option<Option<OwnedFd>>> {
    let thread = format!("{pid}/task/{tid}");
    match link(&thread, CHILDREN)? {
        found if found.as_deref() == own => Ok(None),
        None => Ok(Some(None)),
        Some(_) => {
            let path = format!("/proc/{thread}/ns/{CHILDREN}");
            let door =
                File::open(&path).during("cannot look at a pid namespace", || format!("open({path:?})"))?;
            Ok(Some(Some(door.into())))
        }
    }
}

/// Fills the record, when every process has its namespaces in its ids.
pub fn gather(dump: &mut Dump<'_>) -> Result<()> {
    let init = dump.source.init;
    let mut gather = Gather { depth: status::depth(init)?, pids: Pids::default() };
    let tids =
        |t: &crate::checkpoint::context::LiveTask| t.threads.iter().map(|t| t.tid()).collect::<Vec<_>>();
    let tasks: Vec<_> = dump.tasks.iter().map(|t| (t.pid, t.vpid, t.zombie, tids(t))).collect();
    for (pid, vpid, zombie, tids) in tasks {
        gather.process(dump, (pid, vpid), zombie, &tids).map_err(|e| e.pid(vpid))?;
    }
    let Gather { mut pids, .. } = gather;
    for (id, level) in &mut pids.spaces {
        let lives = |pid: i32| dump.tasks.iter().any(|t| t.vpid == pid && !t.zombie);
        if level.init == 0 && level.parent != 0 {
            return Err(Error::new(
                "a pid namespace inside another one is held open, and its first process is gone",
            )
            .remedy("let the program close or leave it"));
        }
        if lives(level.init) {
            let door = dump.spaces.door(*id).map(copy).transpose()?;
            let doors = door.into_iter().map(|door| (door, Kind::Pid)).collect();
            let what = "cannot read the last pid of a pid namespace";
            level.last = through(doors, || last_pid::get().during(what, || "read(ns_last_pid)".into()))?;
        }
    }
    match pids.is_empty() {
        true => Ok(()),
        false => dump.model.set_critical_extension(EXTENSION, &pids),
    }
}

struct Gather {
    /// How deep the container's namespace lies below ours.
    depth: usize,
    pids: Pids,
}

impl Gather {
    fn process(
        &mut self,
        dump: &mut Dump<'_>,
        (pid, vpid): (i32, i32),
        zombie: bool,
        tids: &[i32],
    ) -> Result<()> {
        let init = dump.source.init;
        let ids = dump.model.ids.get(&vpid.cast_unsigned());
        let space = match ids.and_then(|ids| ids.pid_ns_id) {
            Some(space) => space,
            None if zombie && Status::of(pid)?.ns_pid.len() > self.depth + 1 => {
                dump.spaces.of_task(init, pid, Kind::Pid)?.unwrap_or(0)
            }
            None => return Ok(()),
        };
        if self.know(dump, space) {
            let status = Status::of(pid)?;
            for list in [&status.ns_pid, &status.ns_sid, &status.ns_pgid] {
                self.name(list, space);
            }
            for tid in tids {
                self.name(&Status::of_thread(pid, *tid)?.ns_tid, space);
            }
            if self.pids.own(vpid) == 1
                && let Some(level) = self.pids.spaces.get_mut(&space)
            {
                level.init = vpid;
            }
        }
        if zombie {
            return Ok(());
        }
        let own = own(pid)?;
        for tid in tids {
            let Some(door) = elsewhere(pid, *tid, own.as_deref())? else { continue };
            let space = door.map(|door| dump.spaces.of_door(init, door)).transpose()?;
            if let Some(space) = space {
                self.know(dump, space);
            }
            let vtid = Status::of_thread(pid, *tid)?.tid_at(self.depth).unwrap_or(vpid);
            self.pids.children.insert(vtid, space);
        }
        Ok(())
    }

    /// Whether it is a namespace that the container has made; then it and those around it are in the record.
    fn know(&mut self, dump: &Dump<'_>, space: u32) -> bool {
        let Some(parent) = dump.spaces.parent(space) else { return false };
        self.pids.spaces.entry(space).or_insert(Level { parent, ..Level::default() });
        self.know(dump, parent);
        true
    }

    /// Takes down what somebody in a namespace calls a process, thread, session or group: as `/proc` lists it, with 0
    /// where he does not see it.
    fn name(&mut self, list: &[i32], space: u32) {
        let Some(vpid) = list.get(self.depth).copied().filter(|id| *id != 0) else { return };
        let inner: Vec<i32> = list.iter().skip(self.depth + 1).copied().take_while(|id| *id != 0).collect();
        let known = self.pids.ids.get(&vpid).map_or(0, |ids| ids.inner.len());
        let mut space = space;
        for _ in inner.len()..self.pids.depth(space) {
            space = self.pids.spaces.get(&space).map_or(0, |level| level.parent);
        }
        if inner.len() > known {
            self.pids.ids.insert(vpid, Ids { space, inner });
        }
    }
}

/// Adds which proc file system shows which namespace, when all mounts have been saved.
pub fn show(dump: &mut Dump<'_>) -> Result<()> {
    let procs = dump.spaces.procs().clone();
    if procs.is_empty() {
        return Ok(());
    }
    let pids = Pids { procs, ..dump.model.extension(EXTENSION)? };
    dump.model.set_critical_extension(EXTENSION, &pids)
}
