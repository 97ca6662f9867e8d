//! User namespaces: a container with id mappings of its own.
//!
//! ```text
//!   credentials        as the container sees them          the kernel maps what a process sets itself
//!   owners of files    as this host sees them              the engine sets them, from outside the namespace
//! ```
//!
//! Where config.json of a restore has other mappings, [`Owners`] turns the second into those of the same users inside. What
//! the engine makes, it makes as the container's root: a file system of the container's knows no owner that is not mapped.

mod owners;

use std::os::fd::OwnedFd;

use oci_spec::runtime::{Capability, LinuxNamespaceType, Spec};

use crate::checkpoint::context::{Dump, Restore, Source, Target};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{CredsEntry, UidGidExtent, UsernsEntry};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::enter::door;
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::nested;
use crate::checkpoint::task::credentials::Policy;
use crate::sys::namespace::with_idle_child_in;
use crate::sys::procfs::read_text;
use crate::sys::{credentials, ioctl};

pub use owners::Owners;

/// Whether the container has id mappings of its own.
pub fn private(source: &Source) -> Result<bool> {
    Kind::User.private(source.init)
}

/// Refuses a first process that has left the container's user namespace: all else is told from where that one is.
pub fn check(source: &Source) -> Result<()> {
    let wanted = source.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let wanted = wanted.into_iter().flatten().any(|n| n.typ() == LinuxNamespaceType::User);
    if !private(source)? || Kind::User.joined(&source.spec).is_some() {
        return Ok(());
    }
    let inode = |door: &OwnedFd| nix::sys::stat::fstat(door).map(|stat| stat.st_ino).ok();
    // EPERM: there is none around it that we may see.
    let around = ioctl::namespace_parent(door(source.init, Kind::User)?).ok();
    let ours = door(std::process::id().cast_signed(), Kind::User)?;
    if wanted && around.as_ref().is_none_or(|around| inode(around) == inode(&ours)) {
        return Ok(());
    }
    Err(Error::new("the container's first process has entered a user namespace that it has made itself")
        .pid(1)
        .remedy("start such a program (unshare --user) from another one, a shell or `docker run --init`"))
}

/// Saves the mappings.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let init = dump.source.init;
    if Kind::User.private(init)? {
        dump.model.userns.insert(Kind::User.id(true), maps(init)?);
    }
    Ok(())
}

/// The id on this host for one of the container's; one that is not mapped stays as it is, and is nobody's inside.
pub fn outside(extents: &[UidGidExtent], id: u32) -> u32 {
    let extent = extents.iter().find(|e| id >= e.first && id - e.first < e.count);
    extent.and_then(|e| e.lower_first.checked_add(id - e.first)).unwrap_or(id)
}

/// A user namespace: a process in it, if there is one, and a way into it.
pub type Place<'a> = (Option<i32>, &'a OwnedFd);

/// Does something with a process in a user namespace: one that is there, or one of ours that enters it for that.
fn within<T>((pid, door): Place<'_>, work: impl FnOnce(i32) -> T) -> Result<T> {
    match pid {
        Some(pid) => Ok(work(pid)),
        None => with_idle_child_in(door, work)
            .map_err(|e| Error::new(format!("cannot look into a user namespace that no process is in: {e}"))),
    }
}

/// Whether nobody in that user namespace may change supplementary groups.
pub fn fixed_groups_in(place: Place<'_>) -> Result<bool> {
    within(place, fixed_groups)
}

/// Saves the mappings of a user namespace that the container has made, to the ids of the one around it.
pub fn save(dump: &mut Dump<'_>, id: u32, place: Place<'_>, around: Place<'_>) -> Result<()> {
    let mut maps = within(place, self::maps)??;
    let outer = within(around, self::maps)??;
    relate(&mut maps.uid_map, &outer.uid_map)?;
    relate(&mut maps.gid_map, &outer.gid_map)?;
    dump.model.userns.insert(id, maps);
    Ok(())
}

