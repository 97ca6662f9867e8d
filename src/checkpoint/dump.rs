//! The order of a dump.
//!
//! ```text
//!  running --check--> running --freeze, seize, thaw--> every thread in a ptrace stop
//!     ^                  |                                  | capture: registers, tasks, files, memory, namespaces
//!     |                  | refused: all findings            v
//!     |                  v                            model + pages in a staging directory
//!     +--- error --------+------ heal, detach <------------ | any error
//!     |                                                     v
//!     +<-- leave-running: heal, detach ------------- write, publish
//!                                                           v
//!                                            stopping: publish, then SIGKILL, never resumed
//! ```
//!
//! A container that arrives paused, or has groups inside that it has frozen itself, is thawed behind ptrace's back: its
//! threads stand in ptrace stops instead, and are frozen again before they are let go.

use std::thread;
use std::time::{Duration, Instant};

use crate::checkpoint::context::{Dump, LiveTask, Options, Source};
use crate::checkpoint::image::{IMG_VERSION, ImageDir, InventoryEntry, StasisExtension};
use crate::checkpoint::memory::Capture;
use crate::checkpoint::memory::compressed;
use crate::checkpoint::memory::copy::Disk;
use crate::checkpoint::memory::dedup::dedup;
use crate::checkpoint::memory::look::Looks;
use crate::checkpoint::memory::parent::{Known, Parent};
use crate::checkpoint::memory::track::{self, Tracking};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::nested;
use crate::checkpoint::recovery::Record;
use crate::checkpoint::report::{self, DumpReport, Log, Phases};
use crate::checkpoint::stop::{Stopped, all, release, stop};
use crate::checkpoint::task::freeze::{self, Ice};
use crate::checkpoint::task::{labels, process, sessions};
use crate::checkpoint::{Error, Freezer, Result, check, files, memory, namespaces, processor};

/// The extension of a container that was paused: whoever restores it may want to pause it again.
pub const PAUSED: &str = "paused";

/// How long what passes by itself may take, and the first and the longest pause before another look.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// Dumps the container into `options.image_path`. On an error the container runs as before.
pub fn dump(options: &Options, source: &Source, freezer: &mut dyn Freezer) -> Result<DumpReport> {
    dump_after(options, source, freezer, Before::default())
}

/// What has gone before a dump in the same command.
#[derive(Default)]
pub struct Before<'a> {
    /// What has noted the writes since the pre-dump.
    pub tracking: Option<Tracking>,
    /// The pages that the set has on which this one builds, where it is not in its place yet.
    pub known: Option<Known>,
    /// What was seen of its mappings after all had been checked. None: nothing has been.
    pub looks: Option<Looks>,
    /// What has to be done before this set may be called complete.
    pub complete: Option<&'a mut dyn FnMut() -> Result<()>>,
    /// Who takes the container over, when it does not go on here.
    pub heir: Option<&'a mut dyn Heir>,
}

/// Another host, on which the container is to go on.
pub trait Heir {
    /// The set is complete and everything stands still; the images are not published, for nobody here will need them. When
    /// this returns the other side has restored it, and waits for the last word; an error leaves the container running
    /// here.
    fn offer(&mut self, images: &ImageDir) -> Result<()>;
    /// The last word: from here on the container may run there. An error means that nobody knows whether it does: it is
    /// left here, paused.
    fn commit(&mut self) -> Result<()>;
}

/// As [`dump`], after pre-dumps of this command.
pub fn dump_after(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    before: Before<'_>,
) -> Result<DumpReport> {
    let mut log = Log::open(options, "dump.log");
    log.line(format_args!("dump of container {} into {}", source.id, options.image_path.display()));
    let result = run(options, source, freezer, before, &mut log);
    match &result {
        Ok(done) => log.line(format_args!("done: {}; frozen {:.1} ms", done.phases, report::ms(done.frozen))),
        Err(error) => log.error(error),
    }
    result
}

fn run(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    mut before: Before<'_>,
    log: &mut Log,
) -> Result<DumpReport> {
    let end = Instant::now() + PATIENCE;
    let mut pause = PAUSE;
    loop {
        match looked_at(options, source, freezer, &mut before, log) {
            Ok(Some(report)) => return Ok(report),
            Ok(None) => {
                log.line(format_args!("the flags of a mapping have changed meanwhile: once more"));
                before.looks = Some(Looks::default());
            }
            Err(error) if error.is_passing() && Instant::now() < end => {
                log.line(format_args!("not now: {error}"));
                // Nobody tells when a program has read or accepted something.
                thread::sleep(pause);
                pause = (pause * 2).min(PAUSE_MAX);
            }
            Err(error) => return Err(error),
        }
    }
}

