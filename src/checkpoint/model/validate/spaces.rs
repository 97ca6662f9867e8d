//! Seccomp filters, control groups, mounts and the smaller namespaces.

use crate::checkpoint::error::Result;
use crate::checkpoint::image::{CgroupDirEntry, CgroupEntry, MntEntry};
use crate::checkpoint::model::validate::{require, unique};
use crate::checkpoint::model::{IpcNamespace, Model};
use crate::checkpoint::namespaces::net;

/// Longest seccomp program, in bytes: BPF_MAXINSNS instructions.
const FILTER_MAX: usize = 4096 * 8;

pub(super) fn check(model: &Model) -> Result<()> {
    for (index, filter) in model.seccomp.iter().flat_map(|s| &s.seccomp_filters).enumerate() {
        let length = filter.filter.len();
        let sane = length > 0 && length <= FILTER_MAX && length.is_multiple_of(8);
        require(sane, "seccomp.img", || format!("filter {index} has {length} bytes"))?;
        let earlier = filter.prev.is_none_or(|prev| (prev as usize) < index);
        require(earlier, "seccomp.img", || format!("filter {index} lies on one that comes after it"))?;
    }
    if let Some(cgroup) = &model.cgroup {
        check_cgroup(cgroup)?;
    }
    for (id, mounts) in &model.mountpoints {
        check_mounts(mounts, &format!("mountpoints-{id}.img"))?;
    }
    for (id, uts) in &model.utsns {
        let sane = uts.nodename.len() <= 64 && uts.domainname.len() <= 64;
        require(sane, &format!("utsns-{id}.img"), || "a name is longer than 64 bytes".into())?;
    }
    for (id, ipc) in &model.ipcns {
        check_ipc(ipc, *id)?;
    }
    net::validate(model)?;
    for (id, clocks) in &model.timens {
        let sane = [&clocks.monotonic, &clocks.boottime].iter().all(|t| t.tv_nsec < 1_000_000_000);
        require(sane, &format!("timens-{id}.img"), || {
            "a clock has more than a second of nanoseconds".into()
        })?;
    }
    Ok(())
}

/// Whether a path stays below where it begins.
fn inward(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|part| part != "..")
}

fn check_cgroup(cgroup: &CgroupEntry) -> Result<()> {
    let image = "cgroup.img";
    unique(cgroup.sets.iter().map(|s| s.id), image, "set")?;
    for member in cgroup.sets.iter().flat_map(|s| &s.ctls) {
        let path = &member.path;
        let prefix = member.cgns_prefix.unwrap_or(0) as usize;
        let sane = path.starts_with('/') && inward(path) && path.is_char_boundary(prefix);
        require(sane, image, || format!("{path:?} is no path of a control group"))?;
    }
    cgroup.controllers.iter().flat_map(|c| &c.dirs).try_for_each(check_directory)
}

fn check_directory(dir: &CgroupDirEntry) -> Result<()> {
    require(inward(&dir.dir_name), "cgroup.img", || format!("{:?} is no control group", dir.dir_name))?;
    for property in &dir.properties {
        let name = &property.name;
        require(inward(name) && !name.contains('/'), "cgroup.img", || format!("{name:?} is no property"))?;
    }
    dir.children.iter().try_for_each(check_directory)
}

fn check_mounts(mounts: &[MntEntry], image: &str) -> Result<()> {
    let ids = unique(mounts.iter().map(|m| m.mnt_id), image, "mount")?;
    for mount in mounts {
        let at = &mount.mountpoint;
        require(at.starts_with('/') && inward(at), image, || format!("{at:?} is no place for a mount"))?;
        require(inward(&mount.root), image, || format!("{:?} is no root of a mount", mount.root))?;
    }
    // The topmost has a parent outside, or is its own; only one may.
    let tops =
        mounts.iter().filter(|m| !ids.contains(&m.parent_mnt_id) || m.parent_mnt_id == m.mnt_id).count();
    require(mounts.is_empty() || tops == 1, image, || format!("{tops} mounts are without a parent"))
}

fn check_ipc(ipc: &IpcNamespace, id: u32) -> Result<()> {
    let shm = format!("ipcns-shm-{id}.img");
    unique(ipc.shm.iter().map(|(e, _)| e.desc.id), &shm, "segment")?;
    for (segment, _) in &ipc.shm {
        let size = segment.size;
        require(size > 0 && size < 1 << 47, &shm, || format!("a segment has {size} bytes"))?;
    }
    unique(ipc.sem.iter().map(|(e, _)| e.desc.id), &format!("ipcns-sem-{id}.img"), "set")?;
    unique(ipc.msg.iter().map(|(e, _)| e.desc.id), &format!("ipcns-msg-{id}.img"), "queue").map(drop)
}
