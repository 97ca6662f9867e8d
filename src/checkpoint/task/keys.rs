//! Keys in the keyrings of a thread, of its process and of its session: keyctl(2).
//!
//! A program knows its keys by serial numbers, which the kernel chooses, and some kinds cannot be read: they are not
//! restored, and a thread that has any is refused. Keyrings alone are no loss: the container gets one of its own, and
//! those of users live on in the kernel.
//!
//! From outside only the container's session keyring can be found, for it has a name; whose another one is only its
//! threads can tell, once they stand still.

use crate::checkpoint::context::Source;
use crate::checkpoint::namespaces::user;
use crate::checkpoint::remote::{Batch, Call, Injection, Out, Results};
use crate::checkpoint::{Error, Result};
use crate::sys::keyring;

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

/// The serial number in a line of `/proc/keys`, if it is that of the keyring called `named`.
fn serial_of(line: &str, named: &str) -> Option<i32> {
    // 2a4d1b7c I--Q---     2 perm 3f0b0000     0     0 keyring   _ses.c: 1
    let mut words = line.split_ascii_whitespace();
    let serial = words.next()?;
    let keyring = words.nth(6)? == "keyring" && words.next()?.strip_suffix(':')? == named;
    keyring.then(|| i32::from_str_radix(serial, 16).ok()).flatten()
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
            return Ok(());
        }
        let results = injection.run(&batch)?;
        for (text, call, serial, whose) in asked {
            if results.ret(call) >= 0 {
                let text = String::from_utf8_lossy(results.out(text));
                refuse(text.split('\0').next().unwrap_or(""), serial, whose)?;
            }
        }
        Ok(())
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
    fn keys_are_refused_by_name_and_keyrings_are_not() {
        refuse("keyring;0;65534;1f3f0000;_uid.0", 7, "session").unwrap();
        let error = refuse("user;0;0;3f010000;a;b", 7, "process").unwrap_err().to_string();
        assert!(error.contains("key 7 of type user, \"a;b\", in the keyring of a process"), "{error}");
    }
}
