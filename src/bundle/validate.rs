//! What a config.json may ask for: everything that can be refused before anything is made, in runc's words.

use std::path::Path;

use nix::sys::stat::stat;
use nix::unistd::geteuid;
use oci_spec::runtime::{
    IOPriorityClass, Linux, LinuxNamespaceType, LinuxResources, MemoryPolicyModeType, Spec,
};

use crate::cgroup::{devices, is_unified, rdt, v2};
use crate::container::net_devices;
use crate::init::rootfs::has_namespace;
use crate::init::{lsm, mounts, rlimits, scheduling};
use crate::sys::{Context, Error, Result};

/// Refuses what cannot work, or would reach beyond the container. `bundle` is where relative paths count from.
pub fn spec(spec: &Spec, bundle: &Path) -> Result<()> {
    names(spec)?;
    for mount in spec.mounts().iter().flatten() {
        mounts::Mount::parse(mount, bundle)?;
    }
    if let Some(process) = spec.process() {
        lsm::validate(process)?;
        rlimits::validate(process.rlimits().as_deref().unwrap_or_default())?;
        if let Some(scheduler) = process.scheduler() {
            scheduling::validate(scheduler)?;
        }
        if let Some(io) = process.io_priority() {
            let (class, priority) = (io.class(), io.priority());
            if !(0..=7).contains(&priority) {
                return Err(Error::new(format!("invalid ioPriority.Priority: {priority}")));
            }
            // Classes that do not exist have not come through the parser.
            debug_assert!(matches!(
                class,
                IOPriorityClass::IoprioClassRt
                    | IOPriorityClass::IoprioClassBe
                    | IOPriorityClass::IoprioClassIdle
            ));
        }
    }
    let Some(linux) = spec.linux() else { return Ok(()) };
    security(spec, linux)?;
    user_namespace(spec, linux)?;
    time_namespace(spec, linux)?;
    if let Some(word) = linux.rootfs_propagation().as_deref().filter(|w| !w.is_empty())
        && mounts::propagation(word).is_none()
    {
        return Err(Error::new(format!("rootfsPropagation={word} is not supported")));
    }
    for name in linux.sysctl().iter().flatten().map(|(name, _)| name) {
        sysctl(spec, name)?;
    }
    if let Some(r) = linux.resources() {
        resources(r)?;
    }
    devices::Policy::of(linux.resources().as_ref(), linux.devices().as_deref().unwrap_or_default())?;
    memory_policy(linux)?;
    if let Some(wanted) = linux.intel_rdt() {
        rdt::validate(wanted, rdt::Resctrl::find().as_ref())?;
    }
    network_devices(spec, linux)?;
    rootless(spec, linux)
}

fn names(spec: &Spec) -> Result<()> {
    for (name, what) in [(spec.hostname(), "hostname"), (spec.domainname(), "domainname")] {
        if name.as_ref().is_some_and(|n| !n.is_empty()) && !has_namespace(spec, LinuxNamespaceType::Uts) {
            return Err(Error::new(format!("unable to set {what} without a private UTS namespace")));
        }
    }
    Ok(())
}

fn security(spec: &Spec, linux: &Linux) -> Result<()> {
    let any = |paths: &Option<Vec<String>>| paths.as_ref().is_some_and(|p| !p.is_empty());
    let restricted = any(linux.masked_paths()) || any(linux.readonly_paths());
    if restricted && !has_namespace(spec, LinuxNamespaceType::Mount) {
        return Err(Error::new("unable to restrict sys entries without a private MNT namespace"));
    }
    Ok(())
}

/// The path by which a namespace is joined.
fn joined(spec: &Spec, kind: LinuxNamespaceType) -> Option<&Path> {
    let all = spec.linux().as_ref()?.namespaces().as_ref()?;
    let namespace = all.iter().find(|n| n.typ() == kind)?;
    namespace.path().as_deref().filter(|p| !p.as_os_str().is_empty())
}

fn user_namespace(spec: &Spec, linux: &Linux) -> Result<()> {
    // Without a namespace, mappings are for nothing.
    if !has_namespace(spec, LinuxNamespaceType::User) || joined(spec, LinuxNamespaceType::User).is_some() {
        return Ok(());
    }
    for (maps, kind) in [(linux.uid_mappings(), "uid"), (linux.gid_mappings(), "gid")] {
        if maps.as_ref().is_none_or(Vec::is_empty) {
            return Err(Error::new(format!("user namespaces enabled, but no {kind} mappings found")));
        }
    }
    Ok(())
}

fn time_namespace(spec: &Spec, linux: &Linux) -> Result<()> {
    if linux.time_offsets().is_none() {
        return Ok(());
    }
    if !has_namespace(spec, LinuxNamespaceType::Time) {
        return Err(Error::new(
            "time namespace offsets specified, but time namespace isn't enabled in the config",
        ));
    }
    if joined(spec, LinuxNamespaceType::Time).is_some() {
        return Err(Error::new(
            "time namespace enabled, but both namespace path and time offsets specified -- you may only provide one",
        ));
    }
    Ok(())
}

