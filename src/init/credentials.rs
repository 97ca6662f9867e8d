//! Who the container's program runs as: ids and groups, ownership of its standard descriptors, and the mappings of its
//! user namespace.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::prctl::set_keepcaps;
use nix::unistd::{Gid, Uid, fchown, getegid, geteuid, setgid, setgroups, setuid};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec, User};

use super::masked::verify_dev_null;
use crate::sys::procfs::{Later, read_text};
use crate::sys::{Context, Error, Result};

/// Becomes the user of config.json. Capabilities are kept until [`super::capabilities::apply`] sets them; supplementary
/// groups are left alone where the user namespace forbids to set them, as nobody asked for any there.
pub fn become_user(user: &User, procfs: &Later) -> Result<()> {
    set_keepcaps(true).context(|| "unable to set keep caps")?;
    own_stdio(user.uid()).context(|| "unable to setup user")?;
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|g| Gid::from_raw(*g)).collect();
    match setgroups(&groups) {
        Err(Errno::EPERM) if setgroups_denied(procfs)? => {}
        done => done.context(|| "unable to setup user: setgroups")?,
    }
    let unmapped = |what: &str, id: u32, errno: Errno| match errno {
        Errno::EINVAL => Error::new(format!(
            "unable to setup user: cannot set{what} to unmapped {what} {id} in user namespace"
        )),
        e => Error::call(format!("unable to setup user: set{what} {id}"), e),
    };
    setgid(Gid::from_raw(user.gid())).map_err(|e| unmapped("gid", user.gid(), e))?;
    setuid(Uid::from_raw(user.uid())).map_err(|e| unmapped("uid", user.uid(), e))
}

/// Ends what [`become_user`] kept. Called once the working directory is set.
pub fn clear_keep_capabilities() -> Result<()> {
    set_keepcaps(false).context(|| "unable to clear keep caps")
}

fn setgroups_denied(procfs: &Later) -> Result<bool> {
    match procfs.get()?.read("self/setgroups") {
        Ok(text) => Ok(text.trim() == "deny"),
        Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives the standard descriptors to the user, so that a program which is not root can reopen its terminal or pipes.
fn own_stdio(uid: u32) -> Result<()> {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for fd in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let Ok(stat) = nix::sys::stat::fstat(fd) else { continue };
        if stat.st_uid == uid || verify_dev_null(fd).is_ok() {
            continue;
        }
        match fchown(fd, Some(Uid::from_raw(uid)), None) {
            // Owners that are not mapped here, and file systems that cannot change: not worth failing for.
            Ok(()) | Err(Errno::EPERM | Errno::EROFS | Errno::EINVAL | Errno::ENOSYS) => {}
            Err(e) => return Err(e).context(|| "chown of standard descriptor"),
        }
    }
    Ok(())
}

/// True if this process is in a user namespace that is not the initial one.
pub fn in_user_namespace() -> bool {
    match read_text("/proc/self/uid_map") {
        Ok(map) => map.split_whitespace().ne(["0", "0", "4294967295"]),
        Err(_) => false,
    }
}

/// The ids that root of the container has as seen by the process that makes its devices, which is root itself.
pub(super) fn root_ids(_spec: &Spec) -> (u32, u32) {
    (0, 0)
}

/// The id on this host of an id of the container, if it has a mapping.
pub fn host_id(maps: &[LinuxIdMapping], id: u32) -> Option<u32> {
    maps.iter().find_map(|m| {
        let offset = id.checked_sub(m.container_id()).filter(|o| *o < m.size())?;
        m.host_id().checked_add(offset)
    })
}

/// Mappings of a user namespace, to be written from outside.
#[derive(Debug, Clone, Copy)]
pub struct IdMaps<'a> {
    /// User ids.
    pub uids: &'a [LinuxIdMapping],
    /// Group ids.
    pub gids: &'a [LinuxIdMapping],
}

impl<'a> IdMaps<'a> {
    /// The mappings of config.json, if the container gets a user namespace of its own.
    pub fn of(spec: &'a Spec) -> Option<Self> {
        let linux = spec.linux().as_ref()?;
        let user = linux.namespaces().iter().flatten().find(|n| n.typ() == LinuxNamespaceType::User)?;
        if user.path().as_ref().is_some_and(|p| !p.as_os_str().is_empty()) {
            return None;
        }
        Some(Self {
            uids: linux.uid_mappings().as_deref().unwrap_or_default(),
            gids: linux.gid_mappings().as_deref().unwrap_or_default(),
        })
    }

    /// Writes them for process `pid`. Unprivileged, more than one id needs newuidmap(1) and newgidmap(1).
    pub fn write(&self, pid: i32) -> Result<()> {
        let privileged = geteuid().is_root();
        if !privileged && self.gids.len() == 1 && is_self(&self.gids[0], getegid().as_raw()) {
            // Without privileges a group map needs setgroups(2) switched off first.
            write_file(pid, "setgroups", "deny")?;
        }
        self.write_one(pid, "uid_map", "newuidmap", self.uids, geteuid().as_raw())
            .context(|| "failed to write uid mapping")?;
        self.write_one(pid, "gid_map", "newgidmap", self.gids, getegid().as_raw())
            .context(|| "failed to write gid mapping")
    }

    fn write_one(&self, pid: i32, file: &str, helper: &str, maps: &[LinuxIdMapping], own: u32) -> Result<()> {
        if maps.is_empty() {
            return Ok(());
        }
        let line = |m: &LinuxIdMapping| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size());
        let text: String = maps.iter().map(line).collect();
        let alone = maps.len() == 1 && is_self(&maps[0], own);
        match write_file(pid, file, &text) {
            Err(e) if matches!(e.errno(), Some(Errno::EPERM | Errno::EACCES)) && !alone => {
                run_helper(helper, pid, maps)
            }
            other => other,
        }
    }
}

fn is_self(map: &LinuxIdMapping, own: u32) -> bool {
    map.size() == 1 && map.host_id() == own
}

fn write_file(pid: i32, file: &str, text: &str) -> Result<()> {
    let path = format!("/proc/{pid}/{file}");
    std::fs::write(&path, text).context(|| format!("write {path}"))
}

fn run_helper(helper: &str, pid: i32, maps: &[LinuxIdMapping]) -> Result<()> {
    let mut command = Command::new(helper);
    command.arg(pid.to_string());
    for m in maps {
        command.args([m.container_id(), m.host_id(), m.size()].map(|n| n.to_string()));
    }
    let output = match command.output() {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Err(Error::new(format!("{helper} is needed to map more than one id without privileges")));
        }
        other => other.context(|| helper.to_owned())?,
    };
    if output.status.success() {
        return Ok(());
    }
    Err(Error::new(format!("{helper}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
