//! `pause` and `resume`.

use super::{Context, one_id};
use crate::container::{Result, pause as container};

/// Suspend all processes of a container
#[derive(Debug, clap::Args)]
pub struct PauseArgs {
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

/// Resume all processes of a paused container
#[derive(Debug, clap::Args)]
pub struct ResumeArgs {
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn pause(context: &Context, args: &PauseArgs) -> Result<u8> {
    container::pause(&context.store, one_id("pause", &args.args)?)?;
    Ok(0)
}

pub fn resume(context: &Context, args: &ResumeArgs) -> Result<u8> {
    container::resume(&context.store, one_id("resume", &args.args)?)?;
    Ok(0)
}
