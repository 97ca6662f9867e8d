//! Descriptors.

use std::collections::BTreeMap;
use std::fmt;

use nix::sys::signal::Signal;
use serde::Serialize;

use super::clean;
use crate::checkpoint::files::address;
use crate::checkpoint::files::unix::text;
use crate::checkpoint::image::{FdTypes, FileEntry, InetSkEntry, TtyFileEntry, UnixSkEntry};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::Kind;

/// A table of descriptors, and the processes that have it.
#[derive(Debug, Serialize)]
pub struct Table {
    /// The processes; more than one where they share it.
    pub pids: Vec<u32>,
    /// Name of the first.
    pub name: String,
    /// Working directory of the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// Root directory of the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The descriptors, in ascending order.
    pub descriptors: Vec<Descriptor>,
}

/// One descriptor.
#[derive(Debug, Serialize)]
pub struct Descriptor {
    /// Its number.
    pub fd: u32,
    /// The open file that it stands for; equal numbers are one open file.
    pub file: u32,
    /// What it is.
    pub kind: &'static str,
    /// Which one.
    pub what: String,
    /// It is closed by execve(2).
    pub cloexec: bool,
}

/// A table for each set of processes that share one.
pub fn files(model: &Model) -> Vec<Table> {
    let by_id: BTreeMap<u32, &FileEntry> = model.files.iter().map(|file| (file.id, file)).collect();
    let mut waiting: BTreeMap<u32, usize> = BTreeMap::new();
    for (data, bytes) in model.pipes_data.iter().chain(&model.fifo_data) {
        *waiting.entry(data.pipe_id).or_default() += bytes.len();
    }
    let known = Known { model, by_id: &by_id, waiting: &waiting };
    let mut tables = Vec::new();
    for (id, entries) in &model.fdinfo {
        let pids: Vec<u32> =
            model.ids.iter().filter(|(_, ids)| ids.files_id == *id).map(|(pid, _)| *pid).collect();
        let Some(first) = pids.first() else { continue };
        let fs = model.fs.get(first);
        let mut descriptors: Vec<Descriptor> = entries
            .iter()
            .map(|entry| Descriptor {
                fd: entry.fd,
                file: entry.id,
                kind: kind(entry.r#type()),
                what: by_id.get(&entry.id).map(|file| known.describe(file)).unwrap_or_default(),
                cloexec: entry.flags & libc::FD_CLOEXEC.cast_unsigned() != 0,
            })
            .collect();
        descriptors.sort_by_key(|d| d.fd);
        tables.push(Table {
            name: super::comm(model, *first),
            directory: fs.and_then(|fs| path(model, fs.cwd_id)),
            root: fs.and_then(|fs| path(model, fs.root_id)),
            pids,
            descriptors,
        });
    }
    tables.sort_by_key(|table| table.pids[0]);
    tables
}

/// The path of a regular file, directory or device.
pub(super) fn path(model: &Model, id: u32) -> Option<String> {
    model.files.iter().find(|file| file.id == id).and_then(name)
}

/// The path of an open file that has one.
pub(super) fn name(file: &FileEntry) -> Option<String> {
    file.reg.as_ref().map(|reg| clean(&reg.path().to_string_lossy()))
}

/// Its name for people.
pub(super) fn kind(kind: FdTypes) -> &'static str {
    match kind {
        FdTypes::Reg => "file",
        FdTypes::Pipe => "pipe",
        FdTypes::Fifo => "fifo",
        FdTypes::Inetsk => "ip socket",
        FdTypes::Unixsk => "unix socket",
        FdTypes::Eventfd => "eventfd",
        FdTypes::Eventpoll => "epoll",
        FdTypes::Inotify => "inotify",
        FdTypes::Signalfd => "signalfd",
        FdTypes::Packetsk => "packet socket",
        FdTypes::Tty | FdTypes::CtlTty => "terminal",
        FdTypes::Fanotify => "fanotify",
        FdTypes::Netlinksk => "netlink socket",
        FdTypes::Ns => "namespace",
        FdTypes::Tunf => "tun",
        FdTypes::Ext => "external file",
        FdTypes::Timerfd => "timerfd",
        FdTypes::Memfd => "memfd",
        FdTypes::Bpfmap => "bpf map",
        FdTypes::Pidfd => "pidfd",
        FdTypes::AutofsPipe => "autofs pipe",
        FdTypes::Und => "unknown",
    }
}

/// What descriptors lead to, by number: there may be 100,000 of them.
struct Known<'a> {
    model: &'a Model,
    by_id: &'a BTreeMap<u32, &'a FileEntry>,
    /// Bytes in pipes and fifos.
    waiting: &'a BTreeMap<u32, usize>,
}

