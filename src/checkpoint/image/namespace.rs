//! The smaller namespaces: uts, time, pid, user; and namespace files held open.

use crate::checkpoint::image::record::records;

records! {
    /// A namespace file held open.
    NsFileEntry = "ns_file_entry" {
        id: required uint32 = 1,
        ns_id: required uint32 = 2,
        ns_cflag: required uint32 = 3,
        flags: required uint32 = 4,
    }

    /// utsns-N.img: host and domain name.
    UtsnsEntry = "utsns_entry" {
        nodename: required string = 1,
        domainname: required string = 2,
    }

    /// Seconds and nanoseconds.
    Timespec = "timespec" {
        tv_sec: required uint64 = 1,
        tv_nsec: required uint64 = 2,
    }

    /// timens-N.img: the clocks of the container at the dump, not their offsets.
    TimensEntry = "timens_entry" {
        monotonic: required message(Timespec) = 1,
        boottime: required message(Timespec) = 2,
    }

    /// pidns-N.img: the key of an external pid namespace.
    PidnsEntry = "pidns_entry" {
        ext_key: optional string = 1,
    }

    /// One line of a uid_map or gid_map.
    UidGidExtent = "uid_gid_extent" {
        first: required uint32 = 1,
        lower_first: required uint32 = 2,
        count: required uint32 = 3,
    }

    /// userns-N.img: the id maps.
    UsernsEntry = "userns_entry" {
        uid_map: repeated message(UidGidExtent) = 1,
        gid_map: repeated message(UidGidExtent) = 2,
    }
}
