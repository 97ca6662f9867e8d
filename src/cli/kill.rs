//! `kill`.

use nix::sys::signal::Signal;

use super::{Context, Count, check_args, log};
use crate::container::{Container, Error, Result, Store, signal};
use crate::sys::Context as _;

/// Send a signal (default: SIGTERM) to the container's init process
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Obsolete: a stopped container is no error
    #[arg(long, short, hide = true)]
    all: bool,
    /// The name is a regular expression: send it to every container whose name it matches
    #[arg(long, short)]
    regex: bool,
    /// Name of the container, and the signal's name or number
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    check_args("kill", &args.args, Count::AtLeast(1))?;
    check_args("kill", &args.args, Count::AtMost(2))?;
    let text = args.args.get(1).map_or("", String::as_str);
    if args.regex {
        let number = parse(text)?;
        for id in matching(&context.store, &args.args[0])? {
            match signal::kill(&context.store, &id, number) {
                // It may have ended, or gone, since it was found.
                Err(Error::NotRunning | Error::NotExist) | Ok(()) => {}
                Err(e) => log::warn(&format!("{id}: {e}")),
            }
        }
        return Ok(0);
    }
    // A container that does not exist is told of before a signal that does not.
    let container = Container::load(&context.store, &args.args[0])?;
    match container.signal(parse(text)?) {
        Err(Error::NotRunning) if args.all => Ok(0),
        done => done.map(|()| 0),
    }
}

/// The containers whose names a regular expression matches, somewhere or, with `^` and `$`, as a whole.
pub fn matching(store: &Store, pattern: &str) -> Result<Vec<String>> {
    let pattern = regex_lite::Regex::new(pattern)
        .map_err(|e| Error::new(format!("invalid regular expression: {e}")))?;
    let ids = match store.ids() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => vec![],
        ids => ids.context(|| format!("open {}", store.root().display()))?,
    };
    Ok(ids.into_iter().filter(|id| pattern.is_match(id)).collect())
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
    fn a_regular_expression_finds_names() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path().join("containers"));
        assert!(matching(&store, ".").unwrap().is_empty(), "a root that is not there has no containers");
        for id in ["web-1", "web-2", "db"] {
            std::fs::create_dir_all(store.root().join(id)).unwrap();
        }
        assert_eq!(matching(&store, "^web-[0-9]+$").unwrap(), ["web-1", "web-2"]);
        assert_eq!(matching(&store, "b").unwrap(), ["db", "web-1", "web-2"]);
        assert!(matching(&store, "(").unwrap_err().to_string().starts_with("invalid regular expression"));
    }

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
