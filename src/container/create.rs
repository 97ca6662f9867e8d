//! Creating a container: the command's half. The other half runs in the new process: [`crate::init::process`].
//!
//! ```text
//!   lock, directory ── control groups ── clone3 ── id maps, control groups ── Go
//!      Mounted ──> prestart, createRuntime hooks ── Go
//!      Ready   ──> rlimits, state.json ── Go          (a restore stops here: the process is an empty shell)
//!      end of file ──> created
//! ```
//!
//! A failure at any point undoes all of it.

mod groups;
mod record;
mod sources;

use std::cell::RefCell;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fchmodat};
use nix::unistd::{Gid, Uid, chown, geteuid, mkfifo};
use oci_spec::runtime::{LinuxIntelRdt, LinuxNamespaceType, Process, Spec};

use super::hooks::{self, Point};
use super::launch::{Birth, Newborn, Parent, launch};
use super::store::{Dir, Lock, Store};
use super::{Cgroup, Container, Error, Result, debug, net_devices, notify};
use crate::bundle::Bundle;
use crate::cgroup::rdt;
use crate::init::channel::Message;
use crate::init::console::Console;
use crate::init::credentials::{self, IdMaps};
use crate::init::namespaces;
use crate::init::process::{self, Plan, Purpose, Stage};
use crate::init::rootfs::{self, Setup, parse_mounts};
use crate::init::{lsm, rlimits, scheduling, seccomp, time};
use crate::sys::{self, Context, pidfd};

pub use groups::has_control_group;
use groups::{NO_CGROUP, control_groups};
pub use record::write_pid_file;
use record::{hook_state, state};
use sources::{late_source, sources};

pub(super) use groups::sweep;

/// What is asked of `create`, `run` and `restore`.
#[derive(Debug)]
pub struct Request {
    /// Container id.
    pub id: String,
    /// What to make it of.
    pub bundle: Bundle,
    /// A program to run, or a shell for the checkpoint engine.
    pub purpose: Purpose,
    /// Wait in front of the program until `start`.
    pub hold: bool,
    /// Whose child init becomes.
    pub parent: Parent,
    /// Standard input, output and error, where they are not ours.
    pub stdio: Option<[OwnedFd; 3]>,
    /// Where the terminal's master is to go.
    pub console: Option<Console>,
    /// Connected socket that is to get a pidfd of init.
    pub pidfd_socket: Option<OwnedFd>,
    /// How many descriptors from 3 on the program inherits.
    pub passed: i32,
    /// The program is to have a socket to say on that it is ready.
    pub notify: bool,
    /// Flags of the command line.
    pub options: Options,
}

/// Flags of the command line that shape a container.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// `--no-pivot`.
    pub no_pivot: bool,
    /// `--no-new-keyring`.
    pub no_new_keyring: bool,
    /// `--systemd-cgroup`.
    pub systemd_cgroup: bool,
    /// `--rootless`: do without the control groups that this user may not have.
    pub rootless_cgroup: bool,
}

/// A container that has come into being.
#[derive(Debug)]
pub struct Created {
    /// The container.
    pub container: Container,
    /// config.json.
    pub spec: Spec,
    /// The right to change it.
    pub lock: Lock,
    /// Its init.
    pub init: Newborn,
    /// The slave of its terminal, for a restore.
    pub console: Option<OwnedFd>,
    /// Where its program says that it is ready.
    pub notify: Option<notify::Socket>,
}

/// Creates a container. On failure nothing of it is left.
pub fn create(store: &Store, request: Request) -> Result<Created> {
    create_with(store, request, &|_| Ok(()))
}

