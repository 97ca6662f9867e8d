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
    // A negative one is well written, and no good.
    let (text, negative) =
        args.interval.strip_prefix('-').map_or((&*args.interval, false), |text| (text, true));
    let interval = duration(text).map_err(|why| {
        Error::Usage(format!(
            "invalid value {:?} for flag -interval: time: {why} {:?}",
            args.interval, args.interval
        ))
    })?;
    let interval = if negative { Duration::ZERO } else { interval };
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

/// A duration as Go writes it: `1m30s`, `500ms`, `1.5s`; or what Go says before one that is none.
fn duration(text: &str) -> Result<Duration, String> {
    let invalid = || "invalid duration".to_owned();
    let mut rest = text;
    let mut sum = Duration::ZERO;
    if rest == "0" {
        return Ok(sum);
    }
    while !rest.is_empty() {
        if !rest.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            return Err(invalid());
        }
        let unit = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(unit);
        let number: f64 = number.parse().map_err(|_| invalid())?;
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "" => return Err("missing unit in duration".to_owned()),
            unit => return Err(format!("unknown unit {unit:?} in duration")),
        };
        sum += Duration::try_from_secs_f64(number * seconds).map_err(|_| invalid())?;
        rest = tail;
    }
    if text.is_empty() { Err(invalid()) } else { Ok(sum) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, millis) in [("5s", 5000), ("1m30s", 90_000), ("500ms", 500), ("1.5s", 1500), ("0", 0)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for (bad, why) in [
            ("", "invalid duration"),
            ("5", "missing unit in duration"),
            ("-1s", "invalid duration"),
            ("s", "invalid duration"),
            ("1x", "unknown unit \"x\" in duration"),
            ("1..5s", "invalid duration"),
        ] {
            assert_eq!(duration(bad), Err(why.to_owned()), "{bad}");
        }
    }

    #[test]
    fn an_event_is_one_line() {
        assert_eq!(line("c", &Event::Oom).unwrap(), "{\"type\":\"oom\",\"id\":\"c\"}\n");
    }
}
