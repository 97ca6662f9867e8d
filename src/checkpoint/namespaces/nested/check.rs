//! What of the namespaces that a container has made cannot be checkpointed, looked at while it runs.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use super::spaces::{copy, kind_of, outside};
use crate::checkpoint::context::{Options, Source};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::enter::door;
use crate::checkpoint::namespaces::kind::links;
use crate::checkpoint::namespaces::mount::nested::Tree;
use crate::checkpoint::namespaces::{Kind, ipc, mount, net, vpid};
use crate::checkpoint::pieces;
use crate::sys::kcmp::{What, kcmp};

/// Everything about the namespaces of these processes (pids of this host) that keeps them from being dumped.
pub fn check(options: &Options, source: &Source, pids: &[i32]) -> Vec<Error> {
    let (mut found, mut inside) = (Vec::new(), BTreeMap::new());
    let of = |name: &str| names(name).unwrap_or_default();
    let (inits, ours) = (of(&source.init.to_string()), of("self"));
    for pid in pids {
        if let Err(e) = process(*pid, &inits, &ours, &mut inside) {
            // What has ended meanwhile is no finding.
            if std::fs::metadata(format!("/proc/{pid}/ns/mnt")).is_ok() {
                found.push(e.pid(vpid(source.init, *pid)));
            }
        }
    }
    for ((kind, _), pids) in &inside {
        let Some(Ok(door)) = pids.first().map(|pid| door(*pid, *kind)) else { continue };
        found.extend(contents(options, source, *kind, &door));
        if *kind == Kind::Mnt {
            found.extend(sharing(source.init, pids).err());
        }
    }
    found
}

/// By kind and name, who is in the namespaces that the container has made.
type Inside = BTreeMap<(Kind, PathBuf), Vec<i32>>;

/// By kind, what a process is in; and where its children are to be, as for clocks.
type Names = [Option<PathBuf>; 9];

fn names(pid: &str) -> Result<Names> {
    let [a, b, c, d, e, f, g, h] = Kind::ALL.map(Kind::name);
    links(pid, [a, b, c, d, e, f, g, h, "time_for_children"])
}

fn process(pid: i32, inits: &Names, ours: &Names, inside: &mut Inside) -> Result<()> {
    let names = names(&pid.to_string())?;
    for (((kind, theirs), inits), ours) in Kind::ALL.into_iter().zip(&names).zip(inits).zip(ours) {
        // Of a zombie nothing is left to look at.
        let Some(theirs) = theirs else { continue };
        if Some(theirs) == inits.as_ref() {
            continue;
        }
        if Some(theirs) == ours.as_ref() {
            return Err(outside(kind));
        }
        inside.entry((kind, theirs.clone())).or_default().push(pid);
    }
    let [.., clocks, clocks_of_children] = &names;
    if clocks != clocks_of_children {
        return Err(Error::new(
            "the process has its children in a time namespace of its own, which cannot be checkpointed yet",
        ));
    }
    threads(pid, &names)
}

/// Every thread must be in the namespaces of its process.
fn threads(pid: i32, names: &Names) -> Result<()> {
    const KINDS: [Kind; 5] = [Kind::Net, Kind::Ipc, Kind::Uts, Kind::Cgroup, Kind::Mnt];
    let own = |kind: Kind| Kind::ALL.iter().position(|k| *k == kind).and_then(|at| names[at].as_ref());
    let leader = pid.to_string();
    let path = format!("/proc/{pid}/task");
    let list = std::fs::read_dir(&path).during("cannot list the threads", || format!("open({path:?})"))?;
    let tids: Vec<String> = list.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let elsewhere = |tid: &String| {
        // It may have ended.
        let all = links(&format!("{pid}/task/{tid}"), KINDS.map(Kind::name)).ok()?;
        let differs = |(kind, theirs): &(Kind, &Option<_>)| theirs.is_some() && theirs.as_ref() != own(*kind);
        KINDS.into_iter().zip(&all).find(differs).map(|(kind, _)| kind)
    };
    let tids: Vec<String> = tids.into_iter().filter(|tid| *tid != leader).collect();
    match pieces::all(&tids, elsewhere)?.into_iter().flatten().next() {
        None => Ok(()),
        Some(kind) => Err(Error::new(format!(
            "a thread of the process is in another {} namespace than its first one",
            kind.title()
        ))
        .remedy("let the thread go back, or end it")),
    }
}

