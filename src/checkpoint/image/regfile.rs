//! Files with a path, and how those without one any more are found again.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::checkpoint::image::record::records;
use crate::checkpoint::image::timer::Timeval;

/// How a removed file is found again.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum RemapType {
    Linked = 0,
    Ghost = 1,
    Procfs = 2,
}

records! {
    /// A file, directory or device opened by path. `mnt_id` is the mount it lies on, `name` its path
    /// from the root of the container's mount namespace.
    RegFileEntry = "reg_file_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        pos: required uint64 = 3,
        fown: required message(FownEntry) = 5,
        name: required bytes = 6,
        mnt_id: optional sint32 = 7,
        size: optional uint64 = 8,
        ext: optional bool = 9,
        mode: optional uint32 = 10,
        build_id: repeated uint32 = 11,
        checksum: optional uint32 = 12,
        checksum_config: optional uint32 = 13,
        checksum_parameter: optional uint32 = 14,
    }

    /// Says that the file `orig_id` is no longer at its path: `remap_id` is its other link, its ghost,
    /// or the process it described.
    RemapFilePathEntry = "remap_file_path_entry" {
        orig_id: required uint32 = 1,
        remap_id: required uint32 = 2,
        remap_type: optional enumeration(RemapType) = 3,
    }

    /// A removed file. What it held follows: all of it, or where `chunks` is set as [`GhostChunkEntry`] records.
    GhostFileEntry = "ghost_file_entry" {
        uid: required uint32 = 1,
        gid: required uint32 = 2,
        mode: required uint32 = 3,
        dev: optional uint32 = 4,
        ino: optional uint64 = 5,
        rdev: optional uint32 = 6,
        atim: optional message(Timeval) = 7,
        mtim: optional message(Timeval) = 8,
        chunks: optional bool = 9,
        size: optional uint64 = 10,
        symlnk_target: optional bytes = 11,
    }

    /// A range of a sparse removed file; its bytes follow the record.
    GhostChunkEntry = "ghost_chunk_entry" {
        len: required uint64 = 1,
        off: required uint64 = 2,
    }

    /// A file that somebody else supplies on restore.
    ExtFileEntry = "ext_file_entry" {
        id: required uint32 = 1,
        fown: required message(FownEntry) = 5,
    }

    /// Who gets signals of an open file (F_SETOWN, F_SETSIG).
    FownEntry = "fown_entry" {
        uid: required uint32 = 1,
        euid: required uint32 = 2,
        signum: required uint32 = 3,
        pid_type: required uint32 = 4,
        pid: required uint32 = 5,
    }

    /// fs-N.img: working directory and root, as ids of open files, and the umask.
    FsEntry = "fs_entry" {
        cwd_id: required uint32 = 1,
        root_id: required uint32 = 2,
        umask: optional uint32 = 3,
    }

    /// filelocks.img: one lock. `flag` tells POSIX, flock and lease apart, as CRIU numbers them.
    FileLockEntry = "file_lock_entry" {
        flag: required uint32 = 1,
        r#type: required uint32 = 2,
        pid: required int32 = 3,
        fd: required int32 = 4,
        start: required int64 = 5,
        len: required int64 = 6,
    }
}

impl RegFileEntry {
    /// Its path.
    pub fn path(&self) -> &Path {
        path_of(&self.name)
    }
}

/// A path of the images. In CRIU's definitions it is a string, but names of files are bytes, and those that are not UTF-8
/// stand there as they are.
pub fn path_of(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}
