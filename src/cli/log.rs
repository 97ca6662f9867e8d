//! The log that clients read: containerd shows the last `"level":"error"` entry of the JSON form.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use crate::checkpoint;
use crate::container::{Error, clock};

/// Where and how to log.
#[derive(Debug)]
struct Logger {
    file: Option<File>,
    json: bool,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Sets the log up. Without a file it goes to standard error.
pub fn init(path: Option<&Path>, format: &str, debug: bool) -> Result<(), Error> {
    let json = match format {
        "" | "text" => false,
        "json" => true,
        other => return Err(Error::new(format!("invalid log-format: {other}"))),
    };
    let file = match path.filter(|p| !p.as_os_str().is_empty()) {
        Some(path) => {
            use crate::sys::Context;
            let file = File::options().create(true).append(true).mode(0o644).open(path);
            Some(file.context(|| format!("open {}", path.display()))?)
        }
        None => None,
    };
    // Only ever called once, at the start.
    let _ = LOGGER.set(Logger { file, json });
    if debug {
        crate::container::debug::send_to(self::debug);
    }
    Ok(())
}

/// Logs the failure that ends a command, and prints it where the log is a file.
pub fn error(text: &str, cause: Option<&checkpoint::Error>) {
    write("error", text, cause);
    if LOGGER.get().is_some_and(|l| l.file.is_some()) {
        super::complain(format_args!("{text}\n"));
    }
}

/// Logs what does not end a command.
pub fn warn(text: &str) {
    write("warning", text, None);
}

/// Logs what `--debug` asks for.
fn debug(text: &str) {
    write("debug", text, None);
}

fn write(level: &str, text: &str, cause: Option<&checkpoint::Error>) {
    let logger = LOGGER.get();
    let line = if logger.is_some_and(|l| l.json) {
        json_line(level, text, cause)
    } else {
        format!("time=\"{}\" level={level} msg={}\n", clock::now(), quote(text))
    };
    match logger.and_then(|l| l.file.as_ref()) {
        // One write, so that commands that share a log do not mix their lines. A full disk must not hide the
        // failure itself, which is printed as well.
        Some(mut file) => drop(file.write_all(line.as_bytes())),
        None => super::complain(line),
    }
}

fn json_line(level: &str, text: &str, cause: Option<&checkpoint::Error>) -> String {
    let mut entry = Map::new();
    if let Some(e) = cause.map(checkpoint::Error::fields) {
        let mut field = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                entry.insert(key.to_owned(), value);
            }
        };
        field("pid", e.pid.map(Value::from));
        field("fd", e.fd.map(Value::from));
        field("path", e.path.as_ref().map(|p| Value::from(p.to_string_lossy())));
        field("call", e.call.as_deref().map(Value::from));
        field("errno", e.errno.map(|n| Value::from(format!("{n:?}"))));
        field("remedy", e.remedy.as_deref().map(Value::from));
    }
    entry.insert("level".to_owned(), json!(level));
    entry.insert("msg".to_owned(), json!(text));
    entry.insert("time".to_owned(), json!(clock::now()));
    Value::Object(entry).to_string() + "\n"
}

/// Quotes as Go's %q does, as far as log readers care. One plain word goes without.
fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engines_fields_stand_apart() {
        let e = checkpoint::Error::new("cannot read the pipe").pid(7).fd(3).remedy("close it");
        let line = json_line("error", &e.to_string(), Some(&e));
        let entry: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(entry["level"], "error");
        assert_eq!(entry["msg"], e.to_string());
        assert_eq!(
            (&entry["pid"], &entry["fd"], &entry["remedy"]),
            (&json!(7), &json!(3), &json!("close it"))
        );
        assert!(entry["time"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn text_entries_stay_on_one_line() {
        assert_eq!(quote("exec: \"a\"\n"), r#""exec: \"a\"\n""#);
        assert_eq!(quote("EOF"), "EOF");
        assert_eq!(quote(""), "\"\"");
    }
}
