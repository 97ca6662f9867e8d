//! Children and threads of a task being restored, and its zombies.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use super::batch::{Arg, Batch, Call};
use super::injection::Injection;
use super::memory::{Facts, Memory};
use super::thread::Thread;
use super::wait::Stop;
use super::{ptrace, signals};
use crate::checkpoint::arch::stub::Place;
use crate::checkpoint::error::{Error, Result};

/// What clone3(2) is asked for. The child goes on with a copy of the stub (or shares it, with `CLONE_VM`), so that
/// it needs no stack.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CloneArgs {
    /// `CLONE_*`
    pub flags: u64,
    /// The signal that the parent gets at the child's exit; 0 with `CLONE_THREAD`.
    pub exit_signal: i32,
    /// The child's pids, the one of the innermost namespace first. Empty: the kernel chooses.
    pub set_tid: Vec<i32>,
    /// Address for `CLONE_CHILD_SETTID` and `CLONE_CHILD_CLEARTID`.
    pub child_tid: u64,
    /// Address for `CLONE_PARENT_SETTID`.
    pub parent_tid: u64,
    /// Thread pointer for `CLONE_SETTLS`.
    pub tls: u64,
    /// Descriptor, in the parent, of the control group for `CLONE_INTO_CGROUP`.
    pub cgroup: Option<i32>,
}

/// How a child ends that is to be a zombie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By exit(2) with this code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
}

impl Injection {
    /// Makes a child or a thread, which is stopped at once and ready for batches.
    ///
    /// In a live task the child is a copy of the program (a snapshot of its memory): it dies with the driver, and
    /// never runs the program.
    pub fn clone_child(&mut self, args: &CloneArgs) -> Result<(Thread, Self)> {
        let mut made = Vec::new();
        let mut injections = self.clone_children(std::slice::from_ref(args), &mut made)?;
        made.pop().zip(injections.pop()).ok_or_else(|| Error::new("the new child is not traced"))
    }

    /// As [`Self::clone_child`], for several in one batch. `made` also gets those that were made before a failure.
    pub fn clone_children(&mut self, all: &[CloneArgs], made: &mut Vec<Thread>) -> Result<Vec<Self>> {
        let mut batch = Batch::new();
        batch.about("cannot make the child");
        let calls: Vec<Call> = all.iter().map(|args| call(&mut batch, args)).collect();

        let options = self.thread.options();
        if options & ptrace::O_BIRTHS != ptrace::O_BIRTHS {
            self.thread.set_options(options | ptrace::O_BIRTHS)?;
        }
        let run = self.run(&batch);
        if !self.thread.is_gone() && options != self.thread.options() {
            self.thread.set_options(options)?;
        }
        let first = made.len();
        made.extend(self.births.iter().map(|tid| Thread::adopt(*tid, options | ptrace::O_BIRTHS)));
        let born = &made[first..];
        let run = run.map_err(|error| match all.get(born.len()) {
            Some(args) => describe(error, args),
            None => error,
        })?;
        if born.len() != all.len() {
            return Err(Error::new("the new child is not traced"));
        }
        let children = all.iter().zip(calls).zip(born);
        children.map(|((args, call), thread)| self.adopted(args, run.int(call), thread, options)).collect()
    }

