//! `check`.

use std::io::Write;

use super::checkpoint::{What, options};
use super::{Context, Count, check_args};
use crate::checkpoint::context::Options;
use crate::checkpoint::features::{self, Feature};
use crate::checkpoint::outlook::{Fate, Outlook};
use crate::container::{Error, Result, checkpoint};

/// Tell what can be checkpointed here
///
/// Without an id: what this kernel offers, what for, and what is done without it. With one: what a checkpoint of that
/// container would refuse, lose or take long over; the container is not stopped. Ends with 1 where something that is
/// required is missing or would be refused.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    what: What,
    /// Leave out processes that were started by exec
    #[arg(long)]
    drop_exec: bool,
    /// Keep processes that were started by exec, without their clients
    #[arg(long, conflicts_with = "drop_exec")]
    keep_exec: bool,
    /// Keep what is in the network namespace
    #[arg(long)]
    keep_network: bool,
    /// Output format: text or json
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    format: String,
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    check_args("check", &args.args, Count::AtMost(1))?;
    let json = match args.format.as_str() {
        "text" => false,
        "json" => true,
        _ => return Err(Error::new("invalid format option")),
    };
    let (text, good) = match args.args.first() {
        None => {
            let all = features::all();
            let good = all.iter().all(|f| f.present || !f.required);
            (if json { encode(&all)? } else { table(&all) }, good)
        }
        Some(id) => {
            let outlook = checkpoint::look(
                &context.store,
                id,
                Options {
                    keep_network: args.keep_network,
                    drop_exec: args.drop_exec,
                    keep_exec: args.keep_exec,
                    ..options(&args.what)?
                },
            )?;
            (if json { encode(&outlook)? } else { tell(&outlook) }, outlook.possible)
        }
    };
    // A closed pipe is no reason to say more.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(u8::from(!good))
}

fn encode(value: &impl serde::Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::new(format!("encoding: {e}")))?;
    Ok(text + "\n")
}

fn table(features: &[Feature]) -> String {
    let mut text = format!("{:<30} {:<8} {:<52} WITHOUT IT\n", "FEATURE", "HERE", "NEEDED FOR");
    for f in features {
        let here = if f.present { "yes" } else { "no" };
        let without = f.fallback.unwrap_or("required");
        let (name, purpose) = (f.name, f.purpose);
        text += &format!("{name:<30} {here:<8} {purpose:<52} {without}\n");
    }
    let missing = |f: &&Feature| !f.present && f.required;
    let names: Vec<&str> = features.iter().filter(missing).map(|f| f.name).collect();
    text += &match names.is_empty() {
        true => "containers can be checkpointed and restored here\n".to_owned(),
        false => format!("containers cannot be checkpointed here; missing: {}\n", names.join(", ")),
    };
    text
}

fn tell(outlook: &Outlook) -> String {
    let (plural, mib) =
        (|n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "es" }), 1 << 20);
    let mut text = format!(
        "{}: {}, {} thread{}, {} MiB of memory\n",
        outlook.id,
        plural(outlook.processes, "process"),
        outlook.threads,
        if outlook.threads == 1 { "" } else { "s" },
        (outlook.private_bytes + outlook.shared_bytes) / mib
    );
    for finding in &outlook.findings {
        let fate = match finding.fate {
            Fate::Refused => "refused",
            Fate::Lost => "lost",
            Fate::Slow => "slow",
        };
        text += &format!("{fate}: {}\n", finding.message);
    }
    text += match outlook.possible {
        true => "it can be checkpointed\n",
        false => "it cannot be checkpointed as it is\n",
    };
    text
}
