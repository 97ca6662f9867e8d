//! Network namespaces and devices.

use crate::checkpoint::image::record::records;

/// Kind of a network device.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum NdType {
    Loopback = 1,
    Veth = 2,
    Tun = 3,
    Extlink = 4,
    Venet = 5,
    Bridge = 6,
    Macvlan = 7,
    Sit = 8,
}

/// An image without records, in the format of iproute2's `save`: a word that tells what it is, then messages of netlink(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NetDump {
    /// Addresses of devices.
    Addresses,
    /// Routes of IPv4.
    Routes,
    /// Routes of IPv6.
    Routes6,
    /// Rules, which choose a table of routes.
    Rules,
    /// Connections that packet filters know: the messages alone.
    Connections,
}

impl NetDump {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Addresses, Self::Routes, Self::Routes6, Self::Rules, Self::Connections];

    /// Its image's name, for a namespace.
    pub fn image(self, id: u32) -> String {
        let name = match self {
            Self::Addresses => "ifaddr",
            Self::Routes => "route",
            Self::Routes6 => "route6",
            Self::Rules => "rule",
            Self::Connections => "netns-ct",
        };
        format!("{name}-{id}.img")
    }

    /// The word that it begins with.
    pub fn magic(self) -> Vec<u8> {
        let word: u32 = match self {
            Self::Addresses => 0x4736_1222,
            Self::Routes | Self::Routes6 => 0x4531_1224,
            Self::Rules => 0x7170_6986,
            Self::Connections => return Vec::new(),
        };
        word.to_ne_bytes().to_vec()
    }
}

/// Which of the two values a sysctl has.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum SysctlType {
    CtlStr = 5,
    Ctl32 = 6,
}

records! {
    /// One sysctl.
    SysctlEntry = "sysctl_entry" {
        r#type: required enumeration(SysctlType) = 1,
        iarg: optional int32 = 2,
        sarg: optional string = 3,
    }

    /// What a macvlan adds to a network device.
    MacvlanLinkEntry = "macvlan_link_entry" {
        mode: required uint32 = 1,
        flags: optional uint32 = 2,
    }

    /// What a sit tunnel adds to a network device.
    SitEntry = "sit_entry" {
        link: optional uint32 = 1,
        local: repeated uint32 = 2,
        remote: repeated uint32 = 3,
        ttl: optional uint32 = 4,
        tos: optional uint32 = 5,
        pmtudisc: optional bool = 6,
        proto: optional uint32 = 7,
        flags: optional uint32 = 8,
        encap_type: optional uint32 = 9,
        encap_flags: optional uint32 = 10,
        encap_sport: optional uint32 = 11,
        encap_dport: optional uint32 = 12,
        rd_prefixlen: optional uint32 = 13,
        rd_prefix: repeated uint32 = 14,
        relay_prefixlen: optional uint32 = 15,
        relay_prefix: repeated uint32 = 16,
    }

    /// What a tun or tap adds to a network device.
    TunLinkEntry = "tun_link_entry" {
        flags: required uint32 = 1,
        owner: required int32 = 2,
        group: required int32 = 3,
        vnethdr: required uint32 = 4,
        sndbuf: required uint32 = 5,
    }

    /// An open /dev/net/tun.
    TunfileEntry = "tunfile_entry" {
        id: required uint32 = 1,
        netdev: optional string = 2,
        detached: optional bool = 3,
        ns_id: optional uint32 = 4,
    }

    /// netdev-N.img: one network device.
    NetDeviceEntry = "net_device_entry" {
        r#type: required enumeration(NdType) = 1,
        ifindex: required uint32 = 2,
        mtu: required uint32 = 3,
        flags: required uint32 = 4,
        name: required string = 5,
        tun: optional message(TunLinkEntry) = 6,
        address: optional bytes = 7,
        conf: repeated int32 = 8,
        conf4: repeated message(SysctlEntry) = 9,
        conf6: repeated message(SysctlEntry) = 10,
        macvlan: optional message(MacvlanLinkEntry) = 11,
        peer_ifindex: optional uint32 = 12,
        peer_nsid: optional uint32 = 13,
        master: optional uint32 = 14,
        sit: optional message(SitEntry) = 15,
    }

    /// The id by which another network namespace is known in this one.
    NetnsId = "netns_id" {
        target_ns_id: required uint32 = 1,
        netnsid_value: required int32 = 2,
    }

    /// netns-N.img: sysctls of a network namespace, or the key of an external one.
    NetnsEntry = "netns_entry" {
        def_conf: repeated int32 = 1,
        all_conf: repeated int32 = 2,
        def_conf4: repeated message(SysctlEntry) = 3,
        all_conf4: repeated message(SysctlEntry) = 4,
        def_conf6: repeated message(SysctlEntry) = 5,
        all_conf6: repeated message(SysctlEntry) = 6,
        nsids: repeated message(NetnsId) = 7,
        ext_key: optional string = 8,
        unix_conf: repeated message(SysctlEntry) = 9,
        ipv4_sysctl: repeated message(SysctlEntry) = 10,
    }
}
