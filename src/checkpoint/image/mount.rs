//! mountpoints-N.img: the mount table of a mount namespace.

use crate::checkpoint::image::record::records;

/// File systems that CRIU knows by number; the others go by `fsname`.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Fstype {
    Unsupported = 0,
    Proc = 1,
    Sysfs = 2,
    Devtmpfs = 3,
    BinfmtMisc = 4,
    Tmpfs = 5,
    Devpts = 6,
    Simfs = 7,
    Pstore = 8,
    Securityfs = 9,
    Fusectl = 10,
    Debugfs = 11,
    Cgroup = 12,
    Aufs = 13,
    Mqueue = 14,
    Fuse = 15,
    Auto = 16,
    Overlayfs = 17,
    Autofs = 18,
    Tracefs = 19,
    Cgroup2 = 23,
}

records! {
    /// One mount. `root_dev` is in the encoding of [`crate::checkpoint::image::device`]; an external mount carries the key of its source.
    MntEntry = "mnt_entry" {
        fstype: required uint32 = 1,
        mnt_id: required uint32 = 2,
        root_dev: required uint32 = 3,
        parent_mnt_id: required uint32 = 4,
        flags: required uint32 = 5,
        root: required string = 6,
        mountpoint: required string = 7,
        source: required string = 8,
        options: required string = 9,
        shared_id: optional uint32 = 10,
        master_id: optional uint32 = 11,
        with_plugin: optional bool = 12,
        ext_mount: optional bool = 13,
        fsname: optional string = 14,
        internal_sharing: optional bool = 15,
        deleted: optional bool = 16,
        sb_flags: optional uint32 = 17,
        ext_key: optional string = 18,
    }
}
