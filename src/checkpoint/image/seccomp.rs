//! seccomp.img: the filters, as a forest that threads point into.

use crate::checkpoint::image::record::records;

records! {
    /// One filter program as raw `sock_filter`s; `prev` is the index of the one below it.
    SeccompFilter = "seccomp_filter" {
        filter: required bytes = 1,
        prev: optional uint32 = 2,
        flags: optional uint32 = 3,
    }

    /// All filters of the container.
    SeccompEntry = "seccomp_entry" {
        seccomp_filters: repeated message(SeccompFilter) = 1,
    }
}
