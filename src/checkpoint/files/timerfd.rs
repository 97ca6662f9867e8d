//! timerfd_create(2): a timer whose expirations are read.
//!
//! A periodic timer that has expired and was not read shows `it_value` 0: the kernel arms it again when it is read, or
//! asked for its time, which a dump does. An image may say so all the same.
//! Setting it like that would disarm it, so it is armed with a whole interval, and its ticks are put back with
//! TFD_IOC_SET_TICKS. Absolute timers come back as relative ones with the time that was left, except for clocks
//! that can jump, where the kernel counts against the clock itself.

use std::os::fd::OwnedFd;

use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, TimerSetTimeFlags};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::external;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::image::{FdTypes, FileEntry, TimerfdEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::ioctl;

/// A timerfd.
pub fn is(live: &Live) -> bool {
    live.is_anon("timerfd")
}

/// Records the timer.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let entry = current(live).and_then(|now| entry(&now, id)).map_err(|e| live.name(e))?;
    let entry = TimerfdEntry { fown: live.fown(&dump.files.pids)?, ..entry };
    dump.model.files.push(FileEntry {
        r#type: FdTypes::Timerfd as i32,
        id,
        tfd: Some(entry),
        ..FileEntry::default()
    });
    Ok(())
}

/// The timer, with all expirations counted: the kernel counts those after the first only when it is asked.
fn current(live: &Live) -> Result<Live> {
    let what = "cannot look at a timerfd";
    ioctl::count_timerfd_ticks(&live.file).during(what, || "timerfd_gettime(_, _)".into())?;
    let copy = live.file.try_clone().during(what, || "fcntl(_, F_DUPFD_CLOEXEC)".into())?;
    Live::own(copy, live.vpid)
}

fn entry(live: &Live, id: u32) -> Result<TimerfdEntry> {
    let (vsec, vnsec) = pair(live.info.field("it_value"))?;
    let (isec, insec) = pair(live.info.field("it_interval"))?;
    let small = |key, radix| live.info.number(key, radix).map(|n| n as u32);
    Ok(TimerfdEntry {
        id,
        flags: live.info.flags,
        clockid: small("clockid", 10)?,
        ticks: live.info.number("ticks", 10)?,
        settime_flags: small("settime flags", 8)?,
        vsec,
        vnsec,
        isec,
        insec,
        ..TimerfdEntry::default()
    })
}

/// `(3, 250000000)`
fn pair(text: Option<&str>) -> Result<(u64, u64)> {
    let numbers = |t: &str| {
        let (a, b) = t.trim().strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
        Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
    };
    text.and_then(numbers).ok_or_else(|| Error::new(format!("fdinfo of a timerfd not understood: {text:?}")))
}

/// Makes timerfds. They run from now on.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    for e in opener.of(FdTypes::Timerfd).filter_map(|e| e.tfd.as_ref()) {
        let file = make(e)?;
        opener.put_owned(e.id, file, &e.fown, e.flags);
    }
    Ok(())
}

fn clock(id: u32) -> Result<(ClockId, nix::time::ClockId)> {
    use nix::time::ClockId as Read;
    Ok(match id.cast_signed() {
        libc::CLOCK_REALTIME => (ClockId::CLOCK_REALTIME, Read::CLOCK_REALTIME),
        libc::CLOCK_MONOTONIC => (ClockId::CLOCK_MONOTONIC, Read::CLOCK_MONOTONIC),
        libc::CLOCK_BOOTTIME => (ClockId::CLOCK_BOOTTIME, Read::CLOCK_BOOTTIME),
        libc::CLOCK_REALTIME_ALARM => (ClockId::CLOCK_REALTIME_ALARM, Read::CLOCK_REALTIME),
        libc::CLOCK_BOOTTIME_ALARM => (ClockId::CLOCK_BOOTTIME_ALARM, Read::CLOCK_BOOTTIME),
        other => return Err(Error::new(format!("a timerfd uses clock {other}, which is unknown"))),
    })
}

/// The kernel's longest time: what is armed for longer never fires, and shows as what is left of it (ktime_t).
const FOREVER: i64 = i64::MAX / 1_000_000_000;

fn span(sec: u64, nsec: u64) -> Result<TimeSpec> {
    match (i64::try_from(sec), i64::try_from(nsec)) {
        (Ok(sec), Ok(nsec)) if nsec < 1_000_000_000 && sec <= FOREVER => Ok(TimeSpec::new(sec, nsec)),
        _ => Err(Error::new(format!("a timerfd has the impossible time {sec}.{nsec}"))),
    }
}

/// When `left` will be over.
fn after(now: TimeSpec, left: TimeSpec) -> TimeSpec {
    let nanoseconds = now.tv_nsec() + left.tv_nsec();
    let seconds = now.tv_sec().saturating_add(left.tv_sec()).saturating_add(nanoseconds / 1_000_000_000);
    TimeSpec::new(seconds.min(FOREVER), nanoseconds % 1_000_000_000)
}

