//! What a checkpoint of a running container would meet, told without stopping it: what it would refuse, what a restore
//! would not bring back, and what would take long.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use oci_spec::runtime::Spec;
use serde::Serialize;

use crate::checkpoint::context::{Options, Source};
use crate::checkpoint::files::uring;
use crate::checkpoint::memory::look::Looks;
use crate::checkpoint::namespaces::Kind;
use crate::checkpoint::task::status::Status;
use crate::checkpoint::{Error, Freezer, check};
use crate::sys::procfs::read_text;

/// The outlook for one container.
#[derive(Debug, Serialize)]
pub struct Outlook {
    /// Container id.
    pub id: String,
    /// Nothing would be refused.
    pub possible: bool,
    /// Processes of the container.
    pub processes: usize,
    /// Their threads.
    pub threads: usize,
    /// Memory of their own, in bytes; shared pages count for each.
    pub private_bytes: u64,
    /// Shared memory, in bytes; shared pages count for each.
    pub shared_bytes: u64,
    /// Everything worth saying.
    pub findings: Vec<Finding>,
    /// How long the look took, in microseconds.
    pub took_us: u64,
}

/// What becomes of a thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    /// The checkpoint is refused.
    Refused,
    /// A restore does not bring it back.
    Lost,
    /// It takes long.
    Slow,
}

/// One thing.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// What becomes of it.
    pub fate: Fate,
    /// In one sentence, with the remedy.
    pub message: String,
    /// Process, by its id inside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Descriptor of that process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// File, as the container sees it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn refused(error: &Error) -> Self {
        let fields = error.fields();
        Self {
            fate: Fate::Refused,
            message: error.to_string(),
            pid: fields.pid,
            fd: fields.fd,
            path: fields.path.as_ref().map(|p| p.display().to_string()),
            remedy: fields.remedy.clone(),
        }
    }

    fn note(fate: Fate, what: String, remedy: &str) -> Self {
        let message = format!("{what}; {remedy}");
        Self { fate, message, pid: None, fd: None, path: None, remedy: Some(remedy.to_owned()) }
    }
}

/// From so much on, memory is worth a word.
const MUCH: u64 = 256 << 20;