/// Turns ids of this host into those of a namespace.
fn relate(maps: &mut [UidGidExtent], outer: &[UidGidExtent]) -> Result<()> {
    for extent in maps {
        let first = extent.lower_first;
        let around = outer.iter().find(|e| first >= e.lower_first && first - e.lower_first < e.count);
        let around = around
            .ok_or_else(|| Error::new("a user namespace maps ids that the one around it does not have"))?;
        extent.lower_first = around.first + (first - around.lower_first);
    }
    Ok(())
}

/// The ids of a process, turned from those of the namespace around a user namespace of the images into its own.
pub fn inside(model: &Model, id: u32, creds: &CredsEntry) -> Result<CredsEntry> {
    let none = UsernsEntry::default();
    let maps = model.userns.get(&id).unwrap_or(&none);
    let turn = |map: &[UidGidExtent], id: u32| {
        let extent = map.iter().find(|e| id >= e.lower_first && id - e.lower_first < e.count);
        extent.map(|e| e.first + (id - e.lower_first)).ok_or_else(|| {
            Error::new(format!("a user namespace has no name for the id {id}, which a process in it has"))
        })
    };
    let (user, group) = (|id| turn(&maps.uid_map, id), |id| turn(&maps.gid_map, id));
    Ok(CredsEntry {
        uid: user(creds.uid)?,
        euid: user(creds.euid)?,
        suid: user(creds.suid)?,
        fsuid: user(creds.fsuid)?,
        gid: group(creds.gid)?,
        egid: group(creds.egid)?,
        sgid: group(creds.sgid)?,
        fsgid: group(creds.fsgid)?,
        groups: creds.groups.iter().map(|id| group(*id)).collect::<Result<_>>()?,
        ..creds.clone()
    })
}

/// Whether nobody in the user namespace of a process may change supplementary groups.
pub fn fixed_groups(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/setgroups")).is_ok_and(|text| text.trim() == "deny")
}

/// A group of a user namespace of the images, as the container knows it; 0 for the container's own.
pub fn some_group(restore: &Restore<'_>, mut id: u32) -> Result<u32> {
    let spaces = nested::spaces(restore.model)?;
    let mut group = None;
    while let Some(maps) = restore.model.userns.get(&id).filter(|_| id > Kind::Time.id(true)) {
        let mut extents = maps.gid_map.iter();
        let extent = match group {
            None => extents.next(),
            Some(g) => extents.find(|e| g >= e.first && g - e.first < e.count),
        };
        let none = || Error::new(format!("nobody could have made a user namespace in the one numbered {id}"));
        let extent = extent.ok_or_else(none)?;
        group = Some(extent.lower_first + group.map_or(0, |g: u32| g - extent.first));
        id = spaces.iter().find(|space| space.id == id).map_or(0, |space| space.owner);
    }
    Ok(group.unwrap_or(0))
}

/// What is to be written into the files of /proc/PID for a user namespace of the images, in this order.
pub fn files(restore: &Restore<'_>, id: u32, fixed_groups: bool) -> Result<Vec<(&'static str, String)>> {
    let Some(maps) = restore.model.userns.get(&id) else {
        return Err(Error::new(format!("the images lack userns-{id}.img")));
    };
    permit(&restore.target.spec, maps)?;
    let text = |map: &[UidGidExtent]| {
        let line = |e: &UidGidExtent| format!("{} {} {}\n", e.first, e.lower_first, e.count);
        map.iter().map(line).collect::<String>()
    };
    let mut files = Vec::new();
    if fixed_groups {
        files.push(("setgroups", "deny".to_owned()));
    }
    files.extend([("uid_map", text(&maps.uid_map)), ("gid_map", text(&maps.gid_map))]);
    files.retain(|(_, text)| !text.is_empty());
    Ok(files)
}

/// A process may map its own ids into a user namespace that it makes; others only with a capability.
fn permit(spec: &Spec, maps: &UsernsEntry) -> Result<()> {
    let policy = Policy::of(spec);
    for (map, capability, what) in
        [(&maps.uid_map, Capability::Setuid, "users"), (&maps.gid_map, Capability::Setgid, "groups")]
    {
        let more = map.len() > 1 || map.iter().any(|extent| extent.count > 1);
        if more && !policy.grants(capability) {
            let extent = |e: &UidGidExtent| format!("{}:{}:{}", e.first, e.lower_first, e.count);
            return Err(Error::new(format!(
                "the checkpoint has a user namespace with the {what} {}, and config.json lets nobody map more than one",
                map.iter().map(extent).collect::<Vec<_>>().join(",")
            ))
            .remedy(format!("give the capability CAP_{}", capability.to_string().trim_start_matches("CAP_"))));
        }
    }
    Ok(())
}

