//! What the rooms share while a dump or a restore is under way.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::RegFileEntry;
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::{Injection, Thread};
use crate::checkpoint::task::status::Status;

/// What the caller asked of `checkpoint` and `restore`. Flags that mean nothing to one of the two are ignored by it.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Directory that holds the images.
    pub image_path: PathBuf,
    /// Directory for the log and statistics.
    pub work_path: Option<PathBuf>,
    /// The container goes on after the dump.
    pub leave_running: bool,
    /// Established TCP connections are kept.
    pub tcp_established: bool,
    /// TCP connections come back closed.
    pub tcp_close: bool,
    /// TCP connections that were not accepted are left out.
    pub tcp_skip_in_flight: bool,
    /// How the packets of kept connections are held up meanwhile.
    pub network_lock: NetworkLock,
    /// Unix sockets connected to a peer outside the container are allowed.
    pub ext_unix_sk: bool,
    /// A terminal that belongs to a session outside the container is allowed.
    pub shell_job: bool,
    /// File locks are kept.
    pub file_locks: bool,
    /// Processes that were started by exec are left out.
    pub drop_exec: bool,
    /// Processes that were started by exec are kept.
    pub keep_exec: bool,
    /// Socket that gets the terminals of processes of exec.
    pub exec_console: Option<PathBuf>,
    /// The network namespace is restored empty.
    pub empty_network: bool,
    /// What is in the network namespace is kept.
    pub keep_network: bool,
    /// Devices outside that those of the container are connected to.
    pub external: Vec<crate::checkpoint::namespaces::net::External>,
    /// Bind mounts of config.json that are to show something else, with their sources.
    pub external_mounts: BTreeMap<PathBuf, PathBuf>,
    /// Print the statistics of the operation.
    pub print_stats: bool,
    /// Where a trace of the operation is written.
    pub trace: Option<PathBuf>,
    /// What to do with control groups: `soft`, `full`, `strict`, `ignore`.
    pub manage_cgroups: Option<String>,
    /// Images, directory and parents are not flushed to the disk before the dump is reported.
    pub no_sync: bool,
    /// An earlier set of images, relative to the image directory, whose pages need not be saved again.
    pub parent_path: Option<PathBuf>,
    /// What this set has anew is taken out of the earlier ones.
    pub auto_dedup: bool,
    /// Compress the pages.
    pub compress: bool,
    /// What config.json of the destination does not allow is left out of the images, instead of refusing them.
    pub clamp: bool,
    /// A processor with fewer instructions than that of the checkpoint is taken.
    pub any_processor: bool,
    /// Files may have another size than at the checkpoint.
    pub any_file_size: bool,
    /// A container that was paused at the checkpoint runs after the restore.
    pub resume: bool,
    /// The memory of a restored container is filled while it already runs.
    pub lazy: bool,
    /// What is touched first then is recorded beside the images, and comes first the next time.
    pub record_touched: bool,
    /// The processes' label of a Linux security module, TYPE:NAME, where config.json has none.
    pub lsm_profile: Option<String>,
    /// The SELinux label of the mounts, where config.json has none.
    pub lsm_mount_context: Option<String>,
}

/// How the network is kept from answering for a connection that nobody has at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NetworkLock {
    /// By rules of nftables on exactly these connections.
    #[default]
    Nftables,
    /// Not at all: the caller has done it.
    Skip,
}

/// The container a dump reads: facts that the caller takes from its state and config.json.
#[derive(Debug, Clone)]
pub struct Source {
    /// Container id.
    pub id: String,
    /// Init of the container, as a pid of this host.
    pub init: i32,
    /// Root file system on the host.
    pub rootfs: PathBuf,
    /// config.json.
    pub spec: oci_spec::runtime::Spec,
    /// Mount destinations that come from outside (bind mounts of config.json), with their sources on the host.
    pub external_mounts: BTreeMap<PathBuf, PathBuf>,
    /// What descriptors 0, 1 and 2 of init were at its start, as readlink(2) of /proc/PID/fd/N prints them.
    pub stdio: Vec<String>,
    /// Control groups of the container by controller name ("" for v2), absolute directories.
    pub cgroups: BTreeMap<String, PathBuf>,
    /// The container's state directory, where the recovery record stands while a dump is under way.
    /// None where nobody would read one, as in tests.
    pub state_dir: Option<PathBuf>,
}

/// One process of the container, stopped.
#[derive(Debug)]
pub struct LiveTask {
    /// Pid on this host.
    pub pid: i32,
    /// Pid inside the container's pid namespace; the images know only this one.
    pub vpid: i32,
    /// Handle for `pidfd_getfd(2)`.
    pub pidfd: OwnedFd,
    /// `/proc/PID/status` of when it stood still. Signals may have come since.
    pub status: Status,
    /// True for a process that has exited and was not waited for: it has no threads, memory or descriptors.
    pub zombie: bool,
    /// Its threads, the leader first, each seized and stopped. Empty for a zombie.
    pub threads: Vec<Thread>,
    /// Ready to run batches in the leader, from freeze to thaw.
    pub injection: Option<Injection>,
    /// What it has told of its address space.
    pub space: crate::checkpoint::memory::mm::Answers,
}

