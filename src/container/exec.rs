//! A further process in a container: the command's half of [`crate::init::setns`].

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use oci_spec::runtime::{LinuxNamespaceType, Process};

use super::hooks::HookState;
use super::launch::{Birth, Newborn, Parent, launch};
use super::{Cgroup, Container, Error, Result, Status, Store, debug};
use crate::init::channel::Message;
use crate::init::console::Console;
use crate::init::{credentials, namespaces, rlimits, scheduling, seccomp, setns};
use crate::sys;

/// What is asked of `exec`.
#[derive(Debug)]
pub struct Request {
    /// What to run, and as whom.
    pub process: Process,
    /// Standard input, output and error, where they are not ours.
    pub stdio: Option<[OwnedFd; 3]>,
    /// Where the terminal's master is to go.
    pub console: Option<Console>,
    /// Connected socket that is to get a pidfd of the process.
    pub pidfd_socket: Option<OwnedFd>,
    /// How many descriptors from 3 on the program inherits.
    pub passed: i32,
    /// Paused containers are allowed: the process starts once the container is resumed.
    pub ignore_paused: bool,
    /// Groups inside the container's that the process is to be in, by controller; `""` is for all.
    pub groups: BTreeMap<String, String>,
}

/// Finds the container for an `exec`, if it is in a state to take one.
pub fn target(store: &Store, id: &str, ignore_paused: bool) -> Result<Container> {
    let container = Container::load(store, id)?;
    match container.status()? {
        Status::Stopped => Err(Error::new("cannot exec in a stopped container")),
        Status::Paused if !ignore_paused => {
            Err(Error::new("cannot exec in a paused container (use --ignore-paused to override)"))
        }
        _ => Ok(container),
    }
}

/// Runs a process in the container. It is a child of ours.
pub fn exec(container: &Container, request: &Request) -> Result<Newborn> {
    // No process may appear while the container is being checkpointed or paused.
    let mut lock = Some(container.dir.lock_shared()?);
    let cgroup = container.cgroup();
    if !container.has_init() {
        return Err(Error::new("cannot exec in a stopped container"));
    }
    let frozen = cgroup.is_frozen()?;
    if !request.ignore_paused && frozen {
        return Err(Error::new("cannot exec in a paused container (use --ignore-paused to override)"));
    }
    let spec = container.spec()?;
    let filter =
        spec.linux().as_ref().and_then(|l| l.seccomp().as_ref()).map(seccomp::compile).transpose()?;
    let pid = container.state.init_process_pid;
    let joined = namespaces::of_process(pid)?;
    if !container.has_init() {
        return Err(Error::new("cannot exec in a stopped container"));
    }
    let plan = setns::Plan {
        id: &container.state.id,
        spec: &spec,
        process: &request.process,
        namespaces: &joined,
        user_namespace: namespaces::joins(&joined, LinuxNamespaceType::User)
            || credentials::in_user_namespace(),
        no_new_keyring: container.state.config.no_new_keyring,
        stdio: request.stdio.as_ref(),
        console: request.console.as_ref(),
        pidfd_socket: request.pidfd_socket.as_ref(),
        passed: request.passed,
        seccomp: filter.as_ref(),
    };
    let inside = cgroup.inside(&request.groups)?;
    let affinity = request.process.exec_cpu_affinity().as_ref();
    let (first, last) = match affinity {
        Some(a) => (a.initial().as_deref(), a.cpu_affinity_final().as_deref()),
        None => (None, None),
    };
    if let Some(list) = first {
        // The process is born with it, and this command only waits from here on.
        scheduling::set_affinity(0, list).map_err(|e| e.context("error setting initial CPU affinity"))?;
    }
    let doors = inside.doors();
    let birth = Birth { joined: &joined, doors: doors.as_ref(), ..Birth::default() };
    let process = launch(&birth, &|channel| setns::main(&plan, channel))
        .map_err(|e| e.context("unable to start container process"))?;
    debug::newborn(process.pid);
    let talked = (|| -> Result<()> {
        let entered = match doors {
            Some(_) if process.born_inside || !inside.is_unified() => {
                inside.add_rest(process.pid, process.born_inside)
            }
            _ => enter(container, &inside, process.pid),
        };
        entered.map_err(|e| {
            e.context(format!(
                "unable to start container process: error adding pid {} to cgroups",
                process.pid
            ))
        })?;
        container.state.rdt.join(process.pid).map_err(|e| {
            let pid = process.pid;
            e.context(format!("unable to start container process: error adding pid {pid} to Intel RDT"))
        })?;
        match last {
            Some(list) => scheduling::set_affinity(process.pid, list).map_err(|e| {
                e.context("unable to start container process: error setting final CPU affinity")
            })?,
            None if first.is_none() => scheduling::reset_affinity(process.pid),
            None => {}
        }
        if frozen {
            // The process goes on once somebody thaws it, and `resume` must not wait for that.
            lock = None;
        }
        debug::say(|| "child process in init()".to_owned());
        process.channel.go()?;
        let mut ready = false;
        while let Some(message) = process.channel.listen()? {
            match message {
                Message::Ready => {
                    rlimits::apply(request.process.rlimits().as_deref().unwrap_or_default(), process.pid)
                        .map_err(|e| e.context("unable to start container process"))?;
                    ready = true;
                }
                Message::Listener(fd) => {
                    let state = HookState::of(&container.state, "running");
                    super::listener::hand_over(&spec, &process, fd, &state, process.pid)?;
                }
                Message::Failed(text) => {
                    return Err(sys::Error::new(text).context("unable to start container process").into());
                }
                _ => return Err(Error::new("garbled message on the init channel")),
            }
            process.channel.go()?;
        }
        if ready {
            debug::say(|| "setns_init: about to exec".to_owned());
            Ok(())
        } else {
            Err(Error::new("unable to start container process: it died before it was ready"))
        }
    })();
    drop(lock);
    match talked {
        Ok(()) => Ok(process),
        Err(e) => {
            process.kill();
            Err(e)
        }
    }
}

