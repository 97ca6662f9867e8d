//! What a dump or a restore reports: how long the container stood still, and where the time and the bytes went.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use prost::Message;

use crate::checkpoint::Error;
use crate::checkpoint::context::Options;
use crate::checkpoint::image::{DumpStatsEntry, Kind, RestoreStatsEntry, StatsEntry};
use crate::checkpoint::memory::compressed;
use crate::checkpoint::model::Model;

/// The phases of an operation in the order they ended, each with its length.
#[derive(Debug, Clone)]
pub struct Phases {
    last: Instant,
    done: Vec<(&'static str, Duration)>,
}

impl Phases {
    /// Starts the clock.
    pub fn start() -> Self {
        Self { last: Instant::now(), done: Vec::new() }
    }
    /// The phase `name` ends now, and the next begins.
    pub fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        self.done.push((name, now - self.last));
        self.last = now;
    }
    /// The phases so far.
    pub fn all(&self) -> &[(&'static str, Duration)] {
        &self.done
    }
    /// How long one of them took.
    pub fn of(&self, name: &str) -> Duration {
        self.done.iter().filter(|(n, _)| *n == name).map(|(_, d)| *d).sum()
    }
    /// Their sum.
    pub fn total(&self) -> Duration {
        self.done.iter().map(|(_, d)| *d).sum()
    }
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, took)) in self.done.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{name} {:.1} ms", took.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}

/// What a dump reports.
#[derive(Debug, Clone)]
pub struct DumpReport {
    /// From the freezer's request until the last thread had stopped.
    pub freezing: Duration,
    /// How long no thread of the container ran; for a dump that ends the container, until its images were published.
    pub frozen: Duration,
    /// Everything, by phase.
    pub phases: Phases,
    /// Processes dumped, zombies included.
    pub tasks: usize,
    /// Threads of these processes.
    pub threads: usize,
    /// Bytes in the image directory.
    pub image_bytes: u64,
    /// Pages that the tasks have mapped.
    pub pages_scanned: u64,
    /// Pages in the images.
    pub pages_written: u64,
}

/// What a restore reports.
#[derive(Debug, Clone)]
pub struct RestoreReport {
    /// Everything, by phase.
    pub phases: Phases,
    /// Processes restored, zombies included.
    pub tasks: usize,
    /// Threads of these processes.
    pub threads: usize,
    /// Init of the container, as a pid of this host.
    pub init: i32,
    /// Pages in the images.
    pub pages_restored: u64,
    /// What is not as it was, because this kernel cannot have it so.
    pub warnings: Vec<String>,
}

impl fmt::Display for DumpReport {
    /// The table that `--print-stats` prints.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Displaying dump stats:")?;
        writeln!(f, "Freezing time: {} us", us(self.freezing))?;
        writeln!(f, "Frozen time: {} us", us(self.frozen))?;
        writeln!(f, "Processes: {}, threads: {}", self.tasks, self.threads)?;
        writeln!(f, "Pages scanned: {}, written: {}", self.pages_scanned, self.pages_written)?;
        writeln!(f, "Image size: {} bytes", self.image_bytes)?;
        table(f, &self.phases)
    }
}

impl fmt::Display for RestoreReport {
    /// The table that `--print-stats` prints.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Displaying restore stats:")?;
        writeln!(f, "Restore time: {} us", us(self.phases.total()))?;
        writeln!(f, "Processes: {}, threads: {}", self.tasks, self.threads)?;
        writeln!(f, "Pages restored: {}", self.pages_restored)?;
        table(f, &self.phases)
    }
}

fn table(f: &mut fmt::Formatter<'_>, phases: &Phases) -> fmt::Result {
    phases.all().iter().try_for_each(|(name, took)| writeln!(f, "  {name:<12} {:>9.3} ms", ms(*took)))
}

impl DumpReport {
    /// Leaves `stats-dump` in the work directory, where clients look for it. A failure to do so is none of the dump.
    pub fn write_stats(&self, options: &Options) {
        let dump = DumpStatsEntry {
            freezing_time: us(self.freezing),
            frozen_time: us(self.frozen),
            memdump_time: us(self.phases.of("memory")),
            memwrite_time: us(self.phases.of("pages")),
            pages_scanned: self.pages_scanned,
            pages_written: self.pages_written,
            ..DumpStatsEntry::default()
        };
        write_stats(options, "stats-dump", StatsEntry { dump: Some(dump), restore: None });
    }
}