/// Looks at a container.
pub fn look(options: &Options, source: &Source, freezer: &dyn Freezer) -> Outlook {
    let started = Instant::now();
    let mut looks = Looks::default();
    let refused = check::check(options, source, freezer, false, &mut looks);
    let mut findings: Vec<Finding> = refused.iter().map(Finding::refused).collect();
    let pids = freezer.pids().unwrap_or_default();
    let size = pids.iter().filter_map(|pid| Size::of(*pid)).fold(Size::default(), Size::plus);
    findings.extend(slow(&size));
    findings.extend(uring::under_way(source.init, &looks).iter().map(|error| Finding {
        fate: Fate::Slow,
        message: format!("{error}; a checkpoint waits for them, and is refused if they do not end"),
        ..Finding::refused(error)
    }));
    findings.extend(clients_of_exec(options, source, &pids));
    findings.extend(lost(options, source));
    Outlook {
        id: source.id.clone(),
        possible: refused.is_empty(),
        processes: pids.len(),
        threads: size.threads,
        private_bytes: size.private,
        shared_bytes: size.shared,
        findings,
        took_us: micros(started.elapsed()),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// How big processes are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Size {
    threads: usize,
    private: u64,
    shared: u64,
}

impl Size {
    fn of(pid: i32) -> Option<Self> {
        Some(Self::parse(&read_text(format!("/proc/{pid}/status")).ok()?))
    }

    fn parse(status: &str) -> Self {
        let fields: BTreeMap<&str, &str> = status.lines().filter_map(|line| line.split_once(':')).collect();
        let number = |name: &str| {
            let word = fields.get(name).and_then(|text| text.split_whitespace().next());
            word.and_then(|word| word.parse::<u64>().ok()).unwrap_or(0)
        };
        Self {
            threads: usize::try_from(number("Threads")).unwrap_or(0),
            private: number("RssAnon") << 10,
            shared: number("RssShmem") << 10,
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            threads: self.threads + other.threads,
            private: self.private.saturating_add(other.private),
            shared: self.shared.saturating_add(other.shared),
        }
    }
}

fn slow(size: &Size) -> Vec<Finding> {
    let mut found = Vec::new();
    if size.private >= MUCH {
        let what = format!("{} MiB of memory are written", size.private >> 20);
        found.push(Finding::note(
            Fate::Slow,
            what,
            "checkpoint --precopy, or --pre-dump beforehand, writes most of it while the container runs",
        ));
    }
    if size.shared >= MUCH {
        let what = format!(
            "{} MiB of shared memory are written while the container stands still",
            size.shared >> 20
        );
        found.push(Finding::note(Fate::Slow, what, "checkpoint --precopy writes most of it before"));
    }
    found
}

/// Processes of exec come back without whoever had started them.
fn clients_of_exec(options: &Options, source: &Source, pids: &[i32]) -> Option<Finding> {
    let known: BTreeSet<i32> = pids.iter().copied().collect();
    let from_outside = |pid: &&i32| {
        **pid != source.init && Status::of(**pid).is_ok_and(|status| !known.contains(&status.ppid))
    };
    let count = if options.keep_exec { pids.iter().filter(from_outside).count() } else { 0 };
    let remedy = "restore --exec-console-socket gives their terminals to somebody else";
    (count > 0).then(|| {
        let what = format!(
            "{count} processes of exec lose their clients: their pipes end, their terminals are hung up"
        );
        Finding::note(Fate::Lost, what, remedy)
    })
}

fn lost(options: &Options, source: &Source) -> Vec<Finding> {
    let owned = Kind::Net.owned(source.init, &source.spec).unwrap_or(false);
    if !owned || options.empty_network || options.keep_network {
        return Vec::new();
    }
    let devices = std::fs::read_to_string(format!("/proc/{}/net/dev", source.init)).unwrap_or_default();
    let names = devices_of(&devices, &moved_in(&source.spec));
    if names.is_empty() {
        return Vec::new();
    }
    let what = format!("the network devices {} are not saved", names.join(", "));
    let remedy = "whoever restores the container must attach it to its network again, as Docker and Podman do; or keep them with \
         checkpoint --keep-network";
    vec![Finding::note(Fate::Lost, what, remedy)]
}

/// Network devices that the kernel does not make itself, without those that config.json moves in.
fn devices_of(table: &str, moved_in: &BTreeSet<String>) -> Vec<String> {
    let names = table.lines().skip(2).filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    let own =
        ["lo", "tunl0", "sit0", "gre0", "gretap0", "erspan0", "ip6tnl0", "ip6gre0", "ip_vti0", "ip6_vti0"];
    names.filter(|n| !own.contains(n) && !moved_in.contains(*n)).map(str::to_owned).collect()
}

fn moved_in(spec: &Spec) -> BTreeSet<String> {
    let devices = spec.linux().as_ref().and_then(|l| l.net_devices().as_ref());
    let name = |(old, device): (&String, &oci_spec::runtime::LinuxNetDevice)| {
        device.name().clone().unwrap_or_else(|| old.clone())
    };
    devices.into_iter().flatten().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_add_up() {
        let one = Size::parse("Name:\tx\nThreads:\t3\nRssAnon:\t  1024 kB\nRssShmem:\t 8 kB\n");
        assert_eq!(one, Size { threads: 3, private: 1 << 20, shared: 8 << 10 });
        let much = Size::default().plus(one).plus(Size { threads: 1, private: MUCH, shared: MUCH });
        assert_eq!(much.threads, 4);
        let fates: Vec<_> = slow(&much).iter().map(|f| f.fate).collect();
        assert_eq!(fates, [Fate::Slow, Fate::Slow]);
        assert!(slow(&Size::default()).is_empty());
    }

    #[test]
    fn devices_made_by_somebody_are_named() {
        let table = "Inter-|\n face |\n    lo: 0 0\n  eth0: 1 2\nsit0: 0\n in0: 0\n";
        assert_eq!(devices_of(table, &["in0".to_owned()].into()), ["eth0"]);
    }
}
