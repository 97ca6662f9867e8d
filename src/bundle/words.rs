//! What to say of a word of config.json that is none of those that may stand there: the parser would tell of variants,
//! but clients and their users know runc's words.

use oci_spec::runtime::{
    Arch, IOPriorityClass, LinuxDeviceType, LinuxNamespaceType, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    MemoryPolicyFlagType, MemoryPolicyModeType, PosixRlimitType,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Says which word is wrong, if one is.
pub fn wrong(spec: &Value) -> Option<String> {
    let process = if spec.get("process").is_some() { "process" } else { "" };
    let inside = |rest: &str| format!("{process}/{rest}");
    let any = [
        find::<LinuxNamespaceType>(spec, "linux/namespaces/*/type", |w| {
            format!("namespace {{{w:?} \"\"}} does not exist")
        }),
        find::<LinuxDeviceType>(spec, "linux/devices/*/type", |w| format!("invalid device type {w:?}")),
        find::<LinuxPersonalityDomain>(spec, "linux/personality/domain", |w| {
            format!("invalid personality domain {w}")
        }),
        find::<MemoryPolicyModeType>(spec, "linux/memoryPolicy/mode", |w| {
            format!("invalid memory policy mode {w:?}")
        }),
        find::<MemoryPolicyFlagType>(spec, "linux/memoryPolicy/flags/*", |w| {
            format!("invalid memory policy flag {w:?}")
        }),
        find::<PosixRlimitType>(spec, &inside("rlimits/*/type"), |w| format!("wrong rlimit value: {w}")),
        find::<LinuxSchedulerPolicy>(spec, &inside("scheduler/policy"), |w| match w {
            "" => "scheduler policy is required".to_owned(),
            w => format!("invalid scheduler policy: {w}"),
        }),
        find::<LinuxSchedulerFlag>(spec, &inside("scheduler/flags/*"), |w| {
            format!("invalid scheduler flag: {w}")
        }),
        find::<IOPriorityClass>(spec, &inside("ioPriority/class"), |w| {
            format!("invalid ioPriority.Class: {w:?}")
        }),
    ];
    any.into_iter().flatten().next().or_else(|| seccomp(spec))
}

fn seccomp(spec: &Value) -> Option<String> {
    let no = |w: &str, what: &str| format!("string {w} is not a valid {what} for seccomp");
    let action = |path| find::<LinuxSeccompAction>(spec, path, |w| no(w, "action"));
    action("linux/seccomp/defaultAction")
        .or_else(|| action("linux/seccomp/syscalls/*/action"))
        .or_else(|| find::<Arch>(spec, "linux/seccomp/architectures/*", |w| no(w, "arch")))
        .or_else(|| {
            find::<LinuxSeccompOperator>(spec, "linux/seccomp/syscalls/*/args/*/op", |w| no(w, "operator"))
        })
        .or_else(|| {
            find::<LinuxSeccompFilterFlag>(spec, "linux/seccomp/flags/*", |w| {
                format!("seccomp flag {w} is not known to stasis")
            })
        })
}

/// The first word at `path` that is no `T`. `*` stands for every element of an array; the last word may be missing, which
/// is the empty word, where its object is not.
fn find<T: DeserializeOwned>(
    value: &Value,
    path: &str,
    say: impl Fn(&str) -> String + Copy,
) -> Option<String> {
    let (first, rest) = path.split_once('/').unwrap_or((path, ""));
    match first {
        "" if rest.is_empty() => {
            let wrong = serde_json::from_value::<T>(value.clone()).is_err();
            wrong.then(|| say(value.as_str().unwrap_or_default()))
        }
        "" => find::<T>(value, rest, say),
        "*" => value.as_array()?.iter().find_map(|item| find::<T>(item, rest, say)),
        name if rest.is_empty() => {
            find::<T>(value.as_object()?.get(name).unwrap_or(&Value::String(String::new())), rest, say)
        }
        name => find::<T>(value.get(name)?, rest, say),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn wrong_words_are_named_as_runc_does() {
        for (spec, said) in [
            (json!({"linux": {"memoryPolicy": {"nodes": "0"}}}), "invalid memory policy mode \"\""),
            (
                json!({"linux": {"memoryPolicy": {"mode": "MPOL_BIND", "flags": ["x"]}}}),
                "invalid memory policy flag \"x\"",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "pid"}, {"type": "x"}]}}),
                "namespace {\"x\" \"\"} does not exist",
            ),
            (json!({"process": {"rlimits": [{"type": "x"}]}}), "wrong rlimit value: x"),
            (json!({"scheduler": {"policy": "x"}}), "invalid scheduler policy: x"),
            (json!({"scheduler": {}}), "scheduler policy is required"),
            (json!({"ioPriority": {"priority": 1}}), "invalid ioPriority.Class: \"\""),
            (
                json!({"linux": {"seccomp": {"defaultAction": "x"}}}),
                "string x is not a valid action for seccomp",
            ),
            (
                json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "flags": ["x"]}}}),
                "seccomp flag x is not known to stasis",
            ),
        ] {
            assert_eq!(wrong(&spec).as_deref(), Some(said), "{spec}");
        }
        assert_eq!(wrong(&json!({"linux": {"namespaces": [{"type": "pid"}]}, "process": {}})), None);
    }
}
