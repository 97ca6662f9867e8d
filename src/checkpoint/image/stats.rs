//! stats-dump and stats-restore: what an operation took, in microseconds and pages.

use std::fs::File;
use std::path::Path;

use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::kind::Kind;
use crate::checkpoint::image::record::records;
use crate::checkpoint::image::stream::Writer;

records! {
    /// Figures of a dump.
    DumpStatsEntry = "dump_stats_entry" {
        freezing_time: required uint32 = 1,
        frozen_time: required uint32 = 2,
        memdump_time: required uint32 = 3,
        memwrite_time: required uint32 = 4,
        pages_scanned: required uint64 = 5,
        pages_skipped_parent: required uint64 = 6,
        pages_written: required uint64 = 7,
        irmap_resolve: optional uint32 = 8,
        pages_lazy: required uint64 = 9,
        page_pipes: optional uint64 = 10,
        page_pipe_bufs: optional uint64 = 11,
        shpages_scanned: optional uint64 = 12,
        shpages_skipped_parent: optional uint64 = 13,
        shpages_written: optional uint64 = 14,
    }

    /// Figures of a restore.
    RestoreStatsEntry = "restore_stats_entry" {
        pages_compared: required uint64 = 1,
        pages_skipped_cow: required uint64 = 2,
        forking_time: required uint32 = 3,
        restore_time: required uint32 = 4,
        pages_restored: optional uint64 = 5,
    }

    /// One of the two.
    StatsEntry = "stats_entry" {
        dump: optional message(DumpStatsEntry) = 1,
        restore: optional message(RestoreStatsEntry) = 2,
    }
}

impl StatsEntry {
    /// Writes `stats-dump` or `stats-restore` into the work directory, over the figures of an earlier operation.
    pub fn write(&self, work: &Path) -> Result<()> {
        let path = work.join(if self.dump.is_some() { "stats-dump" } else { "stats-restore" });
        let file = File::create(&path)
            .during("cannot write the statistics", || format!("open({path:?}, O_CREAT|O_TRUNC)"))?;
        let mut writer = Writer::new(file, path, Kind::Stats)?;
        writer.record(self)?;
        writer.finish().map(drop)
    }
}