/// As [`create`]; `early` gets the pid of the new process, which is in its namespaces, before any hook is run.
pub fn create_with(store: &Store, request: Request, early: Early<'_>) -> Result<Created> {
    if !geteuid().is_root()
        && request.bundle.spec.process().as_ref().is_some_and(|p| p.user().additional_gids().is_some())
    {
        return Err(Error::new("cannot set any additional groups in a rootless container"));
    }
    let (dir, lock) = store.create(&request.id)?;
    let mut undo = Undo { dir: &dir, cgroup: None, rdt: rdt::Place::default(), init: None };
    let made = listen(&dir, &request)
        .and_then(|notify| make(&dir, &request, &mut undo, early).map(|made| (made, notify)));
    match made {
        Ok(((container, init, console), notify)) => {
            Ok(Created { container, spec: request.bundle.spec, lock, init, console, notify })
        }
        Err(e) => {
            undo.all(&request);
            Err(e)
        }
    }
}

/// Makes the place where the program says that it is ready; whoever lets it run listens there.
fn listen(dir: &Dir, request: &Request) -> Result<Option<notify::Socket>> {
    if !request.notify {
        return Ok(None);
    }
    notify::make_dir(dir)?;
    if request.hold { Ok(None) } else { notify::Socket::listen(dir) }
}

/// What comes before anything is attached to the new process.
pub type Early<'a> = &'a dyn Fn(i32) -> Result<()>;

/// What has to be undone when a creation fails.
struct Undo<'a> {
    dir: &'a Dir,
    cgroup: Option<Cgroup>,
    rdt: rdt::Place,
    init: Option<(i32, OwnedFd)>,
}

impl Undo<'_> {
    fn all(self, request: &Request) {
        if let Some((pid, pidfd)) = self.init {
            let _ = pidfd::send_signal(pidfd.as_fd(), libc::SIGKILL);
            let _ = sys::process::wait_child(pid, true);
        }
        if let Some(cgroup) = self.cgroup {
            let _ = cgroup.delete();
        }
        let _ = self.rdt.leave();
        let _ = self.dir.remove();
        if hooks::any(&request.bundle.spec, &[Point::Poststop]) {
            let state = hook_state(request, None, "stopped");
            let _ = hooks::run(&request.bundle.spec, Point::Poststop, &state, &[]);
        }
    }
}

fn make(
    dir: &Dir,
    request: &Request,
    undo: &mut Undo<'_>,
    early: Early<'_>,
) -> Result<(Container, Newborn, Option<OwnedFd>)> {
    let spec = &request.bundle.spec;
    let process = spec.process().as_ref().ok_or_else(|| Error::new("process property must not be empty"))?;
    check(spec)?;
    // What has read the command line and config.json.
    sys::program::forget_pages();
    let cgroup = control_groups(dir, request)?;
    let unified = cgroup.paths().get("").cloned();
    undo.cgroup = Some(cgroup.clone());
    let cgroup = &cgroup;
    let filter = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let filter = match request.purpose {
        Purpose::Start => filter.map(seccomp::compile).transpose()?,
        Purpose::Restore => None,
    };
    let fifo = request.hold.then(|| exec_fifo(dir, spec)).transpose()?;
    let joined = namespaces::to_join(spec)?;
    let hooks_inside = |stage: Stage<'_>| run_inside(request, stage);
    let plan = Plan {
        id: &request.id,
        spec,
        process,
        setup: RefCell::new(Setup {
            spec,
            rootfs: &request.bundle.rootfs,
            bundle: &request.bundle.path,
            user_namespace: rootfs::has_namespace(spec, LinuxNamespaceType::User)
                || credentials::in_user_namespace(),
            no_pivot: request.options.no_pivot,
            unified: unified.as_deref(),
            sources: sources(&request.bundle)?,
        }),
        purpose: request.purpose,
        rootless: !geteuid().is_root(),
        no_new_keyring: request.options.no_new_keyring,
        stdio: request.stdio.as_ref(),
        console: request.console.as_ref(),
        pidfd_socket: request.pidfd_socket.as_ref(),
        fifo: fifo.as_ref(),
        passed: request.passed,
        seccomp: filter.as_ref(),
        hooks: &hooks_inside,
    };
    let doors = cgroup.doors();
    let flags = namespaces::clone_flags(spec);
    let birth =
        Birth { flags, joined: &joined, doors: doors.as_ref(), parent: request.parent, ..Birth::default() };
    let init = launch(&birth, &|channel| process::main(&plan, channel))
        .map_err(|e| e.context("unable to start container process"))?;
    debug::newborn(init.pid);
    undo.init = Some((init.pid, init.pidfd.try_clone().context(|| "dup")?));
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    let entered = match doors {
        Some(_) => cgroup.add_rest(init.pid, init.born_inside),
        None => cgroup.enter(init.pid, resources, spec.annotations().as_ref()),
    };
    entered.map_err(|e| e.context(NO_CGROUP))?;
    scheduling::reset_affinity(init.pid);
    rdt::enter(intel_rdt(spec), &request.id, init.pid, &mut undo.rdt).map_err(|e| {
        e.context("unable to start container process: unable to apply Intel RDT configuration")
    })?;
    if let Some(devices) = spec.linux().as_ref().and_then(|l| l.net_devices().as_ref()) {
        net_devices::hand_over(devices, init.pid)
            .map_err(|e| e.context("unable to start container process: error creating network interfaces"))?;
    }
    if let Some(maps) = IdMaps::of(spec) {
        maps.write(init.pid)?;
    }
    if let Some(score) = process.oom_score_adj() {
        oom_score(init.pid, score)?;
    }
    early(init.pid)?;
    debug::say(|| "child process in init()".to_owned());
    // What has made the control groups and compiled the filter.
    sys::program::forget_pages();
    if let Some(filter) = &filter {
        debug::say(|| format!("seccomp filter flags: {}", filter.flags));
    }
    init.channel.go()?;
    match serve(dir, request, process, (cgroup, &undo.rdt), &init)
        .map_err(|e| e.context("unable to start container process: error during container init"))?
    {
        (Some(container), console) => Ok((container, init, console)),
        (None, _) => Err(died(init.pid)),
    }
}

