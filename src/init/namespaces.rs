//! The namespaces of config.json: which to make, which to join, and what runc calls them in state.json.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::sys::stat::{fstat, stat};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use crate::sys::{Context, Error, Result, process};

/// One kind of namespace.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// The specification's name.
    pub kind: LinuxNamespaceType,
    /// Its CLONE_NEW* flag.
    pub flag: i32,
    /// Its file under /proc/PID/ns.
    pub file: &'static str,
    /// Its key in state.json.
    pub runc: &'static str,
}

/// All kinds, in the order in which they are to be joined: the user namespace first, since it gives the right to
/// the others; the mount namespace late, since its /proc may be another.
pub const KINDS: [Kind; 8] = [
    Kind { kind: LinuxNamespaceType::User, flag: libc::CLONE_NEWUSER, file: "user", runc: "NEWUSER" },
    Kind { kind: LinuxNamespaceType::Ipc, flag: libc::CLONE_NEWIPC, file: "ipc", runc: "NEWIPC" },
    Kind { kind: LinuxNamespaceType::Uts, flag: libc::CLONE_NEWUTS, file: "uts", runc: "NEWUTS" },
    Kind { kind: LinuxNamespaceType::Network, flag: libc::CLONE_NEWNET, file: "net", runc: "NEWNET" },
    Kind { kind: LinuxNamespaceType::Pid, flag: libc::CLONE_NEWPID, file: "pid", runc: "NEWPID" },
    Kind { kind: LinuxNamespaceType::Cgroup, flag: libc::CLONE_NEWCGROUP, file: "cgroup", runc: "NEWCGROUP" },
    Kind { kind: LinuxNamespaceType::Time, flag: CLONE_NEWTIME, file: "time", runc: "NEWTIME" },
    Kind { kind: LinuxNamespaceType::Mount, flag: libc::CLONE_NEWNS, file: "mnt", runc: "NEWNS" },
];

/// A time namespace (Linux 5.6); shares its bit with the exit signal of clone(2), so only clone3(2) takes it.
pub const CLONE_NEWTIME: i32 = 0x80;

/// What config.json says of that kind of namespace.
pub fn wanted(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    let all = spec.linux().as_ref()?.namespaces().as_deref()?;
    all.iter().find(|n| n.typ() == kind)
}

/// A path that counts as none: some clients write an empty one for a new namespace.
pub fn path(namespace: &LinuxNamespace) -> Option<&PathBuf> {
    namespace.path().as_ref().filter(|p| !p.as_os_str().is_empty())
}

/// The flags of clone3(2) for the namespaces that are made at birth. A cgroup namespace must wait until the process
/// is in its control group, and a time namespace until its clocks are set.
pub fn clone_flags(spec: &Spec) -> u64 {
    let late = libc::CLONE_NEWCGROUP | CLONE_NEWTIME;
    let new = |k: &&Kind| wanted(spec, k.kind).is_some_and(|n| path(n).is_none());
    KINDS.iter().filter(new).map(|k| (k.flag & !late) as u64).sum()
}

/// An open namespace to join.
#[derive(Debug)]
pub struct Joined {
    kind: &'static Kind,
    file: File,
    name: PathBuf,
}

/// Opens the namespaces that config.json wants joined by path. What this process is already in is left out.
pub fn to_join(spec: &Spec) -> Result<Vec<Joined>> {
    let mut list = vec![];
    for kind in &KINDS {
        if let Some(name) = wanted(spec, kind.kind).and_then(path) {
            list.extend(open(kind, name.clone())?);
        }
    }
    Ok(list)
}

/// Opens all namespaces of a process that differ from ours.
pub fn of_process(pid: i32) -> Result<Vec<Joined>> {
    let mut list = vec![];
    for kind in &KINDS {
        list.extend(open(kind, format!("/proc/{pid}/ns/{}", kind.file).into())?);
    }
    Ok(list)
}

