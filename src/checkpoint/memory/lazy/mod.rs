//! Filling memory while the program already runs: `restore --lazy`.
//!
//! ```text
//!   restore ── registers the memory of each process with a userfaultfd, starts the guard, ends
//!                 guard ──clone3(CLONE_FILES)──> filler: events, faults, pieces
//!                   │ waits                         │ ends: all is filled
//!                   └── the filler has died ──> SIGKILL to the container, and fill.json says why
//! ```
//!
//! When the last descriptor of a userfaultfd is closed, missing pages read as zeros. So two processes share one table of
//! descriptors and watch each other: whichever dies, the other one holds the memory until the container is dead. The
//! program never sees a zero in the place of its data.
//!
//! | file     | what it knows                                                     |
//! |----------|-------------------------------------------------------------------|
//! | `table`  | what is left, following the program's mappings                    |
//! | `filler` | the loop                                                          |
//! | `touched` | what comes first, because it was touched first earlier           |
//! | `status` | fill.json                                                         |

mod filler;
pub mod status;
mod table;
mod touched;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};

use crate::cgroup::Cgroup;
use crate::checkpoint::context::{NewTask, Target};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::memory::pagemap::Run;
use crate::checkpoint::remote::{Batch, Conduit};
use crate::checkpoint::task;
use crate::sys::process::{Fork, Side, clone3, detach, exit_now, wait_child};
use crate::sys::{pidfd, userfaultfd};

use self::filler::Space;
use self::status::Status;
use self::table::Table;
use self::touched::Touched;

const FEATURES: u64 = userfaultfd::FEATURE_EVENT_FORK
    | userfaultfd::FEATURE_EVENT_REMAP
    | userfaultfd::FEATURE_EVENT_REMOVE
    | userfaultfd::FEATURE_EVENT_UNMAP;
const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// What is to be filled later.
#[derive(Debug, Default)]
pub struct Lazy {
    spaces: Vec<Space>,
    files: Vec<File>,
}

/// Until it is dropped only what somebody waits for is filled: the rest would keep a processor and the memory's locks from
/// the restore, which is about to let the program go.
#[derive(Debug, Default)]
pub struct Hold {
    _release: Option<OwnedFd>,
    /// Its end: fill.json is there.
    told: Option<OwnedFd>,
}

impl Hold {
    /// Waits until everybody can see that the memory is being filled.
    pub fn begun(&mut self) {
        let Some(told) = self.told.take() else { return };
        while nix::unistd::read(&told, &mut [0]) == Err(nix::errno::Errno::EINTR) {}
    }
}

impl Drop for Hold {
    /// Also where a restore fails: what is removed with the container is not made later.
    fn drop(&mut self) {
        self.begun();
    }
}

impl Lazy {
    /// Adds the memory of a process: its userfaultfd, the parts that are left, and the files that have them.
    pub fn add(&mut self, vpid: i32, uffd: OwnedFd, runs: impl Iterator<Item = Run>, files: Vec<File>) {
        let first = self.files.len();
        let mut table = Table::default();
        runs.for_each(|run| table.add(Run { file: run.file + first, ..run }));
        if table.bytes() > 0 {
            self.spaces.push(Space::new(uffd, table, vpid));
            self.files.extend(files);
        }
    }

