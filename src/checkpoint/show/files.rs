//! Descriptors.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::clean;
use crate::checkpoint::files::address;
use crate::checkpoint::files::unix::text;
use crate::checkpoint::image::{FdTypes, FileEntry, InetSkEntry, UnixSkEntry};
use crate::checkpoint::model::Model;

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
                what: by_id.get(&entry.id).map(|file| describe(model, file)).unwrap_or_default(),
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
    file.reg.as_ref().map(|reg| clean(&reg.name))
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

fn describe(model: &Model, file: &FileEntry) -> String {
    if let Some(reg) = &file.reg {
        return match reg.pos {
            0 => clean(&reg.name),
            at => format!("{} at {at}", clean(&reg.name)),
        };
    }
    if let Some(pipe) = &file.pipe {
        let data = model.pipes_data.iter().find(|(data, _)| data.pipe_id == pipe.pipe_id);
        let waiting = data.map_or(0, |(_, bytes)| bytes.len());
        return format!("{} {}, {waiting} bytes wait", pipe.pipe_id, access(pipe.flags));
    }
    if let Some(fifo) = &file.fifo {
        return fifo.regf_id.and_then(|id| path(model, id)).unwrap_or_default();
    }
    if let Some(socket) = &file.isk {
        return internet(socket);
    }
    if let Some(socket) = &file.usk {
        return unix(socket);
    }
    if let Some(memfd) = &file.memfd {
        let inode = model.memfds.iter().find(|m| m.inode_id == u64::from(memfd.inode_id));
        return inode.map(|m| format!("{}, {} bytes", clean(&m.name), m.size)).unwrap_or_default();
    }
    if let Some(tty) = &file.tty {
        let info = model.tty_info.iter().find(|info| info.id == tty.tty_info_id);
        let pty = info.and_then(|info| info.pty.as_ref()).map(|pty| format!("pts {}", pty.index));
        return pty.or_else(|| tty.regf_id.and_then(|id| path(model, id))).unwrap_or_default();
    }
    if let Some(event) = &file.efd {
        return format!("at {}", event.counter);
    }
    if let Some(epoll) = &file.epfd {
        return format!("watches {}", epoll.tfd.len());
    }
    if let Some(pidfd) = &file.pidfd {
        return format!("process {}", pidfd.nspid);
    }
    String::new()
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
