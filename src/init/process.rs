//! What a new process does between `clone3(2)` and the container's program.
//!
//! ```text
//!   first steps ── Go ──> namespaces' own settings ──> mounts ── Mounted/Go ──> hooks, pivot ──> console
//!       ──> read-only paths, host name, sysctls ── Ready/Go ──> labels, seccomp, user, capabilities
//!       ──> program found ──> channel closed ──> exec fifo ──> execve(2)
//! ```
//!
//! The process is a fork of the command and shares nothing with it: it works on what the command had in memory.

use std::cell::RefCell;
use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_dumpable;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, fchdir, getppid, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::channel::{Channel, Message};
use super::mounts::Source;
use super::program::{self, Program};
use super::{console, devices, lsm, masked, privileges, rootfs, sysctl};
use crate::sys::process::{self, exit_now};
use crate::sys::procfs::{Descriptors, Later, Procfs};
use crate::sys::{Context, Error, Result, keyring, network, pidfd};

/// What the process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Run the program of config.json once the exec fifo is opened.
    Start,
    /// Wait, as an empty shell, for the checkpoint engine to fill it.
    Restore,
}

/// All that the init of a container needs to know.
pub struct Plan<'a> {
    /// Container id.
    pub id: &'a str,
    /// config.json.
    pub spec: &'a Spec,
    /// Its process.
    pub process: &'a Process,
    /// What there is to mount.
    pub setup: RefCell<rootfs::Setup<'a>>,
    /// Program to run, or shell to fill.
    pub purpose: Purpose,
    /// Who makes the container is not root.
    pub rootless: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// Standard input, output and error, where they are not the command's.
    pub stdio: Option<&'a [OwnedFd; 3]>,
    /// Where the terminal's master is to go.
    pub console: Option<&'a console::Console>,
    /// Socket that is to get a pidfd of the process.
    pub pidfd_socket: Option<&'a OwnedFd>,
    /// O_PATH descriptor of the exec fifo.
    pub fifo: Option<&'a OwnedFd>,
    /// How many descriptors from 3 on the program inherits.
    pub passed: i32,
    /// The seccomp program, compiled.
    pub seccomp: Option<&'a super::seccomp::Program>,
    /// Runs the hooks that belong into the container: `createContainer` before, `startContainer` after the pivot.
    pub hooks: &'a dyn Fn(Stage<'_>) -> Result<()>,
}

/// Which hooks are due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage<'a> {
    /// In the container's namespaces, with the host's root directory; the working directory is the container's root.
    CreateContainer,
    /// Just before the program, whose environment this is.
    StartContainer(&'a [CString]),
}

/// The whole life of init up to its program. Never returns.
pub fn main(plan: &Plan<'_>, channel: Channel) -> ! {
    let failure = match prepare(plan, &channel) {
        Err(e) => {
            if channel.tell(&Message::Failed(e.to_string())).is_ok() {
                exit_now(1);
            }
            e
        }
        Ok((program, own)) => {
            drop(channel);
            match start(plan, &program, own.as_ref()) {
                Err(e) => e,
                Ok(never) => match never {},
            }
        }
    };
    // Nobody listens any more but whoever reads the container's standard error.
    eprintln!("{failure}");
    exit_now(255)
}

