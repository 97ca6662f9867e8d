//! Unix sockets.

use crate::checkpoint::image::record::records;
use crate::checkpoint::image::regfile::FownEntry;
use crate::checkpoint::image::socket::{SkOptsEntry, SkShutdown};

records! {
    /// Mode and owner of a socket's file.
    FilePermsEntry = "file_perms_entry" {
        mode: required uint32 = 1,
        uid: required uint32 = 2,
        gid: required uint32 = 3,
    }

    /// A unix socket. `ino` and `peer` tie the two ends together.
    UnixSkEntry = "unix_sk_entry" {
        id: required uint32 = 1,
        ino: required uint32 = 2,
        r#type: required uint32 = 3,
        state: required uint32 = 4,
        flags: required uint32 = 5,
        uflags: required uint32 = 6,
        backlog: required uint32 = 7,
        peer: required uint32 = 8,
        fown: required message(FownEntry) = 9,
        opts: required message(SkOptsEntry) = 10,
        name: required bytes = 11,
        shutdown: optional enumeration(SkShutdown) = 12,
        file_perms: optional message(FilePermsEntry) = 13,
        name_dir: optional bytes = 14,
        deleted: optional bool = 15,
        ns_id: optional uint32 = 16,
        mnt_id: optional sint32 = 17,
    }
}
