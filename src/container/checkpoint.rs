//! Checkpoint and restore of a container: what the engine needs to know of it, and what becomes of it afterwards.
//!
//! ```text
//!   checkpoint:  state.json, config.json ──> Source ──> engine ──> images      (stopping: the container is deleted)
//!   restore:     bundle ──> create, up to an empty shell ──> Target ──> engine ──> state.json, pid file ──> running
//! ```

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;

use super::create::{Created, Request, create_with, has_control_group, write_pid_file};
use super::launch::{Newborn, Parent};
use super::{Container, Error, Result, Status, Store, criu_config, exec, start};
use crate::checkpoint::context::{Entrant, Options, Source, Target};
use crate::checkpoint::image::ImageDir;
use crate::checkpoint::memory::lazy;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::time;
use crate::checkpoint::report::{DumpReport, RestoreReport};
use crate::checkpoint::task::process::asks_for_parents_death;
use crate::checkpoint::task::{labels, sessions};
use crate::checkpoint::{
    dump, external, files, outlook, precopy, predump, processor, recovery, restore as engine, trace,
};
use crate::init::mounts::Mount;
use crate::sys::Context;
use crate::sys::fd::Room;

/// What a checkpoint or restore has to say besides its report.
#[derive(Debug)]
pub struct Outcome<T> {
    /// What was done, and how long it took.
    pub report: T,
    /// Whether it is to be printed.
    pub print: bool,
    /// What went otherwise than asked, and did no harm.
    pub warnings: Vec<String>,
}

/// `checkpoint`: dumps a container into images, after up to so many rounds of pre-copy. It is gone afterwards, unless it
/// was to be left running.
pub fn checkpoint(store: &Store, id: &str, mut options: Options, rounds: u32) -> Result<Outcome<DumpReport>> {
    let (container, _lock) = Container::load_locked(store, id)?;
    container.can_be_dumped()?;
    let mut warnings = configured(&container.state.annotations(), &mut options)?;
    let source = container.source()?;
    let mut cgroup = container.cgroup();
    let room = Room::make();
    let report = match rounds {
        0 => dump::dump(&options, &source, &mut cgroup)?,
        rounds => precopy::dump(&options, &source, &mut cgroup, rounds)?,
    };
    // Before there are hooks to be run.
    drop(room);
    if !options.leave_running {
        // The checkpoint is good even so.
        warnings.extend(container.destroy().err().map(|e| e.to_string()));
    }
    let traced = options.trace.as_deref().map_or(Ok(()), |path| trace::dump(path, &report));
    warnings.extend(traced.err().map(|e| e.to_string()));
    Ok(Outcome { report, print: options.print_stats, warnings })
}

/// `checkpoint --pre-dump`: saves the memory of a container that goes on.
pub fn pre_dump(store: &Store, id: &str, mut options: Options) -> Result<Outcome<DumpReport>> {
    let (container, _lock) = Container::load_locked(store, id)?;
    container.can_be_dumped()?;
    let warnings = configured(&container.state.annotations(), &mut options)?;
    let source = container.source()?;
    let _room = Room::make();
    let (report, tracking) = predump::pre_dump(&options, &source, &mut container.cgroup())?;
    tracking.keep(container.dir.path(), source.init)?;
    Ok(Outcome { report, print: options.print_stats, warnings })
}

/// Takes in CRIU's configuration file for this container.
fn configured(annotations: &BTreeMap<String, String>, options: &mut Options) -> Result<Vec<String>> {
    let ignored = criu_config::apply(annotations, options)?;
    Ok(ignored
        .iter()
        .map(|name| format!("the option {name} of CRIU's configuration file is ignored"))
        .collect())
}

/// `check`: what a checkpoint would meet. Waits for nobody, and stops nothing.
pub fn look(store: &Store, id: &str, mut options: Options) -> Result<outlook::Outlook> {
    let container = Container::load(store, id)?;
    container.can_be_dumped()?;
    configured(&container.state.annotations(), &mut options)?;
    let _room = Room::make();
    Ok(outlook::look(&options, &container.source()?, &container.cgroup()))
}

impl Container {
    /// Undoes what a killed checkpoint has left. Every command begins with this.
    pub(super) fn heal(&self) -> Result<()> {
        if self.has_init() {
            recovery::heal(self.dir.path(), &mut self.cgroup())?;
        } else {
            recovery::forget(self.dir.path());
        }
        Ok(())
    }

