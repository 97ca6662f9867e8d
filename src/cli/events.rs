//! `events`.

use std::time::Duration;

use super::{Context, one_id, say};
use crate::cgroup::Stats;
use crate::container::events::Event;
use crate::container::{Container, Error, Result};

/// Display the resource usage of a container, and out-of-memory events
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Time between two displays, as 5s or 500ms
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    interval: String,
    /// Display once, and exit
    #[arg(long)]
    stats: bool,
    /// Name of the container
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8> {
    let id = one_id("events", &args.args)?;
    let bad = || Error::Usage(format!("invalid value {:?} for flag -interval: parse error", args.interval));
    // A negative one is well written, and no good.
    let interval = match args.interval.strip_prefix('-') {
        Some(text) => duration(text).map(|_| Duration::ZERO),
        None => duration(&args.interval),
    };
    let interval = interval.ok_or_else(bad)?;
    let container = Container::load(&context.store, id)?;
    if interval.is_zero() {
        return Err(Error::new("duration interval must be greater than 0"));
    }
    let stats = container.stats()?;
    if args.stats {
        say(line(id, &Event::Stats(Box::new(stats)))?);
        return Ok(0);
    }
    container.watch(interval, &mut |event| line(id, &event).is_ok_and(say))?;
    Ok(0)
}

/// One line of JSON, its fields in runc's order.
fn line(id: &str, event: &Event) -> Result<String> {
    #[derive(serde::Serialize)]
    struct Line<'a> {
        r#type: &'a str,
        id: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        data: Option<&'a Stats>,
    }
    let (kind, data) = match event {
        Event::Oom => ("oom", None),
        Event::Stats(stats) => ("stats", Some(&**stats)),
    };
    let text = serde_json::to_string(&Line { r#type: kind, id, data });
    Ok(text.map_err(|e| Error::new(e.to_string()))? + "\n")
}

/// A duration as Go writes it: `1m30s`, `500ms`, `1.5s`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = Duration::ZERO;
    if rest == "0" {
        return Some(sum);
    }
    while !rest.is_empty() {
        let unit = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(unit);
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        sum += Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        rest = tail;
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        assert_eq!(duration("5s"), Some(Duration::from_secs(5)));
        assert_eq!(duration("1m30s"), Some(Duration::from_secs(90)));
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(duration("0"), Some(Duration::ZERO));
        for bad in ["", "5", "-1s", "s", "1x", "1..5s"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_event_is_one_line() {
        assert_eq!(line("c", &Event::Oom).unwrap(), "{\"type\":\"oom\",\"id\":\"c\"}\n");
    }
}