fn make(e: &TimerfdEntry) -> Result<OwnedFd> {
    let what = "cannot make a timerfd";
    let (kind, read) = clock(e.clockid)?;
    let timer = TimerFd::new(kind, TimerFlags::TFD_CLOEXEC)
        .during(what, || format!("timerfd_create({kind:?}, _)"))?;
    let (left, interval) = (span(e.vsec, e.vnsec)?, span(e.isec, e.insec)?);
    let zero = TimeSpec::new(0, 0);
    // Expired and unread: what it waits for is the read. See above.
    let left = if left == zero && e.ticks > 0 { interval } else { left };
    let flags = TimerSetTimeFlags::from_bits_truncate(e.settime_flags.cast_signed());
    if left != zero {
        let value = if flags.contains(TimerSetTimeFlags::TFD_TIMER_ABSTIME) {
            after(nix::time::clock_gettime(read).during(what, || format!("clock_gettime({read})"))?, left)
        } else {
            left
        };
        let expiration = if interval == zero {
            Expiration::OneShot(value)
        } else {
            Expiration::IntervalDelayed(value, interval)
        };
        timer
            .set(expiration, flags)
            .during(what, || format!("timerfd_settime(_, {flags:?}, {expiration:?})"))?;
    }
    if e.ticks > 0 {
        ioctl::set_timerfd_ticks(&timer, e.ticks)
            .during(what, || format!("ioctl(_, TFD_IOC_SET_TICKS, {})", e.ticks))?;
    }
    let file = OwnedFd::from(timer);
    external::set_flags(&file, e.flags)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn look(file: OwnedFd) -> (Live, TimerfdEntry) {
        let live = Live::own(file, 1).unwrap();
        let e = entry(&live, 3).unwrap();
        (live, e)
    }

    #[test]
    fn a_running_timer_goes_on() {
        let t = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_NONBLOCK).unwrap();
        let (first, then) = (Duration::from_secs(1000), Duration::from_secs(7));
        t.set(Expiration::IntervalDelayed(first.into(), then.into()), TimerSetTimeFlags::empty()).unwrap();
        let (live, e) = look(t.into());
        assert!(is(&live));
        let (_again, f) = look(make(&e).unwrap());
        assert!(f.vsec >= 998 && f.vsec <= 1000, "{f:?}");
        assert_eq!((f.isec, f.clockid, f.flags, f.ticks), (7, e.clockid, e.flags, 0));
    }

    #[test]
    fn an_expired_periodic_timer_keeps_its_tick_and_goes_on() {
        let t = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
        let (first, then) = (Duration::from_nanos(1), Duration::from_secs(500));
        t.set(Expiration::IntervalDelayed(first.into(), then.into()), TimerSetTimeFlags::empty()).unwrap();
        let mut poll = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&t), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut poll, 1000u16).unwrap();
        let (_live, e) = look(t.into());
        assert_eq!((e.vsec, e.vnsec, e.ticks), (0, 0, 1));
        let again = make(&e).unwrap();
        let mut buf = [0u8; 8];
        nix::unistd::read(&again, &mut buf).unwrap();
        assert_eq!(u64::from_ne_bytes(buf), 1);
        let (_again, f) = look(again);
        assert!(f.vsec >= 499, "it is armed again: {f:?}");
    }

    #[test]
    fn all_expirations_are_counted() {
        let t = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
        let often = Duration::from_millis(1);
        t.set(Expiration::IntervalDelayed(often.into(), often.into()), TimerSetTimeFlags::empty()).unwrap();
        let mut poll = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&t), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut poll, 10_000u16).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        let (live, e) = look(t.into());
        assert_eq!(e.ticks, 1, "the first only");
        let e = entry(&current(&live).unwrap(), 3).unwrap();
        assert!(e.ticks >= 29, "{e:?}");
    }

    #[test]
    fn an_absolute_one_shot_ends_when_it_would_have() {
        let t = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::empty()).unwrap();
        let at =
            nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).unwrap() + TimeSpec::new(300, 0);
        t.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME).unwrap();
        let (_live, e) = look(t.into());
        assert_eq!(e.settime_flags, 1);
        let (_again, f) = look(make(&e).unwrap());
        assert!((299..=300).contains(&f.vsec));
        assert_eq!((f.isec, f.settime_flags), (0, 1));
    }

    #[test]
    fn what_never_ends_goes_on_never_to_end() {
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        let t = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::empty()).unwrap();
        t.set(Expiration::OneShot(TimeSpec::new(i64::MAX, 0)), flags).unwrap();
        let mut t = OwnedFd::from(t);
        for _ in 0..3 {
            let (_live, e) = look(t);
            assert_eq!(e.settime_flags, 3);
            assert!(e.vsec > 4_000_000_000, "{e:?}");
            t = make(&e).unwrap();
        }
    }

    #[test]
    fn impossible_times_are_refused() {
        assert!(make(&TimerfdEntry { vnsec: 1 << 40, ..TimerfdEntry::default() }).is_err());
        assert!(make(&TimerfdEntry { vsec: 1 << 40, ..TimerfdEntry::default() }).is_err());
        assert!(make(&TimerfdEntry { clockid: 77, ..TimerfdEntry::default() }).is_err());
        assert!(pair(Some("(1 2)")).is_err());
    }
}