/// Does for the new init what it can't do itself, until it is ready. Nothing is returned of one that has died.
fn serve(
    dir: &Dir,
    request: &Request,
    process: &Process,
    (cgroup, rdt): (&Cgroup, &rdt::Place),
    init: &Newborn,
) -> Result<(Option<Container>, Option<OwnedFd>)> {
    let spec = &request.bundle.spec;
    let mut console = None;
    let mut container = None;
    while let Some(message) = init.channel.listen()? {
        match message {
            Message::Clocks => time::write(spec, init.pid)?,
            Message::Source(index) => {
                let mounts = parse_mounts(spec, &request.bundle.path, &request.bundle.rootfs)?;
                let mount =
                    mounts.get(index).ok_or_else(|| Error::new("garbled message on the init channel"))?;
                init.channel.go_with(late_source(mount, spec, init.pid)?)?;
                continue;
            }
            Message::Mounted => {
                if let Some(linux) = spec.linux() {
                    cgroup
                        .apply(linux)
                        .map_err(|e| e.context("error setting cgroup config for procHooks process"))?;
                }
                rdt::set(intel_rdt(spec), rdt)
                    .map_err(|e| e.context("error setting Intel RDT config for procHooks process"))?;
                let state = hook_state(request, Some(init.pid), "creating");
                hooks::run(spec, Point::Prestart, &state, &[])?;
                hooks::run(spec, Point::CreateRuntime, &state, &[])?;
            }
            Message::Descriptor(fd) => {
                console = Some(fd);
                continue;
            }
            Message::Ready => {
                rlimits::apply(process.rlimits().as_deref().unwrap_or_default(), init.pid)
                    .map_err(|e| e.context("error setting rlimits for ready process"))?;
                let state = state(request, init, cgroup.paths().clone(), rdt.clone())?;
                let ready = Container { dir: dir.clone(), state };
                if request.purpose == Purpose::Restore {
                    return Ok((Some(ready), console));
                }
                let text =
                    serde_json::to_vec(spec).map_err(|e| Error::new(format!("encoding config.json: {e}")))?;
                dir.write("config.json", &text)?;
                dir.save(&ready.state)?;
                container = Some(ready);
            }
            Message::Listener(fd) => {
                let state = hook_state(request, Some(init.pid), "creating");
                super::listener::hand_over(spec, init, fd, &state, init.pid)?;
            }
            Message::Failed(text) => return Err(Error::new(text)),
            Message::Pid(..) => return Err(Error::new("garbled message on the init channel")),
        }
        init.channel.go()?;
    }
    debug::say(|| "init: closing the pipe to signal completion".to_owned());
    Ok((container, console))
}

