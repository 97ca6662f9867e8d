//! config.json: loading, validation, and the templates that `spec` and `features` print.

pub mod features;
pub mod template;
pub mod validate;
pub mod warnings;
mod words;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capability, Process, Spec};
use serde_json::{Value, json};

use crate::init::scheduling;
use crate::sys::{Context, Error, Result};

/// Name of the specification file in a bundle.
pub const CONFIG: &str = "config.json";

/// A config.json that is larger than this was not written for a container.
const LIMIT: u64 = 64 << 20;

/// A bundle whose config.json has been read and makes sense.
#[derive(Debug)]
pub struct Bundle {
    /// Its directory, absolute.
    pub path: PathBuf,
    /// config.json.
    pub spec: Spec,
    /// The root file system, absolute and free of symbolic links.
    pub rootfs: PathBuf,
    /// Capabilities that nobody has heard of, and that were left out.
    pub unknown: Vec<String>,
}

impl Bundle {
    /// Reads and checks the bundle in that directory.
    pub fn load(path: &Path) -> Result<Self> {
        let path = fs::canonicalize(path).context(|| format!("chdir {}", path.display()))?;
        let (spec, unknown) = load(&path.join(CONFIG))?;
        validate::spec(&spec, &path)?;
        let rootfs = rootfs(&path, &spec)?;
        Ok(Self { path, spec, rootfs, unknown })
    }
}

/// Reads and checks a config.json, and names the capabilities that it left out.
fn load(path: &Path) -> Result<(Spec, Vec<String>)> {
    let text = match fs::metadata(path) {
        Ok(meta) if meta.len() > LIMIT => return Err(Error::new(format!("{} is too large", path.display()))),
        _ => fs::read(path),
    };
    let text = match text {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::new(format!("JSON specification file {CONFIG} not found")));
        }
        text => text.context(|| format!("open {}", path.display()))?,
    };
    read_known(&text)
}

/// Understands the text of a config.json, and checks what needs no bundle to be checked.
pub fn read(text: &[u8]) -> Result<Spec> {
    read_known(text).map(|(spec, _)| spec)
}

fn read_known(text: &[u8]) -> Result<(Spec, Vec<String>)> {
    let (spec, unknown): (Spec, _) = parse(text).map_err(|e| match e.line() {
        // runc's own words.
        0 => Error::new(e.to_string()),
        _ => Error::new(format!("{CONFIG}: {e}")),
    })?;
    match spec.process() {
        Some(process) => validate_process(process)?,
        None => return Err(Error::new("process property must not be empty")),
    }
    crate::init::namespaces::validate(&spec)?;
    Ok((spec, unknown))
}