/// The mappings of a process, as this host sees them.
fn maps(pid: i32) -> Result<UsernsEntry> {
    let read = |name| {
        let path = format!("/proc/{pid}/{name}");
        let text = read_text(&path).during("cannot read the id mappings", || format!("read({path:?})"))?;
        parse(&text)
    };
    Ok(UsernsEntry { uid_map: read("uid_map")?, gid_map: read("gid_map")? })
}

fn parse(text: &str) -> Result<Vec<UidGidExtent>> {
    let line = |line: &str| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(UidGidExtent { first: next()?, lower_first: next()?, count: next()? })
    };
    let all: Option<Vec<_>> = text.lines().map(line).collect();
    all.ok_or_else(|| Error::new(format!("the id mappings are unreadable: {text:?}")))
}

/// Runs `work` with the ids that the container's root has on this host, and all capabilities, on a thread of its own.
/// A container without id mappings of its own makes no difference.
pub fn as_root_of<T: Send>(target: &Target, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    as_root_in(target.init, work)
}

/// The same for the user namespace of a process.
pub fn as_root_in<T: Send>(pid: i32, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    if !Kind::User.private(pid)? {
        return work();
    }
    let maps = maps(pid)?;
    let root = |map: &[UidGidExtent]| map.iter().find(|e| e.first == 0 && e.count > 0).map(|e| e.lower_first);
    let (Some(uid), Some(gid)) = (root(&maps.uid_map), root(&maps.gid_map)) else {
        return Err(Error::new("the id mappings of config.json have no root"));
    };
    std::thread::scope(|scope| {
        let become_root = move || {
            credentials::keep_capabilities()
                .and_then(|()| credentials::set_thread_ids(uid, gid))
                .during("cannot become the container's root", || format!("setresuid(-1, {uid}, -1)"))?;
            work()
        };
        let thread = scope.spawn(become_root);
        thread.join().unwrap_or_else(|_| Err(Error::new("a helper thread of the engine failed")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_lead_to_the_namespace_around() {
        let extent = |first, lower_first, count| UidGidExtent { first, lower_first, count };
        let outer = [extent(0, 100_000, 1000), extent(1000, 300_000, 10)];
        let mut maps = [extent(0, 100_007, 1), extent(5, 300_002, 3)];
        relate(&mut maps, &outer).unwrap();
        assert_eq!(maps, [extent(0, 7, 1), extent(5, 1002, 3)]);
        assert!(relate(&mut [extent(0, 5, 1)], &outer).is_err());
    }

    #[test]
    fn whoever_may_not_change_ids_maps_one() {
        let spec = |caps: &str| -> Spec {
            serde_json::from_str(&format!(
                r#"{{"ociVersion": "1.0.2", "process": {{"cwd": "/", "user": {{"uid": 0, "gid": 0}},
                    "capabilities": {{"bounding": [{caps}]}}}}}}"#
            ))
            .unwrap()
        };
        let maps = |count| UsernsEntry {
            uid_map: vec![UidGidExtent { first: 0, lower_first: 7, count }],
            gid_map: Vec::new(),
        };
        permit(&spec(""), &maps(1)).unwrap();
        permit(&spec(r#""CAP_SETUID""#), &maps(9)).unwrap();
        let error = permit(&spec(r#""CAP_SETGID""#), &maps(9)).unwrap_err().to_string();
        assert!(error.contains("0:7:9") && error.contains("config.json"), "{error}");
    }

    #[test]
    fn mappings_are_read() {
        let users = parse("         0     100000      65536\n     70000          7          1\n").unwrap();
        assert_eq!(users[1], UidGidExtent { first: 70000, lower_first: 7, count: 1 });
        assert!(parse("0 1").is_err());
    }
}
