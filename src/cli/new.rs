//! What `create`, `run` and `restore` have in common.

use std::env;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Process, Spec};

use super::{Context, absolute, log};
use crate::bundle::Bundle;
use crate::container::create::{Created, Options, Request, host_root};
use crate::container::foreground::{Signals, stay};
use crate::container::launch::Parent;
use crate::container::stdio::{Ours, Stdio};
use crate::container::{Error, Result, notify};
use crate::init::process::Purpose;
use crate::init::{capabilities, seal};
use crate::sys::{self, Context as _};

/// Flags of a new container.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    /// Path to the root of the bundle directory [default: the current directory]
    #[arg(long, short, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// Path of a socket which will receive the master of the console's pseudoterminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Path of a socket which will receive a pidfd of the init process
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// File to write the process id to
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Do not use pivot_root, for a root file system on a ramdisk
    #[arg(long)]
    pub no_pivot: bool,
    /// Keep the caller's session keyring
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u16,
}

/// A container about to be made.
pub struct Prepared {
    /// For `container::create`.
    pub request: Request,
    /// Our side of its standard descriptors.
    pub ours: Ours,
    /// Where to write its pid.
    pub pid_file: Option<PathBuf>,
}

/// Makes sure that the program file cannot be reached from inside (by executing it again), and reads the bundle.
pub fn prepare(
    context: &Context,
    id: &str,
    flags: &Flags,
    detach: bool,
    purpose: Purpose,
) -> Result<Prepared> {
    seal(context)?;
    let pid_file = flags.pid_file.as_deref().map(absolute).transpose()?;
    let console_socket = flags.console_socket.as_deref().map(absolute).transpose()?;
    let pidfd_socket = flags.pidfd_socket.as_deref().map(absolute).transpose()?;
    let bundle = flags.bundle.as_deref().unwrap_or(Path::new("."));
    // Hooks with relative paths, and their working directory, mean the bundle.
    env::set_current_dir(bundle).context(|| format!("chdir {}", bundle.display()))?;
    let mut bundle = Bundle::load(Path::new("."))?;
    crate::bundle::warnings::of(&bundle.spec).iter().for_each(|text| log::warn(text));
    warn_of_capabilities(&bundle.unknown, bundle.spec.process().as_ref());
    let listen = listen_fds();
    if listen > 0 {
        add_env(&mut bundle.spec, [format!("LISTEN_FDS={listen}"), "LISTEN_PID=1".to_owned()]);
    }
    let notify = notify::manager().is_some();
    if notify {
        notify::add(&mut bundle.spec, &context.store.dir(id)?);
    }
    let passed = i32::from(listen) + i32::from(flags.preserve_fds);
    check_passed(i32::from(listen), passed)?;
    let terminal = bundle.spec.process().as_ref().and_then(|p| p.terminal()).unwrap_or(false);
    let stdio = Stdio::new(detach, terminal, console_socket.as_deref(), host_root(&bundle.spec))?;
    let pidfd_socket = pidfd_socket.as_deref().map(dial).transpose()?;
    let request = Request {
        id: id.to_owned(),
        bundle,
        purpose,
        hold: false,
        parent: if detach && purpose == Purpose::Restore { Parent::Reaper } else { Parent::Us },
        stdio: stdio.theirs,
        console: stdio.console,
        pidfd_socket,
        passed,
        notify,
        options: Options {
            no_pivot: flags.no_pivot,
            no_new_keyring: flags.no_new_keyring,
            systemd_cgroup: context.systemd_cgroup,
            rootless_cgroup: context.rootless,
        },
    };
    Ok(Prepared { request, ours: stdio.ours, pid_file })
}

/// Passes on to the service manager, if one wants to hear it, that the container is ready. A command in the background
/// stays until then, one in the foreground is itself what the manager watches.
pub fn tell_manager(created: &mut Created, detach: bool) -> Result<()> {
    let (Some(manager), Some(socket)) = (notify::manager(), created.notify.take()) else { return Ok(()) };
    let manager = PathBuf::from(manager);
    if detach {
        let told = socket.relay(&manager, created.init.pidfd.as_fd(), created.init.pid);
        return told.or_else(unheard);
    }
    let init = created.init.pidfd.try_clone().context(|| "dup")?;
    let relay = move || socket.relay(&manager, init.as_fd(), std::process::id() as i32).or_else(unheard);
    std::thread::Builder::new().spawn(relay).context(|| "a thread for the notify socket")?;
    Ok(())
}

/// The container runs all the same.
pub fn unheard(e: Error) -> Result<()> {
    log::warn(&e.to_string());
    Ok(())
}

/// Names the capabilities that a process will not have, whatever is asked for.
pub fn warn_of_capabilities(unknown: &[String], process: Option<&Process>) {
    if !unknown.is_empty() {
        log::warn(&format!("ignoring unknown or unavailable capabilities: [{}]", unknown.join(" ")));
    }
    let sets = process.and_then(|p| p.capabilities().as_ref());
    for name in sets.map(capabilities::unraisable).unwrap_or_default() {
        log::warn(&format!("can't raise ambient capability {name}: operation not permitted"));
    }
}

/// Goes on in a program file that nobody can write to.
pub fn seal(context: &Context) -> Result<()> {
    let root = context.store.root();
    std::fs::create_dir_all(root).context(|| format!("mkdir {}", root.display()))?;
    Ok(seal::ensure(root)?)
}

/// Takes in processes that outlive an init without a pid namespace of its own.
pub fn become_subreaper() {
    if let Err(e) = nix::sys::prctl::set_child_subreaper(true) {
        log::warn(&format!("prctl(PR_SET_CHILD_SUBREAPER): {}", sys::error::words(e)));
    }
}

/// Stays with a container in the foreground until its init has ended, deletes it unless `keep`, and says how it ended.
pub fn stay_and_delete(created: Created, ours: Ours, signals: &Signals, keep: bool) -> Result<u8> {
    drop(created.lock);
    let code = stay(created.init.pid, created.init.pidfd.as_fd(), ours, signals);
    if !keep {
        let lock = created.container.dir.lock();
        // Another command may have deleted it.
        if lock.is_ok() {
            if let Err(e) = created.container.destroy() {
                log::warn(&format!("unable to destroy container: {e}"));
            }
        }
    }
    u8::try_from(code?).map_err(|_| Error::new("exit status out of range"))
}

/// Connects to the socket that is to get a pidfd.
pub fn dial(path: &Path) -> Result<std::os::fd::OwnedFd> {
    let socket = std::os::unix::net::UnixStream::connect(path);
    Ok(socket.context(|| format!("failed to dial {}", path.display()))?.into())
}

/// Adds variables to the environment of the container's process.
pub fn add_env(spec: &mut Spec, variables: impl IntoIterator<Item = String>) {
    if let Some(process) = spec.process_mut() {
        process.env_mut().get_or_insert_default().extend(variables);
    }
}

/// Sockets that systemd passes to us are for the container.
pub fn listen_fds() -> u16 {
    let number = |name: &str| env::var(name).ok().and_then(|v| v.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return 0;
    }
    number("LISTEN_FDS").and_then(|n| u16::try_from(n).ok()).unwrap_or(0)
}

/// Refuses to pass on descriptors that are not there.
pub fn check_passed(first: i32, passed: i32) -> Result<()> {
    for fd in 3 + first..3 + passed {
        std::fs::symlink_metadata(format!("/proc/self/fd/{fd}"))
            .context(|| format!("unable to stat preserved-fd {} (of {})", fd - 3 - first, passed - first))
            .map_err(|e: sys::Error| Error::from(e))?;
    }
    Ok(())
}
