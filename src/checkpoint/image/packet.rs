//! Packet sockets.

use crate::checkpoint::image::record::records;
use crate::checkpoint::image::regfile::FownEntry;
use crate::checkpoint::image::socket::SkOptsEntry;

records! {
    /// A multicast membership.
    PacketMclist = "packet_mclist" {
        index: required uint32 = 1,
        r#type: required uint32 = 2,
        addr: required bytes = 3,
    }

    /// A ring of frames.
    PacketRing = "packet_ring" {
        block_size: required uint32 = 1,
        block_nr: required uint32 = 2,
        frame_size: required uint32 = 3,
        frame_nr: required uint32 = 4,
        retire_tmo: required uint32 = 5,
        sizeof_priv: required uint32 = 6,
        features: required uint32 = 7,
    }

    /// A packet socket.
    PacketSockEntry = "packet_sock_entry" {
        id: required uint32 = 1,
        r#type: required uint32 = 2,
        protocol: required uint32 = 3,
        flags: required uint32 = 4,
        ifindex: required uint32 = 5,
        fown: required message(FownEntry) = 6,
        opts: required message(SkOptsEntry) = 7,
        version: required uint32 = 8,
        reserve: required uint32 = 9,
        aux_data: required bool = 10,
        orig_dev: required bool = 11,
        vnet_hdr: required bool = 12,
        loss: required bool = 13,
        timestamp: required uint32 = 14,
        copy_thresh: required uint32 = 15,
        mclist: repeated message(PacketMclist) = 16,
        fanout: optional uint32 = 17,
        rx_ring: optional message(PacketRing) = 18,
        tx_ring: optional message(PacketRing) = 19,
        ns_id: optional uint32 = 20,
    }
}
