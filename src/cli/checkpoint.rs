//! `checkpoint`.

use std::path::PathBuf;

use super::{Context, absolute, log, one_id, say};
use crate::checkpoint::context::{NetworkLock, Options};
use crate::checkpoint::progress;
use crate::container::{Error, Result, checkpoint};

/// What of a container is to be saved, and how much of it may be lost.
#[derive(Debug, clap::Args)]
pub struct What {
    /// Keep established TCP connections
    #[arg(long)]
    tcp_established: bool,
    /// Have TCP connections come back closed
    #[arg(long)]
    tcp_close: bool,
    /// Leave out TCP connections that were not accepted
    #[arg(long)]
    tcp_skip_in_flight: bool,
    /// How packets of kept TCP connections are held up: nftables or skip
    #[arg(long, value_name = "METHOD")]
    network_lock: Option<String>,
    /// Allow unix sockets with a peer outside
    #[arg(long)]
    ext_unix_sk: bool,
    /// Allow a terminal from outside
    #[arg(long)]
    shell_job: bool,
    /// Keep file locks
    #[arg(long)]
    file_locks: bool,
    /// What to do with control groups: soft, full, strict or ignore
    #[arg(long, value_name = "MODE")]
    manage_cgroups_mode: Option<String>,
    /// Leave out what is in a namespace: network
    #[arg(long, value_name = "NAMESPACE")]
    empty_ns: Vec<String>,
}

/// Checkpoint a running container
///
/// Its whole state goes into a directory of images, from which `restore` brings it back.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory for the images [default: ./checkpoint]
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    #[command(flatten)]
    what: What,
    /// Directory for the log and statistics
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Images of an earlier --pre-dump, relative to the image path
    #[arg(long, value_name = "DIR")]
    parent_path: Option<PathBuf>,
    /// Leave the container running
    #[arg(long)]
    leave_running: bool,
    /// Leave out processes that were started by exec
    #[arg(long)]
    drop_exec: bool,
    /// Keep processes that were started by exec, without their clients
    #[arg(long, conflicts_with = "drop_exec")]
    keep_exec: bool,
    /// Keep what is in the network namespace: devices, addresses, routes, packet filters, sysctls
    #[arg(long)]
    keep_network: bool,
    /// Link unlinked files back where possible
    #[arg(long)]
    link_remap: bool,
    /// Leave the memory here, to be fetched by a lazy restore
    #[arg(long)]
    lazy_pages: bool,
    /// Descriptor to write a zero byte to once lazy pages can be fetched
    #[arg(long, value_name = "FD", allow_hyphen_values = true)]
    status_fd: Option<i32>,
    /// Send the memory to a page server
    #[arg(long, value_name = "ADDRESS:PORT")]
    page_server: Option<String>,
    /// Only save the memory, and leave the container running
    #[arg(long)]
    pre_dump: bool,
    /// Save the memory in up to so many rounds while the container runs, and only what changed since while it stands still
    #[arg(long, value_name = "ROUNDS", num_args = 0..=1, require_equals = true, default_missing_value = "8")]
    precopy: Option<u32>,
    /// Do not wait until the images are on the disk
    #[arg(long)]
    no_sync: bool,
    /// Remove from earlier images what a later one replaces
    #[arg(long)]
    auto_dedup: bool,
    /// Compress the memory, on all processors
    #[arg(long, conflicts_with_all = ["pre_dump", "precopy", "auto_dedup"])]
    compress: bool,
    /// Print what the checkpoint took
    #[arg(long)]
    print_stats: bool,
    /// Write where the time went to FILE, for chrome://tracing or Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

