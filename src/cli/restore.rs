//! `restore`.

use std::path::PathBuf;

use super::{Context, one_id};
use crate::container::{Error, Result};

/// Restore a container from a checkpoint
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Path of a socket which will receive the master of the console's pseudoterminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Directory of the images [default: ./checkpoint]
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    /// Directory for the log and statistics
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Restore established TCP connections
    #[arg(long)]
    tcp_established: bool,
    /// Allow unix sockets with a peer outside
    #[arg(long)]
    ext_unix_sk: bool,
    /// Allow a terminal from outside
    #[arg(long)]
    shell_job: bool,
    /// Restore file locks
    #[arg(long)]
    file_locks: bool,
    /// What to do with control groups: soft, full, strict or ignore
    #[arg(long, value_name = "MODE")]
    manage_cgroups_mode: Option<String>,
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
    /// Leave out what is in a namespace: network
    #[arg(long, value_name = "NAMESPACE")]
    empty_ns: Vec<String>,
    /// Remove from the images what has been restored
    #[arg(long)]
    auto_dedup: bool,
    /// Fill the memory while the container already runs
    #[arg(long)]
    lazy_pages: bool,
    /// LSM profile for the processes, as TYPE:NAME
    #[arg(long, value_name = "TYPE:NAME")]
    lsm_profile: Option<String>,
    /// LSM context for the mounts
    #[arg(long, value_name = "CONTEXT")]
    lsm_mount_context: Option<String>,
    /// Print what the restore took
    #[arg(long)]
    print_stats: bool,
    /// The container's name, unique on this host
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(_context: &Context, args: Args) -> Result<u8> {
    let id = one_id("restore", &args.args)?;
    Err(Error::new(format!("container {id} cannot be restored yet")))
}