impl Known<'_> {
    fn path(&self, id: Option<u32>) -> String {
        id.and_then(|id| self.by_id.get(&id)).and_then(|file| name(file)).unwrap_or_default()
    }

    fn describe(&self, file: &FileEntry) -> String {
        let waiting = |pipe| self.waiting.get(&pipe).copied().unwrap_or_default();
        if let Some(reg) = &file.reg {
            match reg.pos {
                0 => clean(&reg.path().to_string_lossy()),
                at => format!("{} at {at}", clean(&reg.path().to_string_lossy())),
            }
        } else if let Some(pipe) = &file.pipe {
            format!("{} {}, {} bytes wait", pipe.pipe_id, access(pipe.flags), waiting(pipe.pipe_id))
        } else if let Some(fifo) = &file.fifo {
            format!("{}, {} bytes wait", self.path(fifo.regf_id), waiting(fifo.pipe_id))
        } else if let Some(socket) = &file.isk {
            internet(socket)
        } else if let Some(socket) = &file.usk {
            unix(socket)
        } else if let Some(memfd) = &file.memfd {
            let inode = self.model.memfds.iter().find(|m| m.inode_id == u64::from(memfd.inode_id));
            inode
                .map(|m| format!("{}, {} bytes", clean(&String::from_utf8_lossy(&m.name)), m.size))
                .unwrap_or_default()
        } else if let Some(tty) = &file.tty {
            self.terminal(tty)
        } else {
            other(file)
        }
    }

    fn terminal(&self, tty: &TtyFileEntry) -> String {
        let path = self.path(tty.regf_id);
        let info = self.model.tty_info.iter().find(|info| info.id == tty.tty_info_id);
        match info.and_then(|info| info.pty.as_ref()) {
            Some(pty) if path.ends_with("ptmx") => format!("master of pts {}", pty.index),
            Some(pty) => format!("pts {}", pty.index),
            None => path,
        }
    }
}

/// What needs nothing but its own record.
fn other(file: &FileEntry) -> String {
    if let Some(event) = &file.efd {
        format!("at {}", event.counter)
    } else if let Some(epoll) = &file.epfd {
        format!("watches {}", epoll.tfd.len())
    } else if let Some(inotify) = &file.ify {
        format!("watches {}", inotify.wd.len())
    } else if let Some(fanotify) = &file.ffy {
        format!("marks {}", fanotify.mark.len())
    } else if let Some(signalfd) = &file.sgfd {
        signals(signalfd.sigmask)
    } else if let Some(timer) = &file.tfd {
        let (left, every) = (seconds(timer.vsec, timer.vnsec), seconds(timer.isec, timer.insec));
        match (left.as_str(), every.as_str()) {
            ("0", "0") => format!("not set, {} ticks", timer.ticks),
            (left, "0") => format!("in {left} s, {} ticks", timer.ticks),
            (left, every) => format!("in {left} s, then every {every} s, {} ticks", timer.ticks),
        }
    } else if let Some(pidfd) = &file.pidfd {
        match pidfd.nspid {
            ..0 => "of a process that is gone".into(),
            pid => format!("process {pid}"),
        }
    } else if let Some(socket) = &file.nlsk {
        format!("protocol {}, port {}", socket.protocol, socket.portid)
    } else if let Some(socket) = &file.psk {
        format!("protocol {}, interface {}", socket.protocol, socket.ifindex)
    } else if let Some(tun) = &file.tunf {
        tun.netdev.as_deref().map(clean).unwrap_or_default()
    } else if let Some(namespace) = &file.nsf {
        Kind::with_flag(namespace.ns_cflag.cast_signed())
            .map(|kind| kind.title().to_owned())
            .unwrap_or_default()
    } else {
        String::new()
    }
}

fn seconds(whole: u64, nanoseconds: u64) -> String {
    match nanoseconds {
        0 => whole.to_string(),
        part => format!("{whole}.{part:09}").trim_end_matches('0').to_owned(),
    }
}

/// The names of a set of signals.
fn signals(mask: u64) -> String {
    let named = (1..=64).filter(|n| mask >> (n - 1) & 1 == 1).map(|n| match Signal::try_from(n) {
        Ok(signal) => signal.as_str().to_owned(),
        Err(_) => n.to_string(),
    });
    named.collect::<Vec<_>>().join(" ")
}

fn access(flags: u32) -> &'static str {
    match flags.cast_signed() & libc::O_ACCMODE {
        libc::O_WRONLY => "writing",
        libc::O_RDWR => "reading and writing",
        _ => "reading",
    }
}