    pub(crate) fn can_be_dumped(&self) -> Result<()> {
        lazy::wait(self.dir.path())?;
        match self.status()? {
            Status::Running | Status::Paused if self.cgroup().has_freezer() => Ok(()),
            Status::Running | Status::Paused => Err(Error::new(
                "a container without control groups can't be checkpointed, for nothing else freezes it: have root start it",
            )),
            status @ (Status::Created | Status::Stopped) => {
                Err(Error::new(format!("Container cannot be checkpointed in {} state", status.as_str())))
            }
        }
    }

    pub(crate) fn source(&self) -> Result<Source> {
        let spec = self.spec()?;
        let bundle = self.state.bundle().to_owned();
        Ok(Source {
            id: self.state.id.clone(),
            init: self.state.init_process_pid,
            rootfs: self.state.config.rootfs.clone(),
            external_mounts: binds(&spec, &bundle)?,
            spec,
            stdio: self.state.external_descriptors.clone(),
            cgroups: self.state.cgroup_paths.clone(),
            state_dir: Some(self.dir.path().to_owned()),
        })
    }
}

/// The bind mounts of config.json: destination and source.
fn binds(spec: &Spec, bundle: &Path) -> Result<BTreeMap<PathBuf, PathBuf>> {
    let mut found = BTreeMap::new();
    for mount in spec.mounts().iter().flatten() {
        if Mount::parse(mount, bundle)?.is_bind() {
            if let Some(source) = mount.source() {
                found.insert(mount.destination().clone(), bundle.join(source));
            }
        }
    }
    Ok(found)
}

/// `restore`: a new container of that bundle, with the processes of the images in it. On failure nothing is left.
pub fn restore(
    store: &Store,
    request: Request,
    options: Options,
    pid_file: Option<&Path>,
) -> Result<(Created, Outcome<RestoreReport>)> {
    restore_when(store, request, options, pid_file, &mut || Ok(()))
}

/// As [`restore`]; when all is in place, and before any restored instruction runs, `agreed` has the last word.
pub fn restore_when(
    store: &Store,
    mut request: Request,
    mut options: Options,
    pid_file: Option<&Path>,
    agreed: &mut dyn FnMut() -> Result<()>,
) -> Result<(Created, Outcome<RestoreReport>)> {
    let annotations = request.bundle.spec.annotations().clone().unwrap_or_default();
    let mut warnings = configured(&annotations.into_iter().collect(), &mut options)?;
    // The images are read before anything is made.
    let images = ImageDir::open(&options.image_path)?;
    let mut model = Model::read(&images)?;
    model.validate()?;
    files::accept(&model, &options)?;
    processor::admit(&mut model, &images, &options)?;
    time::go_on(&model, &mut request.bundle.spec)?;
    labels::name(&options, &mut request.bundle.spec)?;
    external::mounts(&options.external_mounts, &mut request.bundle.spec)?;
    let stdio = given(request.stdio.as_ref(), request.console.is_some())?;
    // Packets of connections that have no socket yet would be answered, as soon as a hook has attached the network.
    let locked = Cell::new(false);
    let early = |pid: i32| {
        locked.set(files::lock_restored(&model, &options, pid)?);
        Ok(())
    };
    if options.manage_cgroups.as_deref() == Some("strict") && has_control_group(&request)? {
        return Err(Error::new(
            "the container's control group is there already, which --manage-cgroups-mode strict forbids",
        ));
    }
    if !asks_for_parents_death(&model) {
        request.parent = Parent::Us;
    }
    let mut created = create_with(store, request, &early)?;
    let mut newcomers = Vec::new();
    let filled = enter(&created.container, &model, &mut newcomers).and_then(|entrants| {
        fill(&mut created, &options, &model, &images, (stdio, entrants), pid_file, agreed)
    });
    match filled {
        Ok(report) => {
            let traced = options.trace.as_deref().map_or(Ok(()), |path| trace::restore(path, &report));
            warnings.extend(report.warnings.iter().cloned());
            warnings.extend(traced.err().map(|e| e.to_string()));
            Ok((created, Outcome { report, print: options.print_stats, warnings }))
        }
        Err(e) => {
            // A lock that was there before stays: the images can be tried again.
            if locked.get() {
                let _ = files::unlock_restored(&model, created.init.pid);
            }
            // Init ends only after they have been waited for.
            newcomers.iter().for_each(Newborn::kill);
            created.init.kill();
            // The first failure is the one to tell.
            let _ = created.container.destroy();
            Err(e)
        }
    }
}

