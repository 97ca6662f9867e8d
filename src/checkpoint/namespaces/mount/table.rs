//! Mounts as records of mountpoints-N.img.

use super::RENEWABLE;
use super::class::Class;
use crate::checkpoint::image::{Fstype, MntEntry};
use crate::checkpoint::namespaces::mountinfo::Mount;

/// File systems that CRIU has numbers for, by their names in the kernel.
const NUMBERED: [(&str, Fstype); 18] = [
    ("proc", Fstype::Proc),
    ("sysfs", Fstype::Sysfs),
    ("devtmpfs", Fstype::Devtmpfs),
    ("binfmt_misc", Fstype::BinfmtMisc),
    ("tmpfs", Fstype::Tmpfs),
    ("devpts", Fstype::Devpts),
    ("pstore", Fstype::Pstore),
    ("securityfs", Fstype::Securityfs),
    ("fusectl", Fstype::Fusectl),
    ("debugfs", Fstype::Debugfs),
    ("tracefs", Fstype::Tracefs),
    ("cgroup", Fstype::Cgroup),
    ("cgroup2", Fstype::Cgroup2),
    ("aufs", Fstype::Aufs),
    ("mqueue", Fstype::Mqueue),
    ("fuse", Fstype::Fuse),
    ("overlay", Fstype::Overlayfs),
    ("autofs", Fstype::Autofs),
];

/// The record of a mount.
pub(super) fn entry(mount: &Mount, class: &Class) -> MntEntry {
    let number = NUMBERED.iter().find(|(name, _)| *name == mount.fstype).map(|(_, number)| *number);
    // CRIU mounts what it has a name for, and takes no name beside a number.
    let named = number.is_none() && RENEWABLE.contains(&mount.fstype.as_str());
    let unnumbered = if named { Fstype::Auto } else { Fstype::Unsupported };
    MntEntry {
        fstype: number.unwrap_or(unnumbered) as u32,
        mnt_id: mount.id,
        root_dev: mount.dev,
        parent_mnt_id: mount.parent,
        // The bits fit: the kernel's flags are 32 of them.
        flags: mount.flags.bits() as u32,
        root: mount.root.clone(),
        mountpoint: mount.point.to_string_lossy().into_owned(),
        source: mount.source.clone(),
        options: mount.options.clone(),
        shared_id: Some(mount.shared),
        master_id: Some(mount.master),
        sb_flags: Some(mount.super_flags.bits() as u32),
        ext_key: match class {
            Class::External(key) => Some(key.clone()),
            _ => None,
        },
        fsname: named.then(|| mount.fstype.clone()),
        ..MntEntry::default()
    }
}

/// The kernel's name of the file system of a record; none where neither CRIU's number nor a name says it.
pub(super) fn fstype(entry: &MntEntry) -> Option<&str> {
    let named = NUMBERED.iter().find(|(_, number)| *number as u32 == entry.fstype).map(|(name, _)| *name);
    named.or(entry.fsname.as_deref())
}

/// Whether the options `uid` and `gid` of a mount name users and groups whom the container knows.
pub fn has_owner(entry: &MntEntry) -> bool {
    matches!(fstype(entry), Some("tmpfs" | "devpts" | "hugetlbfs" | "proc"))
}

/// CRIU writes a table from its end to its beginning. In the kernel's order the older of two mounts stands first, and so
/// does what another one lies on.
pub fn in_kernels_order(mut table: Vec<MntEntry>) -> Vec<MntEntry> {
    let lies_on_later = |(at, entry): (usize, &MntEntry)| {
        table.iter().skip(at + 1).any(|below| below.mnt_id == entry.parent_mnt_id)
    };
    if table.iter().enumerate().any(lies_on_later) {
        table.reverse();
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::namespaces::mountinfo;

    #[test]
    fn a_file_system_keeps_its_name() {
        let line = b"36 35 0:9 / /dev/mqueue rw,nosuid - mqueue mqueue rw";
        let mut mount = mountinfo::parse(line).unwrap().remove(0);
        let record = entry(&mount, &Class::External("/key".into()));
        assert_eq!((fstype(&record), record.ext_key.as_deref()), (Some("mqueue"), Some("/key")));
        mount.fstype = "ext4".into();
        assert_eq!(fstype(&entry(&mount, &Class::Root)), None);
    }

    #[test]
    fn criu_begins_at_the_end() {
        let mount = |mnt_id, parent_mnt_id| MntEntry { mnt_id, parent_mnt_id, ..MntEntry::default() };
        let ordered = vec![mount(5, 1), mount(9, 5), mount(7, 9), mount(6, 5)];
        let backwards: Vec<_> = ordered.iter().rev().cloned().collect();
        assert_eq!(in_kernels_order(backwards), ordered);
        assert_eq!(in_kernels_order(ordered.clone()), ordered);
    }
}