fn internet(socket: &InetSkEntry) -> String {
    let at =
        |words: &[u32], port| address::from_words(words, port, 0).map(|a| a.to_string()).unwrap_or_default();
    let protocol = match socket.proto.cast_signed() {
        libc::IPPROTO_TCP => "tcp".to_owned(),
        libc::IPPROTO_UDP => "udp".to_owned(),
        other => format!("protocol {other}"),
    };
    let (from, to) = (at(&socket.src_addr, socket.src_port), at(&socket.dst_addr, socket.dst_port));
    let state = [
        "",
        "",
        "connecting",
        "",
        "closing",
        "closing",
        "",
        "",
        "half-closed",
        "closing",
        "listening",
        "closing",
    ];
    let state = usize::try_from(socket.state).ok().and_then(|n| state.get(n)).copied().unwrap_or_default();
    let to = if socket.dst_port == 0 { String::new() } else { format!(" to {to}") };
    let state = if state.is_empty() || protocol != "tcp" { String::new() } else { format!(", {state}") };
    format!("{protocol} {from}{to}{state}")
}

fn unix(socket: &UnixSkEntry) -> String {
    let kind = match socket.r#type.cast_signed() {
        libc::SOCK_STREAM => "stream",
        libc::SOCK_DGRAM => "datagrams",
        libc::SOCK_SEQPACKET => "packets",
        _ => "unknown",
    };
    let name =
        if socket.name.is_empty() { String::new() } else { format!(" {}", clean(&text(&socket.name))) };
    let listening = if socket.state == 10 { ", listening" } else { "" };
    format!("{kind}{name}{listening}")
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pids: Vec<String> = self.pids.iter().map(u32::to_string).collect();
        write!(f, "{} {}", pids.join(", "), self.name)?;
        let (root, directory) =
            (self.root.as_deref().unwrap_or("/"), self.directory.as_deref().unwrap_or("?"));
        match root {
            "/" => writeln!(f, ": in {directory}")?,
            root => writeln!(f, ": in {directory}, root {root}")?,
        }
        for d in &self.descriptors {
            let cloexec = if d.cloexec { ", closed by exec" } else { "" };
            writeln!(f, "  {:>4}  {:<15} {}{cloexec}  #{}", d.fd, d.kind, d.what, d.file)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::{
        FifoEntry, InotifyFileEntry, PidfdEntry, PipeDataEntry, RegFileEntry, SignalfdEntry, TimerfdEntry,
        TtyInfoEntry, TtyPtyEntry,
    };
    use crate::checkpoint::model::tests::small;

    #[test]
    fn descriptors_say_which_one_they_are() {
        let mut model = small();
        let reg = |id, name: &str| FileEntry {
            id,
            reg: Some(RegFileEntry { name: name.into(), ..RegFileEntry::default() }),
            ..FileEntry::default()
        };
        model.files = vec![reg(1, "/dev/ptmx"), reg(2, "/dev/pts/3"), reg(3, "/run/fi\nfo")];
        model.fifo_data = vec![(PipeDataEntry { pipe_id: 9, ..PipeDataEntry::default() }, vec![0; 12])];
        let pty = Some(TtyPtyEntry { index: 3 });
        model.tty_info = vec![TtyInfoEntry { id: 6, pty, ..TtyInfoEntry::default() }];
        let by_id = model.files.iter().map(|file| (file.id, file)).collect();
        let known = Known { model: &model, by_id: &by_id, waiting: &BTreeMap::from([(9, 12)]) };
        let tty = |id| TtyFileEntry { tty_info_id: 6, regf_id: Some(id), ..TtyFileEntry::default() };
        let empty = FileEntry::default;
        let timer = |vsec, vnsec, isec| TimerfdEntry { vsec, vnsec, isec, ..TimerfdEntry::default() };
        let fifo = FifoEntry { pipe_id: 9, regf_id: Some(3), ..FifoEntry::default() };
        let sigmask = 1 << 9 | 1 << 14 | 1 << 39;
        for (file, says) in [
            (FileEntry { tty: Some(tty(1)), ..empty() }, "master of pts 3"),
            (FileEntry { tty: Some(tty(2)), ..empty() }, "pts 3"),
            (FileEntry { fifo: Some(fifo), ..empty() }, "/run/fi\\nfo, 12 bytes wait"),
            (
                FileEntry { tfd: Some(timer(1, 500_000_000, 20)), ..empty() },
                "in 1.5 s, then every 20 s, 0 ticks",
            ),
            (FileEntry { tfd: Some(timer(0, 0, 0)), ..empty() }, "not set, 0 ticks"),
            (FileEntry { tfd: Some(timer(0, 7, 0)), ..empty() }, "in 0.000000007 s, 0 ticks"),
            (
                FileEntry { sgfd: Some(SignalfdEntry { sigmask, ..SignalfdEntry::default() }), ..empty() },
                "SIGUSR1 SIGTERM 40",
            ),
            (FileEntry { ify: Some(InotifyFileEntry::default()), ..empty() }, "watches 0"),
            (
                FileEntry { pidfd: Some(PidfdEntry { nspid: -1, ..PidfdEntry::default() }), ..empty() },
                "of a process that is gone",
            ),
        ] {
            assert_eq!(known.describe(&file), says);
        }
    }
}