/// A dump under way.
pub struct Dump<'a> {
    /// What was asked.
    pub options: &'a Options,
    /// What is dumped.
    pub source: &'a Source,
    /// Its processes, parents before children; the first is init.
    pub tasks: Vec<LiveTask>,
    /// What has been captured so far.
    pub model: Model,
    /// Where the images are being written: a temporary directory, published at the end.
    pub images: &'a crate::checkpoint::image::ImageDir,
    /// The set that this one builds on.
    pub parent: Option<crate::checkpoint::memory::parent::Parent>,
    /// Descriptors that take their time to close: not while it stands still.
    pub to_close: Vec<OwnedFd>,
    /// What is known of its mappings from before it stood still.
    pub looks: crate::checkpoint::memory::look::Looks,
    /// What the room of descriptors remembers between files.
    pub files: crate::checkpoint::files::Registry,
    /// Groups inside that the container had frozen; they are thawed meanwhile.
    pub frozen_groups: Vec<PathBuf>,
    /// What the container's own control groups are limited to, as far as it was read before the container stood still.
    pub limits: crate::checkpoint::namespaces::cgroup::Limits,
    /// Its control groups, if somebody has looked at them.
    pub groups: Option<Result<Option<crate::checkpoint::namespaces::cgroup::Groups>>>,
    /// The sysctls of its network, opened, where they are kept.
    pub sysctls: Option<crate::checkpoint::namespaces::net::Sysctls>,
    /// Its own pid namespace.
    pub pids: Option<OwnedFd>,
    /// Network devices that go with the container.
    pub network: crate::checkpoint::namespaces::net::Hold,
    /// The namespaces that the container has made.
    pub spaces: crate::checkpoint::namespaces::nested::Spaces,
    /// The next free id for files, pipes, sockets, inodes and shared memory. Starts at 1.
    next_id: u32,
}

impl<'a> Dump<'a> {
    /// A dump of `tasks` that has captured nothing yet.
    pub fn new(
        options: &'a Options,
        source: &'a Source,
        images: &'a crate::checkpoint::image::ImageDir,
        tasks: Vec<LiveTask>,
    ) -> Self {
        Self {
            options,
            source,
            tasks,
            model: Model::default(),
            images,
            parent: None,
            to_close: Vec::new(),
            looks: crate::checkpoint::memory::look::Looks::default(),
            files: crate::checkpoint::files::Registry::default(),
            frozen_groups: Vec::new(),
            limits: BTreeMap::new(),
            groups: None,
            sysctls: None,
            pids: None,
            network: crate::checkpoint::namespaces::net::Hold::default(),
            spaces: crate::checkpoint::namespaces::nested::Spaces::default(),
            next_id: 1,
        }
    }

    /// An object id that no other object of this dump has.
    pub fn new_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }
}

/// The container a restore fills: built from *this* bundle's config.json, its init stub seized and stopped
/// inside the new namespaces, root file system in place, no program started.
pub struct Target {
    /// Container id.
    pub id: String,
    /// The init stub, as a pid of this host.
    pub init: i32,
    /// Its pidfd.
    pub init_pidfd: OwnedFd,
    /// O_PATH descriptor of the container's root directory, in the container's mount namespace.
    pub root: OwnedFd,
    /// config.json of the destination.
    pub spec: oci_spec::runtime::Spec,
    /// Control groups of the new container by controller name ("" for v2), absolute directories.
    pub cgroups: BTreeMap<String, PathBuf>,
    /// The container's state directory, where `fill.json` stands while memory is being filled.
    pub state_dir: Option<PathBuf>,
    /// Descriptors 0, 1 and 2 that the caller gives the container, where it has no terminal.
    pub stdio: [Option<OwnedFd>; 3],
    /// The slave of the new terminal, where config.json asks for one.
    pub console: Option<OwnedFd>,
    /// A stub for each process that exec had started, born under its old number inside.
    pub entrants: Vec<Entrant>,
}

/// A stub that was put into the container from outside.
pub struct Entrant {
    /// Its pid on this host.
    pub pid: i32,
    /// Its pidfd.
    pub pidfd: OwnedFd,
}

/// A restore under way.
pub struct Restore<'a> {
    /// What was asked.
    pub options: &'a Options,
    /// What is filled.
    pub target: &'a Target,
    /// The images, read and validated.
    pub model: &'a Model,
    /// Where the images are, for pages and other bulk data.
    pub images: &'a crate::checkpoint::image::ImageDir,
    /// Whose things are on this host.
    pub owners: crate::checkpoint::namespaces::user::Owners,
    /// The namespaces that the container had made, as far as they have been made again.
    pub made: crate::checkpoint::namespaces::nested::Made,
}

impl Restore<'_> {
    /// The root directory from which a file is looked up: that of the mount namespace it was opened in.
    pub fn root_of(&self, file: &RegFileEntry) -> Result<OwnedFd> {
        self.root_at(file.mnt_id)
    }

    /// The root directory of the mount namespace that a mount of the images is in.
    pub fn root_at(&self, mount: Option<i32>) -> Result<OwnedFd> {
        let mount = mount.and_then(|id| u32::try_from(id).ok());
        let nested = self.made.roots()?.into_iter().find(|(id, _)| {
            let table = self.model.mountpoints.get(id);
            table.is_some_and(|table| table.iter().any(|entry| Some(entry.mnt_id) == mount))
        });
        match nested {
            Some((_, root)) => Ok(root),
            None => {
                let root = self.target.root.try_clone();
                root.during("cannot hold a directory", || "fcntl(_, F_DUPFD_CLOEXEC)".into())
            }
        }
    }
}

/// A process being restored: it exists under its old pid, runs batches, and has no memory or descriptors of its own yet.
pub struct NewTask {
    /// Pid on this host.
    pub pid: i32,
    /// Pid inside the container, the one the images know it by.
    pub vpid: i32,
    /// Handle for `pidfd_getfd(2)`.
    pub pidfd: OwnedFd,
    /// Runs batches in its only thread, from code and scratch memory that lie outside every mapping of the images.
    pub injection: Injection,
}
