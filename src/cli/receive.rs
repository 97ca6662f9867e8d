//! `receive`.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::checkpoint::any_processor;
use super::{Context, absolute, new, one_id};
use crate::checkpoint::context::Options;
use crate::checkpoint::external::External;
use crate::checkpoint::progress;
use crate::container::Result;
use crate::init::process::Purpose;
use crate::migrate::{self, Listener, Receive};
use crate::sys::Context as _;

/// Take in a container that `stasis migrate` sends
///
/// Without --listen it is sent over standard input and output. The container runs on, detached, when this command ends.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Wait for a connection there. Whoever connects is believed: only for a network of one's own
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// Have all memory in place before the container runs
    #[arg(long)]
    eager: bool,
    /// What the processor must have: ins, all instructions of that of the source, or none
    #[arg(long, value_name = "CAP", default_value = "ins")]
    cpu_cap: String,
    /// What a bind mount of config.json shows here: mnt[DST]=SRC; what a network device of the container is connected to:
    /// veth[IN]=OUT, veth[IN]=OUT@BRIDGE, or what it lies on: macvlan[IN]=OUT
    #[arg(long, value_name = "WHAT")]
    external: Vec<External>,
    /// How long the other side may say nothing
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u32,
    /// Directory for the images on their way, which must not exist [default: one in /var/tmp]
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    /// Directory for the log and statistics
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Path to the root of the bundle directory [default: the current directory]
    #[arg(long, short, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Path of a socket which will receive the master of the console's pseudoterminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File to write the process id to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Do not use pivot_root, for a root file system on a ramdisk
    #[arg(long)]
    no_pivot: bool,
    /// The container's name here
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: Args) -> Result<u8> {
    let id = one_id("receive", &args.args)?.to_owned();
    let default = || PathBuf::from(format!("/var/tmp/stasis-receive-{id}-{}", std::process::id()));
    let images = args.image_path.as_deref().map(absolute).transpose()?.unwrap_or_else(default);
    let mut options = Options {
        work_path: args.work_path.as_deref().map(absolute).transpose()?.or_else(|| Some(images.clone())),
        lazy: !args.eager,
        any_processor: any_processor(&args.cpu_cap)?,
        ..Options::default()
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
    progress::show();
    let prepared = new::prepare(context, &id, &flags, true, Purpose::Restore)?;
    let patience = Duration::from_secs(args.timeout.into());
    let from = match &args.listen {
        Some(address) => {
            let listener = Listener::new(address)?;
            println!("waiting at {}", listener.address());
            listener.accept(patience)?
        }
        None => over_stdio(patience)?,
    };
    let pid_file = prepared.pid_file.as_deref();
    migrate::receive(&context.store, prepared.request, &from, &images, options, pid_file)?;
    Ok(0)
}

/// Standard input and output become the connection; the container, which would hold them open, gets nothing.
fn over_stdio(patience: Duration) -> Result<Receive> {
    let input = std::io::stdin().as_fd().try_clone_to_owned().context(|| "dup")?;
    let output = std::io::stdout().as_fd().try_clone_to_owned().context(|| "dup")?;
    let null =
        open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).context(|| "open /dev/null")?;
    nix::unistd::dup2_stdin(&null).context(|| "dup2")?;
    nix::unistd::dup2_stdout(&null).context(|| "dup2")?;
    nix::unistd::dup2_stderr(&null).context(|| "dup2")?;
    Ok(Receive::new(input, output, patience))
}
