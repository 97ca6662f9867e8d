//! Pipes and fifos.

use crate::checkpoint::image::record::records;
use crate::checkpoint::image::regfile::FownEntry;

records! {
    /// One end of a pipe, opened; ends of one pipe share `pipe_id`.
    PipeEntry = "pipe_entry" {
        id: required uint32 = 1,
        pipe_id: required uint32 = 2,
        flags: required uint32 = 3,
        fown: required message(FownEntry) = 4,
    }

    /// An opened fifo; `regf_id` is its path as a regular file entry.
    FifoEntry = "fifo_entry" {
        id: required uint32 = 1,
        pipe_id: required uint32 = 2,
        regf_id: optional uint32 = 3,
    }

    /// pipes-data.img, fifo-data.img: capacity and content of a pipe; the bytes follow the record.
    PipeDataEntry = "pipe_data_entry" {
        pipe_id: required uint32 = 1,
        bytes: required uint32 = 2,
        size: optional uint32 = 3,
    }
}
