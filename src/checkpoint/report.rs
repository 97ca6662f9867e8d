//! What a dump or a restore reports: how long the container stood still, and where the time and the bytes went.

use std::fmt;
use std::time::{Duration, Instant};

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
}