/// Everything that `create` can report, and where the exec fifo is to be opened anew.
fn prepare(plan: &Plan<'_>, channel: &Channel) -> Result<(Program, Option<Descriptors>)> {
    let parent = getppid();
    let mapped = plan.namespace(LinuxNamespaceType::User);
    first_steps(plan.stdio, plan.keep(channel), mapped && plan.rootless)?;
    channel.wait()?;
    if plan.namespace(LinuxNamespaceType::Time) {
        // Now, while a rootless user may still open our files under /proc.
        super::time::enter_new(plan.spec, &|| {
            channel.tell(&Message::Clocks)?;
            channel.wait()
        })?;
    }
    if mapped {
        become_root()?;
    }
    setsid().context(|| "setsid")?;
    own_namespaces(plan)?;
    if !plan.no_new_keyring {
        let user_namespace = plan.namespace(LinuxNamespaceType::User);
        lsm::with_key_label(plan.process, || session_keyring(plan.id, user_namespace))?;
    }
    let root = rootfs::prepare(&mut plan.setup.borrow_mut(), &|index| {
        channel.tell(&Message::Source(index))?;
        channel.wait_for_descriptor()
    })?;
    channel.tell(&Message::Mounted)?;
    channel.wait()?;
    fchdir(root.fd()).context(|| "chdir to the root file system")?;
    (plan.hooks)(Stage::CreateContainer)?;
    let setup = plan.setup.borrow();
    rootfs::pivot(&setup, &root)?;
    terminal(plan, channel)?;
    if let Some(socket) = plan.pidfd_socket {
        let own = pidfd::open(std::process::id() as i32, 0).context(|| "pidfd_open")?;
        console::send(socket.as_fd(), b"standard", own.as_fd())?;
    }
    if plan.purpose == Purpose::Start {
        rootfs::make_working_directory(plan.process.cwd());
    }
    rootfs::finish(&setup, &root)?;
    drop(root);
    let procfs = Later::default();
    if setup.user_namespace {
        // Whether groups can be set is asked under the container's seccomp filter, which may forbid to mount.
        procfs.get()?;
    }
    if let Some(sysctls) = plan.spec.linux().as_ref().and_then(|l| l.sysctl().as_ref()) {
        if !sysctls.is_empty() {
            sysctl::apply(sysctls, procfs.get()?)?;
        }
    }
    masked::apply(plan.spec)?;
    // The container may have no /proc, or what only looks like one: then one of our own, while we may still mount it.
    let own = || {
        let shown = Procfs::mounted().and_then(|procfs| procfs.descriptors());
        shown.or_else(|_| Procfs::open()?.descriptors())
    };
    let own = plan.fifo.map(|_| own()).transpose()?;
    if plan.purpose == Purpose::Restore {
        return Err(shell(channel));
    }
    lsm::apply_apparmor(plan.process, &procfs).context(|| "unable to apply apparmor profile")?;
    privileges::before_ready(plan.process, plan.spec)?;
    channel.tell(&Message::Ready)?;
    channel.wait()?;
    if plan.fifo.is_some() {
        process::end_on_signals().context(|| "sigaction")?;
    }
    let late = privileges::Late {
        filter: plan.seccomp,
        listener: &|fd| {
            channel.tell(&Message::Listener(fd))?;
            channel.wait()
        },
        parent: Some(parent),
    };
    let program = privileges::after_ready(plan.process, plan.passed, &procfs, &late)?;
    Ok((program, own))
}

/// What `start` sets off. Its failures can only be printed.
fn start(plan: &Plan<'_>, program: &Program, own: Option<&Descriptors>) -> Result<Infallible> {
    if let Some((fifo, own)) = plan.fifo.zip(own) {
        if plan.rootless {
            // `exec` may come before `start`, and its user has no other right to our namespaces. Whoever else could
            // trace us has all that we have left.
            set_dumpable(true).context(|| "prctl(PR_SET_DUMPABLE)")?;
        }
        let file = own.reopen(fifo, OFlag::O_WRONLY).context(|| "reopen exec fifo")?;
        // Whoever has opened the other end may be killed before the byte is read: that is no reason to die of SIGPIPE.
        let _other = own.reopen(fifo, OFlag::O_RDONLY | OFlag::O_NONBLOCK);
        nix::unistd::write(&file, b"0").context(|| "write exec fifo")?;
    }
    (plan.hooks)(Stage::StartContainer(&program.env))?;
    Err(program.exec())
}

/// The same for every process we make: no descriptor, signal setting or core dump of the command's stays.
///
/// A process of ours must not be traced, and its files under /proc not be opened, from inside the container. A rootless
/// user who is to write the maps of a new user namespace must own these files: then it is `dumpable` until
/// [`become_root`]. Root writes them anyway, and others whom a shared pid namespace shows this process must not reach it.
pub(super) fn first_steps(stdio: Option<&[OwnedFd; 3]>, keep: Vec<RawFd>, dumpable: bool) -> Result<()> {
    set_dumpable(dumpable).context(|| "prctl(PR_SET_DUMPABLE)")?;
    if let Some([input, output, error]) = stdio {
        nix::unistd::dup2_stdin(input).context(|| "dup2")?;
        nix::unistd::dup2_stdout(output).context(|| "dup2")?;
        nix::unistd::dup2_stderr(error).context(|| "dup2")?;
    }
    // SAFETY: the values that own the closed descriptors live in the command's frames, to which this process
    // never returns.
    unsafe { process::close_all_but(&keep) }.context(|| "close_range")?;
    // Rust ignores SIGPIPE, and a command in the foreground takes all signals through a descriptor.
    // SAFETY: the default action runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.context(|| "signal(SIGPIPE)")?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).context(|| "sigprocmask")
}

/// Takes the identity of root in a user namespace whose maps are now written.
pub(super) fn become_root() -> Result<()> {
    set_dumpable(false).context(|| "prctl(PR_SET_DUMPABLE)")?;
    match setgroups(&[]) {
        // Forbidden for good in the namespace of an unprivileged user.
        Ok(()) | Err(nix::errno::Errno::EPERM) => {}
        Err(errno) => return Err(Error::call("setgroups", errno)),
    }
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).context(|| "setresgid(0) in the user namespace")?;
    setresuid(uid, uid, uid).context(|| "setresuid(0) in the user namespace")?;
    // A change of ids has set it to what sysctl fs.suid_dumpable says.
    set_dumpable(false).context(|| "prctl(PR_SET_DUMPABLE)")
}

