//! Sessions of `exec`: processes that were put into the container from outside, second roots of its tree.
//!
//! ```text
//!   outside   shim or command ──> init          ──> exec'ed process: leads a session, its parent is outside
//!   ────────────────────────────────│───────────────────│──────────────────────────────────────────────────
//!   inside                     1 ppid 0             7 ppid 0
//!                               ├─ 2                 └─ 8         9 (child of init): 7's, whom 7 had left behind
//! ```
//!
//! Nobody inside can fork such a process again: init has no siblings, says clone(2). So the restore makes it as `exec`
//! does, from outside, under its old number, and the engine fills it as it fills init.
//!
//! What ties it to its client is gone, as when the client had died:
//!
//! * Its parent is whoever takes in orphans, the shim for instance, and that one was never told of it: `docker exec` has
//!   ended with the checkpoint, and the process appears in `docker top` only.
//! * The other end of its pipes is gone: it reads the end of the file, and writes into nothing (SIGPIPE, EPIPE).
//! * `/dev/null` of the host becomes the container's.
//! * A terminal is hung up, which ends a shell, unless somebody takes its master at the restore (`files/tty/client.rs`).
//!
//! So they are kept only when asked for: `--keep-exec`. What they may do is judged by config.json, like everybody's:
//! `exec --privileged` and `exec --cap` come to nothing without `restore --policy clamp`.
//!
//! CRIU knows one root. The extension is critical.

use std::collections::BTreeSet;

use super::status::Status;
use crate::checkpoint::context::Dump;
use crate::checkpoint::model::Model;
use crate::checkpoint::{Error, Result};

/// The extension with the numbers of those processes.
pub const EXTENSION: &str = "exec-sessions";

/// Refuses what the restore could not make: a process of another pid namespace than init's, which lies `depth` below
/// ours, or of a session that began outside.
pub fn check(status: &Status, depth: usize) -> Result<()> {
    let remedy = "end it, or leave it out with --drop-exec";
    if status.ns_pid.len() != depth + 1 {
        return Err(Error::new(
            "the process has entered a pid namespace that the container has made from outside",
        )
        .remedy(remedy));
    }
    if status.ns_sid.get(depth) != status.ns_pid.get(depth) {
        return Err(Error::new("the process has come from outside and leads no session").remedy(remedy));
    }
    Ok(())
}

/// Records those of the processes in pstree.
pub fn record(dump: &mut Dump<'_>) -> Result<()> {
    let all: BTreeSet<u32> =
        dump.model.pstree.iter().skip(1).filter(|e| e.ppid == 0).map(|e| e.pid).collect();
    match all.is_empty() {
        true => Ok(()),
        false => dump.model.set_critical_extension(EXTENSION, &all),
    }
}

/// Those of the images.
pub fn of(model: &Model) -> Result<BTreeSet<u32>> {
    model.extension(EXTENSION)
}

/// What is said of such a process where nothing was said on what is to become of it.
pub fn refusal(vpid: i32) -> Error {
    Error::new("the process was started by exec: it is no descendant of the container's first process")
        .pid(vpid)
        .remedy("keep it with --keep-exec, leave it out with --drop-exec, or end it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_leaders_in_the_containers_pid_namespace_can_be_made() {
        let status = |pids: &[i32], sids: &[i32]| Status {
            ns_pid: pids.to_vec(),
            ns_sid: sids.to_vec(),
            ..Status::default()
        };
        check(&status(&[4711, 7], &[4711, 7]), 1).unwrap();
        let error = check(&status(&[4711, 7], &[99, 0]), 1).unwrap_err().to_string();
        assert!(error.contains("no session") && error.contains("--drop-exec"), "{error}");
        assert!(check(&status(&[4711, 7, 1], &[4711, 7, 1]), 1).is_err());
    }
}
