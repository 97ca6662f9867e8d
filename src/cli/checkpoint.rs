//! `checkpoint`.

use std::path::PathBuf;

use super::{Context, one_id};
use crate::container::{Error, Result};

/// Checkpoint a running container
///
/// Its whole state goes into a directory of images, from which `restore` brings it back.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory for the images [default: ./checkpoint]
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    /// Directory for the log and statistics
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Images of an earlier --pre-dump, relative to the image path
    #[arg(long, value_name = "DIR")]
    parent_path: Option<PathBuf>,
    /// Leave the container running
    #[arg(long)]
    leave_running: bool,
    /// Keep established TCP connections
    #[arg(long)]
    tcp_established: bool,
    /// Leave out TCP connections that are being established
    #[arg(long)]
    tcp_skip_in_flight: bool,
    /// Link unlinked files back where possible
    #[arg(long)]
    link_remap: bool,
    /// Allow unix sockets with a peer outside
    #[arg(long)]
    ext_unix_sk: bool,
    /// Allow a terminal from outside
    #[arg(long)]
    shell_job: bool,
    /// Leave the memory here, to be fetched by a lazy restore
    #[arg(long)]
    lazy_pages: bool,
    /// Descriptor to write a zero byte to once lazy pages can be fetched
    #[arg(long, value_name = "FD", allow_hyphen_values = true)]
    status_fd: Option<i32>,
    /// Send the memory to a page server
    #[arg(long, value_name = "ADDRESS:PORT")]
    page_server: Option<String>,
    /// Keep file locks
    #[arg(long)]
    file_locks: bool,
    /// Only save the memory, and leave the container running
    #[arg(long)]
    pre_dump: bool,
    /// What to do with control groups: soft, full, strict or ignore
    #[arg(long, value_name = "MODE")]
    manage_cgroups_mode: Option<String>,
    /// Leave out what is in a namespace: network
    #[arg(long, value_name = "NAMESPACE")]
    empty_ns: Vec<String>,
    /// Remove from earlier images what a later one replaces
    #[arg(long)]
    auto_dedup: bool,
    /// Print what the checkpoint took
    #[arg(long)]
    print_stats: bool,
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(_context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("checkpoint", &args.args)?;
    Err(Error::new(format!("container {id} cannot be checkpointed yet")))
}
