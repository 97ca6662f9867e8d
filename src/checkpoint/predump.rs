//! The order of a pre-dump: the memory alone, of a container that runs on.
//!
//! ```text
//!   check ──> stop ──> per process: note writes; scan and protect ──> let go      (milliseconds)
//!         ──> copy the pages while the program runs ──> pagemap-N, pages-N, inventory, parent ──> publish
//! ```
//!
//! Pages that change while they are copied are copied again by whoever builds on this set: their change is noted. The set
//! cannot be restored by itself.

use crate::checkpoint::context::{LiveTask, Options, Source};
use crate::checkpoint::dump::{describe_set, refuse};
use crate::checkpoint::image::{INVENTORY, ImageDir, InventoryEntry, Kind, VmaEntry};
use crate::checkpoint::memory::capture::{Earlier, Stream, TaskPages};
use crate::checkpoint::memory::copy::Disk;
use crate::checkpoint::memory::dedup::dedup;
use crate::checkpoint::memory::layout;
use crate::checkpoint::memory::look::Looks;
use crate::checkpoint::memory::pages::Pagemap;
use crate::checkpoint::memory::parent::{Known, Parent};
use crate::checkpoint::memory::track::Tracking;
use crate::checkpoint::remote::Injection;
use crate::checkpoint::report::{self, DumpReport, Log, Phases};
use crate::checkpoint::stop::{Stopped, all, release, stop};
use crate::checkpoint::task::sharing;
use crate::checkpoint::{Error, Freezer, Result, check, files};

/// What `pre_dump_mode` says of a set whose pages were read from outside.
const PRE_DUMP_READ: u32 = 2;

/// Writes the memory of a running container into `options.image_path`. What an earlier pre-dump has left notes its writes,
/// if it fits; else the noting begins. It is returned, to be kept.
pub fn pre_dump(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
) -> Result<(DumpReport, Tracking)> {
    let mut log = Log::open(options, "dump.log");
    log.line(format_args!("pre-dump of container {} into {}", source.id, options.image_path.display()));
    let result = find(options, source, freezer, None, &mut log).and_then(|found| {
        let Found { round, tracking, mut report } = found;
        round.write(&ImageDir::create(&options.image_path)?, options, Disk::of(!options.no_sync))?;
        if options.auto_dedup && !dedup(&ImageDir::open(&options.image_path)?)? {
            log.line(format_args!("the file system makes no holes, or the pages are compressed: the earlier sets stay as they are"));
        }
        report.phases.end("pages");
        report.image_bytes = report::bytes(&options.image_path, "");
        report.write_stats(options);
        Ok((report, tracking))
    });
    match &result {
        Ok((done, _)) => {
            log.line(format_args!("done: {}; frozen {:.1} ms", done.phases, report::ms(done.frozen)));
        }
        Err(error) => log.error(error),
    }
    result
}

/// As [`pre_dump`], but nothing is written yet. `given`: what notes the writes since an earlier one of this command, and
/// the pages that this has.
pub fn round(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    given: Option<(Tracking, Known)>,
) -> Result<(Round, Tracking)> {
    let mut log = Log::open(options, "dump.log");
    let found = find(options, source, freezer, given, &mut log).inspect_err(|error| log.error(error))?;
    Ok((found.round, found.tracking))
}

/// Pages that were found, and are to be written while their processes run.
#[derive(Debug)]
pub struct Round {
    pages: Vec<TaskPages>,
    run: String,
}

impl Round {
    /// A round to which the marks belong from now on.
    pub fn new(pages: Vec<TaskPages>, tracking: &mut Tracking) -> Result<Self> {
        let run = run_id()?;
        tracking.belongs_to(run.clone());
        Ok(Self { pages, run })
    }

    /// Bytes of memory that it has.
    pub fn bytes(&self) -> u64 {
        self.pages.iter().map(TaskPages::bytes).sum()
    }

    /// The pages that it has, or an earlier one.
    pub fn known(&self) -> Known {
        self.pages.iter().map(|pages| (pages.vpid(), pages.known())).collect()
    }

    /// Writes it all, and publishes it.
    pub fn write(self, images: &ImageDir, options: &Options, disk: Disk) -> Result<()> {
        self.describe(images)?;
        for pages in self.pages {
            pages.write_running(images, disk)?;
        }
        if let Some(path) = &options.parent_path {
            images.link_parent(path)?;
        }
        images.publish(!options.no_sync)
    }

