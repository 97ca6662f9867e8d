//! Locks on open files: fcntl(2) of both kinds, flock(2), and leases.
//!
//! ```text
//!   /proc/PID/fdinfo/FD     lock: 1: POSIX  ADVISORY  WRITE 4711 fe:00:1234 0 EOF
//!                                    POSIX   belongs to a table of descriptors and a file
//!                                    others  belong to an open file description
//!   filelocks.img           FileLockEntry { flag, type, pid, fd, start, len }
//!   restore                 that task sets it, once it has its descriptors and opens no file any more: closing one
//!                           would release its POSIX locks
//! ```
//!
//! A dump has to be told to keep locks: until the restore the file is unlocked, for everyone who can reach it.

use nix::errno::Errno;

use crate::checkpoint::context::{Dump, NewTask, Options};
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::Files;
use crate::checkpoint::image::FileLockEntry;
use crate::checkpoint::remote::Batch;
use crate::checkpoint::{Error, Result};

/// The kinds of locks, as CRIU numbers them.
const POSIX: u32 = 1;
const FLOCK: u32 = 2;
const OFD: u32 = 4;
const LEASE: u32 = 8;

/// Refuses locks that are not to be kept, or can't be.
pub fn check(options: &Options, live: &Live) -> Result<()> {
    let Some(line) = live.info.all("lock").next() else { return Ok(()) };
    if !options.file_locks {
        let kind: Vec<&str> = line.split_whitespace().skip(1).take(3).collect();
        return Err(live
            .name(Error::new(format!("the process holds a lock on an open file: {}", kind.join(" "))))
            .remedy("checkpoint with --file-locks, if nobody outside can take the lock before the restore"));
    }
    held(live).map(drop).map_err(|e| live.name(e))
}

fn held(live: &Live) -> Result<Vec<FileLockEntry>> {
    live.info.all("lock").filter_map(|line| parse(line).transpose()).collect()
}