/// The mount namespaces that the container has made.
pub fn trees(init: i32, pids: &[(i32, i32)]) -> Vec<Tree> {
    let of = |pid: i32| Kind::Mnt.of(&pid.to_string()).ok().flatten();
    let inits = of(init);
    let others = pids.iter().filter_map(|(pid, _)| Some((of(*pid)?, *pid)));
    let all: BTreeMap<PathBuf, i32> = others.filter(|(name, _)| Some(name) != inits.as_ref()).collect();
    all.into_values().filter_map(|pid| mount::nested::look(door(pid, Kind::Mnt).ok()?).ok()).collect()
}

/// A process of each network namespace that the container has made.
pub fn in_networks(init: i32, pids: &[(i32, i32)]) -> Vec<i32> {
    let of = |pid: i32| Kind::Net.of(&pid.to_string()).ok().flatten();
    let inits = of(init);
    let others = pids.iter().filter_map(|(pid, _)| Some((of(*pid)?, *pid)));
    let all: BTreeMap<PathBuf, i32> = others.filter(|(net, _)| Some(net) != inits.as_ref()).collect();
    all.into_values().collect()
}

/// Refuses a TCP connection in a network namespace that the container has made: its packets could not be held up.
pub fn check_connection(init: i32, socket: &OwnedFd) -> Result<()> {
    let inode = |fd: &OwnedFd| nix::sys::stat::fstat(fd).map(|stat| stat.st_ino).ok();
    let Ok(is) = crate::sys::ioctl::socket_namespace(socket) else { return Ok(()) };
    if inode(&is) == inode(&door(init, Kind::Net)?) {
        return Ok(());
    }
    Err(Error::new("there is a TCP connection in a network namespace that the container has made")
        .remedy("have it closed with --tcp-close"))
}

/// Processes of a mount namespace that the container has made must not share their working directory: the kernel lets
/// nobody who does change the namespace.
fn sharing(init: i32, pids: &[i32]) -> Result<()> {
    for (n, one) in pids.iter().enumerate() {
        // One that ends meanwhile shares nothing.
        if let Some(other) =
            pids[..n].iter().find(|other| kcmp(**other, *one, What::Fs).is_ok_and(|o| o.is_eq()))
        {
            return Err(Error::new(format!(
                "the process shares its working directory with process {}, in a mount namespace that the container has made",
                vpid(init, *other)
            ))
            .pid(vpid(init, *one)));
        }
    }
    Ok(())
}

/// What is in a namespace that the container has made.
fn contents(options: &Options, source: &Source, kind: Kind, door: &OwnedFd) -> Vec<Error> {
    match kind {
        Kind::Mnt => copy(door)
            .and_then(mount::nested::look)
            .and_then(|tree| mount::nested::check(options, source, &tree))
            .unwrap_or_else(|e| vec![e]),
        Kind::Ipc => ipc::check_inside(door).err().into_iter().collect(),
        Kind::Net => {
            copy(door).map_or_else(|e| vec![e], |door| net::check_inside(options, vec![(door, kind)]))
        }
        _ => Vec::new(),
    }
}

/// Refuses a descriptor of a namespace that cannot be made again.
pub fn check_door(options: &Options, source: &Source, door: &OwnedFd) -> Result<()> {
    let (kind, init) = (kind_of(door)?, source.init);
    let inode = |fd: &OwnedFd| {
        nix::sys::stat::fstat(fd)
            .map(|stat| stat.st_ino)
            .during("cannot look at a namespace", || "fstat(_)".into())
    };
    let is = inode(door)?;
    let of = |pid: i32| -> Result<bool> {
        // None where the kernel has no such kind, or the process has ended.
        let Some(_) = kind.of(&pid.to_string())? else { return Ok(false) };
        Ok(inode(&super::super::enter::door(pid, kind)?)? == is)
    };
    if of(init)? {
        return Ok(());
    }
    if of(std::process::id().cast_signed())? {
        return Err(outside(kind));
    }
    contents(options, source, kind, door).into_iter().next().map_or(Ok(()), Err)
}
