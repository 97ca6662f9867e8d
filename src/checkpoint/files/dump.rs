//! The dump of descriptors: every table once, every open file once.

use std::os::fd::AsFd;

use nix::fcntl::OFlag;

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::live::{Live, descriptors, look_at_all, names};
use crate::checkpoint::files::registry::classify;
use crate::checkpoint::files::{
    KINDS, Surroundings, check, epoll, external, fanotify, inotify, locks, netlink, options, packet,
    register_path, tcp, tty, tun, unix,
};
use crate::checkpoint::image::{FdTypes, FdinfoEntry, FsEntry};
use crate::checkpoint::{Error, Result, pieces};
use crate::sys::kcmp::{What, kcmp};

/// Fills the model's descriptor tables, open files, and working directories and roots.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    prepare(dump)?;
    external::write_names(dump)?;
    let tasks: Vec<(usize, i32, i32)> =
        dump.tasks.iter().enumerate().filter(|(_, t)| !t.zombie).map(|(n, t)| (n, t.pid, t.vpid)).collect();
    let (mut tables, mut spaces) = (Vec::new(), Vec::new());
    for &(index, pid, vpid) in &tasks {
        let ids = dump.model.ids.entry(vpid.cast_unsigned()).or_default();
        if ids.files_id == 0 {
            ids.files_id = same(&mut tables, pid, What::Files)?;
            ids.fs_id = same(&mut spaces, pid, What::Fs)?;
        }
        let files_id = ids.files_id;
        if !dump.model.fdinfo.contains_key(&files_id) {
            let table = table(dump, index, pid, vpid, files_id)?;
            dump.model.fdinfo.insert(files_id, table);
        }
        let fs = directories(dump, index).map_err(|e| e.pid(vpid))?;
        dump.model.fs.insert(vpid.cast_unsigned(), fs);
    }
    let foreign = epoll::resolve(dump)?;
    if !foreign.is_empty() {
        dump.model.set_extension(epoll::EXTENSION, &foreign)?;
    }
    let options = std::mem::take(&mut dump.files.inet);
    if !options.is_empty() {
        dump.model.set_extension(options::EXTENSION, &options)?;
    }
    let packets = std::mem::take(&mut dump.files.packets);
    if !packets.is_empty() {
        dump.model.set_extension(packet::EXTENSION, &packets)?;
    }
    let flags = std::mem::take(&mut dump.files.netlink);
    if !flags.is_empty() {
        dump.model.set_extension(netlink::EXTENSION, &flags)?;
    }
    tcp::describe(dump);
    let more = unix::resolve(dump)?;
    if !more.is_empty() {
        dump.model.set_extension(unix::EXTENSION, &more)?;
    }
    tty::record_clients(dump)?;
    tty::dump_queues(dump)?;
    tun::describe(dump)
}

/// What must be looked at before a dump opens any file of the container's.
pub fn before(dump: &mut Dump<'_>) -> Result<()> {
    let (mut groups, mut instances) = (Vec::new(), Vec::new());
    let live = dump.tasks.iter().enumerate().filter(|(_, task)| !task.zombie);
    let live: Vec<_> = live.map(|(index, task)| (index, task.pid, task.vpid)).collect();
    let all = pieces::all(&live, |(_, pid, vpid)| names(*pid).map_err(|e| e.pid(*vpid)))?;
    for ((index, pid, _), names) in live.into_iter().zip(all) {
        let names = names?;
        for (fd, name) in &names {
            match name.as_encoded_bytes() {
                b"anon_inode:[fanotify]" => groups.push((index, *fd)),
                b"anon_inode:inotify" => instances.push((index, *fd)),
                _ => {}
            }
        }
        dump.files.names.insert(pid, names);
    }
    fanotify::refuse_unread(dump, &groups)?;
    inotify::copy_unread(dump, &instances)
}

