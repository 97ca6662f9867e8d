//! What `--debug` tells of a container's making. The words are runc's where its users may look for them.

use std::sync::OnceLock;

use crate::init::scheduling;

static SINK: OnceLock<fn(&str)> = OnceLock::new();

/// Where the lines go. Without, nobody is told, and they are not even made.
pub fn send_to(sink: fn(&str)) {
    // Only ever called once, at the start.
    let _ = SINK.set(sink);
}

/// Tells a line.
pub fn say(line: impl FnOnce() -> String) {
    if let Some(sink) = SINK.get() {
        sink(&line());
    }
}

/// Tells of a process that has just been made.
pub fn newborn(pid: i32) {
    say(|| format!("nsexec[{pid}]: => nsexec container setup"));
    say(|| format!("nsexec[{pid}]: affinity: {:#x}", scheduling::affinity_mask(pid)));
}
