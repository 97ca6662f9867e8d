//! Limits of the namespace: sysctls that each IPC namespace has of its own.
//!
//! Destination policy wins: what config.json sets stays, and where it makes /proc/sys read-only the container could
//! not have changed the rest either.

use std::path::Path;

use nix::errno::Errno;
use oci_spec::runtime::Spec;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::IpcVarEntry;

/// Reads a sysctl of one number.
pub(super) fn number(path: &str) -> Result<u64> {
    match numbers(path)?.as_slice() {
        [one] => Ok(*one),
        other => Err(Error::new(format!("a limit is unreadable: {path} has {other:?}"))),
    }
}

fn numbers(path: &str) -> Result<Vec<u64>> {
    let text = std::fs::read_to_string(path)
        .during("cannot read a limit of the IPC namespace", || format!("read({path:?})"))?;
    // -1 stands for none.
    let number = |word: &str| word.parse::<i64>().map(i64::cast_unsigned).or_else(|_| word.parse());
    text.split_whitespace()
        .map(|word| {
            number(word).map_err(|_| Error::new(format!("a limit is unreadable: {path} has {word:?}")))
        })
        .collect()
}

/// A limit that may not exist.
fn maybe(path: &str) -> Result<Option<u64>> {
    if Path::new(path).exists() { number(path).map(Some) } else { Ok(None) }
}

fn small(value: u64) -> Result<u32> {
    // Larger than the image has room for means as good as none.
    Ok(u32::try_from(value).unwrap_or(u32::MAX))
}

/// Reads all. Runs inside the namespace.
pub(super) fn dump() -> Result<IpcVarEntry> {
    let kernel = |name: &str| number(&format!("/proc/sys/kernel/{name}"));
    let queue = |name: &str| maybe(&format!("/proc/sys/fs/mqueue/{name}"));
    let next = |name: &str| -> Result<Option<u32>> {
        Ok(maybe(&format!("/proc/sys/kernel/{name}"))?.and_then(|n| u32::try_from(n).ok()))
    };
    let sem = numbers("/proc/sys/kernel/sem")?;
    Ok(IpcVarEntry {
        sem_ctls: sem.into_iter().map(small).collect::<Result<_>>()?,
        msg_ctlmax: small(kernel("msgmax")?)?,
        msg_ctlmnb: small(kernel("msgmnb")?)?,
        msg_ctlmni: small(kernel("msgmni")?)?,
        auto_msgmni: small(maybe("/proc/sys/kernel/auto_msgmni")?.unwrap_or(0))?,
        shm_ctlmax: kernel("shmmax")?,
        shm_ctlall: kernel("shmall")?,
        shm_ctlmni: small(kernel("shmmni")?)?,
        shm_rmid_forced: small(kernel("shm_rmid_forced")?)?,
        mq_queues_max: small(queue("queues_max")?.unwrap_or(0))?,
        mq_msg_max: small(queue("msg_max")?.unwrap_or(0))?,
        mq_msgsize_max: small(queue("msgsize_max")?.unwrap_or(0))?,
        mq_msg_default: queue("msg_default")?.map(small).transpose()?,
        mq_msgsize_default: queue("msgsize_default")?.map(small).transpose()?,
        msg_next_id: next("msg_next_id")?,
        sem_next_id: next("sem_next_id")?,
        shm_next_id: next("shm_next_id")?,
    })
}

/// Sets those that differ and that the container may have changed. Runs inside the namespace.
pub(super) fn restore(entry: &IpcVarEntry, spec: &Spec) -> Result<()> {
    for (name, value) in values(entry) {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        if !changeable(spec, name) || !Path::new(&path).exists() {
            continue;
        }
        if numbers(&path)?.iter().map(u64::to_string).collect::<Vec<_>>().join(" ") == value {
            continue;
        }
        match std::fs::write(&path, &value) {
            // Read-only in this kernel.
            Err(e) if matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EACCES | Errno::EPERM)) => {
            }
            done => done.during("cannot set a limit of the IPC namespace", || {
                format!("write({path:?}, {value:?})")
            })?,
        }
    }
    Ok(())
}

/// Whether a container of this config.json could have set it.
fn changeable(spec: &Spec, name: &str) -> bool {
    let Some(linux) = spec.linux() else { return false };
    let set = linux.sysctl().as_ref().is_some_and(|all| all.contains_key(name));
    let sealed = linux.readonly_paths().iter().flatten().any(|path| path == "/proc/sys" || path == "/proc");
    !set && !sealed
}

/// Names and values, as the kernel reads them.
fn values(entry: &IpcVarEntry) -> Vec<(&'static str, String)> {
    let sem: Vec<String> = entry.sem_ctls.iter().map(u32::to_string).collect();
    let mut all = vec![
        ("kernel.sem", sem.join(" ")),
        ("kernel.msgmax", entry.msg_ctlmax.to_string()),
        ("kernel.msgmnb", entry.msg_ctlmnb.to_string()),
        ("kernel.msgmni", entry.msg_ctlmni.to_string()),
        ("kernel.shmmax", entry.shm_ctlmax.to_string()),
        ("kernel.shmall", entry.shm_ctlall.to_string()),
        ("kernel.shmmni", entry.shm_ctlmni.to_string()),
        ("kernel.shm_rmid_forced", entry.shm_rmid_forced.to_string()),
        ("fs.mqueue.queues_max", entry.mq_queues_max.to_string()),
        ("fs.mqueue.msg_max", entry.mq_msg_max.to_string()),
        ("fs.mqueue.msgsize_max", entry.mq_msgsize_max.to_string()),
    ];
    let optional = [
        ("fs.mqueue.msg_default", entry.mq_msg_default),
        ("fs.mqueue.msgsize_default", entry.mq_msgsize_default),
    ];
    all.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?.to_string()))));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;

    fn spec(linux: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion": "1.0.2", "linux": {linux}}}"#)).unwrap()
    }

    #[test]
    fn limits_come_back_unless_config_json_says_otherwise() {
        in_child(libc::CLONE_NEWIPC, || {
            let before = dump().unwrap();
            let mut wanted = before.clone();
            (wanted.msg_ctlmax, wanted.msg_ctlmni, wanted.shm_ctlmax) = (1234, 56, 1 << 40);
            restore(&wanted, &spec(r#"{"readonlyPaths": ["/proc/sys"]}"#)).unwrap();
            assert_eq!(dump().unwrap(), before);
            restore(&wanted, &spec(r#"{"sysctl": {"kernel.msgmni": "5"}}"#)).unwrap();
            let after = dump().unwrap();
            assert_eq!((after.msg_ctlmax, after.shm_ctlmax), (1234, 1 << 40));
            assert_eq!(after.msg_ctlmni, before.msg_ctlmni);
        });
    }
}
