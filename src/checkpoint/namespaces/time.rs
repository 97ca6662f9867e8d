//! Clocks. The image has what the container's clocks showed, not offsets: at a restore, on whatever machine and
//! after whatever time, the new offsets are the difference to the clocks of that machine.
//!
//! ```text
//!   dump:     shown = our clock - our offset + the container's offset
//!   restore:  offset = shown - (our clock - our offset)          so they go on where they stopped
//! ```
//!
//! A container without a time namespace sees the clocks of its machine. On the same machine they are right after a
//! restore, too. Elsewhere, or after a reboot, they may have gone back, or be days ahead, and programs count on
//! neither: then the restore makes a time namespace that config.json does not ask for.

use std::collections::HashMap;

use nix::time::{ClockId, clock_gettime};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxTimeOffset, Spec};

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{TimensEntry, Timespec};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::kind::Kind;

/// The name of this room's extension in stasis.img: which boot of which machine the clocks are counted from.
const EXTENSION: &str = "boot";

/// Nanoseconds in a second.
const SECOND: i128 = 1_000_000_000;

/// What to write into timens_offsets, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offsets {
    /// Of CLOCK_MONOTONIC.
    pub monotonic: i128,
    /// Of CLOCK_BOOTTIME.
    pub boottime: i128,
}

impl Offsets {
    /// As the kernel reads them from /proc/PID/timens_offsets; seconds may be negative, nanoseconds may not.
    pub fn lines(&self) -> String {
        let line = |name, n: i128| format!("{name} {} {}\n", n.div_euclid(SECOND), n.rem_euclid(SECOND));
        line("monotonic", self.monotonic) + &line("boottime", self.boottime)
    }

    /// As config.json has them.
    fn for_config(&self) -> Result<HashMap<String, LinuxTimeOffset>> {
        let offset = |n: i128| -> Result<LinuxTimeOffset> {
            let range = |_| Error::new("the images show a time that no clock can show");
            let mut offset = LinuxTimeOffset::default();
            offset.set_secs(Some(i64::try_from(n.div_euclid(SECOND)).map_err(range)?));
            offset.set_nanosecs(Some(u32::try_from(n.rem_euclid(SECOND)).map_err(range)?));
            Ok(offset)
        };
        [("monotonic", self.monotonic), ("boottime", self.boottime)]
            .into_iter()
            .map(|(clock, n)| Ok((clock.to_owned(), offset(n)?)))
            .collect()
    }

    /// Those of a process.
    fn of(pid: &str) -> Result<Self> {
        let path = format!("/proc/{pid}/timens_offsets");
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e).during("cannot read the offsets of the clocks", || format!("read({path:?})")),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let mut offsets = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let name = words.next();
            let mut number = || words.next().and_then(|w| w.parse::<i128>().ok());
            let (Some(name), Some(seconds), Some(nanoseconds)) = (name, number(), number()) else {
                return Err(Error::new(format!("the offsets of the clocks are unreadable: {line:?}")));
            };
            let value = seconds * SECOND + nanoseconds;
            match name {
                "monotonic" | "1" => offsets.monotonic = value,
                "boottime" | "7" => offsets.boottime = value,
                other => return Err(Error::new(format!("there is a clock {other:?}, which is unknown"))),
            }
        }
        Ok(offsets)
    }
}

/// Notes what the container's clocks show.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let init = dump.source.init;
    let own = Kind::Time.private(init)?;
    let entry = shown(init)?;
    // CRIU looks for 0 where the container has no time namespace of its own.
    dump.model.timens.insert(if own { Kind::Time.id(true) } else { 0 }, entry);
    dump.model.set_extension(EXTENSION, &boot()?)
}

/// What the clocks of a process show.
fn shown(pid: i32) -> Result<TimensEntry> {
    let now = here()?;
    let there = Offsets::of(&pid.to_string())?;
    let shown =
        Offsets { monotonic: now.monotonic + there.monotonic, boottime: now.boottime + there.boottime };
    Ok(TimensEntry { monotonic: timespec(shown.monotonic)?, boottime: timespec(shown.boottime)? })
}

/// Notes what the clocks show in a namespace that the container has made; `pids` are in it.
pub fn save(dump: &mut Dump<'_>, id: u32, pids: &[i32]) -> Result<()> {
    let Some(pid) = pids.first() else {
        return Err(Error::new("a time namespace without a process cannot be checkpointed")
            .remedy("let the program close its descriptor of it"));
    };
    dump.model.timens.insert(id, shown(*pid)?);
    Ok(())
}

/// Sets the clocks that the children of a process will see, where none has been born yet.
pub fn put_back(restore: &Restore<'_>, id: u32, pid: i32) -> Result<()> {
    let Some(shown) = restore.model.timens.get(&id) else { return Ok(()) };
    let (path, lines) = (format!("/proc/{pid}/timens_offsets"), since(shown)?.lines());
    std::fs::write(&path, &lines).during("cannot set the clocks", || format!("write({path:?}, {lines:?})"))
}

