//! The namespaces that the container had made, made again by its init.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use oci_spec::runtime::Capability;

use super::spaces::{copy, fill, unsupported};
use super::{KINDS, Space, spaces};
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::enter::door;
use crate::checkpoint::namespaces::{Kind, mount, time};
use crate::checkpoint::remote::{CloneArgs, Exit, Injection};
use crate::checkpoint::task::credentials::Policy;
use crate::checkpoint::task::status::Status;

/// What has been made, by its number in the images.
#[derive(Debug, Default)]
pub struct Made {
    /// Ways into it.
    doors: Mutex<BTreeMap<u32, OwnedFd>>,
    /// The root directories of mount namespaces.
    roots: Mutex<BTreeMap<u32, OwnedFd>>,
}

impl Made {
    pub(super) fn doors(&self) -> MutexGuard<'_, BTreeMap<u32, OwnedFd>> {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The root directories of mount namespaces.
    pub fn roots(&self) -> Result<BTreeMap<u32, OwnedFd>> {
        let roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        roots.iter().map(|(id, root)| Ok((*id, copy(root)?))).collect()
    }
}

/// Makes and fills all but those that need the control groups.
pub fn make(restore: &Restore<'_>, stub: &mut NewTask) -> Result<()> {
    let all = spaces(restore.model)?;
    let Some(first) = all.first() else { return Ok(()) };
    if !Policy::of(&restore.target.spec).grants(Capability::SysAdmin) {
        return Err(Error::new(format!(
            "the checkpoint has a {} namespace that the container has made, and config.json does not let it make any",
            first.kind.title()
        ))
        .remedy("give the capability CAP_SYS_ADMIN"));
    }
    // A file system may belong to a network or IPC namespace.
    let (last, first): (Vec<_>, Vec<_>) = all.into_iter().partition(|space| space.kind == Kind::Mnt);
    for space in first.into_iter().chain(last) {
        match space.kind {
            kind if !KINDS.contains(&kind) => return Err(unsupported(kind)),
            Kind::Cgroup => {}
            _ => one(restore, stub, space)?,
        }
    }
    Ok(())
}

/// Makes those whose root is the control group of their maker: `places` has the directories of each.
pub fn make_placed(
    restore: &Restore<'_>,
    stub: &mut NewTask,
    places: &BTreeMap<u32, Vec<PathBuf>>,
    put: &dyn Fn(&std::path::Path, i32) -> Result<()>,
) -> Result<()> {
    for space in spaces(restore.model)?.into_iter().filter(|space| space.kind == Kind::Cgroup) {
        let Some(dirs) = places.get(&space.id) else {
            return Err(Error::new(format!(
                "the images do not say where control group namespace {} has its root",
                space.id
            )));
        };
        let door = helper(stub, 0, &mut |pid, injection| {
            dirs.iter().try_for_each(|dir| put(dir, pid))?;
            injection.syscall(libc::SYS_unshare, &[libc::CLONE_NEWCGROUP.into()])?;
            door(pid, Kind::Cgroup)
        })?;
        restore.made.doors().insert(space.id, door);
    }
    Ok(())
}

fn one(restore: &Restore<'_>, stub: &mut NewTask, space: Space) -> Result<()> {
    // Whoever makes a time namespace is not in it.
    let flags = if space.kind == Kind::Time { 0 } else { space.kind.flag().bits() };
    let door = helper(stub, flags, &mut |pid, injection| {
        if space.kind == Kind::Time {
            injection.syscall(libc::SYS_unshare, &[libc::CLONE_NEWTIME.into()])?;
            time::put_back(restore, space.id, pid)?;
            let path = format!("/proc/{pid}/ns/time_for_children");
            let door = std::fs::File::open(&path)
                .during("cannot open a time namespace", || format!("open({path:?})"))?;
            return Ok(OwnedFd::from(door));
        }
        if space.kind == Kind::Mnt {
            let root = mount::nested::put_back(restore, space.id, pid)?;
            restore.made.roots.lock().unwrap_or_else(PoisonError::into_inner).insert(space.id, root);
        }
        fill(restore, space, pid)?;
        door(pid, space.kind)
    })?;
    restore.made.doors().insert(space.id, door);
    Ok(())
}

/// Has `parent` make a child in new namespaces, and ends it when `work` has opened what it needs.
fn helper<T>(
    parent: &mut NewTask,
    flags: i32,
    work: &mut dyn FnMut(i32, &mut Injection) -> Result<T>,
) -> Result<T> {
    let args = CloneArgs { flags: u64::from(flags.cast_unsigned()), ..CloneArgs::default() };
    let (thread, mut injection) = parent.injection.clone_child(&args)?;
    let pid = thread.tid();
    let inside = Status::of(pid)?.ns_pid.last().copied().unwrap_or(pid);
    let done = work(pid, &mut injection);
    injection.exit_child(Exit::Code(0))?;
    let wait = [inside.into(), 0.into(), libc::__WALL.into(), 0.into()];
    parent.injection.syscall(libc::SYS_wait4, &wait)?;
    done
}