/// Opens what every look needs: the root, the mounts, the names of processes. Rooms that register paths may come first.
pub(super) fn prepare(dump: &mut Dump<'_>) -> Result<()> {
    if dump.files.root.is_some() {
        return Ok(());
    }
    let init = dump.source.init;
    dump.files.root = Some(check::root_of(init)?);
    dump.files.trees = dump.spaces.trees();
    dump.files.mounts = check::mounts_of(init)?;
    let nested = dump.files.trees.iter().flat_map(|tree| &tree.mounts);
    dump.files.mounts.extend(nested.filter_map(|m| i32::try_from(m.id).ok()));
    dump.files.pids = dump.tasks.iter().map(|t| (t.pid, t.vpid)).collect();
    Ok(())
}

/// The id of what a process may share with one before it.
fn same(known: &mut Vec<i32>, pid: i32, what: What) -> Result<u32> {
    let mut at = known.len();
    for (n, &other) in known.iter().enumerate() {
        let equal = kcmp(other, pid, what)
            .during("cannot compare two processes", || format!("kcmp({other}, {pid}, {what:?})"))?;
        if equal.is_eq() {
            at = n;
            break;
        }
    }
    if at == known.len() {
        known.push(pid);
    }
    u32::try_from(at + 1).map_err(|_| Error::new("too many processes"))
}

/// One table of descriptors.
fn table(dump: &mut Dump<'_>, task: usize, pid: i32, vpid: i32, files_id: u32) -> Result<Vec<FdinfoEntry>> {
    let mut table = Vec::new();
    let Some(task) = dump.tasks.get(task) else { return Ok(table) };
    let handle = task
        .pidfd
        .try_clone()
        .during("cannot hold the process", || "fcntl(pidfd, F_DUPFD_CLOEXEC)".into())?;
    let fds: Vec<_> = match dump.files.names.remove(&pid) {
        Some(names) => names.into_iter().map(|(fd, name)| (fd, Some(name))).collect(),
        None => descriptors(pid).map_err(|e| e.pid(vpid))?.into_iter().map(|fd| (fd, None)).collect(),
    };
    look_at_all(pid, vpid, handle.as_fd(), &fds, &mut |live| {
        let Some(live) = live? else { return Ok(true) };
        let (id, kind) = record(dump, &live)?;
        locks::dump(dump, &live, files_id, id)?;
        table.push(FdinfoEntry {
            id,
            flags: if live.info.cloexec { libc::FD_CLOEXEC.cast_unsigned() } else { 0 },
            r#type: kind as i32,
            fd: live.fd.cast_unsigned(),
            xattr_security_selinux: None,
        });
        Ok(true)
    })?;
    Ok(table)
}

/// Records an open file, if it is new. Its id and kind.
pub(super) fn record(dump: &mut Dump<'_>, live: &Live) -> Result<(u32, FdTypes)> {
    let (id, new) = classify(dump, live)?;
    let outside = check::leads_out(dump.source, &dump.files.mounts, live)?;
    if outside {
        let kind = if live.format() == libc::S_IFSOCK { FdTypes::Ext } else { FdTypes::Reg };
        if new {
            external::dump(dump, live, id)?;
        }
        return Ok((id, kind));
    }
    let kind = KINDS.iter().find(|k| (k.is)(live)).ok_or_else(|| check::unsupported(live))?;
    if new {
        (kind.check)(live, &Surroundings::of(dump, live.info.mnt_id)?)?;
        (kind.dump)(dump, live, id).map_err(|e| live.name(e))?;
    }
    Ok((id, kind.r#type))
}

/// Working directory, root and umask.
fn directories(dump: &mut Dump<'_>, index: usize) -> Result<FsEntry> {
    let (pid, umask) = (dump.tasks[index].pid, dump.tasks[index].status.umask);
    let mut register = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty())
            .during("cannot open a process's directory", || format!("open({path:?}, O_PATH|O_DIRECTORY)"))?;
        let link = std::fs::read_link(&path)
            .during("cannot read a process's directory", || format!("readlink({path:?})"))?;
        register_path(dump, dir, &link, OFlag::O_PATH | OFlag::O_DIRECTORY)
    };
    let (cwd_id, root_id) = (register("cwd")?, register("root")?);
    Ok(FsEntry { cwd_id, root_id, umask: Some(umask) })
}
