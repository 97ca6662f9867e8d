//! What keeps a container's descriptors from being dumped, looked at while it runs.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;

use crate::checkpoint::context::{Options, Source};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::{Live, descriptors, look_at_all};
use crate::checkpoint::files::{
    KINDS, Named, Surroundings, device, external, inet, inotify, locks, mqueue, pipe, tcp, tty, unix,
};
use crate::checkpoint::namespaces::nested;
use crate::checkpoint::{Error, Result};
use crate::sys::pidfd;

/// File system of memfd_secret(2).
const SECRETMEM_MAGIC: i64 = 0x5345_434d;

/// Everything about the descriptors of these processes (pid on this host, pid inside) that can't be checkpointed.
/// A process or descriptor that vanishes meanwhile is no finding.
pub fn check(options: &Options, source: &Source, tasks: &[(i32, i32)]) -> Vec<Error> {
    let trees = nested::trees(source.init, tasks);
    let (root, mut mounts) = match (root_of(source.init), mounts_of(source.init)) {
        (Ok(root), Ok(mounts)) => (root, mounts),
        (Err(e), _) | (_, Err(e)) => return vec![e],
    };
    let pids = tasks.iter().copied().collect();
    mounts.extend(trees.iter().flat_map(|tree| &tree.mounts).filter_map(|m| i32::try_from(m.id).ok()));
    let (mut found, mut sockets, mut terminals) = (Vec::new(), Vec::new(), Vec::new());
    let (mut connected, named) = (false, Named::default());
    for &(pid, vpid) in tasks {
        let Ok(handle) = pidfd::open(pid, 0) else { continue };
        let Ok(fds) = descriptors(pid) else { continue };
        let fds: Vec<_> = fds.into_iter().map(|fd| (fd, None)).collect();
        let mut judge = |live: Result<Option<Live>>| {
            match live {
                Ok(Some(live)) => {
                    let tree = trees.iter().find(|tree| tree.has(live.info.mnt_id));
                    let around = Surroundings {
                        options,
                        root: tree.map_or(&root, |tree| &tree.root),
                        own: tree.is_none(),
                        source: Some(source),
                        init: source.init,
                        pids: &pids,
                        named: Some(&named),
                    };
                    let outcome =
                        locks::check(options, &live).and_then(|()| refuse(source, &around, &mounts, &live));
                    if inet::is_connection(&live) {
                        connected = true;
                        let outcome = nested::check_connection(source.init, &live.file);
                        found.extend(outcome.err().filter(|_| !options.tcp_close).map(|e| live.name(e)));
                    }
                    match outcome {
                        Ok(true) if tty::is(&live) => terminals.push(live),
                        Ok(true) => sockets.push(live),
                        Ok(false) => {}
                        Err(e) => found.push(e),
                    }
                }
                Ok(None) => {}
                Err(_) if pidfd::send_signal(handle.as_fd(), 0).is_err() => return Ok(false),
                Err(e) => found.push(e),
            }
            Ok(true)
        };
        // It has no errors of its own.
        let _ = look_at_all(pid, vpid, handle.as_fd(), &fds, &mut judge);
    }
    if connected && options.tcp_established && !options.tcp_close {
        found.extend(tcp::lock::check(options, source.init).err());
    }
    found.extend(unix::check(options, source, &root, &trees, &sockets, tasks));
    let console = source.spec.process().as_ref().and_then(|p| p.terminal()).unwrap_or(false);
    found.extend(tty::check_all(&terminals, console, options.keep_exec));
    found
}

/// True for a unix socket or a terminal of the container, which can be judged only together with the others.
fn refuse(source: &Source, around: &Surroundings<'_>, mounts: &BTreeSet<i32>, live: &Live) -> Result<bool> {
    if leads_out(source, mounts, live)? {
        return Ok(false);
    }
    let kind = KINDS.iter().find(|k| (k.is)(live)).ok_or_else(|| unsupported(live))?;
    (kind.check)(live, around)?;
    if inotify::is(live) {
        inotify::check(live, around)?;
    }
    Ok(unix::is(live) || tty::is(live))
}

/// Is it one of the descriptors given at create, on no mount of the container? Others that lead out are refused.
/// Pipes are recorded as pipes, and told by their names.
pub fn leads_out(source: &Source, mounts: &BTreeSet<i32>, live: &Live) -> Result<bool> {
    let inside = mounts.contains(&live.info.mnt_id);
    let given = external::stdio_index(&source.stdio, live, inside).is_some();
    if pipe::is(live) || mqueue::is(live) {
        return Ok(false);
    }
    if given {
        return Ok(true);
    }
    let memfd = live.link.as_os_str().as_encoded_bytes().starts_with(b"/memfd:");
    let by_path = live.link.is_absolute() && !memfd;
    if by_path && !inside && live.fs == SECRETMEM_MAGIC {
        return Err(live
            .name(Error::new("secret memory (memfd_secret) can be read by nobody but the program"))
            .remedy("let the program close it"));
    }
    if by_path && !inside && !device::is_null(live) {
        return Err(live
            .name(Error::new("an open file lies outside the container's mounts"))
            .remedy("let the program close it; only standard input, output and error may lead out"));
    }
    Ok(false)
}

/// A refusal by name of what no kind knows.
pub fn unsupported(live: &Live) -> Error {
    let link = live.link.display();
    let what = match live.link.to_str().unwrap_or_default() {
        "anon_inode:[userfaultfd]" => "a userfaultfd".to_owned(),
        "anon_inode:[perf_event]" => "a performance counter (perf_event)".to_owned(),
        "anon_inode:bpf-prog" | "anon_inode:bpf_link" => {
            format!("a BPF object ({link})")
        }
        l if l.starts_with("socket:") => format!("a socket of an unsupported family ({link})"),
        _ => format!("an open file of an unsupported kind ({link})"),
    };
    live.name(Error::new(format!("{what} cannot be checkpointed")))
        .remedy("let the program close it, or stop it")
}

/// The root directory of a process.
pub fn root_of(pid: i32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/root");
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty())
        .during("cannot open the container's root", || format!("open({path:?}, O_PATH|O_DIRECTORY)"))
}

/// The ids of the mounts that a process sees.
pub fn mounts_of(pid: i32) -> Result<BTreeSet<i32>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = std::fs::read_to_string(&path)
        .during("cannot read the container's mounts", || format!("open({path:?}, O_RDONLY)"))?;
    Ok(text.lines().filter_map(|l| l.split(' ').next()?.parse().ok()).collect())
}
