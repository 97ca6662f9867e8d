//! Terminals.

use crate::checkpoint::image::record::records;
use crate::checkpoint::image::regfile::FownEntry;

/// Kind of a terminal.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum TtyType {
    Unknown = 0,
    Pty = 1,
    Console = 2,
    Vt = 3,
    Ctty = 4,
    ExtTty = 5,
    Serial = 6,
}

records! {
    /// Size of a terminal's window.
    WinsizeEntry = "winsize_entry" {
        ws_row: required uint32 = 1,
        ws_col: required uint32 = 2,
        ws_xpixel: required uint32 = 3,
        ws_ypixel: required uint32 = 4,
    }

    /// Settings of a terminal.
    TermiosEntry = "termios_entry" {
        c_iflag: required uint32 = 1,
        c_oflag: required uint32 = 2,
        c_cflag: required uint32 = 3,
        c_lflag: required uint32 = 4,
        c_line: required uint32 = 5,
        c_ispeed: required uint32 = 6,
        c_ospeed: required uint32 = 7,
        c_cc: repeated uint32 = 8,
    }

    /// Number of a pty.
    TtyPtyEntry = "tty_pty_entry" {
        index: required uint32 = 1,
    }

    /// tty-data.img: input that waits in a terminal.
    TtyDataEntry = "tty_data_entry" {
        tty_id: required uint32 = 1,
        data: required bytes = 2,
    }

    /// tty-info.img: a terminal, whichever descriptors are open on it.
    TtyInfoEntry = "tty_info_entry" {
        id: required uint32 = 1,
        r#type: required enumeration(TtyType) = 2,
        locked: required bool = 3,
        exclusive: required bool = 4,
        packet_mode: required bool = 5,
        sid: required uint32 = 6,
        pgrp: required uint32 = 7,
        rdev: required uint32 = 8,
        termios: optional message(TermiosEntry) = 9,
        termios_locked: optional message(TermiosEntry) = 10,
        winsize: optional message(WinsizeEntry) = 11,
        pty: optional message(TtyPtyEntry) = 12,
        dev: optional uint32 = 13,
        uid: optional uint32 = 14,
        gid: optional uint32 = 15,
    }

    /// An open description of a terminal.
    TtyFileEntry = "tty_file_entry" {
        id: required uint32 = 1,
        tty_info_id: required uint32 = 2,
        flags: required uint32 = 3,
        fown: required message(FownEntry) = 4,
        regf_id: optional uint32 = 6,
    }
}