/// One dump of a container that has been looked at, now or before.
fn looked_at(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    before: &mut Before<'_>,
    log: &mut Log,
) -> Result<Option<DumpReport>> {
    let phases = Phases::start();
    if before.looks.is_none() {
        let mut looks = Looks::default();
        refuse(check::check(options, source, freezer, before.tracking.is_some(), &mut looks), log)?;
        refuse(files::uring::stuck(source.init, &looks), log)?;
        before.looks = Some(looks);
    }
    if !options.leave_running {
        // Nobody waits for it to go on.
        before.looks = None;
    }
    attempt(options, source, freezer, before, log, phases)
}

/// One dump. None: what was taken for true of the mappings was not so; next time nothing will be.
fn attempt(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    before: &mut Before<'_>,
    log: &mut Log,
    mut phases: Phases,
) -> Result<Option<DumpReport>> {
    let images = if options.leave_running || before.heir.is_some() {
        ImageDir::create_in_haste(&options.image_path)?
    } else {
        ImageDir::create(&options.image_path)?
    };
    let parent = match (&before.known, before.tracking.take()) {
        (Some(known), tracking @ Some(_)) => Some(Parent::given(tracking, known.clone())),
        (_, tracking) => Parent::open(options, source.state_dir.as_deref(), tracking)?,
    };
    if parent.as_ref().is_some_and(|parent| !parent.is_known()) {
        log.line(format_args!("what was written since the earlier set is not known: all pages are saved"));
    }
    // What does not depend on what it does is found while it runs.
    processor::dump(&mut Model::default())?;
    let limits = namespaces::cgroup::limits(options, source)?;
    let sysctls = namespaces::net::open_sysctls(options, source)?;
    let Stopped { record, ice, tasks, strangers, threads, started, freezing } =
        stop(options, source, freezer, &mut phases)?;
    log.line(format_args!("{} processes, {threads} threads have stopped", tasks.len()));

    let mut dump = Dump::new(options, source, &images, tasks);
    dump.frozen_groups.clone_from(&ice.inside);
    (dump.limits, dump.sysctls) = (limits, sysctls);
    dump.parent = parent;
    dump.looks = before.looks.take().unwrap_or_default();
    let mut standing =
        Standing { dump, strangers, ice, record, freezer, before, log, phases, started, frozen: None };
    let taken = standing.take();
    let Some(Taken { phases, frozen, model }) = standing.end(taken)? else { return Ok(None) };
    // Whoever wants to build on a dump begins with a pre-dump.
    if let Some(dir) = &source.state_dir {
        track::end(dir)?;
    }
    let report = DumpReport {
        freezing,
        frozen,
        phases,
        tasks: model.pstree.len(),
        threads,
        image_bytes: report::bytes(&options.image_path, ""),
        pages_scanned: report::mapped(&model),
        pages_written: report::pages(&options.image_path),
    };
    report.write_stats(options);
    Ok(Some(report))
}

/// A container that stands still, on record, until [`Standing::end`].
struct Standing<'a, 'b, 'c> {
    dump: Dump<'a>,
    strangers: Vec<LiveTask>,
    ice: Ice,
    record: Record,
    freezer: &'b mut dyn Freezer,
    before: &'b mut Before<'c>,
    log: &'b mut Log,
    phases: Phases,
    started: Instant,
    /// For how long it stood still, once it goes on.
    frozen: Option<Duration>,
}

/// A dump that has succeeded.
struct Taken {
    phases: Phases,
    frozen: Duration,
    model: Model,
}