    /// Starts the filling, before anything looks at the memory. `images`: the directory where what is touched first is
    /// recorded for the next restore, if there is to be one.
    pub fn start(self, target: &Target, images: Option<BorrowedFd<'_>>) -> Result<Hold> {
        if self.spaces.is_empty() {
            return Ok(Hold::default());
        }
        let what = "cannot start filling the memory";
        let (told, tell) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).during(what, || "pipe2()".into())?;
        let (hold, release) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).during(what, || "pipe2()".into())?;
        // SAFETY: the threads that copied pages have ended, and the child ends by _exit.
        match unsafe { clone3(Fork::default()) }.during(what, || "clone3({exit_signal=SIGCHLD})".into())? {
            Side::Child => self.guard(target, &hold, images),
            Side::Parent(..) => {
                drop(tell);
                Ok(Hold { _release: Some(release), told: Some(told) })
            }
        }
    }

    /// The guard, from its first instruction to its last.
    fn guard(mut self, target: &Target, hold: &OwnedFd, images: Option<BorrowedFd<'_>>) -> ! {
        let pid = std::process::id().cast_signed();
        let total = self.spaces.iter().map(|space| space.table.bytes()).sum();
        let start = status::start_time(pid).unwrap_or(-1);
        let status = Status { pid, start, total, left: total, failed: None };
        let is_first = |status: task::status::Status| status.ns_tid.last() == Some(&1);
        let own_pids = task::status::Status::of_thread(target.init, target.init).is_ok_and(is_first);
        let victim = Victim {
            init: &target.init_pidfd,
            cgroups: (!own_pids).then(|| target.cgroups.clone()),
            state_dir: target.state_dir.clone(),
        };
        victim.tell(&status);
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
        let mut keep: Vec<i32> = self.files.iter().map(AsRawFd::as_raw_fd).collect();
        keep.extend(self.spaces.iter().map(|space| space.uffd.as_raw_fd()));
        keep.extend([target.init_pidfd.as_raw_fd(), hold.as_raw_fd()]);
        keep.extend(images.map(|images| images.as_raw_fd()));
        let mut touched = images.map_or_else(Touched::default, Touched::read);
        // SAFETY: what is used from here on is kept; nothing else is dropped, for this process ends by _exit.
        let detached = unsafe { detach(&keep) };
        let _ = nix::sys::prctl::set_name(c"stasis-fill");
        let handle = match detached.and_then(|()| pidfd::open(pid, 0)) {
            Ok(handle) => handle,
            Err(errno) => victim.end(status, format!("the filler cannot be started: {errno}")),
        };
        let fork = Fork { flags: libc::CLONE_FILES as u64, ..Fork::default() };
        // SAFETY: this process has one thread; the child shares the descriptors and nothing else, and ends by _exit.
        match unsafe { clone3(fork) } {
            Ok(Side::Child) => {
                let progress = |left| victim.tell(&Status { left, ..status.clone() });
                let (spaces, files) = (&mut self.spaces, &self.files);
                match filler::run(spaces, files, &mut touched, handle.as_fd(), Some(hold.as_fd()), progress) {
                    Ok(()) => {
                        if let Some(images) = images {
                            touched.write(images);
                        }
                        exit_now(0)
                    }
                    Err(error) => victim.end(status, error.to_string()),
                }
            }
            Ok(Side::Parent(filler, _)) => match wait_child(filler.as_raw(), true) {
                Ok(Some(0)) => {
                    // Whoever has waited for the end of the file finds memory that nobody watches any more.
                    self.spaces.clear();
                    if let Some(dir) = &victim.state_dir {
                        status::remove(dir);
                    }
                    exit_now(0)
                }
                how => {
                    let told = victim.state_dir.as_deref().and_then(Status::read);
                    let why = told.and_then(|status| status.failed);
                    let how = how.ok().flatten().unwrap_or(-1);
                    victim.end(status, why.unwrap_or_else(|| format!("the filler has died (status {how})")))
                }
            },
            Err(errno) => victim.end(status, format!("the filler cannot be started: {errno}")),
        }
    }
}

/// The container, for when it has to be killed.
struct Victim<'a> {
    init: &'a OwnedFd,
    /// None where all processes end with init. By the time it has died its control group may be another container's.
    cgroups: Option<BTreeMap<String, PathBuf>>,
    state_dir: Option<PathBuf>,
}

impl Victim<'_> {
    fn tell(&self, status: &Status) {
        if let Some(dir) = &self.state_dir {
            status.write(dir);
        }
    }

    /// Kills the container, of which part of the memory cannot be had any more. The memory is let go only when nobody
    /// can look at it.
    fn end(&self, status: Status, why: String) -> ! {
        self.tell(&Status { failed: Some(why), ..status });
        if let Some(cgroups) = &self.cgroups {
            let _ = Cgroup::load(cgroups.clone()).kill(libc::SIGKILL);
        }
        let _ = pidfd::send_signal(self.init.as_fd(), libc::SIGKILL);
        let mut ended = [nix::poll::PollFd::new(self.init.as_fd(), nix::poll::PollFlags::POLLIN)];
        while nix::poll::poll(&mut ended, nix::poll::PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
        exit_now(1)
    }
}

/// Makes a userfaultfd of a task's memory that is told of all faults, also those of the kernel, and of what the program
/// does to its mappings. None: this kernel or this machine gives none, and the memory is to be filled at once.
pub fn userfaultfd(task: &mut NewTask, conduit: &Conduit) -> Result<Option<OwnedFd>> {
    let made = match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => {
            let numbers = conduit.send(&mut task.injection, &[device.as_fd()])?;
            let number = *numbers.first().ok_or_else(|| Error::new("no descriptor was passed"))?;
            let mut batch = Batch::new();
            let call =
                batch.call(libc::SYS_ioctl, &[number.into(), userfaultfd::IOC_NEW.into(), FLAGS.into()]);
            let call = batch.tolerate(call);
            batch.call(libc::SYS_close, &[number.into()]);
            task.injection.run(&batch)?.result(call)
        }
        Err(_) => {
            let mut batch = Batch::new();
            let call = batch.call(libc::SYS_userfaultfd, &[FLAGS.into()]);
            let call = batch.tolerate(call);
            task.injection.run(&batch)?.result(call)
        }
    };
    let Ok(number) = made else { return Ok(None) };
    let number = i32::try_from(number).unwrap_or(-1);
    let taken = pidfd::getfd(task.pidfd.as_fd(), number)
        .during("cannot prepare to fill the memory", || format!("pidfd_getfd(pidfd, {number}, 0)"));
    task.injection.syscall(libc::SYS_close, &[number.into()])?;
    let uffd = taken?;
    Ok(userfaultfd::api(uffd.as_fd(), FEATURES).is_ok().then_some(uffd))
}

/// Waits until the memory of a container is filled, if it is being filled.
pub fn wait(state_dir: &Path) -> Result<()> {
    status::wait(state_dir)
}
