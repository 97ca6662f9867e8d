//! BPF maps held open.

use crate::checkpoint::image::record::records;
use crate::checkpoint::image::regfile::FownEntry;

records! {
    /// A BPF map as an open file.
    BpfmapFileEntry = "bpfmap_file_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        pos: required uint64 = 3,
        fown: required message(FownEntry) = 4,
        map_type: required uint32 = 5,
        key_size: required uint32 = 6,
        value_size: required uint32 = 7,
        map_id: required uint32 = 8,
        max_entries: required uint32 = 9,
        map_flags: required uint32 = 10,
        memlock: required uint64 = 11,
        frozen: required bool = 12,
        map_name: required string = 13,
        ifindex: required uint32 = 14,
        mnt_id: optional sint32 = 15,
        map_extra: optional uint64 = 16,
    }

    /// Keys and values of a BPF map; they follow the record.
    BpfmapDataEntry = "bpfmap_data_entry" {
        map_id: required uint32 = 1,
        keys_bytes: required uint32 = 2,
        values_bytes: required uint32 = 3,
        count: required uint32 = 4,
    }
}