/// The parameters of an IPC namespace outside fs.mqueue.
const IPC: &[&str] = &[
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Only parameters of namespaces that the container does not share with the host may be set.
fn sysctl(spec: &Spec, name: &str) -> Result<()> {
    // The name with dots between its parts, whichever way it is written.
    let name: String = crate::init::sysctl::path(name)
        .chars()
        .map(|c| match c {
            '/' => '.',
            '.' => '/',
            other => other,
        })
        .collect();
    let refuse = |why: &str| Err(Error::new(format!("sysctl {name:?} {why}")));
    if IPC.contains(&name.as_str()) || name.starts_with("fs.mqueue.") {
        return match has_namespace(spec, LinuxNamespaceType::Ipc) {
            true => Ok(()),
            false => refuse("is not allowed in the hosts ipc namespace"),
        };
    }
    if name.starts_with("net.") {
        return match shares_network(spec)? {
            true => refuse("not allowed in host network namespace"),
            false => Ok(()),
        };
    }
    if has_namespace(spec, LinuxNamespaceType::Uts) {
        match name.as_str() {
            "kernel.domainname" => return Ok(()),
            "kernel.hostname" => {
                return refuse("is not allowed as it conflicts with the OCI \"hostname\" field");
            }
            _ => {}
        }
    }
    if name.starts_with("user.") {
        return match has_namespace(spec, LinuxNamespaceType::User) {
            true => Ok(()),
            false => Err(Error::new(format!("setting ucounts without a user namespace not allowed: {name}"))),
        };
    }
    refuse("is not in a separate kernel namespace")
}

/// True if the container is in our own network namespace.
fn shares_network(spec: &Spec) -> Result<bool> {
    if !has_namespace(spec, LinuxNamespaceType::Network) {
        return Ok(true);
    }
    let Some(path) = joined(spec, LinuxNamespaceType::Network) else { return Ok(false) };
    let inode = |path: &Path| {
        stat(path)
            .map(|s| (s.st_dev, s.st_ino))
            .context(|| format!("invalid netns path: stat {}", path.display()))
    };
    Ok(inode(path)? == inode(Path::new("/proc/self/ns/net"))?)
}

fn resources(r: &LinuxResources) -> Result<()> {
    if is_unified() {
        if let Some(m) = r.memory() {
            v2::swap_alone(m.swap().unwrap_or(0), m.limit().unwrap_or(0))?;
        }
    } else if r.unified().as_ref().is_some_and(|u| !u.is_empty()) {
        return Err(Error::new("invalid configuration: cannot use unified on cgroup v1"));
    }
    Ok(())
}

fn network_devices(spec: &Spec, linux: &Linux) -> Result<()> {
    let Some(devices) = linux.net_devices().as_ref().filter(|d| !d.is_empty()) else { return Ok(()) };
    if !has_namespace(spec, LinuxNamespaceType::Network) {
        return Err(Error::new("unable to move network devices without a NET namespace"));
    }
    if !geteuid().is_root() {
        return Err(Error::new("network devices are not supported for rootless containers"));
    }
    let new = devices.values().filter_map(|device| device.name().as_ref()).filter(|name| !name.is_empty());
    match devices.keys().chain(new).find(|name| !net_devices::is_valid(name)) {
        Some(name) => Err(Error::new(format!("invalid network device name {name:?}"))),
        None => Ok(()),
    }
}

fn memory_policy(linux: &Linux) -> Result<()> {
    let Some(policy) = linux.memory_policy() else { return Ok(()) };
    let nodes = scheduling::parse_list(policy.nodes().as_deref().unwrap_or_default()).context(|| {
        format!("invalid memory policy nodes {:?}", policy.nodes().as_deref().unwrap_or_default())
    })?;
    match policy.mode() {
        MemoryPolicyModeType::MpolDefault | MemoryPolicyModeType::MpolLocal if !nodes.is_empty() => {
            Err(Error::new(format!("memory policy mode requires 0 nodes but got {}", nodes.len())))
        }
        MemoryPolicyModeType::MpolBind
        | MemoryPolicyModeType::MpolInterleave
        | MemoryPolicyModeType::MpolPreferredMany
        | MemoryPolicyModeType::MpolWeightedInterleave
            if nodes.is_empty() =>
        {
            Err(Error::new("memory policy mode requires at least one node but got 0"))
        }
        _ => Ok(()),
    }
}

/// Without root, a container needs a user namespace, and ids in mount options that are mapped in it.
fn rootless(spec: &Spec, linux: &Linux) -> Result<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    if !has_namespace(spec, LinuxNamespaceType::User) {
        return Err(Error::new("rootless container requires user namespaces"));
    }
    let (uids, gids) = (
        linux.uid_mappings().as_deref().unwrap_or_default(),
        linux.gid_mappings().as_deref().unwrap_or_default(),
    );
    if joined(spec, LinuxNamespaceType::User).is_none() {
        if uids.is_empty() {
            return Err(Error::new("rootless containers requires at least one UID mapping"));
        }
        if gids.is_empty() {
            return Err(Error::new("rootless containers requires at least one GID mapping"));
        }
    }
    for option in spec.mounts().iter().flatten().flat_map(|m| m.options().iter().flatten()) {
        let (maps, value) = match (option.strip_prefix("uid="), option.strip_prefix("gid=")) {
            (Some(uid), _) => (uids, uid),
            (_, Some(gid)) => (gids, gid),
            _ => continue,
        };
        // The mappings of a namespace that is joined are not in config.json: the kernel judges.
        if joined(spec, LinuxNamespaceType::User).is_none()
            && let Ok(id) = value.parse()
            && crate::init::credentials::host_id(maps, id).is_none()
        {
            return Err(Error::new(format!("cannot specify {option} mount option for rootless container")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks a config whose `linux` has these namespaces and this rest.
    fn check(namespaces: &[&str], linux: &str, rest: &str) -> Result<()> {
        let list: Vec<String> = namespaces.iter().map(|n| format!(r#"{{"type":"{n}"}}"#)).collect();
        let json =
            format!(r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{}]{linux}}}{rest}}}"#, list.join(","));
        spec(&serde_json::from_str(&json).unwrap(), Path::new("/bundle"))
    }

    fn refused(namespaces: &[&str], linux: &str, rest: &str, words: &str) {
        let e = check(namespaces, linux, rest).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }

    #[test]
    fn parameters_of_shared_namespaces_are_refused() {
        let set = |name: &str| format!(r#","sysctl":{{"{name}":"1"}}"#);
        for (name, namespace, words) in [
            ("kernel.msgmax", "ipc", "hosts ipc namespace"),
            ("fs.mqueue.msg_max", "ipc", "hosts ipc namespace"),
            ("net.ipv4.ip_forward", "network", "host network namespace"),
            ("net/ipv4/ip_forward", "network", "host network namespace"),
            ("kernel.domainname", "uts", "separate kernel namespace"),
        ] {
            refused(&["mount"], &set(name), "", words);
            check(&["mount", namespace], &set(name), "").unwrap();
        }
        refused(&["mount", "uts"], &set("kernel.hostname"), "", "conflicts with the OCI");
        refused(&["mount", "ipc", "network", "uts"], &set("vm.swappiness"), "", "separate kernel namespace");
        refused(&["mount"], &set("user.max_user_namespaces"), "", "without a user namespace");
    }

    #[test]
    fn our_own_network_is_the_hosts_however_it_is_named() {
        let json = r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"network","path":"/proc/self/ns/net"}],
            "sysctl":{"net.ipv4.ip_forward":"1"}}}"#;
        let e = spec(&serde_json::from_str(json).unwrap(), Path::new("/")).unwrap_err().to_string();
        assert!(e.contains("host network namespace"), "{e}");
    }

    #[test]
    fn settings_need_their_namespace() {
        refused(&["mount"], "", r#","hostname":"x""#, "unable to set hostname");
        check(&["mount", "uts"], "", r#","hostname":"x""#).unwrap();
        refused(&[], r#","maskedPaths":["/x"]"#, "", "unable to restrict sys entries");
        let one = r#"[{"containerID":0,"hostID":1,"size":1}]"#;
        refused(&["user"], "", "", "user namespaces enabled, but no uid mappings found");
        refused(&["user"], &format!(r#","uidMappings":{one}"#), "", "but no gid mappings found");
        check(&[], &format!(r#","uidMappings":{one}"#), "").unwrap();
        refused(&[], r#","timeOffsets":{}"#, "", "time namespace isn't enabled");
        refused(&[], r#","netDevices":{"eth9":{}}"#, "", "without a NET namespace");
        for bad in [r#"{"eth9":{"name":"a/b"}}"#, r#"{"":{}}"#] {
            refused(&["network"], &format!(r#","netDevices":{bad}"#), "", "invalid network device name");
        }
        check(&["network"], r#","netDevices":{"eth9":{"name":"a"}}"#, "").unwrap();
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        refused(&[], r#","rootfsPropagation":"open""#, "", "rootfsPropagation=open is not supported");
        refused(&[], r#","memoryPolicy":{"mode":"MPOL_BIND"}"#, "", "at least one node");
        refused(&[], r#","resources":{"devices":[{"allow":true}]}"#, "", "device access at 0 field");
        let bind = r#","mounts":[{"destination":"/x","source":"/y","options":["bind","size=1"]}]"#;
        refused(&[], "", bind, "filesystem-specific");
    }
}