/// Words for an init that went without a word.
fn died(pid: i32) -> Error {
    let how = match sys::process::wait_child(pid, true) {
        Ok(Some(code @ 129..)) => format!("killed by signal {}", code - 128),
        Ok(Some(code)) => format!("exit status {code}"),
        _ => "unknown reason".to_owned(),
    };
    Error::new(format!(
        "unable to start container process: container init died before it was ready ({how}); was it out of memory?"
    ))
}

/// The hooks that run inside the new process.
fn run_inside(request: &Request, stage: Stage<'_>) -> sys::Result<()> {
    let spec = &request.bundle.spec;
    // startContainer hooks get the program's environment where they bring none.
    let (point, status, env) = match stage {
        Stage::CreateContainer => (Point::CreateContainer, "creating", &[][..]),
        Stage::StartContainer(env) => (Point::StartContainer, "created", env),
    };
    if !hooks::any(spec, &[point]) {
        return Ok(());
    }
    let state = hook_state(request, Some(std::process::id() as i32), status);
    let env: Vec<String> = env.iter().map(|pair| pair.to_string_lossy().into_owned()).collect();
    hooks::run(spec, point, &state, &env)
}

/// What can be found wrong before anything is made.
fn check(spec: &Spec) -> Result<()> {
    let Some(process) = spec.process() else { return Ok(()) };
    rlimits::validate(process.rlimits().as_deref().unwrap_or_default())?;
    lsm::validate(process)?;
    if let Some(scheduler) = process.scheduler() {
        scheduling::validate(scheduler)?;
    }
    Ok(())
}

/// The fifo that init opens for writing, and thereby waits for `start`.
fn exec_fifo(dir: &Dir, spec: &Spec) -> Result<OwnedFd> {
    let path = dir.exec_fifo();
    let mode = Mode::from_bits_truncate(0o622);
    mkfifo(&path, mode).context(|| format!("mkfifo {}", path.display()))?;
    // The umask may have taken bits away.
    fchmodat(nix::fcntl::AT_FDCWD, &path, mode, nix::sys::stat::FchmodatFlags::FollowSymlink)
        .context(|| format!("chmod {}", path.display()))?;
    let (root, gid) = host_root(spec);
    // It is opened, for reading too, by the user that the program will be run as.
    let user = spec.process().as_ref().map_or(0, |p| p.user().uid());
    let uid =
        IdMaps::of(spec).map_or(Some(user), |maps| credentials::host_id(maps.uids, user)).unwrap_or(root);
    if (uid != 0 || gid != 0) && geteuid().is_root() {
        chown(&path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .context(|| format!("chown {}", path.display()))?;
    }
    Ok(open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .context(|| format!("open {}", path.display()))?)
}

/// The host's ids of the container's root, which is to own what we make for it.
pub fn host_root(spec: &Spec) -> (u32, u32) {
    let root = |maps| credentials::host_id(maps, 0).unwrap_or(0);
    IdMaps::of(spec).map_or((0, 0), |maps| (root(maps.uids), root(maps.gids)))
}

/// oom_score_adj of the new process; lowering it takes a privilege, keeping it does not.
fn oom_score(pid: i32, score: i32) -> Result<()> {
    let name = format!("/proc/{pid}/oom_score_adj");
    let now = fs::read_to_string(&name).unwrap_or_default();
    if now.trim() != score.to_string() {
        fs::write(&name, score.to_string()).context(|| format!("write {name}"))?;
    }
    Ok(())
}

fn intel_rdt(spec: &Spec) -> Option<&LinuxIntelRdt> {
    spec.linux().as_ref()?.intel_rdt().as_ref()
}