impl RestoreReport {
    /// Leaves `stats-restore` in the work directory.
    pub fn write_stats(&self, options: &Options) {
        let restore = RestoreStatsEntry {
            forking_time: us(self.phases.of("tree")),
            restore_time: us(self.phases.total()),
            pages_restored: Some(self.pages_restored),
            ..RestoreStatsEntry::default()
        };
        write_stats(options, "stats-restore", StatsEntry { dump: None, restore: Some(restore) });
    }
}

const PAGE: u64 = 4096;

fn us(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// A duration in milliseconds.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn write_stats(options: &Options, name: &str, stats: StatsEntry) {
    let mut bytes = Kind::Stats.header();
    let record = stats.encode_to_vec();
    bytes.extend_from_slice(&u32::try_from(record.len()).unwrap_or(0).to_le_bytes());
    bytes.extend_from_slice(&record);
    let _ = std::fs::write(work(options).join(name), bytes);
}

fn work(options: &Options) -> &Path {
    options.work_path.as_deref().unwrap_or(&options.image_path)
}

/// Bytes of all images in a directory whose names begin with `prefix`.
pub fn bytes(dir: &Path, prefix: &str) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let ours = |name: &str| name.starts_with(prefix) && name.ends_with(".img");
    let images = files.filter(|f| f.file_name().to_str().is_some_and(ours));
    images.filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum()
}

/// Pages of memory in a directory of images.
pub fn pages(dir: &Path) -> u64 {
    let plain = |name: &str| name.starts_with("pages-") && name.ends_with(".img");
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let ours = files.filter(|f| f.file_name().to_str().is_some_and(plain));
    let length = |entry: std::fs::DirEntry| {
        let told = if entry.file_name().as_encoded_bytes().ends_with(b".lz4.img") {
            compressed::length(&File::open(entry.path()).ok()?)
        } else {
            None
        };
        told.or_else(|| Some(entry.metadata().ok()?.len()))
    };
    ours.filter_map(length).fold(0, u64::saturating_add) / PAGE
}

/// Pages that the tasks of the images have mapped.
pub fn mapped(model: &Model) -> u64 {
    let sizes = model.mm.values().flat_map(|mm| &mm.vmas).map(|vma| vma.end.saturating_sub(vma.start) / PAGE);
    sizes.fold(0, u64::saturating_add)
}

/// `dump.log` or `restore.log` in the work directory: the story of an operation, with times.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    start: Instant,
}

impl Log {
    /// Begins the log. One that cannot be written stays silent.
    pub fn open(options: &Options, name: &str) -> Self {
        let dir = work(options);
        let _ = std::fs::create_dir_all(dir);
        Self { file: File::create(dir.join(name)).ok(), start: Instant::now() }
    }
    /// Writes a line.
    pub fn line(&mut self, text: fmt::Arguments<'_>) {
        let elapsed = self.start.elapsed();
        if let Some(file) = &mut self.file {
            // In one piece: it may be that a container stands still.
            let line = format!("({:02}.{:06}) {text}\n", elapsed.as_secs(), elapsed.subsec_micros());
            let _ = file.write_all(line.as_bytes());
        }
    }
    /// Writes an error, marked as clients look for it.
    pub fn error(&mut self, error: &Error) {
        self.line(format_args!("Error: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up() {
        let mut phases = Phases::start();
        phases.end("a");
        phases.end("b");
        assert_eq!(phases.total(), phases.of("a") + phases.of("b"));
        assert!(phases.to_string().starts_with("a 0."), "{phases}");
    }

    #[test]
    fn statistics_and_log_are_where_clients_look() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            image_path: dir.path().join("none"),
            work_path: Some(dir.path().into()),
            ..Options::default()
        };
        let mut log = Log::open(&options, "dump.log");
        log.error(&Error::new("cannot"));
        let ms = Duration::from_millis(1);
        let report = DumpReport {
            freezing: ms,
            frozen: ms,
            phases: Phases::start(),
            tasks: 1,
            threads: 1,
            image_bytes: 8192,
            pages_scanned: 5,
            pages_written: 2,
        };
        report.write_stats(&options);
        assert!(std::fs::read_to_string(dir.path().join("dump.log")).unwrap().contains("Error: cannot"));
        let stats = std::fs::read(dir.path().join("stats-dump")).unwrap();
        assert_eq!(stats[..8], Kind::Stats.header());
        let entry = StatsEntry::decode(&stats[12..]).unwrap();
        let dump = entry.dump.unwrap();
        assert_eq!((dump.frozen_time, dump.pages_scanned, dump.pages_written), (1000, 5, 2));
    }
}