    /// Writes all but the pages, which somebody else reads.
    pub fn streams(self, images: &ImageDir) -> Result<Vec<Stream>> {
        self.describe(images)?;
        self.pages.into_iter().map(|pages| pages.stream(images)).collect()
    }

    fn describe(&self, images: &ImageDir) -> Result<()> {
        let inventory = InventoryEntry {
            pre_dump_mode: Some(PRE_DUMP_READ),
            dump_uptime: Some(uptime()?),
            dump_criu_run_id: Some(self.run.clone()),
            ..describe_set()
        };
        images.write(Kind::Inventory, INVENTORY, &[inventory])
    }
}

/// What was found while all stood still.
struct Found {
    round: Round,
    tracking: Tracking,
    report: DumpReport,
}

fn find(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    given: Option<(Tracking, Known)>,
    log: &mut Log,
) -> Result<Found> {
    let mut phases = Phases::start();
    if given.is_none() {
        let mut looks = Looks::default();
        let mut found = check::check(options, source, freezer, false, &mut looks);
        // What passes by itself is of the dump that follows.
        found.retain(|error| !error.is_passing());
        refuse(found, log)?;
        refuse(files::uring::stuck(source.init, &looks), log)?;
    }
    let state_dir = source.state_dir.as_deref();
    let mut parent = match given {
        Some((tracking, known)) => Some(Parent::given(Some(tracking), known)),
        None => Parent::open(options, state_dir, None)?,
    };
    if parent.as_ref().is_some_and(|parent| !parent.is_known()) {
        log.line(format_args!("what was written since the earlier set is not known: all pages are saved"));
    }
    let known = parent.as_mut().and_then(Parent::take_tracking);
    let is_known = known.is_some();
    let mut tracking = known.unwrap_or_else(Tracking::begin);
    let Stopped { record, ice, mut tasks, mut strangers, threads, started, freezing } =
        stop(options, source, freezer, &mut phases)?;
    let count = tasks.len();

    let mut scanned = 0;
    let found = tracking.renew(state_dir).and_then(|()| {
        let mut found = Vec::new();
        let tenants = sharing::stopped_tenants(&tasks)?;
        let owners = tasks.iter().filter(|task| !task.zombie && !tenants.contains(&task.pid));
        for (task, id) in owners.zip(1..) {
            let vpid = task.vpid;
            let earlier = match &mut parent {
                Some(parent) if is_known => parent.of(vpid.cast_unsigned(), tracking.marks(task.pid)),
                _ => Earlier::NONE,
            };
            let pages = scan(task, id, earlier, &mut tracking, &mut scanned).map_err(|e| e.pid(vpid))?;
            found.push(pages);
        }
        Ok(found)
    });
    phases.end("memory");
    let released = release(all(&mut tasks, &mut strangers), freezer, &ice);
    let frozen = started.elapsed();
    record.remove();
    let round = Round::new(found?, &mut tracking)?;
    released?;
    phases.end("resume");
    let report = DumpReport {
        freezing,
        frozen,
        phases,
        tasks: count,
        threads,
        image_bytes: 0,
        pages_scanned: scanned,
        pages_written: round.bytes() / 4096,
    };
    Ok(Found { round, tracking, report })
}

/// Finds what is to be written of one process, and from now on notes its writes.
fn scan(
    task: &LiveTask,
    id: u32,
    mut earlier: Earlier,
    tracking: &mut Tracking,
    scanned: &mut u64,
) -> Result<TaskPages> {
    let leader = task.threads.first().ok_or_else(|| Error::new("the process has no thread"))?;
    let mut injection = Injection::start(leader)?;
    let mappings: Vec<VmaEntry> = layout::private(task.pid)?;
    *scanned += mappings.iter().map(|vma| (vma.end - vma.start) / 4096).sum::<u64>();
    tracking.watch(task, &mut injection, &mappings)?;
    injection.finish()?;
    earlier.marks = tracking.scan(task.pid);
    let mut map = Pagemap::open(task.pid)?;
    let pages =
        TaskPages::find(&mut map, (task.pid, task.vpid.cast_unsigned()), id, mappings.iter(), &earlier)?;
    tracking.scanned(task.pid)?;
    Ok(pages)
}

/// A name for a set that no other set has.
fn run_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/uuid";
    let text = std::fs::read_to_string(path)
        .map_err(|e| Error::new(format!("cannot name the set of images: {path}: {e}")))?;
    Ok(text.trim().to_owned())
}

/// Time since the machine started, in microseconds.
fn uptime() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default();
    Ok((seconds * 1e6) as u64)
}
