//! Making the processes of the images again, out of the stub that waits as the container's first one.
//!
//! ```text
//!   stub ──> tree: clone3(set_tid), setsid, setpgid; helpers exit ──> descriptors, memory (the rooms' own)
//!        ──> per process, children before parents:
//!              threads; actions, limits, timers
//!              zombies die; what their death has sent to the parent is taken away
//!              queued signals; seccomp; credentials         (see `credentials` for that order)
//!              masks; a stopped process is stopped
//!        ──> ready() ──> detach
//! ```
//!
//! Children come before parents, because what a child does while it is made (die as a zombie, stop) sends its parent
//! SIGCHLD, which the parent throws away before its own queue is restored.
//!
//! | file     | what it knows                                               |
//! |----------|-------------------------------------------------------------|
//! | here     | what is to be made, and the tree                            |
//! | `finish` | the last stage of a process: its threads, what they share   |
//! | `thread` | what a thread sets by itself, credentials last              |

mod finish;
mod thread;

use std::collections::BTreeMap;

use super::process::{self, ALIVE, DEAD, STOPPED};
use super::tree::Step;
use super::{cookies, credentials, seccomp, sharing};
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::Context;
use crate::checkpoint::image::{
    CoreEntry, PstreeEntry, TaskCoreEntry, TaskExtra, ThreadCoreEntry, ThreadExtra,
};
use crate::checkpoint::namespaces::nested::birth::Births;
use crate::checkpoint::namespaces::nested::pids::Pids;
use crate::checkpoint::remote::{CloneArgs, Conduit, Exit, Thread};
use crate::checkpoint::task::labels::Label;
use crate::checkpoint::{Error, Result};
use crate::sys;

const PR_SET_NAME: u64 = 15;
const PR_SET_CHILD_SUBREAPER: u64 = 36;

/// What the images and the destination say of tasks, looked at before anything is made.
pub struct Revival<'a> {
    restore: &'a Restore<'a>,
    steps: Vec<Step>,
    pids: Pids,
    births: Births,
    /// Who runs on whose memory.
    tenants: BTreeMap<u32, u32>,
    policy: credentials::Policy,
    label: Option<Label>,
    filters: seccomp::Policy,
    extra: TaskExtra,
    /// Where a thread's own is in it.
    extras: BTreeMap<u32, usize>,
    runtimes_filter: bool,
}

/// Numbers of descriptors by which processes enter the namespaces that they enter last.
#[derive(Debug, Default)]
pub struct Doors {
    /// User namespaces, by process.
    pub users: BTreeMap<i32, i32>,
    /// Where the children of threads are born, by thread. None: in a namespace that is new.
    pub children: BTreeMap<i32, Option<i32>>,
    /// The attributes of their own threads, by process.
    pub attributes: BTreeMap<i32, i32>,
}

/// When others have something to do with a process, while the tree is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It has come to lead a session, and has no children yet.
    Leads,
    /// It is about to fork this child.
    Forks(i32),
    /// It has forked it.
    Forked(i32),
    /// It has been forked.
    Born,
}

impl<'a> Revival<'a> {
    /// Checks the images against each other and against config.json.
    pub fn plan(restore: &'a Restore<'a>, filters: seccomp::Policy) -> Result<Self> {
        let model = restore.model;
        let (steps, pids) = (process::plan(model)?, Pids::of(model)?);
        let births = Births::of(model, &steps, &pids)?;
        births.check(model)?;
        let policy = credentials::Policy::of(&restore.target.spec);
        let label = Label::of(&restore.target.spec);
        let extra = process::extra(model)?;
        let extras = extra.threads.iter().enumerate().map(|(at, thread)| (thread.tid, at)).collect();
        let runtimes_filter = extra.bottom_filter_is_runtimes.unwrap_or(true);
        let tenants = sharing::tenants(model);
        let revival = Self {
            restore,
            steps,
            pids,
            births,
            tenants,
            policy,
            label,
            filters,
            extra,
            extras,
            runtimes_filter,
        };
        for entry in &model.pstree {
            let tc = revival.tc(entry)?;
            match tc.task_state {
                DEAD => continue,
                ALIVE | STOPPED => {}
                other => {
                    return Err(Error::new(format!("the image has unknown state {other}")).pid(vpid(entry)));
                }
            }
            for vtid in &entry.threads {
                let core = revival.core(*vtid)?;
                revival.chain(core)?;
            }
        }
        Ok(revival)
    }