/// Makes what exec had started, to be filled.
fn enter(container: &Container, model: &Model, made: &mut Vec<Newborn>) -> Result<Vec<Entrant>> {
    for vpid in sessions::of(model)? {
        made.push(exec::shell(container, vpid.cast_signed())?);
    }
    let entrant = |process: &Newborn| {
        Ok(Entrant { pid: process.pid, pidfd: process.pidfd.try_clone().context(|| "dup")? })
    };
    made.iter().map(entrant).collect()
}

fn fill(
    created: &mut Created,
    options: &Options,
    model: &Model,
    images: &ImageDir,
    (stdio, entrants): ([Option<OwnedFd>; 3], Vec<Entrant>),
    pid_file: Option<&Path>,
    agreed: &mut dyn FnMut() -> Result<()>,
) -> Result<RestoreReport> {
    let root = format!("/proc/{}/root", created.init.pid);
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let container = &created.container;
    let target = Target {
        state_dir: Some(container.dir.path().to_owned()),
        id: container.state.id.clone(),
        init: created.init.pid,
        init_pidfd: created.init.pidfd.try_clone().context(|| "dup")?,
        root: open(root.as_str(), flags, Mode::empty()).context(|| format!("open {root}"))?,
        spec: created.spec.clone(),
        cgroups: container.state.cgroup_paths.clone(),
        stdio,
        console: created.console.take(),
        entrants,
    };
    let mut failed = None;
    let paused = !options.resume && model.extension::<bool>(dump::PAUSED)?;
    let mut ready = || {
        let done = publish(container, &created.spec, created.init.pid, pid_file).and_then(|()| agreed());
        // While it is still held: it runs no instruction before `resume`.
        let done = done.and_then(|()| if paused { Ok(container.cgroup().freeze()?) } else { Ok(()) });
        done.map_err(|e| {
            let words = crate::checkpoint::Error::new(e.to_string());
            failed = Some(e);
            words
        })
    };
    let report = engine::restore(options, &target, model, images, &mut ready);
    if let Some(e) = failed {
        return Err(e);
    }
    let report = report?;
    start::poststart(container, &created.spec)?;
    Ok(report)
}

/// The container exists for other commands, before its first instruction.
fn publish(container: &Container, spec: &Spec, pid: i32, pid_file: Option<&Path>) -> Result<()> {
    let text = serde_json::to_vec(spec).map_err(|e| Error::new(format!("encoding config.json: {e}")))?;
    container.dir.write("config.json", &text)?;
    container.dir.save(&container.state)?;
    match pid_file {
        Some(path) => write_pid_file(path, pid),
        None => Ok(()),
    }
}

/// The standard descriptors that the container gets: those made for it, or else the caller's own.
fn given(made: Option<&[OwnedFd; 3]>, terminal: bool) -> Result<[Option<OwnedFd>; 3]> {
    if terminal {
        return Ok([None, None, None]);
    }
    if let Some(made) = made {
        let dup = |i: usize| made[i].try_clone().context(|| "dup").map(Some);
        return Ok([dup(0)?, dup(1)?, dup(2)?]);
    }
    let dup = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().ok();
    Ok([dup(std::io::stdin().as_fd()), dup(std::io::stdout().as_fd()), dup(std::io::stderr().as_fd())])
}

/// The image directory as the user gave it, or runc's default; it must be there for a restore.
pub fn image_path(given: Option<&Path>) -> Result<PathBuf> {
    let path = given.unwrap_or(Path::new("checkpoint"));
    Ok(std::path::absolute(path).context(|| format!("{}", path.display()))?)
}

/// Makes the directories that a checkpoint writes to.
pub fn make_dirs(options: &Options) -> Result<()> {
    for dir in [Some(&options.image_path), options.work_path.as_ref()].into_iter().flatten() {
        fs::create_dir_all(dir).context(|| format!("mkdir {}", dir.display()))?;
    }
    Ok(())
}
