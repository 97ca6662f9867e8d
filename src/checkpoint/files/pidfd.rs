//! pidfd_open(2): a handle on a process.
//!
//! ```text
//!   fdinfo  Pid: 4711  ──> the process's number inside    opened when every process exists (late.rs)
//!           Pid: -1    ──> -1: it ended and was waited for    a child that has ended likewise
//! ```
//!
//! Handles on one process that is gone can be told from those on another by their inode, and are again afterwards.

use std::collections::BTreeMap;
use std::path::Path;

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::Surroundings;
use crate::checkpoint::files::inside::giving_birth_in;
use crate::checkpoint::files::live::Live;
use crate::checkpoint::files::opener::{Files, Opener};
use crate::checkpoint::image::{FdTypes, FileEntry, PidfdEntry};
use crate::checkpoint::namespaces::Kind;
use crate::checkpoint::task::status::Status;
use crate::checkpoint::{Error, Result};
use crate::sys::pidfd;

/// What pidfd_open(2) takes: PIDFD_NONBLOCK, and PIDFD_THREAD since Linux 6.9.
const FLAGS: u32 = (libc::O_NONBLOCK | libc::O_EXCL).cast_unsigned();

/// A pidfd.
pub fn is(live: &Live) -> bool {
    live.is_anon("pidfd")
}

/// The process on this host; None for one that is gone.
fn target(live: &Live) -> Result<Option<i32>> {
    let text = live.info.field("Pid").unwrap_or_default();
    match text.parse().map_err(|_| Error::new(format!("fdinfo of a pidfd not understood: Pid: {text:?}")))? {
        -1 => Ok(None),
        pid => Ok(Some(pid)),
    }
}

/// Refuses handles on what is not, or is less than, a process of the container.
pub fn check(live: &Live, around: &Surroundings<'_>) -> Result<()> {
    let Some(pid) = target(live).map_err(|e| live.name(e))? else { return Ok(()) };
    if live.pid == std::process::id().cast_signed() {
        return Err(live.name(Error::new("a pidfd is on its way through a unix socket")));
    }
    if around.pids.contains_key(&pid) {
        return Ok(());
    }
    if is_thread(pid, around) {
        return Err(live
            .name(Error::new("a pidfd is a handle on a thread that is not the first of its process"))
            .remedy("such a handle cannot be restored; let the program close it"));
    }
    // Born since the container's processes were listed; or its end has been since.
    if ended(pid) || is_inside(pid, live.pid) || ended(pid) {
        return Ok(());
    }
    Err(live
        .name(Error::new(format!("a pidfd is a handle on a process outside the container, {pid}")))
        .remedy("let the program close it"))
}

/// Is a process gone, or a zombie?
fn ended(pid: i32) -> bool {
    Status::of(pid).map_or(true, |status| matches!(status.state, 'Z' | 'X'))
}

/// Is a process in a pid namespace that it shares with one of the container's, and not with us?
fn is_inside(pid: i32, holder: i32) -> bool {
    let space = |pid: i32| Kind::Pid.of(&pid.to_string());
    let shared = || -> Result<bool> { Ok(space(pid)? == space(holder)? && Kind::Pid.private(holder)?) };
    shared().unwrap_or(false)
}

/// Is it a thread of one of the container's processes?
fn is_thread(tid: i32, around: &Surroundings<'_>) -> bool {
    around.pids.keys().any(|pid| Path::new(&format!("/proc/{pid}/task/{tid}")).exists())
}

/// Records a handle.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let nspid = match target(live)? {
        None => -1,
        Some(pid) => *dump.files.pids.get(&pid).ok_or_else(|| {
            Error::new(format!("a pidfd is a handle on a process outside the container, {pid}"))
        })?,
    };
    let entry = PidfdEntry {
        id,
        // As CRIU has it: the number only tells such processes apart.
        ino: live.stat.st_ino as u32,
        flags: live.info.flags & !(libc::O_ACCMODE.cast_unsigned()),
        nspid,
        fown: live.fown(&dump.files.pids)?,
    };
    let r#type = FdTypes::Pidfd as i32;
    dump.model.files.push(FileEntry { r#type, id, pidfd: Some(entry), ..FileEntry::default() });
    Ok(())
}

/// Leaves them for when the processes exist.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    for e in opener.of(FdTypes::Pidfd).filter_map(|e| e.pidfd.as_ref()) {
        opener.own(e.id, &e.fown, e.flags);
        opener.files.late.insert(e.id);
    }
    Ok(())
}

