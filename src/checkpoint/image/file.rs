//! The tables of descriptors, and the one table of open files they point into.
//!
//! ```text
//!   fdinfo-<files_id>.img        files.img
//!   fd 0 ─┐ id 7                 id 7  REG   /etc/hosts, offset, flags
//!   fd 3 ─┘                      id 8  PIPE  ...
//!   fd 5 ── id 8 ───────────────▶
//! ```
//!
//! Two descriptors with one id share one open file description.

use crate::checkpoint::image::anon::{
    EventfdFileEntry, EventpollFileEntry, MemfdFileEntry, PidfdEntry, SignalfdEntry, TimerfdEntry,
};
use crate::checkpoint::image::bpf::BpfmapFileEntry;
use crate::checkpoint::image::fsnotify::{FanotifyFileEntry, InotifyFileEntry};
use crate::checkpoint::image::namespace::NsFileEntry;
use crate::checkpoint::image::net::TunfileEntry;
use crate::checkpoint::image::packet::PacketSockEntry;
use crate::checkpoint::image::pipe::{FifoEntry, PipeEntry};
use crate::checkpoint::image::record::records;
use crate::checkpoint::image::regfile::{ExtFileEntry, RegFileEntry};
use crate::checkpoint::image::socket::{InetSkEntry, NetlinkSkEntry};
use crate::checkpoint::image::tty::TtyFileEntry;
use crate::checkpoint::image::unix::UnixSkEntry;

/// Kind of an open file.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FdTypes {
    Und = 0,
    Reg = 1,
    Pipe = 2,
    Fifo = 3,
    Inetsk = 4,
    Unixsk = 5,
    Eventfd = 6,
    Eventpoll = 7,
    Inotify = 8,
    Signalfd = 9,
    Packetsk = 10,
    Tty = 11,
    Fanotify = 12,
    Netlinksk = 13,
    Ns = 14,
    Tunf = 15,
    Ext = 16,
    Timerfd = 17,
    Memfd = 18,
    Bpfmap = 19,
    Pidfd = 20,
    CtlTty = 65534,
    AutofsPipe = 65535,
}

records! {
    /// One descriptor number of one table. `flags` is its close-on-exec flag.
    FdinfoEntry = "fdinfo_entry" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        r#type: required enumeration(FdTypes) = 3,
        fd: required uint32 = 4,
        xattr_security_selinux: optional string = 5,
    }

    /// One open file description; the field that `type` names is present.
    FileEntry = "file_entry" {
        r#type: required enumeration(FdTypes) = 1,
        id: required uint32 = 2,
        reg: optional message(RegFileEntry) = 3,
        isk: optional message(InetSkEntry) = 4,
        nsf: optional message(NsFileEntry) = 5,
        psk: optional message(PacketSockEntry) = 6,
        nlsk: optional message(NetlinkSkEntry) = 7,
        efd: optional message(EventfdFileEntry) = 8,
        epfd: optional message(EventpollFileEntry) = 9,
        sgfd: optional message(SignalfdEntry) = 10,
        tunf: optional message(TunfileEntry) = 11,
        tfd: optional message(TimerfdEntry) = 12,
        ify: optional message(InotifyFileEntry) = 13,
        ffy: optional message(FanotifyFileEntry) = 14,
        ext: optional message(ExtFileEntry) = 15,
        usk: optional message(UnixSkEntry) = 16,
        fifo: optional message(FifoEntry) = 17,
        pipe: optional message(PipeEntry) = 18,
        tty: optional message(TtyFileEntry) = 19,
        memfd: optional message(MemfdFileEntry) = 20,
        bpf: optional message(BpfmapFileEntry) = 21,
        pidfd: optional message(PidfdEntry) = 22,
    }
}