    fn core(&self, vtid: u32) -> Result<&'a CoreEntry> {
        let core = self.restore.model.cores.get(&vtid);
        core.ok_or_else(|| Error::new(format!("the images have no core-{vtid}.img")))
    }
    fn tc(&self, entry: &PstreeEntry) -> Result<&'a TaskCoreEntry> {
        let tc = self.core(entry.pid)?.tc.as_ref();
        tc.ok_or_else(|| Error::new(format!("core-{}.img is not that of a process", entry.pid)))
    }
    fn extra(&self, vtid: u32) -> Option<&ThreadExtra> {
        self.extras.get(&vtid).and_then(|at| self.extra.threads.get(*at))
    }
    fn chain(&self, core: &CoreEntry) -> Result<Vec<seccomp::Program>> {
        let image = self.restore.model.seccomp.as_ref();
        let thread = core.thread_core.as_ref();
        seccomp::chain(
            image,
            thread.unwrap_or(&ThreadCoreEntry::default()),
            self.runtimes_filter,
            &self.filters,
        )
    }

    /// What every thread is put under.
    pub fn label(&self) -> Option<&Label> {
        self.label.as_ref()
    }

    /// What processes are called in the pid namespaces that the container has made.
    pub fn pids(&self) -> &Pids {
        &self.pids
    }

    /// Which process forks which.
    pub fn forks(&self) -> impl Iterator<Item = (i32, i32)> {
        self.steps.iter().filter_map(|step| match *step {
            Step::Fork { by, pid, .. } => Some((by, pid)),
            _ => None,
        })
    }

    /// Makes the tree out of `stub`. What was made is in the result even when something failed, to be killed. Others
    /// have something to do at certain moments.
    pub fn grow(
        &self,
        stub: NewTask,
        tree: &mut BTreeMap<i32, NewTask>,
        conduit: &Conduit,
        meanwhile: &mut dyn FnMut(&mut NewTask, Moment) -> Result<()>,
    ) -> Result<()> {
        let root = stub.vpid;
        tree.insert(root, stub);
        let first = self.restore.model.pstree.first().map_or(0, vpid);
        if first != root {
            return Err(Error::new(format!(
                "the images' first process is {first}, the container's is {root}"
            ))
            .remedy("restore into a container with a pid namespace of its own"));
        }
        self.lead_session(tree)?;
        meanwhile(get(tree, root)?, Moment::Leads)?;
        for step in &self.steps {
            if let Step::Fork { by, pid, .. } = *step {
                meanwhile(get(tree, by)?, Moment::Forks(pid))?;
            }
            self.step(*step, tree, conduit)?;
            if let Step::Fork { by, pid, .. } = *step {
                meanwhile(get(tree, by)?, Moment::Forked(pid))?;
                meanwhile(get(tree, pid)?, Moment::Born)?;
            }
            if let Step::Setsid { pid } = *step {
                meanwhile(get(tree, pid)?, Moment::Leads)?;
            }
        }
        Ok(())
    }

    fn lead_session(&self, tree: &mut BTreeMap<i32, NewTask>) -> Result<()> {
        let Some(root) = self.restore.model.pstree.first() else { return Ok(()) };
        let task = get(tree, vpid(root))?;
        if root.sid == root.pid
            && task.injection.syscall(libc::SYS_getsid, &[0.into()])? != i64::from(root.pid)
        {
            task.injection.syscall(libc::SYS_setsid, &[])?;
        }
        Ok(())
    }

    fn step(&self, step: Step, tree: &mut BTreeMap<i32, NewTask>, conduit: &Conduit) -> Result<()> {
        match step {
            Step::Enter { pid } => _ = get(tree, pid)?,
            Step::Fork { by, pid, helper } => {
                let mut flags = self.shared(by, pid);
                if self.pids.made_by(pid).is_some() {
                    flags |= u64::from(libc::CLONE_NEWPID.unsigned_abs());
                }
                let set_tid = self.pids.set_tid(pid, self.pids.space(by));
                let exit_signal = if helper { 0 } else { self.end(pid) };
                let args = CloneArgs { flags, exit_signal, set_tid, ..CloneArgs::default() };
                let parent = get(tree, by)?;
                let (thread, injection) = match self.births.get(pid) {
                    None => parent.injection.clone_child(&args),
                    Some(_) => self.births.fork(self.restore, &self.pids, parent, pid, args, conduit),
                }
                .map_err(|e| e.pid(pid))?;
                let host = thread.tid();
                let pidfd = sys::pidfd::open(host, 0)
                    .during("cannot hold the new process", || format!("pidfd_open({host}, 0)"))?;
                tree.insert(pid, NewTask { pid: host, vpid: pid, pidfd, injection });
            }
            Step::Setsid { pid } => call(tree, pid, libc::SYS_setsid, [0; 2])?,
            Step::Setpgid { pid, pgid } => {
                let group = self.pids.seen(pgid, self.pids.space(pid)).unwrap_or(pgid);
                call(tree, pid, libc::SYS_setpgid, [0, group])?;
            }
            Step::Subreaper { pid } => {
                let set = [PR_SET_CHILD_SUBREAPER.into(), 1.into()];
                get(tree, pid)?.injection.syscall(libc::SYS_prctl, &set).map_err(|e| e.pid(pid))?;
            }
            Step::Exit { pid, by } => {
                let helper = tree.remove(&pid).ok_or_else(|| Error::new("a helper is gone").pid(pid))?;
                helper.injection.exit_child(Exit::Code(0))?;
                let seen = self.pids.seen(pid, self.pids.space(by)).unwrap_or(pid);
                let wait = [seen.into(), 0.into(), libc::__WALL.into(), 0.into()];
                get(tree, by)?.injection.syscall(libc::SYS_wait4, &wait).map_err(|e| e.pid(by))?;
            }
        }
        Ok(())
    }

    /// CLONE_FILES and the like for processes that share with their parent.
    fn shared(&self, parent: i32, child: i32) -> u64 {
        let ids = |pid: i32| self.restore.model.ids.get(&pid.cast_unsigned());
        let (Some(parent), Some(child)) = (ids(parent), ids(child)) else { return 0 };
        let flag = |same: bool, flag: i32| if same { u64::from(flag.unsigned_abs()) } else { 0 };
        let both = |own: u32, theirs: u32| own == theirs && own != 0;
        flag(parent.files_id == child.files_id, libc::CLONE_FILES)
            | flag(parent.fs_id == child.fs_id, libc::CLONE_FS)
            | flag(both(parent.vm_id, child.vm_id), libc::CLONE_VM)
            | flag(both(parent.sighand_id, child.sighand_id), libc::CLONE_SIGHAND)
    }

    /// The signal that tells the parent of a process's end.
    fn end(&self, pid: i32) -> i32 {
        let own = self.extra.ends.iter().find(|end| end.pid.cast_signed() == pid);
        own.map_or(libc::SIGCHLD, |end| end.signal.cast_signed())
    }

    /// The last stage of every process, children before parents. `threads` gets all threads, to be detached, and also
    /// holds those made before a failure.
    /// `doors` are descriptors of the namespaces that they are still to enter.
    pub fn finish(
        &self,
        tree: &mut BTreeMap<i32, NewTask>,
        threads: &mut Vec<Thread>,
        doors: &Doors,
    ) -> Result<()> {
        for entry in self.restore.model.pstree.iter().rev() {
            let pid = vpid(entry);
            let task = tree.remove(&pid).ok_or_else(|| Error::new("the process is gone").pid(pid))?;
            let tc = self.tc(entry)?;
            if tc.task_state == DEAD {
                finish::die(task, tc).map_err(|e| e.pid(pid))?;
            } else {
                self.process(entry, tc, task, threads, doors).map_err(|e| e.pid(pid))?;
            }
        }
        cookies::restore(&self.extra, self.restore.target.init, threads)
    }
}

fn vpid(entry: &PstreeEntry) -> i32 {
    entry.pid.cast_signed()
}

fn named(error: Error, vtid: u32) -> Error {
    error.pid(vtid.cast_signed())
}

fn get(tree: &mut BTreeMap<i32, NewTask>, pid: i32) -> Result<&mut NewTask> {
    tree.get_mut(&pid).ok_or_else(|| Error::new("the process does not exist yet").pid(pid))
}

fn call(tree: &mut BTreeMap<i32, NewTask>, pid: i32, nr: libc::c_long, args: [i32; 2]) -> Result<()> {
    get(tree, pid)?.injection.syscall(nr, &args.map(Into::into)).map(|_| ()).map_err(|e| e.pid(pid))
}