impl Standing<'_, '_, '_> {
    /// Takes the images, and brings them to where they belong. False: what was taken for true of the mappings was not so.
    fn take(&mut self) -> Result<bool> {
        if self.ice.whole {
            self.dump.model.set_extension(PAUSED, &true)?;
        }
        files::lock_network(&mut self.dump, &mut self.record, self.freezer)?;
        let capture = save(&mut self.dump, &mut self.phases)?;
        if !self.write_memory(capture)? {
            return Ok(false);
        }
        self.write_images()?;
        self.hand_over()?;
        Ok(true)
    }

    /// Memory is what takes long: where a copy can be made that stands still instead, the container goes on before.
    fn write_memory(&mut self, mut capture: Capture) -> Result<bool> {
        let (options, images) = (self.dump.options, self.dump.images);
        // Compressed, they are another file.
        let disk = Disk::of(!options.no_sync && self.before.heir.is_none() && !options.compress);
        // Frozen again at once, what was frozen could not be asked to wait for its copies.
        if options.leave_running && !self.ice.any() && capture.snapshot(&mut self.dump.tasks, images)? {
            self.phases.end("snapshot");
            let written = self.let_go().and_then(|()| {
                capture.record_policies(&mut self.dump.model)?;
                capture.write(images, disk)
            });
            let holds = capture.hold(&self.dump.looks);
            // What failed first is what matters, but no copy stays behind.
            let ended = capture.end();
            if holds {
                written.and(ended)?;
                self.phases.end("pages");
            }
            // What the copy has not inherited against expectation could not be read, either.
            return Ok(holds);
        }
        capture.ask(&mut self.dump.tasks)?;
        capture.record_policies(&mut self.dump.model)?;
        capture.write(images, disk)?;
        self.phases.end("pages");
        if options.leave_running {
            self.let_go()?;
            return Ok(capture.hold(&self.dump.looks));
        }
        Ok(true)
    }

    /// Lets it go on after its images were taken.
    fn let_go(&mut self) -> Result<()> {
        files::unlock_network(&mut self.dump)?;
        let tasks = all(&mut self.dump.tasks, &mut self.strangers);
        release(tasks, self.freezer, &self.ice)?;
        self.frozen = Some(self.started.elapsed());
        Ok(())
    }

    /// Everything but memory, and publishes the set, unless another host takes it.
    fn write_images(&mut self) -> Result<()> {
        let (options, images, inherited) = (self.dump.options, self.dump.images, self.before.heir.is_some());
        if !inherited {
            images.settle()?;
        }
        if options.compress {
            compressed::compress(images)?;
            self.dump.model.set_critical_extension(compressed::EXTENSION, &compressed::LZ4)?;
            self.phases.end("compression");
        }
        namespaces::pid::note_last(&mut self.dump)?;
        self.dump.model.write(images)?;
        if let Some(path) = &options.parent_path {
            images.link_parent(path)?;
        }
        self.phases.end("images");
        if let Some(complete) = &mut self.before.complete {
            complete()?;
        }
        if inherited {
            return Ok(());
        }
        images.publish(!options.no_sync)?;
        self.phases.end("publish");
        if options.auto_dedup && !dedup(&ImageDir::open(&options.image_path)?)? {
            self.log.line(format_args!("the file system makes no holes: the earlier sets stay as they are"));
        }
        Ok(())
    }

    /// Gives the container to the other host, where there is one.
    fn hand_over(&mut self) -> Result<()> {
        let Some(heir) = &mut self.before.heir else { return Ok(()) };
        heir.offer(self.dump.images)?;
        self.phases.end("offer");
        // If this command dies now, or nobody answers, it must not go on here.
        self.freezer.freeze()?;
        self.record.hold()?;
        self.ice.whole = true;
        let agreed = heir.commit();
        // Every thread stands in our hands. Where nobody has agreed they are frozen again before they are let go.
        self.freezer.thaw()?;
        agreed?;
        self.phases.end("handover");
        Ok(())
    }

    /// Ends the container, or sees that it goes on, by what has come of `taken`.
    fn end(mut self, taken: Result<bool>) -> Result<Option<Taken>> {
        let frozen = self.frozen.unwrap_or_else(|| self.started.elapsed());
        let tasks = all(&mut self.dump.tasks, &mut self.strangers);
        match &taken {
            Ok(true) if self.dump.options.leave_running => {}
            Ok(true) => {
                // Its connections end without a word; the lock stays, as far as there is somebody to answer for it.
                let connections = files::abandon_connections(&mut self.dump);
                freeze::kill(tasks)?;
                drop(connections);
                // Whoever restores it may want the names.
                std::mem::take(&mut self.dump.network).release();
            }
            // What failed first is what matters.
            Ok(false) | Err(_) => {
                let _ = files::unlock_network(&mut self.dump);
                let _ = release(tasks, self.freezer, &self.ice);
            }
        }
        self.record.remove();
        if !matches!(taken, Ok(true)) {
            self.before.tracking = self.dump.parent.as_mut().and_then(Parent::take_tracking);
        }
        if !taken? {
            return Ok(None);
        }
        Ok(Some(Taken { phases: self.phases, frozen, model: self.dump.model }))
    }
}

