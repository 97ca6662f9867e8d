//! `/proc/PID/fdinfo/N`: what the kernel tells of a descriptor that fstat(2) does not.
//!
//! ```text
//! pos:    0                    every file: offset,
//! flags:  02000002             its status flags, O_CLOEXEC standing for the descriptor's FD_CLOEXEC,
//! mnt_id: 16                   the mount it was opened through,
//! ino:    2058                 its inode (5.14);
//! tfd: 5 events: 19 data: 5 pos:0 ino:61 sdev:5      then lines of the file's kind
//! ```

use crate::checkpoint::{Error, Result};

/// A parsed fdinfo.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fdinfo {
    /// Offset.
    pub pos: u64,
    /// Status flags, without O_CLOEXEC.
    pub flags: u32,
    /// FD_CLOEXEC of this descriptor.
    pub cloexec: bool,
    /// Mount the file was opened through.
    pub mnt_id: i32,
    /// The lines of the file's kind, as `key`, `value`.
    pub rest: Vec<(String, String)>,
}

impl Fdinfo {
    /// Parses the text of an fdinfo file.
    pub fn parse(text: &str) -> Result<Self> {
        let mut info = Fdinfo { mnt_id: -1, ..Fdinfo::default() };
        let mut seen = false;
        for line in text.lines() {
            // `inotify wd:1 ...` has no colon after its key; `settime flags: 01` has a space in it.
            let watch = line.starts_with("inotify ") || line.starts_with("fanotify ");
            let Some((key, value)) = line.split_once(if watch { ' ' } else { ':' }) else { continue };
            let value = value.trim();
            match key {
                "pos" if !seen => info.pos = value.parse().map_err(|_| bad(line))?,
                "flags" if !seen => {
                    let flags = u32::from_str_radix(value, 8).map_err(|_| bad(line))?;
                    info.cloexec = flags & libc::O_CLOEXEC as u32 != 0;
                    info.flags = flags & !(libc::O_CLOEXEC as u32);
                    seen = true;
                }
                "mnt_id" => info.mnt_id = value.parse().map_err(|_| bad(line))?,
                _ => info.rest.push((key.to_owned(), value.to_owned())),
            }
        }
        if seen { Ok(info) } else { Err(Error::new("fdinfo has no flags")) }
    }

    /// The value of the first line with this key.
    pub fn field(&self, key: &str) -> Option<&str> {
        self.rest.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// A number in the base that this key is printed in.
    pub fn number(&self, key: &str, radix: u32) -> Result<u64> {
        let value = self.field(key).ok_or_else(|| Error::new(format!("fdinfo has no {key}")))?;
        u64::from_str_radix(value, radix).map_err(|_| bad(value))
    }

    /// The values of all lines with this key.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.rest.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

fn bad(line: &str) -> Error {
    Error::new(format!("fdinfo line not understood: {line:?}"))
}

/// A `key:value` among the words of a line, with or without blanks after the colon, as a number.
///
/// `tfd:        5 events:       19 data:                5  pos:0 ino:3d sdev:5`
pub fn word(line: &str, key: &str, radix: u32) -> Result<u64> {
    let mut words = line.split_whitespace();
    while let Some(word) = words.next() {
        let Some((k, v)) = word.split_once(':') else { continue };
        if k != key {
            continue;
        }
        let value = if v.is_empty() { words.next().unwrap_or_default() } else { v };
        return u64::from_str_radix(value, radix).map_err(|_| bad(line));
    }
    Err(Error::new(format!("fdinfo line without {key}: {line:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_fields() {
        let i = Fdinfo::parse("pos:\t12\nflags:\t02100001\nmnt_id:\t16\nino:\t99\n").unwrap();
        assert_eq!((i.pos, i.flags, i.cloexec, i.mnt_id), (12, 0o100_001, true, 16));
        assert_eq!(i.field("ino"), Some("99"));
        assert!(Fdinfo::parse("pos:\t0\n").is_err());
        assert!(Fdinfo::parse("pos:\t0\nflags:\tx\n").is_err());
    }

    #[test]
    fn lines_of_a_kind() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t16\nino:\t4\n\
            tfd:        5 events:       19 data:                a  pos:0 ino:3d sdev:5\n\
            tfd:        6 events:       1d data: ffffffffffffffff  pos:0 ino:3e sdev:5\n";
        let i = Fdinfo::parse(text).unwrap();
        assert_eq!(i.pos, 0);
        let lines: Vec<_> = i.all("tfd").collect();
        assert_eq!(lines.len(), 2);
        // The key has been cut off: its value is the first word.
        assert!(lines[1].starts_with("6 "));
        assert_eq!(word(lines[1], "events", 16).unwrap(), 0x1d);
        assert_eq!(word(lines[1], "data", 16).unwrap(), u64::MAX);
        assert_eq!(word(lines[0], "ino", 16).unwrap(), 0x3d);
        assert!(word(lines[0], "nothing", 16).is_err());
    }

    #[test]
    fn an_inotify_line_is_keyed_by_its_first_word() {
        let text = "pos:\t0\nflags:\t00\nmnt_id:\t16\ninotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 \
            fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d\n";
        let i = Fdinfo::parse(text).unwrap();
        assert_eq!(word(i.field("inotify").unwrap(), "wd", 10).unwrap(), 3);
    }
}
