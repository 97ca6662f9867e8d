//! inotify and fanotify.

use crate::checkpoint::image::record::records;
use crate::checkpoint::image::regfile::FownEntry;

/// What a fanotify mark is set on.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum MarkType {
    Inode = 1,
    Mount = 2,
}

records! {
    /// A file handle, as name_to_handle_at gives it, and the path where it is known.
    FhEntry = "fh_entry" {
        bytes: required uint32 = 1,
        r#type: required uint32 = 2,
        handle: repeated uint64 = 3,
        path: optional bytes = 4,
        mnt_id: optional uint32 = 5,
    }

    /// irmap-cache: the path of an inode that was watched.
    IrmapCacheEntry = "irmap_cache_entry" {
        dev: required uint32 = 1,
        inode: required uint64 = 2,
        path: required string = 3,
    }

    /// One watch of an inotify instance.
    InotifyWdEntry = "inotify_wd_entry" {
        id: required uint32 = 1,
        i_ino: required uint64 = 2,
        mask: required uint32 = 3,
        ignored_mask: required uint32 = 4,
        s_dev: required uint32 = 5,
        wd: required uint32 = 6,
        f_handle: required message(FhEntry) = 7,
    }

    /// An inotify instance and its watches.
    InotifyFileEntry = "inotify_file_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        fown: required message(FownEntry) = 4,
        wd: repeated message(InotifyWdEntry) = 5,
    }

    /// A mark on an inode.
    FanotifyInodeMarkEntry = "fanotify_inode_mark_entry" {
        i_ino: required uint64 = 1,
        f_handle: required message(FhEntry) = 2,
    }

    /// A mark on a mount.
    FanotifyMountMarkEntry = "fanotify_mount_mark_entry" {
        mnt_id: required uint32 = 1,
        path: optional string = 2,
    }

    /// One mark of a fanotify group.
    FanotifyMarkEntry = "fanotify_mark_entry" {
        id: required uint32 = 1,
        r#type: required enumeration(MarkType) = 2,
        mflags: required uint32 = 3,
        mask: required uint32 = 4,
        ignored_mask: required uint32 = 5,
        s_dev: required uint32 = 6,
        ie: optional message(FanotifyInodeMarkEntry) = 7,
        me: optional message(FanotifyMountMarkEntry) = 8,
    }

    /// A fanotify group and its marks.
    FanotifyFileEntry = "fanotify_file_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        fown: required message(FownEntry) = 3,
        faflags: required uint32 = 4,
        evflags: required uint32 = 5,
        mark: repeated message(FanotifyMarkEntry) = 6,
    }
}