/// All findings of the look before the freeze, as one error: the first that lasts, with the number of the others. The log
/// has all.
pub(super) fn refuse(mut found: Vec<Error>, log: &mut Log) -> Result<()> {
    found.sort_by_key(Error::is_passing);
    for error in &found {
        if error.is_passing() {
            log.line(format_args!("{error}"));
        } else {
            log.error(error);
        }
    }
    let others = found.len().saturating_sub(1);
    match found.into_iter().next() {
        None => Ok(()),
        Some(first) if others == 0 => Err(first),
        Some(first) => Err(first.and_others(others)),
    }
}

/// Everything that must agree, while all stand still, but for the contents of private memory.
fn save(dump: &mut Dump<'_>, phases: &mut Phases) -> Result<Capture> {
    std::thread::scope(|scope| {
        let (options, source) = (dump.options, dump.source);
        let (frozen, limits) = (dump.frozen_groups.clone(), dump.limits.clone());
        let look = move || namespaces::cgroup::look(options, source, &frozen, &limits);
        let groups = std::thread::Builder::new().spawn_scoped(scope, look);
        let snapshot = process::capture(&dump.tasks)?;
        process::dump(dump, snapshot)?;
        dump.groups = groups.ok().and_then(|groups| groups.join().ok());
        Ok::<(), Error>(())
    })?;
    sessions::record(dump)?;
    for (pid, zombie) in dump.tasks.iter().map(|t| (t.pid, t.zombie)).collect::<Vec<_>>() {
        if !zombie {
            namespaces::ids(dump, pid)?;
        }
    }
    nested::pids::gather(dump)?;
    process::plan(&dump.model)?;
    describe(dump)?;
    processor::dump(&mut dump.model)?;
    memory::aio::settle(dump)?;
    files::before(dump)?;
    phases.end("tasks");
    namespaces::dump(dump)?;
    phases.end("namespaces");
    files::dump(dump)?;
    // A descriptor may be all that keeps a namespace.
    nested::contents(dump)?;
    namespaces::net::keep(dump)?;
    nested::pids::show(dump)?;
    nested::check_threads(&dump.model)?;
    let (steps, pids) = (process::plan(&dump.model)?, nested::pids::Pids::of(&dump.model)?);
    nested::birth::Births::of(&dump.model, &steps, &pids)?.check(&dump.model)?;
    phases.end("files");
    let capture = pages(dump)?;
    files::record_times(dump)?;
    phases.end("memory");
    Ok(capture)
}

fn pages(dump: &mut Dump<'_>) -> Result<Capture> {
    memory::dump::capture(dump, &mut |dump, file, link, flags| {
        files::register_path(dump, file, link, nix::fcntl::OFlag::from_bits_retain(flags.cast_signed()))
    })
}

fn describe(dump: &mut Dump<'_>) -> Result<()> {
    let root_ids = dump.model.inventory.root_ids.take();
    let root_cg_set = dump.model.inventory.root_cg_set.take();
    dump.model.inventory = InventoryEntry { root_ids, root_cg_set, ..describe_set() };
    let kernel =
        nix::sys::utsname::uname().map_err(|e| Error::new("cannot name the kernel").call("uname()", e))?;
    let extension = dump.model.extension.get_or_insert_with(StasisExtension::default);
    extension.version = env!("CARGO_PKG_VERSION").into();
    extension.kernel = kernel.release().to_string_lossy().into_owned();
    extension.container.clone_from(&dump.source.id);
    Ok(())
}

/// What the inventory of every set says.
pub(super) fn describe_set() -> InventoryEntry {
    InventoryEntry {
        img_version: IMG_VERSION,
        fdinfo_per_id: Some(true),
        ns_per_id: Some(true),
        lsmtype: Some(labels::module().into()),
        ..InventoryEntry::default()
    }
}
