//! What all sockets have, and the sockets of the internet and netlink families.

use crate::checkpoint::image::record::records;
use crate::checkpoint::image::regfile::FownEntry;

/// Which directions of a socket are shut down.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum SkShutdown {
    None = 0,
    Read = 1,
    Write = 2,
    Both = 3,
}

records! {
    /// Options at SOL_SOCKET.
    SkOptsEntry = "sk_opts_entry" {
        so_sndbuf: required uint32 = 1,
        so_rcvbuf: required uint32 = 2,
        so_snd_tmo_sec: required uint64 = 3,
        so_snd_tmo_usec: required uint64 = 4,
        so_rcv_tmo_sec: required uint64 = 5,
        so_rcv_tmo_usec: required uint64 = 6,
        reuseaddr: optional bool = 7,
        so_priority: optional uint32 = 8,
        so_rcvlowat: optional uint32 = 9,
        so_mark: optional uint32 = 10,
        so_passcred: optional bool = 11,
        so_passsec: optional bool = 12,
        so_dontroute: optional bool = 13,
        so_no_check: optional bool = 14,
        so_bound_dev: optional string = 15,
        so_filter: repeated fixed64 = 16,
        so_reuseport: optional bool = 17,
        so_broadcast: optional bool = 18,
        so_keepalive: optional bool = 19,
        tcp_keepcnt: optional uint32 = 20,
        tcp_keepidle: optional uint32 = 21,
        tcp_keepintvl: optional uint32 = 22,
        so_oobinline: optional uint32 = 23,
        so_linger: optional uint32 = 24,
        so_buf_lock: optional uint32 = 25,
    }

    /// Options of a raw socket.
    IpOptsRawEntry = "ip_opts_raw_entry" {
        hdrincl: optional bool = 1,
        nodefrag: optional bool = 2,
        checksum: optional bool = 3,
        icmpv_filter: repeated uint32 = 4,
    }

    /// Options at SOL_IP and SOL_IPV6.
    IpOptsEntry = "ip_opts_entry" {
        freebind: optional bool = 1,
        raw: optional message(IpOptsRawEntry) = 4,
        pktinfo: optional bool = 5,
        tos: optional uint32 = 6,
        ttl: optional uint32 = 7,
    }

    /// Options at SOL_TCP.
    TcpOptsEntry = "tcp_opts_entry" {
        cork: optional bool = 1,
        nodelay: optional bool = 2,
        keepcnt: optional uint32 = 3,
        keepidle: optional uint32 = 4,
        keepintvl: optional uint32 = 5,
    }

    /// A socket of AF_INET or AF_INET6; addresses are big-endian words. `ino` ties a TCP stream to it.
    InetSkEntry = "inet_sk_entry" {
        id: required uint32 = 1,
        ino: required uint32 = 2,
        family: required uint32 = 3,
        r#type: required uint32 = 4,
        proto: required uint32 = 5,
        state: required uint32 = 6,
        src_port: required uint32 = 7,
        dst_port: required uint32 = 8,
        flags: required uint32 = 9,
        backlog: required uint32 = 10,
        src_addr: repeated uint32 = 11,
        dst_addr: repeated uint32 = 12,
        fown: required message(FownEntry) = 13,
        opts: required message(SkOptsEntry) = 14,
        v6only: optional bool = 15,
        ip_opts: optional message(IpOptsEntry) = 16,
        ifname: optional string = 17,
        ns_id: optional uint32 = 18,
        shutdown: optional enumeration(SkShutdown) = 19,
        tcp_opts: optional message(TcpOptsEntry) = 20,
    }

    /// `tcp-stream-<ino>.img`: state of an established connection; its receive and send queue follow.
    TcpStreamEntry = "tcp_stream_entry" {
        inq_len: required uint32 = 1,
        inq_seq: required uint32 = 2,
        outq_len: required uint32 = 3,
        outq_seq: required uint32 = 4,
        opt_mask: required uint32 = 5,
        snd_wscale: required uint32 = 6,
        mss_clamp: required uint32 = 7,
        rcv_wscale: optional uint32 = 8,
        timestamp: optional uint32 = 9,
        cork: optional bool = 10,
        nodelay: optional bool = 11,
        unsq_len: optional uint32 = 12,
        snd_wl1: optional uint32 = 13,
        snd_wnd: optional uint32 = 14,
        max_window: optional uint32 = 15,
        rcv_wnd: optional uint32 = 16,
        rcv_wup: optional uint32 = 17,
    }

    /// A netlink socket.
    NetlinkSkEntry = "netlink_sk_entry" {
        id: required uint32 = 1,
        ino: required uint32 = 2,
        protocol: required uint32 = 3,
        state: required uint32 = 4,
        flags: required uint32 = 6,
        portid: required uint32 = 7,
        groups: repeated uint32 = 8,
        dst_portid: required uint32 = 9,
        dst_group: required uint32 = 10,
        fown: required message(FownEntry) = 11,
        opts: required message(SkOptsEntry) = 12,
        ns_id: optional uint32 = 13,
    }

    /// Descriptors in flight with a packet.
    ScmEntry = "scm_entry" {
        r#type: required uint32 = 1,
        rights: repeated uint32 = 2,
    }

    /// sk-queues.img: one packet or stretch of a stream waiting in a unix socket; its bytes follow.
    SkPacketEntry = "sk_packet_entry" {
        id_for: required uint32 = 1,
        length: required uint32 = 2,
        scm: repeated message(ScmEntry) = 4,
    }
}