    /// A child that was born: stopped, and ready for batches. `in_parent`: what its parent calls it.
    fn adopted(&self, args: &CloneArgs, in_parent: i32, thread: &Thread, options: i32) -> Result<Self> {
        let tid = thread.tid();
        match thread.wait_stop(Instant::now() + self.patience)? {
            Stop::Trap => {}
            Stop::Exited(status) => return Err(Error::new(format!("the new child died ({status:#x})"))),
            other => {
                return Err(Error::new(format!("the new child stopped in an unexpected way: {other:?}")));
            }
        }
        thread.set_options(options | ptrace::O_EXITKILL)?;

        let is_thread = args.flags & libc::CLONE_THREAD as u64 != 0;
        let ids = match args.set_tid.first() {
            Some(&inner) if is_thread => (self.ids.0, inner),
            Some(&inner) => (inner, inner),
            None if is_thread => (self.ids.0, in_parent),
            None if args.flags & libc::CLONE_NEWPID as u64 == 0 => (in_parent, in_parent),
            None => Facts::read(tid)?.ids,
        };
        let mut template = self.template;
        if args.flags & libc::CLONE_SETTLS as u64 != 0 {
            template.set_tls(args.tls);
        }
        Ok(Self {
            thread: thread.clone(),
            memory: Rc::new(Memory::new(tid)),
            code: self.code,
            scratch: self.scratch,
            scratch_len: self.scratch_len,
            ids,
            signal: self.signal,
            template,
            home: None,
            window: self.window,
            queued: if is_thread { Rc::clone(&self.queued) } else { Rc::new(Cell::new(0)) },
            births: Vec::new(),
            patience: self.patience,
            processor: self.processor,
        })
    }

    /// Ends a process of a restore (or a snapshot). It stays a zombie until its parent waits for it.
    pub fn exit_child(mut self, exit: Exit) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        let passed = match exit {
            Exit::Code(code) => {
                let mut regs = self.enter(Place::Boot);
                regs.make_call(libc::SYS_exit_group, [u64::from(code.cast_unsigned()), 0, 0, 0, 0, 0]);
                self.thread.set_regs(&regs)?;
                0
            }
            Exit::Signal(signal) => {
                let mut batch = Batch::new();
                batch.about("cannot prepare the end of the zombie");
                // Default action, and no core file.
                let action = batch.words(&[0; 4]);
                let limit = batch.words(&[0; 2]);
                if signal != libc::SIGKILL {
                    batch.call(libc::SYS_rt_sigaction, &[signal.into(), action, 0.into(), 8.into()]);
                }
                batch.call(libc::SYS_setrlimit, &[libc::RLIMIT_CORE.into(), limit]);
                self.run(&batch)?;
                // At its stop by X, the thread takes this signal in the place of X.
                self.thread.set_sigmask(!signals::bit(signal))?;
                signal
            }
        };
        self.thread.cont(passed)?;
        loop {
            match self.thread.wait_stop(deadline)? {
                Stop::Exited(_) => return Ok(()),
                Stop::Signal(_) => return Err(Error::new(format!("the process survives {exit:?}"))),
                _ => self.thread.cont(0)?,
            }
        }
    }
}

/// Adds clone3(2) with these arguments to a batch.
fn call(batch: &mut Batch, args: &CloneArgs) -> Call {
    let fields = batch.words(&[
        args.flags,
        0, // pidfd
        args.child_tid,
        args.parent_tid,
        i64::from(args.exit_signal).cast_unsigned(),
        0, // stack
        0, // its size
        args.tls,
        0, // set_tid
        args.set_tid.len() as u64,
        args.cgroup.map_or(0, |fd| i64::from(fd).cast_unsigned()),
    ]);
    if !args.set_tid.is_empty() {
        let bytes: Vec<u8> = args.set_tid.iter().flat_map(|tid| tid.to_ne_bytes()).collect();
        let tids = batch.data(&bytes);
        batch.link(fields, 8 * 8, tids);
    }
    let call = batch.call(libc::SYS_clone3, &[fields, Arg::from(8 * 11)]);
    batch.birth(call)
}

/// Adds the flags and pids that stand in the structure which clone3(2) reads.
fn describe(error: Error, args: &CloneArgs) -> Error {
    let fields = error.fields();
    match (&fields.call, fields.errno) {
        (Some(_), Some(errno)) => {
            let call = format!(
                "clone3({{flags={:#x}, exit_signal={}, set_tid={:?}}}, 88)",
                args.flags, args.exit_signal, args.set_tid
            );
            let error = Error::new(fields.what.clone()).call(call, errno);
            if errno == nix::errno::Errno::EEXIST { error.remedy("the pid is taken") } else { error }
        }
        _ => error,
    }
}
