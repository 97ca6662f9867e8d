//! `kill`.

use nix::sys::signal::Signal;

use super::{Context, Count, check_args};
use crate::container::{Error, Result, signal};

/// Send a signal (default: SIGTERM) to the container's init process
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Obsolete: a stopped container is no error
    #[arg(long, short, hide = true)]
    all: bool,
    /// Name of the container, and the signal's name or number
    #[arg(value_name = "container-id> [signal")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    check_args("kill", &args.args, Count::AtLeast(1))?;
    check_args("kill", &args.args, Count::AtMost(2))?;
    let number = parse(args.args.get(1).map_or("", String::as_str))?;
    match signal::kill(&context.store, &args.args[0], number) {
        Err(Error::NotRunning) if args.all => Ok(0),
        done => done.map(|()| 0),
    }
}

/// A signal by number or name, with or without SIG, in any case; SIGTERM if none is given.
fn parse(text: &str) -> Result<i32> {
    if text.is_empty() {
        return Ok(libc::SIGTERM);
    }
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    if let Some(number) = real_time(&name) {
        return Ok(number);
    }
    let name = match name.as_str() {
        "SIGIOT" => "SIGABRT",
        "SIGCLD" => "SIGCHLD",
        "SIGPOLL" => "SIGIO",
        name => name,
    };
    name.parse().map(|s: Signal| s as i32).map_err(|_| Error::new(format!("unknown signal {text:?}")))
}

/// SIGRTMIN, SIGRTMIN+2, SIGRTMAX-1, ...
fn real_time(name: &str) -> Option<i32> {
    let (base, rest) = match name.strip_prefix("SIGRTMIN") {
        Some(rest) => (libc::SIGRTMIN(), rest),
        None => (libc::SIGRTMAX(), name.strip_prefix("SIGRTMAX")?),
    };
    let offset: i32 = if rest.is_empty() { 0 } else { rest.parse().ok()? };
    Some(base + offset).filter(|n| (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_many_names() {
        for (text, number) in
            [("", 15), ("9", 9), ("KILL", 9), ("sigkill", 9), ("0", 0), ("SIGRTMIN+1", 35), ("RTMAX", 64)]
        {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        assert_eq!(parse("nope").unwrap_err().to_string(), r#"unknown signal "nope""#);
    }
}