/// Namespaces that can only be made, or filled, from inside.
fn own_namespaces(plan: &Plan<'_>) -> Result<()> {
    if plan.namespace(LinuxNamespaceType::Cgroup) {
        // Only now, in its control group: that becomes the root of the namespace.
        unshare(CloneFlags::CLONE_NEWCGROUP).context(|| "unshare(CLONE_NEWCGROUP)")?;
    }
    if plan.namespace(LinuxNamespaceType::Network) {
        network::loopback_up().context(|| "bringing up the loopback interface")?;
    }
    if plan.namespace(LinuxNamespaceType::Uts) {
        if let Some(name) = plan.spec.hostname().as_deref().filter(|n| !n.is_empty()) {
            nix::unistd::sethostname(name).context(|| "sethostname")?;
        }
        if let Some(name) = plan.spec.domainname().as_deref().filter(|n| !n.is_empty()) {
            crate::sys::uts::set_domainname(name).context(|| "setdomainname")?;
        }
    }
    Ok(())
}

/// Joins the keyring `_ses.ID`, so that the caller's keys are out of reach.
pub(super) fn session_keyring(id: &str, user_namespace: bool) -> Result<()> {
    let name = std::ffi::CString::new(format!("_ses.{id}")).map_err(|_| Error::new("id with a nul byte"))?;
    let serial = match keyring::join_session(&name) {
        Ok(serial) => serial,
        // A kernel without keyrings has nothing to protect.
        Err(nix::errno::Errno::ENOSYS) => return Ok(()),
        Err(errno) => return Err(Error::call("unable to join session keyring: keyctl", errno)),
    };
    // Searchable: by others inside a user namespace, by the owner otherwise.
    let bits = if user_namespace { 0x8 } else { 0x8_0000 };
    let mod_perm = || keyring::set_permissions(serial, keyring::permissions(serial)? | bits);
    mod_perm().context(|| "unable to mod keyring permissions")
}

/// Makes the terminal, and adopts it or, in a shell to be filled, hands it over.
fn terminal(plan: &Plan<'_>, channel: &Channel) -> Result<()> {
    let Some(console) = plan.console else { return Ok(()) };
    let slave = console::create(console, console_size(plan.process))?;
    if plan.namespace(LinuxNamespaceType::Mount) {
        devices::mount_console(slave.as_fd())?;
    }
    match plan.purpose {
        Purpose::Start => console::adopt(&slave),
        Purpose::Restore => channel.tell(&Message::Descriptor(slave)),
    }
}

/// Rows and columns that config.json asks for.
pub(super) fn console_size(process: &Process) -> Option<(u16, u16)> {
    let size = process.console_size()?;
    let (rows, columns) = (size.height().try_into().ok()?, size.width().try_into().ok()?);
    (rows != 0 && columns != 0).then_some((rows, columns))
}

/// The shell that the checkpoint engine fills: no descriptor but the channel, and nothing to do.
pub(super) fn shell(channel: &Channel) -> Error {
    let wait = || -> Result<()> {
        umask(Mode::from_bits_truncate(0o022));
        channel.tell(&Message::Ready)?;
        // SAFETY: this process uses nothing but the channel from here on.
        unsafe { process::close_all_but(&[channel.as_raw_fd()]) }.context(|| "close_range")?;
        for fd in 0..3 {
            // SAFETY: standard descriptors have no owner.
            let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
            drop(fd);
        }
        let mut byte = [0];
        // SAFETY: the channel outlives the call.
        let fd = unsafe { BorrowedFd::borrow_raw(channel.as_raw_fd()) };
        loop {
            match nix::unistd::read(fd, &mut byte) {
                Err(nix::errno::Errno::EINTR) => {}
                _ => exit_now(255),
            }
        }
    };
    match wait() {
        Err(e) => e,
        Ok(()) => Error::new("the shell of a restore was not filled"),
    }
}

impl Plan<'_> {
    /// True if config.json asks for a new namespace of that kind.
    pub fn namespace(&self, kind: LinuxNamespaceType) -> bool {
        super::namespaces::wanted(self.spec, kind).is_some_and(|n| super::namespaces::path(n).is_none())
    }

    fn keep(&self, channel: &Channel) -> Vec<RawFd> {
        let sockets = [self.console.map(|c| &c.socket), self.pidfd_socket, self.fifo];
        let mut keep: Vec<RawFd> = sockets.into_iter().flatten().map(AsRawFd::as_raw_fd).collect();
        keep.push(channel.as_raw_fd());
        keep.extend(3..3 + self.passed);
        keep.extend(self.setup.borrow().sources.iter().filter_map(|s| match s {
            Source::Ready(tree) => Some(tree.as_raw_fd()),
            Source::Own | Source::Late => None,
        }));
        keep
    }
}

/// Checks what the program is, and where, with the environment it will have.
pub(super) fn find(process: &Process) -> Result<Program> {
    let env = program::environment(process.env().as_deref().unwrap_or_default(), process.user().uid())?;
    Program::find(process.args().as_deref().unwrap_or_default(), env)
}