impl Args {
    /// Refuses by name what cannot be done yet.
    fn refuse(&self) -> Result<()> {
        let missing = [
            (self.lazy_pages, "--lazy-pages"),
            (self.page_server.is_some(), "--page-server"),
            (self.status_fd.is_some_and(|fd| fd >= 0), "--status-fd"),
        ];
        match missing.iter().find(|(given, _)| *given) {
            Some((_, flag)) => {
                Err(Error::new(format!("checkpoint {flag} is not supported yet; leave it out")))
            }
            None if self.keep_network && !self.what.empty_ns.is_empty() => {
                Err(Error::new("checkpoint --keep-network and --empty-ns network exclude each other"))
            }
            None if self.precopy.is_some() && (self.pre_dump || self.parent_path.is_some()) => {
                Err(Error::new("checkpoint --precopy makes its own pre-dumps; give one or the other"))
            }
            None => Ok(()),
        }
    }
}

/// `--empty-ns`, of which runc knows one.
fn empty_network(namespaces: &[String]) -> Result<bool> {
    match namespaces.iter().find(|n| *n != "network") {
        Some(other) => Err(Error::new(format!("namespace {other} is not supported"))),
        None => Ok(!namespaces.is_empty()),
    }
}

/// `--manage-cgroups-mode`.
fn cgroups_mode(mode: Option<&String>) -> Result<Option<String>> {
    match mode.map(String::as_str) {
        None | Some("" | "soft" | "full" | "strict" | "ignore") => {
            Ok(mode.filter(|m| !m.is_empty()).cloned())
        }
        Some(_) => Err(Error::new("Invalid manage-cgroups-mode value")),
    }
}

/// `--network-lock`.
fn network_lock(method: Option<&String>) -> Result<NetworkLock> {
    match method.map(String::as_str) {
        None | Some("" | "nftables") => Ok(NetworkLock::Nftables),
        Some("skip") => Ok(NetworkLock::Skip),
        Some(other) => Err(Error::new(format!("--network-lock {other}: must be nftables or skip"))),
    }
}

/// Prints what a checkpoint or restore has to say.
pub fn tell<T: std::fmt::Display>(done: &checkpoint::Outcome<T>) {
    done.warnings.iter().for_each(|text| log::warn(text));
    if done.print {
        say(&done.report);
    }
}

/// Whether a processor with fewer instructions is taken: `--cpu-cap`, in CRIU's words.
pub fn any_processor(cap: &str) -> Result<bool> {
    match cap {
        "ins" => Ok(false),
        "none" => Ok(true),
        _ => Err(Error::new("invalid cpu-cap: ins or none")),
    }
}

/// What of a container is to be saved.
pub fn options(what: &What) -> Result<Options> {
    Ok(Options {
        tcp_established: what.tcp_established,
        tcp_close: what.tcp_close,
        tcp_skip_in_flight: what.tcp_skip_in_flight,
        network_lock: network_lock(what.network_lock.as_ref())?,
        ext_unix_sk: what.ext_unix_sk,
        shell_job: what.shell_job,
        file_locks: what.file_locks,
        empty_network: empty_network(&what.empty_ns)?,
        manage_cgroups: cgroups_mode(what.manage_cgroups_mode.as_ref())?,
        ..Options::default()
    })
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("checkpoint", &args.args)?;
    args.refuse()?;
    progress::show();
    let options = Options {
        image_path: checkpoint::image_path(args.image_path.as_deref())?,
        work_path: args.work_path.as_deref().map(absolute).transpose()?,
        leave_running: args.leave_running,
        drop_exec: args.drop_exec,
        keep_exec: args.keep_exec,
        keep_network: args.keep_network,
        print_stats: args.print_stats,
        trace: args.trace.as_deref().map(absolute).transpose()?,
        no_sync: args.no_sync,
        auto_dedup: args.auto_dedup,
        compress: args.compress,
        parent_path: args.parent_path.clone(),
        ..options(&args.what)?
    };
    checkpoint::make_dirs(&options)?;
    let done = match args.pre_dump {
        true => checkpoint::pre_dump(&context.store, id, options)?,
        false => checkpoint::checkpoint(&context.store, id, options, args.precopy.unwrap_or(0))?,
    };
    tell(&done);
    Ok(0)
}
