//! Records of file systems that the engine refuses, kept so that their images can be told by name.

use crate::checkpoint::image::record::records;

records! {
    /// autofs-N.img: an automounter.
    AutofsEntry = "autofs_entry" {
        fd: required int32 = 1,
        pgrp: required int32 = 2,
        timeout: required int32 = 3,
        minproto: required int32 = 4,
        maxproto: required int32 = 5,
        mode: required int32 = 6,
        uid: optional int32 = 7,
        gid: optional int32 = 8,
        read_fd: optional int32 = 9,
    }

    /// binfmt-misc.img: a registered binary format.
    BinfmtMiscEntry = "binfmt_misc_entry" {
        name: required string = 1,
        enabled: required bool = 2,
        interpreter: required string = 3,
        flags: optional string = 4,
        extension: optional string = 5,
        magic: optional string = 6,
        mask: optional string = 7,
        offset: optional int32 = 8,
    }
}
