//! Times of day as runc prints them: RFC 3339.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Now, UTC, with nanoseconds.
pub fn now_nanos() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let fraction = format!("{:09}", now.subsec_nanos());
    let fraction = fraction.trim_end_matches('0');
    let dot = if fraction.is_empty() { "" } else { "." };
    format!("{}{dot}{fraction}Z", seconds(now))
}

/// Now, UTC, to the second.
pub fn now() -> String {
    seconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()) + "Z"
}

/// A time in seconds since 1970, UTC. Before that there is none.
pub fn utc(at: i64) -> String {
    seconds(Duration::from_secs(u64::try_from(at).unwrap_or(0))) + "Z"
}

fn seconds(since_epoch: Duration) -> String {
    let total = since_epoch.as_secs();
    let (days, second) = (total / 86_400, total % 86_400);
    // The civil calendar counted from 1 March of year 0, so that leap days end a year.
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = era * 400 + yoe + u64::from(month <= 2);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calendar_is_right() {
        for (secs, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_709_251_199, "2024-02-29T23:59:59"),
            (4_102_444_800, "2100-01-01T00:00:00"),
        ] {
            assert_eq!(seconds(Duration::from_secs(secs)), text);
        }
    }
}