/// Reads a config.json or a process's settings, without capabilities that nobody has heard of, which are named: clients
/// list those of the newest kernel. Flags of the scheduler may have the names of the specification's Go package, and
/// numbers that are not given are 0, as in Go: a process without a user is root's.
pub fn parse<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<(T, Vec<String>), serde_json::Error> {
    let failure = match first(text) {
        Ok(value) => {
            // The one word that the parser does without, and runc does not.
            let priority = b"\"ioPriority\"";
            if text.windows(priority.len()).any(|part| part == priority)
                && let Some(words) = words::wrong(&first(text)?)
            {
                return Err(serde::de::Error::custom(words));
            }
            if !unlimited_pids(text) {
                return Ok((value, vec![]));
            }
            None
        }
        Err(e) => Some(e),
    };
    let mut value: Value = match first(text) {
        Ok(value) => value,
        Err(e) => return Err(failure.unwrap_or(e)),
    };
    if value.is_null() {
        return Err(serde::de::Error::custom("config cannot be null"));
    }
    forget_nulls(&mut value);
    let process = if value.get("process").is_some() { &mut value["process"] } else { &mut value };
    let mut unknown = BTreeSet::new();
    let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(serde_json::Map::values_mut).filter_map(Value::as_array_mut) {
        set.retain(|name| {
            let known = serde_json::from_value::<Capability>(name.clone()).is_ok();
            unknown.extend(name.as_str().filter(|_| !known).map(str::to_owned));
            known
        });
    }
    if let Some(affinity) = process.get_mut("execCPUAffinity").and_then(Value::as_object_mut) {
        plain_lists(affinity).map_err(serde::de::Error::custom)?;
    }
    if let Some(process) = process.as_object_mut().filter(|p| p.contains_key("cwd") || p.contains_key("args"))
    {
        process.entry("user").or_insert_with(|| json!({}));
        process.entry("cwd").or_insert_with(|| json!(""));
    }
    let flags = process.get_mut("scheduler").and_then(|s| s.get_mut("flags")).and_then(Value::as_array_mut);
    for flag in flags.into_iter().flatten().filter(|f| **f == "SCHED_FLAG_RESET_ON_FORK") {
        *flag = "SCHED_RESET_ON_FORK".into();
    }
    if let Some(linux) = value.get_mut("linux").and_then(Value::as_object_mut) {
        // One that names no limit sets none, and one that names no action is no filter.
        let resources = linux.get_mut("resources").and_then(Value::as_object_mut);
        if let Some(resources) = resources.filter(|r| r.get("pids").is_some_and(|p| p.get("limit").is_none()))
        {
            resources.remove("pids");
        }
        let none = |filter: &Value, key: &str, empty: Value| filter.get(key).is_none_or(|v| *v == empty);
        if linux.get("seccomp").is_some_and(|s| {
            s.is_object() && none(s, "defaultAction", json!("")) && none(s, "syscalls", json!([]))
        }) {
            linux.remove("seccomp");
        }
    }
    // Nothing here is a virtual machine.
    if let Some(spec) = value.as_object_mut() {
        spec.remove("vm");
    }
    let rules = value.pointer_mut("/linux/seccomp/syscalls").and_then(Value::as_array_mut);
    let args = rules.into_iter().flatten().filter_map(|r| r.get_mut("args")?.as_array_mut()).flatten();
    for arg in args.filter_map(Value::as_object_mut) {
        for number in ["index", "value"] {
            arg.entry(number).or_insert_with(|| json!(0));
        }
    }
    if let Some(words) = words::wrong(&value) {
        return Err(serde::de::Error::custom(words));
    }
    // What else is wrong is told with its line and column.
    let parsed = serde_json::from_value(value).map_err(|e| failure.unwrap_or(e));
    parsed.map(|value| (value, unknown.into_iter().collect()))
}

/// True if `pids` of the resources is there without a limit: to the parser that is a limit of 0.
fn unlimited_pids(text: &[u8]) -> bool {
    let name = b"\"pids\"";
    fn after(rest: &[u8], byte: u8) -> Option<&[u8]> {
        rest.trim_ascii_start().strip_prefix(&[byte])
    }
    let found = text.windows(name.len()).enumerate().filter(|(_, part)| part == name);
    found.map(|(at, _)| &text[at + name.len()..]).any(|rest| {
        let inside = after(rest, b':').and_then(|rest| after(rest, b'{'));
        inside.is_some_and(|rest| !rest.trim_ascii_start().starts_with(b"\"limit\""))
    })
}

/// The first value is it, as for Go's decoder, whatever follows.
pub fn first<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    T::deserialize(&mut serde_json::Deserializer::from_slice(text))
}

/// To Go, what is null has not been given.
fn forget_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(forget_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_nulls),
        _ => {}
    }
}

/// Lists of processors without the blanks and commas too many that the parser would refuse; empty ones are none.
fn plain_lists(affinity: &mut serde_json::Map<String, Value>) -> Result<()> {
    for (key, name) in AFFINITY {
        let Some(list) = affinity.get(key).and_then(Value::as_str) else { continue };
        let list = scheduling::parse_list(list).map_err(|e| e.context(name))?;
        let list: Vec<String> = list.iter().map(ToString::to_string).collect();
        if list.is_empty() {
            affinity.remove(key);
        } else {
            affinity.insert(key.to_owned(), list.join(",").into());
        }
    }
    Ok(())
}

