//! Keys in the keyrings of a thread, of its process and of its session: keyctl(2).
//!
//! A program knows its keys by serial numbers, which the kernel chooses, and some kinds cannot be read: they are not
//! restored, and a thread that has any is refused. Keyrings alone are no loss: the container gets one of its own, and
//! those of users live on in the kernel.
//!
//! From outside only the container's session keyring can be found, for it has a name. Whose another one is only threads can
//! tell: where one of their user has something in it, each is asked, stopped for a moment; and again once all stand still,
//! for a keyring may hide from its own user.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::checkpoint::context::Source;
use crate::checkpoint::namespaces::user;
use crate::checkpoint::remote::{Batch, Call, Injection, Out, Results, Stop, Thread};
use crate::checkpoint::task::status::{self, Status};
use crate::checkpoint::{Error, Result};
use crate::sys::{credentials, keyring};

const KEYCTL_DESCRIBE: u64 = 6;
const KEYCTL_READ: u64 = 11;
/// `KEY_SPEC_THREAD_KEYRING`, `KEY_SPEC_PROCESS_KEYRING`, `KEY_SPEC_SESSION_KEYRING`.
const KEYRINGS: [(i32, &str); 3] = [(-1, "thread"), (-2, "process"), (-3, "session")];
/// Keys of a keyring that are looked at.
const MOST: usize = 64;
/// Bytes of a key's description.
const TEXT: usize = 256;

/// Looks at the session keyring that the container was started with.
pub fn check(source: &Source) -> Result<()> {
    let named = format!("_ses.{}", source.id);
    user::as_root_in(source.init, || {
        // What nobody may look at from here is looked at later.
        let all = std::fs::read_to_string("/proc/keys").unwrap_or_default();
        let keys = all.lines().filter_map(|line| serial_of(line, &named));
        for key in keys.flat_map(|session| keyring::list(session).unwrap_or_default()) {
            keyring::describe(key).map_or(Ok(()), |text| refuse(&text, key, "session"))?;
        }
        Ok(())
    })
}

/// Looks for keys of running processes: pids of this host and inside, and what is known of them.
pub fn check_threads(tasks: &[(i32, i32, Status)]) -> Vec<Error> {
    let mut suspects: BTreeMap<u32, Suspects> = BTreeMap::new();
    let mut found = Vec::new();
    for (pid, vpid, status) in tasks {
        let uid = status.uid[0];
        let theirs = *suspects.entry(uid).or_insert_with(|| Suspects::of(uid, status.gid[0]));
        // Whoever is traced, or stopped, or waits for a child that it shares its memory with, does not answer now.
        if theirs == Suspects::None || status.tracer != 0 || !matches!(status.state, 'R' | 'S') {
            continue;
        }
        let tids = match theirs {
            Suspects::OfThreads => status::threads(*pid).unwrap_or_default(),
            _ => vec![*pid],
        };
        // Who ends meanwhile, or cannot be asked, is asked once it stands still.
        let keys = tids.into_iter().filter_map(|tid| in_passing(tid).ok()).flatten();
        let refused = keys.filter_map(|key| refuse(&key.text, key.serial, key.whose).err());
        found.extend(refused.take(1).map(|error| error.pid(*vpid)));
    }
    found
}

/// How long a thread may take to stop.
const PATIENCE: Duration = Duration::from_millis(200);

/// The keys of a running thread, stopped for a moment.
fn in_passing(tid: i32) -> Result<Vec<Key>> {
    let thread = Thread::seize(tid)?;
    if !matches!(thread.stop(Instant::now() + PATIENCE)?, Stop::Trap) {
        return Ok(Vec::new());
    }
    let mut injection = Injection::start(&thread)?;
    let mut batch = Batch::new();
    batch.about("cannot ask a thread for its keys");
    let ask = Ask::new(&mut batch);
    let keys = injection.run(&batch).and_then(|results| ask.keys(&results, &mut injection));
    injection.finish()?;
    thread.detach()?;
    keys
}

/// What keyrings a user has on this host that may be those of a container's threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Suspects {
    None,
    /// Those of processes and sessions.
    OfProcesses,
    /// Those of threads, too.
    OfThreads,
}

impl Suspects {
    fn of(uid: u32, gid: u32) -> Self {
        let look = || {
            // Who cannot look as that user leaves it to the threads.
            credentials::keep_capabilities().ok()?;
            credentials::set_thread_ids(uid, gid).ok()?;
            let all = std::fs::read_to_string("/proc/keys").ok()?;
            all.lines().filter_map(|line| Self::of_line(line, uid)).max()
        };
        std::thread::scope(|scope| scope.spawn(look).join().ok().flatten()).unwrap_or(Self::None)
    }

    /// Of a keyring with something in it that is no keyring, or that nobody but its possessor can read.
    fn of_line(line: &str, uid: u32) -> Option<Self> {
        let (serial, name) = keyring_of(line)?;
        let mut words = line.split_ascii_whitespace();
        let (owner, count) = (words.nth(5)?, words.next_back()?);
        let elsewhere = ["_ses.", "_uid", "_persistent", "."].iter().any(|start| name.starts_with(start));
        if elsewhere || owner.parse() != Ok(uid) || count.parse::<u32>().is_err() {
            return None;
        }
        let is_keyring = |key: i32| keyring::describe(key).is_ok_and(|text| text.starts_with("keyring;"));
        match keyring::list(serial) {
            Ok(keys) if keys.iter().copied().all(is_keyring) => None,
            _ if name == "_tid" => Some(Self::OfThreads),
            _ => Some(Self::OfProcesses),
        }
    }
}