/// Has the container made with clocks that go on where they stopped, whatever config.json says of them; unless it joins
/// a time namespace, or never had one and the machine's own clocks are still right. Nothing without time namespaces
/// (Linux 5.6, CONFIG_TIME_NS).
pub fn go_on(model: &Model, spec: &mut Spec) -> Result<()> {
    let boot = model.extension::<String>(EXTENSION)?;
    let same = if boot.is_empty() { None } else { Some(boot == self::boot()?) };
    let Some(offsets) = offsets(model, same)? else { return Ok(()) };
    let mut linux = spec.linux().clone().unwrap_or_default();
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    match namespaces.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Time) {
        Some(joined) if joined.path().is_some() => return Ok(()),
        Some(_) => {}
        None => {
            let mut new = LinuxNamespace::default();
            new.set_typ(LinuxNamespaceType::Time);
            namespaces.push(new);
        }
    }
    linux.set_namespaces(Some(namespaces));
    linux.set_time_offsets(Some(offsets.for_config()?));
    spec.set_linux(Some(linux));
    Ok(())
}

/// The offsets under which the container's clocks go on where they stopped, if it needs any. `same`: whether the images
/// are of this boot of this machine, if they say.
fn offsets(model: &Model, same: Option<bool>) -> Result<Option<Offsets>> {
    let (id, none) = (Kind::Time.inits(model), 0);
    let own = model.timens.get(&id).filter(|_| id != none);
    let Some(shown) = own.or_else(|| model.timens.get(&none)) else { return Ok(None) };
    if Kind::Time.of("self")?.is_none() {
        return Ok(None);
    }
    let offsets = since(shown)?;
    let right = same.unwrap_or(offsets.monotonic <= 0 && offsets.boottime <= 0);
    Ok((own.is_some() || !right).then_some(offsets))
}

/// Names the boot that the machine's clocks are counted from.
fn boot() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(path).during("cannot tell this boot", || format!("read({path:?})"))?;
    Ok(id.trim_end().to_owned())
}

/// The offsets under which clocks show that now.
fn since(shown: &TimensEntry) -> Result<Offsets> {
    let now = here()?;
    let of = |t: &Timespec| i128::from(t.tv_sec) * SECOND + i128::from(t.tv_nsec);
    Ok(Offsets {
        monotonic: of(&shown.monotonic) - now.monotonic,
        boottime: of(&shown.boottime) - now.boottime,
    })
}

/// The machine's clocks, without the offsets that we are under.
fn here() -> Result<Offsets> {
    let own = Offsets::of("self")?;
    let read = |id: ClockId| -> Result<i128> {
        let now = clock_gettime(id).during("cannot read a clock", || format!("clock_gettime({id})"))?;
        Ok(i128::from(now.tv_sec()) * SECOND + i128::from(now.tv_nsec()))
    };
    Ok(Offsets {
        monotonic: read(ClockId::CLOCK_MONOTONIC)? - own.monotonic,
        boottime: read(ClockId::CLOCK_BOOTTIME)? - own.boottime,
    })
}

fn timespec(nanoseconds: i128) -> Result<Timespec> {
    match (u64::try_from(nanoseconds.div_euclid(SECOND)), u64::try_from(nanoseconds.rem_euclid(SECOND))) {
        (Ok(tv_sec), Ok(tv_nsec)) => Ok(Timespec { tv_sec, tv_nsec }),
        _ => Err(Error::new("a clock of the container shows a time before its start")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read_as_the_kernel_prints_them() {
        let offsets =
            Offsets::parse("monotonic           0         0\nboottime       -10 999999999\n").unwrap();
        assert_eq!(offsets, Offsets { monotonic: 0, boottime: -9_000_000_001 });
        assert_eq!(offsets.lines(), "monotonic 0 0\nboottime -10 999999999\n");
        assert!(Offsets::parse("monotonic 1").is_err() && Offsets::parse("tai 0 0").is_err());
    }

    #[test]
    fn a_clock_goes_on_where_it_stopped() {
        let mut model = Model::default();
        assert_eq!(offsets(&model, Some(false)).unwrap(), None);
        let shown = |s| Timespec { tv_sec: s, tv_nsec: 5 };
        model.timens.insert(0, TimensEntry { monotonic: shown(7_000_000_000), boottime: shown(0) });
        assert_eq!(
            offsets(&model, Some(true)).unwrap(),
            None,
            "the same machine, and no namespace of its own"
        );
        if let Some(new) = offsets(&model, None).unwrap() {
            assert!(new.monotonic > 0, "nobody knows which machine, but clocks would go back");
        }
        if let Some(new) = offsets(&model, Some(false)).unwrap() {
            let now = here().unwrap();
            let shown = now.monotonic + new.monotonic;
            assert!((7_000_000_000 * SECOND..7_000_000_010 * SECOND).contains(&shown), "{shown}");
            assert!(new.boottime < 0);
        }
    }
}
