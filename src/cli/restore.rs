//! `restore`.

use std::path::PathBuf;

use super::checkpoint::{What, any_processor, options, tell};
use super::{Context, absolute, new, one_id};
use crate::checkpoint::context::Options;
use crate::checkpoint::external::External;
use crate::checkpoint::progress;
use crate::container::foreground::Signals;
use crate::container::{Error, Result, checkpoint};
use crate::init::process::Purpose;

/// Restore a container from a checkpoint
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Path of a socket which will receive the master of the console's pseudoterminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Path of a socket which will receive the masters of the terminals that exec had made, one a connection, each with
    /// the path of its slave [default: they are hung up]
    #[arg(long, value_name = "SOCKET")]
    exec_console_socket: Option<PathBuf>,
    /// Directory of the images [default: ./checkpoint]
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    /// Directory for the log and statistics
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    #[command(flatten)]
    what: What,
    /// Path to the root of the bundle directory [default: the current directory]
    #[arg(long, short, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Leave the container running, and return
    #[arg(long, short)]
    detach: bool,
    /// File to write the process id to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Do not become the subreaper of the container's processes
    #[arg(long)]
    no_subreaper: bool,
    /// Do not use pivot_root, for a root file system on a ramdisk
    #[arg(long)]
    no_pivot: bool,
    /// Remove from the images what has been restored
    #[arg(long)]
    auto_dedup: bool,
    /// Let the container run even if it was paused at the checkpoint
    #[arg(long)]
    resume: bool,
    /// Fill the memory while the container already runs
    #[arg(long)]
    lazy: bool,
    /// The same, as runc calls it
    #[arg(long)]
    lazy_pages: bool,
    /// LSM profile for the processes where config.json has none: selinux:LABEL or apparmor:NAME
    #[arg(long, value_name = "TYPE:NAME")]
    lsm_profile: Option<String>,
    /// SELinux context for the mounts where config.json has no mountLabel
    #[arg(long, value_name = "CONTEXT")]
    lsm_mount_context: Option<String>,
    /// What a bind mount of config.json shows: mnt[DST]=SRC; what a network device of the checkpoint is connected to:
    /// veth[IN]=OUT, veth[IN]=OUT@BRIDGE, or what it lies on: macvlan[IN]=OUT
    #[arg(long, value_name = "WHAT")]
    external: Vec<External>,
    /// What becomes of processes that are wider than config.json allows: refuse or clamp
    #[arg(long, value_name = "POLICY", default_value = "refuse")]
    policy: String,
    /// What the processor must have: ins, all instructions of that of the checkpoint and all registers in use, or none,
    /// which leaves out the registers that it lacks
    #[arg(long, value_name = "CAP", default_value = "ins")]
    cpu_cap: String,
    /// What files that were open must have as they had it at the checkpoint: filesize, or none, for those that others
    /// have gone on writing
    #[arg(long, value_name = "WHAT", default_value = "filesize")]
    file_validation: String,
    /// Print what the restore took
    #[arg(long)]
    print_stats: bool,
    /// Write where the time went to FILE, for chrome://tracing or Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// The container's name, unique on this host
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

/// containerd and CRI-O pause every container around its checkpoint, and take it for running after a restore. The one's
/// shim says that it is the subreaper, the other's conmon has a pipe that tells of us.
fn for_a_client(args: &Args) -> bool {
    args.no_subreaper || std::env::var_os("_OCI_SYNCPIPE").is_some()
}

pub fn run(context: &Context, args: Args) -> Result<u8> {
    let id = one_id("restore", &args.args)?;
    if args.auto_dedup {
        return Err(Error::new("restore --auto-dedup is not supported yet; leave it out"));
    }
    progress::show();
    let mut options = Options {
        image_path: checkpoint::image_path(args.image_path.as_deref())?,
        work_path: args.work_path.as_deref().map(absolute).transpose()?,
        print_stats: args.print_stats,
        trace: args.trace.as_deref().map(absolute).transpose()?,
        clamp: match args.policy.as_str() {
            "refuse" => false,
            "clamp" => true,
            _ => return Err(Error::new("invalid policy: refuse or clamp")),
        },
        any_processor: any_processor(&args.cpu_cap)?,
        any_file_size: match args.file_validation.as_str() {
            "filesize" => false,
            "none" => true,
            _ => return Err(Error::new("invalid file-validation: filesize or none")),
        },
        lazy: args.lazy || args.lazy_pages,
        record_touched: true,
        resume: args.resume || for_a_client(&args),
        exec_console: args.exec_console_socket.as_deref().map(absolute).transpose()?,
        lsm_profile: args.lsm_profile,
        lsm_mount_context: args.lsm_mount_context,
        ..options(&args.what)?
    };
    args.external.into_iter().for_each(|external| external.add_to(&mut options));
    let flags = new::Flags {
        bundle: args.bundle,
        console_socket: args.console_socket,
        pidfd_socket: None,
        pid_file: args.pid_file,
        no_pivot: args.no_pivot,
        no_new_keyring: false,
        preserve_fds: 0,
    };
    let prepared = new::prepare(context, id, &flags, args.detach, Purpose::Restore)?;
    let signals = if args.detach { None } else { Some(Signals::take()?) };
    // What we leave behind is for whoever is there then.
    if !args.no_subreaper && !args.detach {
        new::become_subreaper();
    }
    let pid_file = prepared.pid_file.as_deref();
    let (mut created, done) = checkpoint::restore(&context.store, prepared.request, options, pid_file)?;
    tell(&done);
    // It had said that it is ready before the checkpoint, and will not say so again.
    created.notify = None;
    let Some(signals) = signals else { return Ok(0) };
    new::stay_and_delete(created, prepared.ours, &signals, false)
}