/// `1: POSIX  ADVISORY  WRITE 4711 fe:00:1234 0 EOF`; None for one that waits for another.
fn parse(line: &str) -> Result<Option<FileLockEntry>> {
    let bad = || Error::new(format!("fdinfo of a lock not understood: {line:?}"));
    let words: Vec<&str> = line.split_whitespace().collect();
    let &[_, kind, state, mode, _, _, start, end] = &words[..] else {
        return if words.get(1) == Some(&"->") { Ok(None) } else { Err(bad()) };
    };
    let flag = match kind {
        "POSIX" => POSIX,
        "FLOCK" => FLOCK,
        "OFDLCK" => OFD,
        "LEASE" => LEASE,
        _ => return Err(Error::new(format!("a lock of kind {kind} cannot be checkpointed"))),
    };
    if flag == LEASE && state != "ACTIVE" {
        return Err(Error::new("a lease is being broken")
            .remedy("let the program give it up, and try again")
            .passing());
    }
    let r#type = match mode {
        "READ" => libc::F_RDLCK,
        "WRITE" => libc::F_WRLCK,
        _ => return Err(bad()),
    };
    let start: i64 = start.parse().map_err(|_| bad())?;
    let len = match end {
        "EOF" => 0,
        end => end.parse::<i64>().ok().and_then(|e| e.checked_sub(start)?.checked_add(1)).ok_or_else(bad)?,
    };
    let r#type = r#type.cast_unsigned();
    Ok(Some(FileLockEntry { flag, r#type, pid: 0, fd: 0, start, len }))
}

/// Records the locks of a descriptor, file `id` in table `table`, that no other has shown.
pub fn dump(dump: &mut Dump<'_>, live: &Live, table: u32, id: u32) -> Result<()> {
    check(dump.options, live)?;
    let locks = held(live)?;
    let (posix, others): (Vec<_>, Vec<_>) = locks.into_iter().partition(|lock| lock.flag == POSIX);
    for (owner, locks) in [(table, posix), (0, others)] {
        if locks.is_empty() || !dump.files.locks.insert((owner, id)) {
            continue;
        }
        let own = |lock| FileLockEntry { pid: live.vpid, fd: live.fd, ..lock };
        dump.model.filelocks.extend(locks.into_iter().map(own));
    }
    Ok(())
}

/// Refuses a file that is on its way through a socket: no descriptor would set its lock again.
pub fn refuse(live: &Live) -> Result<()> {
    match live.info.field("lock") {
        None => Ok(()),
        Some(_) => Err(live.name(Error::new("a file with a lock is on its way through a unix socket"))),
    }
}

/// `struct flock`.
fn range(lock: &FileLockEntry) -> [u64; 4] {
    let kind = u64::from(lock.r#type & 0xffff);
    [kind | (libc::SEEK_SET as u64) << 16, lock.start.cast_unsigned(), lock.len.cast_unsigned(), 0]
}

/// The call that sets a lock.
fn set(batch: &mut Batch, lock: &FileLockEntry) -> Result<()> {
    let unknown = || Error::new(format!("the images have a lock of kind {} {}", lock.flag, lock.r#type));
    let fd = lock.fd;
    let write = match lock.r#type.cast_signed() {
        libc::F_RDLCK => false,
        libc::F_WRLCK => true,
        _ => return Err(unknown()),
    };
    match lock.flag {
        POSIX | OFD => {
            let command = if lock.flag == POSIX { libc::F_SETLK } else { libc::F_OFD_SETLK };
            let range = batch.words(&range(lock));
            batch.call(libc::SYS_fcntl, &[fd.into(), command.into(), range]);
        }
        FLOCK => {
            let how = if write { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
            batch.call(libc::SYS_flock, &[fd.into(), how.into()]);
        }
        LEASE => {
            batch.call(libc::SYS_fcntl, &[fd.into(), libc::F_SETLEASE.into(), lock.r#type.into()]);
        }
        _ => return Err(unknown()),
    }
    Ok(())
}

impl Files<'_> {
    /// Sets the locks of a task.
    pub(super) fn lock(&self, task: &mut NewTask) -> Result<()> {
        for lock in self.restore.model.filelocks.iter().filter(|l| l.pid == task.vpid) {
            let mut batch = Batch::new();
            batch.about("cannot lock an open file again");
            set(&mut batch, lock)?;
            task.injection.run(&batch).map_err(|e| {
                let e = e.pid(task.vpid).fd(lock.fd);
                match e.errno() {
                    Some(Errno::EAGAIN | Errno::EACCES) => e.remedy("somebody else has locked it meanwhile"),
                    _ => e,
                }
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    #[test]
    fn lines_are_parsed() {
        let lock = parse("1: POSIX  ADVISORY  READ 4711 fe:00:1234 128 255").unwrap().unwrap();
        assert_eq!((lock.flag, lock.r#type, lock.start, lock.len), (1, 0, 128, 128));
        assert_eq!(range(&lock), [0, 128, 128, 0]);
        let lock = parse("12: OFDLCK ADVISORY  WRITE -1 fe:00:1234 5 EOF").unwrap().unwrap();
        assert_eq!((lock.flag, lock.r#type, lock.start, lock.len), (4, 1, 5, 0));
        assert!(parse("1: -> POSIX  ADVISORY  READ 1 fe:00:1 0 EOF").unwrap().is_none());
        assert!(
            parse("1: LEASE  BREAKING  READ 1 fe:00:1 0 EOF").unwrap_err().to_string().contains("broken")
        );
        assert!(parse("1: POSIX  ADVISORY  READ 1 fe:00:1 9 -9223372036854775808").is_err());
        assert!(parse("1: DELEG  ACTIVE  READ 1 fe:00:1 0 EOF").is_err());
        assert!(parse("").is_err());
    }

    #[test]
    fn a_lock_is_seen_and_refused_unless_it_is_to_be_kept() {
        let file = tempfile::tempfile().unwrap();
        let lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).unwrap();
        let live = Live::own(OwnedFd::from(lock.try_clone().unwrap()), 9).unwrap();
        let e = check(&Options::default(), &live).unwrap_err().to_string();
        assert!(e.contains("FLOCK ADVISORY WRITE") && e.contains("--file-locks"), "{e}");
        let keep = Options { file_locks: true, ..Options::default() };
        check(&keep, &live).unwrap();
        assert_eq!(held(&live).unwrap().len(), 1);
        assert!(refuse(&live).is_err());
    }
}