/// The serial number and the name in a line of `/proc/keys`, if it is that of a keyring.
fn keyring_of(line: &str) -> Option<(i32, &str)> {
    // 2a4d1b7c I--Q---     2 perm 3f0b0000     0     0 keyring   _ses.c: 1
    let mut words = line.split_ascii_whitespace();
    let serial = i32::from_str_radix(words.next()?, 16).ok()?;
    (words.nth(6)? == "keyring").then_some(())?;
    Some((serial, words.next()?.strip_suffix(':')?))
}

/// The serial number in a line of `/proc/keys`, if it is that of the keyring called `named`.
fn serial_of(line: &str, named: &str) -> Option<i32> {
    keyring_of(line).filter(|(_, name)| *name == named).map(|(serial, _)| serial)
}

/// A key that a thread has told of.
#[derive(Debug)]
struct Key {
    serial: i32,
    /// As [`keyring::describe`] has it.
    text: String,
    whose: &'static str,
}

/// Asks a thread for its keys.
#[derive(Debug)]
pub struct Ask([(Out, Call); 3]);

impl Ask {
    /// Adds the questions to `batch`.
    pub fn new(batch: &mut Batch) -> Self {
        Self(KEYRINGS.map(|(keyring, _)| {
            let out = batch.out(MOST * 4);
            let args = [KEYCTL_READ.into(), keyring.into(), out.arg(), out.len().into()];
            let call = batch.call(libc::SYS_keyctl, &args);
            // There is no such keyring, it may not be read, or the kernel has none at all.
            (out, batch.tolerate(call))
        }))
    }

    /// Refuses what is more than a keyring.
    pub fn answer(&self, results: &Results, injection: &mut Injection) -> Result<()> {
        let keys = self.keys(results, injection)?;
        keys.iter().try_for_each(|key| refuse(&key.text, key.serial, key.whose))
    }

    fn keys(&self, results: &Results, injection: &mut Injection) -> Result<Vec<Key>> {
        let mut batch = Batch::new();
        let mut asked = Vec::new();
        for ((out, call), (_, whose)) in self.0.iter().zip(KEYRINGS) {
            let length = usize::try_from(results.ret(*call)).unwrap_or(0).min(out.len());
            for at in (0..length).step_by(4) {
                let text = batch.out(TEXT);
                let serial = results.i32(*out, at);
                let args = [KEYCTL_DESCRIBE.into(), serial.into(), text.arg(), TEXT.into()];
                let call = batch.call(libc::SYS_keyctl, &args);
                asked.push((text, batch.tolerate(call), serial, whose));
            }
        }
        if asked.is_empty() {
            return Ok(Vec::new());
        }
        let results = injection.run(&batch)?;
        let told = asked.into_iter().filter(|(_, call, ..)| results.ret(*call) >= 0);
        let key = |(text, _, serial, whose): (Out, Call, i32, &'static str)| {
            let text = String::from_utf8_lossy(results.out(text));
            Key { serial, text: text.split('\0').next().unwrap_or("").to_owned(), whose }
        };
        Ok(told.map(key).collect())
    }
}

/// `text`: type;uid;gid;perm;description
fn refuse(text: &str, serial: i32, whose: &str) -> Result<()> {
    let mut parts = text.splitn(5, ';');
    let (kind, name) = (parts.next().unwrap_or(""), parts.nth(3).unwrap_or(""));
    if kind == "keyring" {
        return Ok(());
    }
    Err(Error::new(format!(
        "cannot checkpoint key {serial} of type {kind}, {name:?}, in the keyring of a {whose}"
    ))
    .remedy("let the program unlink the key before the checkpoint"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keyring_is_found_by_its_name() {
        let line = "2a4d1b7c I--Q---     2 perm 3f0b0000     0     0 keyring   _ses.c: 1";
        assert_eq!(serial_of(line, "_ses.c"), Some(0x2a4d_1b7c));
        assert_eq!(serial_of(line, "_ses.cc"), None);
        assert_eq!(serial_of("2a4d1b7c I--Q--- 2 perm 3f0b0000 0 0 user _ses.c: 1", "_ses.c"), None);
        assert_eq!(serial_of("2a4d1b7c I--Q---", "_ses.c"), None);
    }

    #[test]
    fn only_keyrings_of_the_user_that_hold_something_are_suspect() {
        let of = |name: &str, count: &str| {
            // Nobody has a key of that number.
            let line = format!("7fffffff I--Q---     2 perm 3f1b0000  1000     0 keyring   {name}: {count}");
            (Suspects::of_line(&line, 1000), Suspects::of_line(&line, 7))
        };
        assert_eq!(of("_tid", "1"), (Some(Suspects::OfThreads), None));
        assert_eq!(of("_pid", "12"), (Some(Suspects::OfProcesses), None));
        for (name, count) in [("_pid", "empty"), ("_ses.other", "1"), ("_uid.1000", "1"), ("_uid_ses.0", "1")]
        {
            assert_eq!(of(name, count), (None, None), "{name}: {count}");
        }
        assert_eq!(Suspects::of_line("2a4d1b7c I--Q--- 2 perm 3f0b0000 7 0 user a: 1", 7), None);
    }

    #[test]
    fn keys_are_refused_by_name_and_keyrings_are_not() {
        refuse("keyring;0;65534;1f3f0000;_uid.0", 7, "session").unwrap();
        let error = refuse("user;0;0;3f010000;a;b", 7, "process").unwrap_err().to_string();
        assert!(error.contains("key 7 of type user, \"a;b\", in the keyring of a process"), "{error}");
    }
}
