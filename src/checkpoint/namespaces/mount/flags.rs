//! Flags of mounts: MS_* as tables have them, MOUNT_ATTR_* as mount_setattr(2) takes them.

use std::path::Path;

use nix::mount::MsFlags;
use oci_spec::runtime::Spec;

use crate::checkpoint::image::MntEntry;
use crate::checkpoint::namespaces::mountinfo::NOSYMFOLLOW;
use crate::sys::mount::Attributes;

/// Attributes that a record decides.
pub(super) const ALL: u64 = RESTRICTIVE | TIMES;

/// How access times are kept.
const TIMES: u64 = libc::MOUNT_ATTR_NODIRATIME | libc::MOUNT_ATTR__ATIME;

/// Those that take something away from the container.
const RESTRICTIVE: u64 = libc::MOUNT_ATTR_RDONLY
    | libc::MOUNT_ATTR_NOSUID
    | libc::MOUNT_ATTR_NODEV
    | libc::MOUNT_ATTR_NOEXEC
    | libc::MOUNT_ATTR_NOSYMFOLLOW;

/// The attributes that are these flags.
pub(super) fn attributes(flags: MsFlags) -> u64 {
    let pairs = [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (NOSYMFOLLOW, libc::MOUNT_ATTR_NOSYMFOLLOW),
        (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        (MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME),
        (MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
    ];
    pairs.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, attribute)| attribute).sum()
}

/// The flags that a record has.
pub(super) fn of(entry: &MntEntry) -> MsFlags {
    MsFlags::from_bits_retain(entry.flags.into())
}

/// The attributes of a record that take something away.
pub(super) fn restrictions(entry: &MntEntry) -> u64 {
    attributes(of(entry)) & RESTRICTIVE
}

/// What turns the flags `from` into `to`, as far as it takes something away or `loosen` allows more. None if nothing.
pub(super) fn change(from: MsFlags, to: MsFlags, loosen: bool) -> Option<Attributes> {
    let (have, want) = (attributes(from) & RESTRICTIVE, attributes(to) & RESTRICTIVE);
    let mut change = Attributes { set: want & !have, ..Attributes::default() };
    if loosen {
        change.clear = have & !want;
        let (have, want) = (attributes(from) & TIMES, attributes(to) & TIMES);
        if have != want {
            // The kernel takes a way of keeping them only together with the removal of all others.
            change.set |= want;
            change.clear |= TIMES;
        }
        let sharing = MsFlags::MS_SHARED | MsFlags::MS_SLAVE;
        change.propagation = match (from & sharing, to & sharing) {
            (have, want) if have == want => 0,
            (_, want) if want.contains(MsFlags::MS_SHARED) => libc::MS_SHARED,
            (_, want) if want.is_empty() => libc::MS_PRIVATE,
            // Whom it received from is outside.
            _ => 0,
        };
    }
    (change != Attributes::default()).then_some(change)
}

/// Whether nothing of the container's proc or sysfs is hidden or read-only: only then does the kernel let a user namespace
/// mount a new one.
pub fn in_full_view(spec: &Spec, fstype: &str) -> bool {
    let linux = spec.linux().as_ref();
    let masked = linux.and_then(|l| l.masked_paths().as_ref()).into_iter().flatten();
    let read_only = linux.and_then(|l| l.readonly_paths().as_ref()).into_iter().flatten();
    let top = if fstype == "proc" { "/proc" } else { "/sys" };
    let mounts = || spec.mounts().iter().flatten();
    let own = mounts()
        .find(|mount| mount.typ().as_deref() == Some(fstype) && mount.destination() == Path::new(top));
    let writable = own.is_some_and(|mount| !mount.options().iter().flatten().any(|option| option == "ro"));
    let covered =
        mounts().any(|mount| mount.destination() != Path::new(top) && mount.destination().starts_with(top));
    writable && !covered && !masked.chain(read_only).any(|path| Path::new(path).starts_with(top))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restrictions_are_always_added_and_lifted_only_where_allowed() {
        let (ro, suid) = (MsFlags::MS_RDONLY, MsFlags::MS_NOSUID);
        assert_eq!(change(ro, ro | MsFlags::MS_NOATIME, false), None);
        let times = change(ro | MsFlags::MS_STRICTATIME, ro | MsFlags::MS_NOATIME, true).unwrap();
        assert_eq!((times.set, times.clear), (libc::MOUNT_ATTR_NOATIME, TIMES));
        assert_eq!(change(ro, ro | NOSYMFOLLOW, false).unwrap().set, libc::MOUNT_ATTR_NOSYMFOLLOW);
        assert_eq!(change(ro, suid, false).unwrap().set, libc::MOUNT_ATTR_NOSUID);
        assert_eq!(change(ro, suid, false).unwrap().clear, 0);
        assert_eq!(change(ro, suid, true).unwrap().clear, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(change(ro, ro | MsFlags::MS_SHARED, true).unwrap().propagation, libc::MS_SHARED);
        assert_eq!(change(ro, ro | MsFlags::MS_SHARED, false), None);
        assert_eq!(change(ro | MsFlags::MS_SLAVE, ro, true).unwrap().propagation, libc::MS_PRIVATE);
    }
}
