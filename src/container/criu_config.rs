//! CRIU's configuration files: what an administrator has set for checkpoints of every container, or of one.
//!
//! ```text
//!   annotation org.criu.config   absent: /etc/criu/runc.conf     a path: that file     empty: none
//!   # comment
//!   tcp-established              a flag
//!   manage-cgroups "soft"        a flag with a value, in quotes or not
//! ```
//!
//! Clients without flags of their own for some option (Docker for TCP) are served this way. As with runc and CRIU, the
//! file is stronger than the command line, and one that is absent is no error.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{Error, Result};
use crate::checkpoint::context::{NetworkLock, Options};
use crate::checkpoint::external::External;
use crate::sys::Context;

/// Where it is looked for without an annotation.
const DEFAULT: &str = "/etc/criu/runc.conf";
/// The annotation that names another file.
const ANNOTATION: &str = "org.criu.config";

/// Takes over what the container's configuration file says, and returns the names that mean nothing to us.
pub fn apply(annotations: &BTreeMap<String, String>, options: &mut Options) -> Result<Vec<String>> {
    let Some(path) = path(annotations) else { return Ok(vec![]) };
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(e).context(|| format!("open {}", path.display())).map_err(Into::into),
    };
    let mut ignored = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let failed = |why: &str| Error::new(format!("{}:{}: {why}", path.display(), index + 1));
        let Some((name, value)) = statement(line).ok_or_else(|| failed("a quote without its partner"))?
        else {
            continue;
        };
        match name {
            "tcp-established" => options.tcp_established = true,
            "tcp-close" => options.tcp_close = true,
            "skip-in-flight" => options.tcp_skip_in_flight = true,
            "network-lock" if value == "skip" => options.network_lock = NetworkLock::Skip,
            // Whatever the administrator thought of, the lock is by nftables.
            "network-lock" => {}
            "ext-unix-sk" => options.ext_unix_sk = true,
            "shell-job" => options.shell_job = true,
            "file-locks" => options.file_locks = true,
            // Ours: whose clients have no flag for them either.
            "drop-exec" => options.drop_exec = true,
            "keep-exec" => options.keep_exec = true,
            "no-sync" => options.no_sync = true,
            "cpu-cap" if value == "none" => options.any_processor = true,
            "file-validation" if value == "none" => options.any_file_size = true,
            // All else that may be asked of the processor is looked at anyway.
            "cpu-cap" => {}
            "leave-running" => options.leave_running = true,
            "display-stats" => options.print_stats = true,
            "empty-ns" if value == "net" => options.empty_network = true,
            "external" if value.parse::<External>().is_ok() => {
                value.parse().into_iter().for_each(|external: External| external.add_to(options));
            }
            "manage-cgroups" | "manage-cgroups-mode" => options.manage_cgroups = mode(&value),
            // How much to tell, and what our log always or never has.
            "verbosity" | "v4" | "log-file" | "log-pid" | "file-validation" => {}
            _ => ignored.push(name.to_owned()),
        }
    }
    Ok(ignored)
}

fn mode(value: &str) -> Option<String> {
    Some(value).filter(|v| !v.is_empty()).map(str::to_owned)
}

fn path(annotations: &BTreeMap<String, String>) -> Option<PathBuf> {
    match annotations.get(ANNOTATION).map(String::as_str) {
        None => Some(Path::new(DEFAULT).to_owned()),
        Some("") => None,
        Some(path) => Some(Path::new(path).to_owned()),
    }
}

/// A line's option and its value: nothing on an empty line, `None` on one that makes no sense.
fn statement(line: &str) -> Option<Option<(&str, String)>> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Some(None);
    }
    let (name, rest) = line.split_once([' ', '\t', '=']).unwrap_or((line, ""));
    let name = name.trim_start_matches("--");
    let rest = rest.trim_start();
    let Some(quoted) = rest.strip_prefix('"') else {
        let word = rest.split([' ', '\t', '#']).next().unwrap_or_default();
        return Some(Some((name, word.to_owned())));
    };
    let mut value = String::new();
    let mut chars = quoted.chars();
    loop {
        match chars.next()? {
            '"' => return Some(Some((name, value))),
            '\\' => value.push(chars.next()?),
            c => value.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_criu_reads_them() {
        let read = |line| statement(line).unwrap().map(|(n, v)| (n.to_owned(), v));
        let pair = |n: &str, v: &str| Some((n.to_owned(), v.to_owned()));
        assert_eq!(read("  # nothing"), None);
        assert_eq!(read(""), None);
        assert_eq!(read("tcp-established"), pair("tcp-established", ""));
        assert_eq!(read("verbosity 4 # much"), pair("verbosity", "4"));
        assert_eq!(read("tcp-close\t# not that"), pair("tcp-close", ""));
        assert_eq!(read(r#"lsm-profile "selinux:a \"b\"" "#), pair("lsm-profile", "selinux:a \"b\""));
        assert_eq!(statement(r#"log-file "x"#), None);
    }

    #[test]
    fn the_annotation_decides_which_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "tcp-established\nmanage-cgroups soft\nghost-limit 10M\n").unwrap();
        let named = |value: &str| BTreeMap::from([(ANNOTATION.to_owned(), value.to_owned())]);
        let mut options = Options::default();
        assert_eq!(apply(&named(""), &mut options).unwrap(), Vec::<String>::new());
        assert!(!options.tcp_established);
        assert_eq!(apply(&named("/no/such/file"), &mut options).unwrap(), Vec::<String>::new());
        let ignored = apply(&named(file.path().to_str().unwrap()), &mut options).unwrap();
        assert_eq!(ignored, ["ghost-limit"]);
        assert!(options.tcp_established);
        assert_eq!(options.manage_cgroups.as_deref(), Some("soft"));
        assert_eq!(path(&BTreeMap::new()).unwrap(), Path::new(DEFAULT));
    }
}
