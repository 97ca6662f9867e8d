//! The config.json that `spec` writes: a shell in a container, to be edited.

use serde_json::{Value, json};

/// The template. `rootless` is the user for whom it is to work without root, by uid and gid.
pub fn config(cgroup_v2: bool, rootless: Option<(u32, u32)>) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let mut namespaces = vec!["pid", "network", "ipc", "uts", "mount"];
    if cgroup_v2 {
        namespaces.push("cgroup");
    }
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &[]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    let mut linux = json!({
        "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        "maskedPaths": [
            "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
            "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
        ],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    });
    if let Some((uid, gid)) = rootless {
        // Without root there is no network to give, no group to map but one's own, and no sysfs of one's own.
        namespaces.retain(|n| *n != "network");
        namespaces.push("user");
        linux["uidMappings"] = json!([{ "containerID": 0, "hostID": uid, "size": 1 }]);
        linux["gidMappings"] = json!([{ "containerID": 0, "hostID": gid, "size": 1 }]);
        if let Some(map) = linux.as_object_mut() {
            map.remove("resources");
        }
        for m in &mut mounts {
            if m["destination"] == "/sys" {
                *m = mount("/sys", "none", "/sys", &["rbind", "nosuid", "noexec", "nodev", "ro"]);
            }
            if let Some(options) = m.get_mut("options").and_then(Value::as_array_mut) {
                options
                    .retain(|o| o.as_str().is_none_or(|o| !o.starts_with("gid=") && !o.starts_with("uid=")));
            }
        }
    }
    linux["namespaces"] = namespaces.iter().map(|n| json!({ "type": n })).collect();
    json!({
        "ociVersion": crate::container::OCI_VERSION,
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "stasis",
        "mounts": mounts,
        "linux": linux,
    })
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    let mut m = json!({ "destination": destination, "type": kind, "source": source });
    if !options.is_empty() {
        m["options"] = json!(options);
    }
    m
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Spec;

    #[test]
    fn the_template_is_a_valid_config() {
        let spec: Spec = serde_json::from_value(config(true, None)).unwrap();
        crate::bundle::validate_process(spec.process().as_ref().unwrap()).unwrap();
        let text = config(false, Some((1000, 1000))).to_string();
        assert!(text.contains(r#""hostID":1000"#) && !text.contains("gid=5") && !text.contains("network"));
        assert!(!text.contains("null"), "{text}");
    }
}