impl Files<'_> {
    /// Opens a handle on a process that exists; `pids` are the processes by their number inside.
    pub(super) fn open_pidfd(&mut self, e: &PidfdEntry, pids: &BTreeMap<i32, i32>) -> Result<()> {
        let what = "cannot open a handle on a process";
        if e.nspid == -1 {
            return self.open_ended(e);
        }
        let pid = *pids
            .get(&e.nspid)
            .ok_or_else(|| Error::new("the images have a handle on a process that they lack").pid(e.nspid))?;
        let flags = e.flags & FLAGS;
        let file = pidfd::open(pid, flags).during(what, || format!("pidfd_open({pid}, {flags:#x})"))?;
        self.opened.insert(e.id, file);
        Ok(())
    }

    /// Opens all handles on the process that this one had, which is gone, unless that has been done.
    fn open_ended(&mut self, e: &PidfdEntry) -> Result<()> {
        if self.opened.contains_key(&e.id) {
            return Ok(());
        }
        let all = self.restore.model.files.iter().filter_map(|f| f.pidfd.as_ref());
        let same: Vec<&PidfdEntry> = all.filter(|f| f.nspid == -1 && f.ino == e.ino).collect();
        let flags: Vec<u32> = same.iter().map(|f| f.flags & FLAGS).collect();
        // The kernel refuses a handle on a process of another namespace in another way.
        let files = giving_birth_in(self.restore.target.init, || {
            pidfd::of_ended(&flags)
                .during("cannot open handles on a process that has ended", || "pidfd_open(_, _)".into())
        })?;
        self.opened.extend(same.iter().map(|f| f.id).zip(files));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::files::live::Pids;
    use std::os::fd::OwnedFd;

    fn refusal(live: &Live, pids: &Pids) -> String {
        let root: OwnedFd = std::fs::File::open("/").unwrap().into();
        check(live, &Surroundings::here(&root, pids)).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn only_handles_on_processes_of_the_container_pass() {
        let me = std::process::id().cast_signed();
        let mut live = Live::own(pidfd::open(me, 0).unwrap(), 5).unwrap();
        assert!(is(&live));
        assert_eq!(target(&live).unwrap(), Some(me));
        assert!(refusal(&live, &Pids::from([(me, 5)])).contains("on its way"));
        live.pid = 1;
        assert_eq!(refusal(&live, &Pids::from([(me, 5)])), "");
        assert!(refusal(&live, &Pids::new()).contains("outside the container"));
    }

    #[test]
    fn a_thread_is_told() {
        let (tell, hear) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = ended.recv();
        });
        let tid = hear.recv().unwrap();
        // PIDFD_THREAD is of Linux 6.9.
        if let Ok(file) = pidfd::open(tid, libc::O_EXCL.cast_unsigned()) {
            let live = Live { pid: 1, ..Live::own(file, 5).unwrap() };
            let pids = Pids::from([(std::process::id().cast_signed(), 5)]);
            assert!(refusal(&live, &pids).contains("not the first"));
        }
        drop(end);
        thread.join().unwrap();
    }

    #[test]
    fn an_ended_process_is_told() {
        let files = pidfd::of_ended(&[0, libc::O_NONBLOCK.cast_unsigned()]).unwrap();
        let [a, b] = &files.into_iter().map(|f| Live::own(f, 5).unwrap()).collect::<Vec<_>>()[..] else {
            panic!()
        };
        assert_eq!((target(a).unwrap(), target(b).unwrap()), (None, None));
        assert_eq!(b.info.flags & FLAGS, libc::O_NONBLOCK.cast_unsigned());
        assert_eq!(refusal(a, &Pids::new()), "");
    }
}
