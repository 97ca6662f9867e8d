//! `--trace`: where the time went, as chrome://tracing and Perfetto read it (the Trace Event Format, one complete event,
//! "X", a span; times in microseconds).
//!
//! ```text
//!   phases          |check|freeze|tasks|namespaces|files|memory|snapshot|  pages  |images|publish|
//!   standing still        |---------------------------------------------|
//! ```

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::report::{DumpReport, Phases, RestoreReport};

/// Writes the trace of a dump.
pub fn dump(path: &Path, report: &DumpReport) -> Result<()> {
    let mut events = tracks(&report.phases);
    // It begins to stand still when the look at it is over.
    let begin = report.phases.of("check");
    events.push(span("standing still", 2, begin, report.frozen));
    events.push(track(2, "container"));
    write(path, &events)
}

/// Writes the trace of a restore.
pub fn restore(path: &Path, report: &RestoreReport) -> Result<()> {
    write(path, &tracks(&report.phases))
}

fn tracks(phases: &Phases) -> Vec<Value> {
    let mut begin = Duration::ZERO;
    let mut events = vec![track(1, "phases")];
    for (name, took) in phases.all() {
        events.push(span(name, 1, begin, *took));
        begin += *took;
    }
    events
}

fn span(name: &str, track: u32, begin: Duration, took: Duration) -> Value {
    let us = |duration: Duration| duration.as_secs_f64() * 1e6;
    json!({"name": name, "ph": "X", "ts": us(begin), "dur": us(took), "pid": 1, "tid": track})
}

fn track(number: u32, name: &str) -> Value {
    json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": name}})
}

fn write(path: &Path, events: &[Value]) -> Result<()> {
    let all = json!({"displayTimeUnit": "ms", "traceEvents": events});
    File::create(path)
        .and_then(|file| {
            let mut out = BufWriter::new(file);
            serde_json::to_writer_pretty(&mut out, &all)?;
            out.flush()
        })
        .during("cannot write the trace", || format!("write({path:?})"))
        .map_err(|e| e.path(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other_and_the_container_stands_still_after_the_check() {
        let mut phases = Phases::start();
        for name in ["check", "freeze", "pages"] {
            phases.end(name);
        }
        let frozen = Duration::from_micros(1500);
        let report = DumpReport {
            freezing: frozen,
            frozen,
            phases,
            tasks: 1,
            threads: 1,
            image_bytes: 0,
            pages_scanned: 0,
            pages_written: 0,
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        dump(&path, &report).unwrap();
        let trace: Value = serde_json::from_reader(File::open(path).unwrap()).unwrap();
        let spans: Vec<&Value> =
            trace["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X").collect();
        let of = |i: usize, what: &str| spans[i][what].as_f64().unwrap();
        assert_eq!(spans.len(), 4);
        assert!((of(0, "ts") + of(0, "dur") - of(1, "ts")).abs() < 0.01, "{spans:?}");
        assert!((of(1, "ts") + of(1, "dur") - of(2, "ts")).abs() < 0.01, "{spans:?}");
        assert_eq!((&spans[3]["name"], of(3, "dur")), (&json!("standing still"), 1500.0));
        assert!((of(3, "ts") - of(1, "ts")).abs() < 0.01, "{spans:?}");
        let error = dump(&dir.path().join("no/such"), &report).unwrap_err().to_string();
        assert!(error.contains("cannot write the trace"), "{error}");
    }
}