/// The lists of `execCPUAffinity`, and what runc calls them.
const AFFINITY: [(&str, &str); 2] =
    [("initial", "bad CPUAffinity.Initial"), ("final", "bad CPUAffinity.Final")];

/// What runc demands of a process.
pub fn validate_process(process: &Process) -> Result<()> {
    if process.cwd().as_os_str().is_empty() {
        return Err(Error::new("Cwd property must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::new("Cwd must be an absolute path"));
    }
    if process.args().as_deref().unwrap_or_default().is_empty() {
        return Err(Error::new("args must not be empty"));
    }
    if let Some(affinity) = process.exec_cpu_affinity() {
        let lists = [affinity.initial(), affinity.cpu_affinity_final()];
        for (list, (_, name)) in lists.into_iter().zip(AFFINITY) {
            scheduling::parse_list(list.as_deref().unwrap_or_default()).map_err(|e| e.context(name))?;
        }
    }
    Ok(())
}

fn rootfs(bundle: &Path, spec: &Spec) -> Result<PathBuf> {
    let root = spec.root().as_ref().ok_or_else(|| Error::new("root must be specified"))?;
    let path = bundle.join(root.path());
    let path = fs::canonicalize(&path).context(|| format!("invalid rootfs: stat {}", path.display()))?;
    if !path.is_dir() {
        return Err(Error::new(format!("invalid rootfs: {} is not a directory", path.display())));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG), text).unwrap();
        Bundle::load(dir.path()).unwrap_err().to_string()
    }

    #[test]
    fn unknown_capabilities_are_left_out() {
        let process = r#"{"user":{},"cwd":"/","args":["a"],
            "capabilities":{"bounding":["CAP_KILL","CAP_OF_TOMORROW"],"effective":["CAP_KILL"]}}"#;
        let (alone, unknown): (Process, _) = parse(process.as_bytes()).unwrap();
        assert_eq!(unknown, ["CAP_OF_TOMORROW"]);
        let (spec, _): (Spec, _) =
            parse(format!(r#"{{"ociVersion":"1.0.2","process":{process}}}"#).as_bytes()).unwrap();
        for process in [&alone, spec.process().as_ref().unwrap()] {
            let sets = process.capabilities().as_ref().unwrap();
            assert_eq!(sets.bounding().as_ref().unwrap().len(), 1);
        }
        assert!(parse::<Process>(br#"{"user":7}"#).is_err());
    }

    #[test]
    fn limits_and_filters_without_a_word_are_none() {
        let linux = |inner: &str| {
            let (spec, _): (Spec, _) =
                parse(format!(r#"{{"ociVersion":"1.0.2","linux":{{{inner}}}}} what follows"#).as_bytes())
                    .unwrap();
            spec.linux().clone().unwrap()
        };
        let limit = |pids: &str| {
            let linux = linux(&format!(r#""resources":{{"pids":{pids}}}"#));
            linux.resources().as_ref().and_then(|r| r.pids().map(|p| p.limit()))
        };
        for none in ["{}", " { } ", r#"{"limit":null}"#, "null"] {
            assert_eq!(limit(none), None, "{none}");
        }
        assert_eq!((limit(r#"{ "limit" : 0}"#), limit(r#"{"limit":7}"#)), (Some(0), Some(7)));
        assert!(linux(r#""seccomp":{}"#).seccomp().is_none());
        assert!(linux(r#""seccomp":{"defaultAction":"","syscalls":[]}"#).seccomp().is_none());
        assert!(linux(r#""seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}"#).seccomp().is_some());
    }

    #[test]
    fn both_names_of_a_flag_of_the_scheduler_are_understood() {
        for name in ["SCHED_RESET_ON_FORK", "SCHED_FLAG_RESET_ON_FORK"] {
            let process = format!(
                r#"{{"user":{{}},"cwd":"/","args":["a"],"scheduler":{{"policy":"SCHED_BATCH","flags":["{name}"]}}}}"#
            );
            let (process, _): (Process, _) = parse(process.as_bytes()).unwrap();
            assert_eq!(process.scheduler().as_ref().unwrap().flags().as_ref().unwrap().len(), 1);
        }
    }

    #[test]
    fn lists_of_processors_are_read_as_runc_reads_them() {
        let process = |affinity: &str| {
            let text = format!(r#"{{"cwd":"/","args":["a"],"user":{{}},"execCPUAffinity":{affinity}}}"#);
            let (process, _): (Process, _) = parse(text.as_bytes()).map_err(|e| e.to_string())?;
            validate_process(&process).map_err(|e| e.to_string())?;
            Ok::<_, String>(process.exec_cpu_affinity().clone().unwrap_or_default())
        };
        let lists = process(r#"{"initial":" 1-2, 5,","final":""}"#).unwrap();
        assert_eq!((lists.initial().as_deref(), lists.cpu_affinity_final()), (Some("1,2,5"), &None));
        for (affinity, said) in [
            (
                r#"{"initial":"x"}"#,
                "bad CPUAffinity.Initial: strconv.ParseUint: parsing \"x\": invalid syntax",
            ),
            (r#"{"final":"5-1"}"#, "bad CPUAffinity.Final: invalid range: 5-1"),
            (r#"{"initial":"99999"}"#, "bad CPUAffinity.Initial: values larger than 65536 are not supported"),
        ] {
            assert_eq!(process(affinity).unwrap_err(), said);
        }
    }

    #[test]
    fn fields_of_virtual_machines_are_passed_over() {
        let (spec, _): (Spec, _) =
            parse(br#"{"ociVersion":"1.0.2","vm":{"hypervisor":{"path":"/x"}}}"#).unwrap();
        assert!(spec.vm().is_none());
    }

    #[test]
    fn what_is_left_out_is_zero() {
        let (process, _): (Process, _) = parse(br#"{"cwd":"/","args":["a"]}"#).unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
        let (process, _): (Process, _) = parse(br#"{"args":["a"]}"#).unwrap();
        assert_eq!(validate_process(&process).unwrap_err().to_string(), "Cwd property must not be empty");
        let nothing = br#"{"cwd":"/","args":["a"],"user":null,"noNewPrivileges":null,"rlimits":null}"#;
        let (process, _): (Process, _) = parse(nothing).unwrap();
        assert_eq!((process.user().uid(), process.no_new_privileges()), (0, None));
        assert_eq!(failure("null"), "config cannot be null");
        let rules = r#"{"ociVersion":"1.0.2","linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["kill"],"action":"SCMP_ACT_ERRNO","args":[{"op":"SCMP_CMP_EQ"}]}]}}}"#;
        let (spec, _): (Spec, _) = parse(rules.as_bytes()).unwrap();
        let seccomp = spec.linux().as_ref().unwrap().seccomp().clone().unwrap();
        assert_eq!(seccomp.syscalls().as_ref().unwrap()[0].args().as_ref().unwrap()[0].value(), 0);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(failure("{").starts_with("config.json: "));
        assert_eq!(failure(r#"{"ociVersion":"1.0.2"}"#), "process property must not be empty");
        let process = |rest: &str| format!(r#"{{"ociVersion":"1.0.2","process":{{"user":{{}},{rest}}}}}"#);
        assert_eq!(failure(&process(r#""cwd":"x","args":["a"]"#)), "Cwd must be an absolute path");
        assert_eq!(failure(&process(r#""cwd":"/","args":[]"#)), "args must not be empty");
        assert_eq!(failure(&process(r#""cwd":"/","args":["a"]"#)), "root must be specified");
        let empty = tempfile::tempdir().unwrap();
        let e = Bundle::load(empty.path()).unwrap_err().to_string();
        assert_eq!(e, "JSON specification file config.json not found");
    }
}
