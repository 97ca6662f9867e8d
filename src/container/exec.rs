//! A further process in a container: the command's half of [`crate::init::setns`].

use std::os::fd::OwnedFd;

use oci_spec::runtime::Process;

use super::hooks::HookState;
use super::launch::{Newborn, launch};
use super::{Container, Error, Result, Status, Store};
use crate::init::channel::Message;
use crate::init::{namespaces, rlimits, seccomp, setns};
use crate::sys;

/// What is asked of `exec`.
#[derive(Debug)]
pub struct Request {
    /// What to run, and as whom.
    pub process: Process,
    /// Standard input, output and error, where they are not ours.
    pub stdio: Option<[OwnedFd; 3]>,
    /// Connected socket that is to get the terminal's master.
    pub console: Option<OwnedFd>,
    /// Connected socket that is to get a pidfd of the process.
    pub pidfd_socket: Option<OwnedFd>,
    /// How many descriptors from 3 on the program inherits.
    pub passed: i32,
    /// Paused containers are allowed: the process starts once the container is resumed.
    pub ignore_paused: bool,
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
    let _lock = container.dir.lock_shared()?;
    let cgroup = container.cgroup();
    if !container.has_init() {
        return Err(Error::new("cannot exec in a stopped container"));
    }
    if !request.ignore_paused && cgroup.is_frozen()? {
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
        no_new_keyring: container.state.config.no_new_keyring,
        stdio: request.stdio.as_ref(),
        console: request.console.as_ref(),
        pidfd_socket: request.pidfd_socket.as_ref(),
        passed: request.passed,
        seccomp: filter.as_ref(),
    };
    let process = launch(0, &joined, &|channel| setns::main(&plan, channel))
        .map_err(|e| e.context("unable to start container process"))?;
    let talked = (|| -> Result<()> {
        cgroup
            .add(process.pid)
            .map_err(|e| e.context("unable to start container process: error adding pid to cgroups"))?;
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
            Ok(())
        } else {
            Err(Error::new("unable to start container process: it died before it was ready"))
        }
    })();
    match talked {
        Ok(()) => Ok(process),
        Err(e) => {
            process.kill();
            Err(e)
        }
    }
}
