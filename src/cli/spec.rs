//! `spec`.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use nix::unistd::{getegid, geteuid};

use super::{Count, check_args};
use crate::bundle::{CONFIG, template};
use crate::container::{Error, Result};
use crate::sys::Context;

/// Create a new specification file, config.json
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Path to the root of the bundle directory [default: the current directory]
    #[arg(long, short, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Write a configuration that works without root
    #[arg(long)]
    rootless: bool,
    #[arg(hide = true)]
    args: Vec<String>,
}

pub fn run(args: &Args) -> Result<u8> {
    check_args("spec", &args.args, Count::Exactly(0))?;
    let unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let user = args.rootless.then(|| (geteuid().as_raw(), getegid().as_raw()));
    let config = template::config(unified, user);
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::new(e.to_string()))?;
    let path = args.bundle.clone().unwrap_or_default().join(CONFIG);
    let mut file = match File::options().write(true).create_new(true).open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(Error::new(format!("File {CONFIG} exists. Remove it first")));
        }
        file => file.context(|| format!("open {}", path.display()))?,
    };
    file.write_all(text.as_bytes()).context(|| format!("write {}", path.display()))?;
    Ok(0)
}
