//! The namespaces that the container had made, made again by its init.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use oci_spec::runtime::{Capability, Spec};

use super::pids::Pids;
use super::spaces::{copy, fill};
use super::{Space, spaces};
use crate::checkpoint::context::{NewTask, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::CredsEntry;
use crate::checkpoint::namespaces::enter::door;
use crate::checkpoint::namespaces::{Kind, mount, time, user};
use crate::checkpoint::remote::{Batch, CloneArgs, Conduit, Exit, Injection};
use crate::checkpoint::task::credentials::{self, Policy};
use crate::checkpoint::task::status::{Status, depth};

/// What has been made, by its number in the images.
#[derive(Debug, Default)]
pub struct Made {
    /// Ways into it.
    doors: Mutex<BTreeMap<u32, OwnedFd>>,
    /// The root directories of mount namespaces.
    roots: Mutex<BTreeMap<u32, OwnedFd>>,
}

impl Made {
    fn keep_root(&self, id: u32, root: OwnedFd) {
        self.roots.lock().unwrap_or_else(PoisonError::into_inner).insert(id, root);
    }

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
pub fn make(restore: &Restore<'_>, stub: &mut NewTask, conduit: &Conduit) -> Result<()> {
    let all = spaces(restore.model)?;
    if all.is_empty() {
        return Ok(());
    }
    let pids = Pids::of(restore.model)?;
    let maker = Maker { restore, conduit };
    permit(&restore.target.spec, &all)?;
    // A file system may belong to a network or IPC namespace.
    let (last, first): (Vec<_>, Vec<_>) = all.into_iter().partition(|space| space.kind == Kind::Mnt);
    for space in first.into_iter().chain(last) {
        let door = match space.kind {
            Kind::Pid if pids.spaces.get(&space.id).is_some_and(|level| level.init != 0) => continue,
            Kind::Pid => maker.deserted(stub, space)?,
            Kind::Cgroup => continue,
            Kind::User => maker.user(stub, space)?,
            Kind::Time => maker.time(stub, space)?,
            Kind::Mnt => maker.mounts(stub, space)?,
            kind => maker.helper(stub, space.owner, &mut |pid, injection| {
                unshare(injection, kind)?;
                fill(restore, space, pid)?;
                door(pid, kind)
            })?,
        };
        restore.made.doors().insert(space.id, door);
    }
    Ok(())
}

/// Makes the mounts that have waited for namespaces.
pub fn make_late(restore: &Restore<'_>) -> Result<()> {
    if mount::late::all_waiting(restore.model)?.is_empty() {
        return Ok(());
    }
    mount::nested::build_late(restore, Kind::Mnt.inits(restore.model))?;
    let all = spaces(restore.model)?;
    all.iter()
        .filter(|space| space.kind == Kind::Mnt)
        .try_for_each(|space| mount::nested::build_late(restore, space.id))
}

/// A container that could not have made a namespace does not get one from an image.
fn permit(spec: &Spec, all: &[Space]) -> Result<()> {
    let first = all.iter().find(|space| space.owner == 0 && space.kind != Kind::User);
    match first {
        Some(first) if !Policy::of(spec).grants(Capability::SysAdmin) => Err(Error::new(format!(
            "the checkpoint has a {} namespace that the container has made, and config.json does not let it make any",
            first.kind.title()
        ))
        .remedy("give the capability CAP_SYS_ADMIN")),
        _ => Ok(()),
    }
}

/// Makes those whose root is the control group of their maker: `places` has the directories of each.
pub fn make_placed(
    restore: &Restore<'_>,
    stub: &mut NewTask,
    conduit: &Conduit,
    places: &BTreeMap<u32, Vec<PathBuf>>,
    put: &dyn Fn(&Path, i32) -> Result<()>,
) -> Result<()> {
    let maker = Maker { restore, conduit };
    for space in spaces(restore.model)?.into_iter().filter(|space| space.kind == Kind::Cgroup) {
        let Some(dirs) = places.get(&space.id) else {
            return Err(Error::new(format!(
                "the images do not say where control group namespace {} has its root",
                space.id
            )));
        };
        let door = maker.helper(stub, space.owner, &mut |pid, injection| {
            dirs.iter().try_for_each(|dir| put(dir, pid))?;
            unshare(injection, Kind::Cgroup)?;
            door(pid, Kind::Cgroup)
        })?;
        restore.made.doors().insert(space.id, door);
    }
    Ok(())
}

fn unshare(injection: &mut Injection, kind: Kind) -> Result<()> {
    injection.syscall(libc::SYS_unshare, &[kind.flag().bits().into()]).map(drop)
}

/// What a helper is told to do: its pid on this host, and it.
type Work<'w, T> = &'w mut dyn FnMut(i32, &mut Injection) -> Result<T>;

/// Has `parent` make a child, and ends it when `work` has opened what it needs.
pub(super) fn child<T>(parent: &mut Injection, args: &CloneArgs, work: Work<'_, T>) -> Result<T> {
    let (thread, mut injection) = parent.clone_child(args)?;
    let pid = thread.tid();
    let depth = depth(parent.thread().tid())?;
    let inside = Status::of(pid)?.pid_at(depth).unwrap_or(pid);
    let done = work(pid, &mut injection);
    injection.exit_child(Exit::Code(0))?;
    let wait = [inside.into(), 0.into(), libc::__WALL.into(), 0.into()];
    parent.syscall(libc::SYS_wait4, &wait)?;
    done
}

struct Maker<'m> {
    restore: &'m Restore<'m>,
    conduit: &'m Conduit,
}

impl Maker<'_> {
    /// A child of the stub, in the user namespace with that number.
    fn helper<T>(&self, stub: &mut NewTask, owner: u32, work: Work<'_, T>) -> Result<T> {
        child(&mut stub.injection, &CloneArgs::default(), &mut |pid, injection| {
            self.become_owner(injection, owner)?;
            work(pid, injection)
        })
    }

    fn become_owner(&self, injection: &mut Injection, owner: u32) -> Result<()> {
        let Some(door) = self.restore.made.door(owner)? else { return Ok(()) };
        let [number] = self.conduit.send(injection, &[door.as_fd()])?[..] else { return Ok(()) };
        let mut batch = Batch::new();
        batch.about("cannot enter a user namespace");
        batch.call(libc::SYS_setns, &[number.into(), Kind::User.flag().bits().into()]);
        batch.call(libc::SYS_close, &[number.into()]);
        injection.run(&batch).map(drop)
    }

    /// A user namespace. Its maps are written by a process of the one around: nobody else may.
    fn user(&self, stub: &mut NewTask, space: Space) -> Result<OwnedFd> {
        let files = user::files(self.restore, space.id, space.fixed_groups)?;
        let group = user::some_group(self.restore, space.owner)?;
        child(&mut stub.injection, &CloneArgs::default(), &mut |_, around| {
            // Its maker must be somebody in the namespace around, too.
            let maker = CredsEntry {
                uid: space.maker,
                euid: space.maker,
                suid: space.maker,
                fsuid: space.maker,
                gid: group,
                egid: group,
                sgid: group,
                fsgid: group,
                ..CredsEntry::default()
            };
            let mut batch = Batch::new();
            credentials::take_ids(&mut batch, &maker);
            around.run(&batch)?;
            self.become_owner(around, space.owner)?;
            // Or its files in /proc would be root's. No program of the container runs yet that could look at it.
            let dumpable = [libc::PR_SET_DUMPABLE.into(), 1.into()];
            around.syscall(libc::SYS_prctl, &dumpable)?;
            let args = CloneArgs { flags: libc::CLONE_NEWUSER as u64, ..CloneArgs::default() };
            let (thread, inside) = around.clone_child(&args)?;
            let pid = thread.tid();
            let vpid = Status::of(pid)?.ns_pid.last().copied().unwrap_or(pid);
            let done = self.map(around, pid, &files).and_then(|()| door(pid, Kind::User));
            inside.exit_child(Exit::Code(0))?;
            around.syscall(libc::SYS_wait4, &[vpid.into(), 0.into(), libc::__WALL.into(), 0.into()])?;
            done
        })
    }

    fn map(&self, around: &mut Injection, pid: i32, files: &[(&str, String)]) -> Result<()> {
        let path = format!("/proc/{pid}");
        let dir = std::fs::File::open(&path).during("cannot map ids", || format!("open({path:?})"))?;
        let [number] = self.conduit.send(around, &[dir.as_fd()])?[..] else { return Ok(()) };
        for (name, text) in files {
            let mut batch = Batch::new();
            batch.about("cannot map the ids of a user namespace");
            let path = batch.string(name.as_bytes());
            let open = batch.call(libc::SYS_openat, &[number.into(), path, libc::O_WRONLY.into()]);
            let fd = around.run(&batch)?.int(open);
            let mut batch = Batch::new();
            batch.about(format!("cannot map the ids of a user namespace: {name} {text:?}"));
            let bytes = batch.data(text.as_bytes());
            batch.call(libc::SYS_write, &[fd.into(), bytes, text.len().into()]);
            batch.call(libc::SYS_close, &[fd.into()]);
            around.run(&batch)?;
        }
        around.syscall(libc::SYS_close, &[number.into()]).map(drop)
    }

    /// A pid namespace whose first process is gone. One that lives makes its own, in the tree.
    fn deserted(&self, stub: &mut NewTask, space: Space) -> Result<OwnedFd> {
        self.helper(stub, space.owner, &mut |_, injection| {
            unshare(injection, Kind::Pid)?;
            child(injection, &CloneArgs::default(), &mut |pid, _| door(pid, Kind::Pid))
        })
    }

    /// A time namespace. Whoever makes one is not in it.
    fn time(&self, stub: &mut NewTask, space: Space) -> Result<OwnedFd> {
        self.helper(stub, space.owner, &mut |pid, injection| {
            unshare(injection, Kind::Time)?;
            time::put_back(self.restore, space.id, pid)?;
            let path = format!("/proc/{pid}/ns/time_for_children");
            let door = std::fs::File::open(&path)
                .during("cannot open a time namespace", || format!("open({path:?})"))?;
            Ok(OwnedFd::from(door))
        })
    }

    /// A mount namespace: made by the container, then copied by its owner, if that is another one.
    fn mounts(&self, stub: &mut NewTask, space: Space) -> Result<OwnedFd> {
        self.helper(stub, 0, &mut |pid, injection| {
            unshare(injection, Kind::Mnt)?;
            let builder = mount::nested::build(self.restore, space.id, pid)?;
            let (root, door) = if space.owner == 0 {
                (builder.finish()?, door(pid, Kind::Mnt)?)
            } else {
                child(injection, &CloneArgs::default(), &mut |pid, injection| {
                    self.become_owner(injection, space.owner)?;
                    unshare(injection, Kind::Mnt)?;
                    Ok((builder.copied(pid)?, door(pid, Kind::Mnt)?))
                })?
            };
            self.restore.made.keep_root(space.id, root);
            Ok(door)
        })
    }
}
