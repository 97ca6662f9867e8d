//! `ps`.

use std::process::Command;

use super::{Context, Count, check_args, say};
use crate::container::{Container, Error, Result};
use crate::sys::Context as _;

/// Display the processes of a container
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Select one of: table or json
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    format: String,
    /// Name of the container, and options for ps(1)
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    check_args("ps", &args.args, Count::AtLeast(1))?;
    let container = Container::load(&context.store, &args.args[0])?;
    let pids = container.processes()?;
    match args.format.as_str() {
        "table" => {}
        "json" => {
            let text = serde_json::to_string(&pids).map_err(|e| Error::new(e.to_string()))?;
            say(format_args!("{text}\n"));
            return Ok(0);
        }
        _ => return Err(Error::new("invalid format option")),
    }
    let mut options = &args.args[1..];
    let default = ["-ef".to_owned()];
    if options.is_empty() {
        options = &default;
    }
    let output = Command::new("ps").args(options).output().context(|| "exec: \"ps\"")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let status = output.status.to_string().replace("exit status: ", "exit status ");
        return Err(Error::new(format!("{status}: {text}{complaint}")));
    }
    say(filter(&text, &pids)?);
    Ok(0)
}

/// The title, and the lines of these processes.
fn filter(text: &str, pids: &[i32]) -> Result<String> {
    let mut lines = text.lines();
    let title = lines.next().unwrap_or_default();
    let column = title
        .split_whitespace()
        .position(|word| word == "PID")
        .ok_or_else(|| Error::new("couldn't find PID field in ps output"))?;
    let mut out = format!("{title}\n");
    for line in lines.filter(|l| !l.trim().is_empty()) {
        let pid = line.split_whitespace().nth(column).and_then(|word| word.parse().ok());
        let pid: i32 = pid.ok_or_else(|| Error::new(format!("unable to parse pid in {line:?}")))?;
        if pids.contains(&pid) {
            out += line;
            out.push('\n');
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_containers_lines_stay() {
        let text = "UID PID CMD\nroot 1 init\nroot 77 redis\n";
        assert_eq!(filter(text, &[77]).unwrap(), "UID PID CMD\nroot 77 redis\n");
        assert!(filter("UID CMD\n", &[1]).is_err());
    }
}
