//! POSIX message queues. CRIU does not know them: they are in the extension `mqueue`.
//!
//! Who has asked to be told of the first message (mq_notify) cannot be made to ask again.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::OwnedFd;

use nix::dir::Dir;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fchmod, fstat};
use serde::{Deserialize, Serialize};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::user::Owners;
use crate::sys::mount::FsContext;
use crate::sys::mqueue::{self, Attributes, Message};
use crate::sys::sysv;

/// Name of the extension in stasis.img: that of the container's own namespace, or of one that it has made.
pub(super) fn extension(id: u32) -> String {
    if id > Kind::Time.id(true) { format!("mqueue-{id}") } else { "mqueue".into() }
}

/// A queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Queue {
    /// Its name, without the slash.
    pub name: String,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// How many messages it takes.
    pub maxmsg: i64,
    /// How long they may be.
    pub msgsize: i64,
    /// What it holds, in the order in which it would be received.
    pub messages: Vec<Message>,
}

/// The names of all queues of this thread's namespace, and a mount of them, which takes its time to close.
fn names() -> Result<(Vec<String>, OwnedFd)> {
    let what = "cannot list the POSIX message queues";
    let files = FsContext::open(c"mqueue").and_then(|context| context.mount(0));
    let root = files.during(what, || "fsmount(mqueue)".into())?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = openat(&root, ".", flags, Mode::empty()).during(what, || "openat(mqueue, \".\")".into())?;
    let mut dir = Dir::from_fd(dir).during(what, || "openat(mqueue, \".\")".into())?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry.during(what, || "getdents64(mqueue)".into())?;
        match entry.file_name().to_str() {
            Ok("." | "..") => {}
            Ok(name) => names.push(name.to_owned()),
            Err(_) => return Err(Error::new("a POSIX message queue has a name that is not valid UTF-8")),
        }
    }
    names.sort();
    Ok((names, root))
}

fn open(name: &str, flags: i32) -> Result<OwnedFd> {
    let flags = flags | libc::O_NONBLOCK;
    let text = c_string(name)?;
    mqueue::open(&text, flags, 0, None)
        .during("cannot open a POSIX message queue", || format!("mq_open(\"/{name}\", {flags:#o})"))
}

fn c_string(name: &str) -> Result<CString> {
    CString::new(name).map_err(|_| Error::new(format!("a POSIX message queue is called {name:?}")))
}

/// Refuses queues whose next message somebody waits to be told of.
pub(super) fn check() -> Result<()> {
    let (names, _mount) = names()?;
    check_all(&names)
}

fn check_all(names: &[String]) -> Result<()> {
    for name in names {
        let mut text = String::new();
        let what = "cannot look at a POSIX message queue";
        // The text tells of the queue, not of its messages.
        std::fs::File::from(open(name, libc::O_RDONLY)?)
            .read_to_string(&mut text)
            .during(what, || format!("read(\"/{name}\")"))?;
        let told = text.split_whitespace().find_map(|w| w.strip_prefix("NOTIFY_PID:"));
        if told.is_some_and(|pid| pid != "0") {
            return Err(Error::new(format!(
                "a process waits to be notified of messages in the queue /{name}"
            ))
            .remedy("let the program withdraw its mq_notify, or receive in another way"));
        }
    }
    Ok(())
}

/// All queues of this thread's namespace, and what is to be closed when there is time.
pub(super) fn dump() -> Result<(Vec<Queue>, OwnedFd)> {
    let (names, mount) = names()?;
    check_all(&names)?;
    Ok((names.into_iter().map(one).collect::<Result<_>>()?, mount))
}

fn one(name: String) -> Result<Queue> {
    let what = "cannot read a POSIX message queue";
    let queue = open(&name, libc::O_RDWR)?;
    let stat = fstat(&queue).during(what, || format!("fstat(\"/{name}\")"))?;
    let is = mqueue::attributes(&queue).during(what, || format!("mq_getattr(\"/{name}\")"))?;
    let messages = mqueue::contents(&queue).during(what, || format!("mq_receive(\"/{name}\")"))?;
    let (mode, uid, gid) = (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid);
    Ok(Queue { name, mode, uid, gid, maxmsg: is.maxmsg, msgsize: is.msgsize, messages })
}

/// The queues of these images, with owners of this host.
pub(super) fn read(model: &Model, id: u32, owners: &Owners) -> Result<Vec<Queue>> {
    let mut all: Vec<Queue> = model.extension(&extension(id))?;
    for queue in &mut all {
        owners.both(&mut queue.uid, &mut queue.gid)?;
    }
    Ok(all)
}

/// Makes and fills them, in this thread's namespace. Their owners make them, for it is counted whose they are.
pub(super) fn restore(queues: &[Queue]) -> Result<()> {
    for queue in queues {
        let name = &queue.name;
        let what = format!("cannot make the POSIX message queue /{name}");
        let (text, attributes) = (c_string(name)?, Attributes::new(queue.maxmsg, queue.msgsize));
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK;
        let made =
            sysv::created_by(queue.uid, queue.gid, || mqueue::open(&text, flags, 0o600, Some(&attributes)));
        let made = made
            .during(&what, || {
                format!("mq_open(\"/{name}\", O_CREAT, 0600, {{{}, {}}})", queue.maxmsg, queue.msgsize)
            })
            .map_err(|e| {
                e.remedy("fs.mqueue and the limit on message queues (ulimit -q) must allow what was there")
            })?;
        for (priority, text) in &queue.messages {
            mqueue::send(&made, *priority, text)
                .during(&what, || format!("mq_send(\"/{name}\", _, {}, {priority})", text.len()))?;
        }
        let mode = Mode::from_bits_truncate(queue.mode & 0o7777);
        fchmod(&made, mode).during(&what, || format!("fchmod(_, {mode:?})"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;

    #[test]
    fn queues_come_back_with_their_messages() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let messages = vec![(9, b"urgent".to_vec()), (0, Vec::new()), (0, vec![255; 64])];
        let queues = vec![
            Queue { name: "a".into(), mode: 0o640, uid: 7, gid: 8, maxmsg: 3, msgsize: 64, messages },
            Queue { name: "b".into(), mode: 0o666, uid: 0, gid: 0, maxmsg: 10, msgsize: 1, messages: vec![] },
        ];
        in_child(libc::CLONE_NEWIPC, || {
            let dump = || dump().unwrap().0;
            assert!(dump().is_empty());
            restore(&queues).unwrap();
            assert_eq!(dump(), queues);
            assert_eq!(dump(), queues, "they are kept");
            let again = restore(&queues).unwrap_err().to_string();
            assert!(again.contains("queue /a"), "{again}");
        });
    }
}
