//! stasis.img: what CRIU's format has no place for. CRIU does not open it.
//!
//! An extension is *ancillary* when CRIU restores right without it, and *critical* when it would restore wrong.
//! A set with critical ones carries an `img_version` that CRIU refuses; an unknown critical one is refused here.

use crate::checkpoint::image::record::records;

records! {
    /// stasis.img: one record.
    StasisExtension = "stasis_extension" {
        version: required string = 1,
        kernel: required string = 2,
        container: required string = 3,
        digests: repeated message(ImageDigest) = 4,
        extensions: repeated message(Extension) = 5,
        mounts: repeated message(MountSource) = 6,
        created: optional uint64 = 7,
    }

    /// Length of one image. `sha256` is empty, and nobody reads it: a digest would take longer than the rest of a freeze, and
    /// what carries images about has checksums of its own.
    ImageDigest = "image_digest" {
        name: required string = 1,
        size: required uint64 = 2,
        sha256: required bytes = 3,
    }

    /// What a room adds: its name, whether a restore without it would be wrong, and its bytes.
    Extension = "extension" {
        name: required string = 1,
        critical: required bool = 2,
        data: required bytes = 3,
    }

    /// Where an external mount came from at the dump, for messages.
    MountSource = "mount_source" {
        destination: required string = 1,
        source: required string = 2,
    }
}