fn open(kind: &'static Kind, name: PathBuf) -> Result<Option<Joined>> {
    let file = File::open(&name).context(|| format!("namespace path: lstat {}", name.display()))?;
    let theirs = fstat(&file).context(|| format!("fstat {}", name.display()))?;
    let own = format!("/proc/self/ns/{}", kind.file);
    match stat(own.as_str()) {
        Ok(ours) if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino) => Ok(None),
        // Entering one's own user namespace again is EINVAL; every other kind may be entered at will.
        _ => Ok(Some(Joined { kind, file, name })),
    }
}

/// Joins all but the cgroup namespace. The pid namespace counts for children only.
pub fn join(list: &[Joined]) -> Result<()> {
    join_some(list, |kind| kind != LinuxNamespaceType::Cgroup)
}

/// Joins the cgroup namespace, from which control groups outside it cannot be entered any more.
pub fn join_cgroup(list: &[Joined]) -> Result<()> {
    join_some(list, |kind| kind == LinuxNamespaceType::Cgroup)
}

fn join_some(list: &[Joined], which: impl Fn(LinuxNamespaceType) -> bool) -> Result<()> {
    for joined in list.iter().filter(|j| which(j.kind.kind)) {
        process::setns(joined.file.as_fd(), joined.kind.flag)
            .context(|| format!("setns to {}", joined.name.display()))?;
    }
    Ok(())
}

/// True if one of them is of that kind.
pub fn joins(list: &[Joined], kind: LinuxNamespaceType) -> bool {
    list.iter().any(|j| j.kind.kind == kind)
}

/// Refuses what no container can be made of.
pub fn validate(spec: &Spec) -> Result<()> {
    for kind in &KINDS {
        let all = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref()).unwrap_or_default();
        if all.iter().filter(|n| n.typ() == kind.kind).count() > 1 {
            let last = all.iter().rfind(|n| n.typ() == kind.kind).and_then(|n| n.path().as_deref());
            let path = last.unwrap_or(std::path::Path::new(""));
            let name = serde_json::to_value(kind.kind).unwrap_or_default();
            return Err(Error::new(format!("malformed spec file: duplicated ns {{{name} {path:?}}}")));
        }
        if wanted(spec, kind.kind).is_some()
            && !std::path::Path::new("/proc/self/ns").join(kind.file).exists()
        {
            return Err(Error::new(format!("namespace {} is not supported by this kernel", kind.runc)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxBuilder, LinuxNamespaceBuilder, SpecBuilder};

    fn spec(list: &[(LinuxNamespaceType, Option<&str>)]) -> Spec {
        let namespaces: Vec<_> = list
            .iter()
            .map(|(kind, path)| {
                let b = LinuxNamespaceBuilder::default().typ(*kind);
                match path {
                    Some(path) => b.path(path),
                    None => b,
                }
                .build()
                .unwrap()
            })
            .collect();
        SpecBuilder::default()
            .linux(LinuxBuilder::default().namespaces(namespaces).build().unwrap())
            .build()
            .unwrap()
    }

    #[test]
    fn joined_and_late_namespaces_are_not_made_at_birth() {
        use LinuxNamespaceType::{Cgroup, Ipc, Network, Pid, Time};
        let s = spec(&[(Pid, None), (Network, Some("/x")), (Cgroup, None), (Time, None), (Ipc, Some(""))]);
        assert_eq!(clone_flags(&s), (libc::CLONE_NEWPID | libc::CLONE_NEWIPC) as u64);
        let e = to_join(&s).unwrap_err().to_string();
        assert!(e.contains("/x: no such file or directory"), "{e}");
    }

    #[test]
    fn our_own_namespaces_are_not_joined() {
        let s = spec(&[(LinuxNamespaceType::Network, Some("/proc/self/ns/net"))]);
        assert!(to_join(&s).unwrap().is_empty());
        assert!(of_process(std::process::id() as i32).unwrap().is_empty());
    }

    #[test]
    fn a_kind_cannot_be_listed_twice() {
        let pid = LinuxNamespaceType::Pid;
        assert!(validate(&spec(&[(pid, None), (pid, None)])).is_err());
        validate(&spec(&[(pid, None)])).unwrap();
    }
}
