//! A container that stands still, for a dump or a pre-dump, and how it goes on.

use std::time::{Duration, Instant};

use crate::checkpoint::context::{LiveTask, Options, Source};
use crate::checkpoint::recovery::Record;
use crate::checkpoint::report::Phases;
use crate::checkpoint::task::freeze::{self, Ice};
use crate::checkpoint::task::sessions;
use crate::checkpoint::{Freezer, Result};

/// A container that stands still.
pub(super) struct Stopped {
    /// What the next command undoes should this one be killed.
    pub record: Record,
    /// What was frozen before.
    pub ice: Ice,
    pub tasks: Vec<LiveTask>,
    /// Those that stay out of the images, and share the container's fate.
    pub strangers: Vec<LiveTask>,
    pub threads: usize,
    /// When its first thread began to stop, and how long it took until the last had.
    pub started: Instant,
    pub freezing: Duration,
}

/// Stops the container, on record. The phase before it is called the check.
pub(super) fn stop(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    phases: &mut Phases,
) -> Result<Stopped> {
    let ice = Ice::of(freezer)?;
    let record = Record::write(source.state_dir.as_deref(), ice.clone())?;
    phases.end("check");
    let started = Instant::now();
    let stood = freeze::stop(freezer, source.init, &ice).and_then(|mut stood| {
        if options.keep_exec {
            stood.tasks.append(&mut stood.strangers);
        }
        match stood.strangers.first() {
            Some(stranger) if !options.drop_exec => Err(sessions::refusal(stranger.vpid)),
            _ => Ok(stood),
        }
    });
    let freeze::Stood { tasks, strangers } = match stood {
        Ok(stood) => stood,
        Err(error) => {
            record.undo(freezer)?;
            return Err(error);
        }
    };
    let freezing = started.elapsed();
    phases.end("freeze");
    let threads = tasks.iter().map(|t| t.threads.len()).sum();
    Ok(Stopped { record, ice, tasks, strangers, threads, started, freezing })
}

/// Everything that stands still.
pub(super) fn all(tasks: &mut Vec<LiveTask>, strangers: &mut Vec<LiveTask>) -> Vec<LiveTask> {
    tasks.drain(..).chain(strangers.drain(..)).collect()
}

/// Lets the container go on as before. Every task is healed even when another one fails.
pub(super) fn release(mut tasks: Vec<LiveTask>, freezer: &mut dyn Freezer, ice: &Ice) -> Result<()> {
    let mut result = Ok(());
    for task in &mut tasks {
        if let Some(injection) = task.injection.take() {
            result = result.and(injection.finish().map_err(|e| e.pid(task.vpid)));
        }
    }
    result = result.and(ice.freeze(freezer));
    result.and(freeze::let_go(tasks.into_iter().flat_map(|task| task.threads).collect()))
}
