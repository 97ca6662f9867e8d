//! What of a config.json is done without, or will be one day, and is only warned of, in runc's words.

use oci_spec::runtime::Spec;

/// The warnings.
pub fn of(spec: &Spec) -> Vec<String> {
    let mut all = Vec::new();
    for mount in spec.mounts().iter().flatten().filter(|m| !m.destination().is_absolute()) {
        all.push(format!(
            "mount destination {} is not absolute. Support for non-absolute mount destinations will be removed in a \
             future release.",
            mount.destination().display()
        ));
    }
    let Some(linux) = spec.linux() else { return all };
    // The parser's names for these two fields are deprecated, too.
    let memory = linux.resources().as_ref().and_then(|r| r.memory().as_ref());
    let memory = memory.and_then(|m| serde_json::to_value(m).ok()).unwrap_or_default();
    if ["kernel", "kernelTCP"].iter().any(|key| memory.get(key).is_some_and(|v| !v.is_null())) {
        all.push("Kernel memory settings are ignored and will be removed".to_owned());
    }
    let flags = linux.personality().as_ref().and_then(|p| p.flags().as_deref()).unwrap_or_default();
    if !flags.is_empty() {
        all.push(format!(
            "ignoring unsupported personality flags: [{}] because personality flag has not supported at this time",
            flags.join(" ")
        ));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_without_is_named() {
        let read = |text: &str| of(&serde_json::from_str(text).unwrap());
        let all = read(
            r#"{"ociVersion":"1.0.2","mounts":[{"destination":"x","type":"tmpfs"},{"destination":"/y","type":"tmpfs"}],
            "linux":{"resources":{"memory":{"kernelTCP":1}},"personality":{"domain":"LINUX","flags":["A","B"]}}}"#,
        );
        assert_eq!(all.len(), 3, "{all:?}");
        assert!(
            all[0].starts_with("mount destination x is not absolute. Support for non-absolute"),
            "{all:?}"
        );
        assert!(all[1].starts_with("Kernel memory settings are ignored"), "{all:?}");
        assert!(all[2].starts_with("ignoring unsupported personality flags: [A B] because"), "{all:?}");
        assert!(read(r#"{"ociVersion":"1.0.2","linux":{"resources":{"memory":{"limit":1}}}}"#).is_empty());
    }
}
