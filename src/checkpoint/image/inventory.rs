//! inventory.img: the one image that says the set is complete, and what its ids mean.

use crate::checkpoint::image::core::TaskKobjIdsEntry;
use crate::checkpoint::image::record::records;

/// Which security module labels belong to.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Lsmtype {
    NoLsm = 0,
    Selinux = 1,
    Apparmor = 2,
}

records! {
    /// CRIU plugins that took part in the dump.
    PluginsEntry = "plugins_entry" {
        plugins: repeated string = 12,
    }

    /// Version of the set and facts about the machine and the dump.
    InventoryEntry = "inventory_entry" {
        img_version: required uint32 = 1,
        fdinfo_per_id: optional bool = 2,
        root_ids: optional message(TaskKobjIdsEntry) = 3,
        ns_per_id: optional bool = 4,
        root_cg_set: optional uint32 = 5,
        lsmtype: optional enumeration(Lsmtype) = 6,
        dump_uptime: optional uint64 = 8,
        pre_dump_mode: optional uint32 = 9,
        tcp_close: optional bool = 10,
        network_lock_method: optional uint32 = 11,
        plugins_entry: optional message(PluginsEntry) = 12,
        dump_criu_run_id: optional string = 13,
        allow_uprobes: optional bool = 14,
    }
}