/// A process for the checkpoint engine to fill, which is `vpid` inside. It is no child of ours.
pub fn shell(container: &Container, vpid: i32) -> Result<Newborn> {
    let joined = namespaces::of_process(container.state.init_process_pid)?;
    let (groups, config) = (container.cgroup(), &container.state.config);
    let doors = groups.doors();
    let birth = Birth {
        joined: &joined,
        doors: doors.as_ref(),
        parent: Parent::Reaper,
        pid: Some(vpid),
        ..Birth::default()
    };
    let id = &container.state.id;
    let process = launch(&birth, &|channel| setns::shell(id, &joined, config.no_new_keyring, channel))
        .map_err(|e| e.context(format!("cannot make process {vpid}, which exec had started")))?;
    let talked = || -> Result<()> {
        match doors {
            Some(_) => groups.add_rest(process.pid, process.born_inside),
            None => enter(container, &groups, process.pid),
        }
        .map_err(|e| e.context(format!("cannot put process {vpid} into its control groups")))?;
        container.state.rdt.join(process.pid)?;
        process.channel.go()?;
        match process.channel.listen()? {
            Some(Message::Ready) => Ok(()),
            Some(Message::Failed(text)) => Err(Error::new(text)),
            _ => Err(Error::new(format!("process {vpid} has died before it was filled"))),
        }
    };
    match talked() {
        Ok(()) => Ok(process),
        Err(e) => {
            process.kill();
            Err(e)
        }
    }
}

/// Puts the process into the groups.
///
/// In v2 the container's own group takes none once there are groups inside that have controllers: then it goes where init
/// is. A user may not move a process from somebody else's group, such as that of his login, into his own: his systemd
/// may; without it the process stays where it is, as with runc.
fn enter(container: &Container, groups: &Cgroup, pid: i32) -> sys::Result<()> {
    let failure = match groups.add(pid) {
        Err(e) if groups.is_unified() => e,
        done => return done,
    };
    let own = container.cgroup();
    let init = || Cgroup::of_process(container.state.init_process_pid)?.add(pid);
    if own.attach(groups, pid).is_ok()
        || (groups.paths() == own.paths() && init().is_ok())
        || container.state.rootless
        || credentials::in_user_namespace()
    {
        return Ok(());
    }
    Err(failure)
}
