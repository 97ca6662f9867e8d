//! The global PAX header at the end of an archive: what a tar has no place for.
//!
//! ```text
//!   LENGTH STASIS.socket=MODE UID GID SECONDS PATH     a tar has no type for sockets
//!   LENGTH STASIS.flags=FLAGS PATH                     flags of chattr(1)
//!   LENGTH STASIS.xattr=NAME-LENGTH PATH-LENGTH NAME PATH VALUE
//!                                                      an attribute that SCHILY.xattr can't hold
//! ```
//!
//! Paths and values may hold any byte, so a record ends where its length says: a newline is none of its ends.

use super::broken;
use crate::checkpoint::error::{Error, Result};

const SOCKET: &str = "STASIS.socket";
const FLAGS: &str = "STASIS.flags";
const ATTRIBUTE: &str = "STASIS.xattr";

/// One record. Paths are as the entries of the archive have them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A socket.
    Socket(Socket),
    /// Flags of chattr(1), as FS_IOC_GETFLAGS tells them, and the file they are of.
    Flags(u32, Vec<u8>),
    /// An extended attribute.
    Attribute(Attribute),
}

/// A socket in the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// Its permissions.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was modified, in seconds since 1970.
    pub seconds: u32,
    /// Where it is.
    pub path: Vec<u8>,
}

/// An extended attribute of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    /// Its name.
    pub name: Vec<u8>,
    /// The file.
    pub path: Vec<u8>,
    /// What it holds.
    pub value: Vec<u8>,
}

impl Record {
    /// As it stands in the header.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Socket(Socket { mode, uid, gid, seconds, path }) => {
                line(SOCKET, &[format!("{mode:o} {uid} {gid} {seconds} ").as_bytes(), path])
            }
            Self::Flags(flags, path) => line(FLAGS, &[format!("{flags} ").as_bytes(), path]),
            Self::Attribute(Attribute { name, path, value }) => {
                let lengths = format!("{} {} ", name.len(), path.len());
                line(ATTRIBUTE, &[lengths.as_bytes(), name, b" ", path, b" ", value])
            }
        }
    }

    /// All records of a header. Those of other keys are passed over.
    ///
    /// # Errors
    /// A record whose length leads past the end, or which lacks a part.
    pub fn decode(mut header: &[u8]) -> Result<Vec<Self>> {
        let mut records = Vec::new();
        while !header.is_empty() {
            let (key, value, rest) = first(header).ok_or_else(|| broken("a record has an odd length"))?;
            header = rest;
            let kind: fn(&[u8]) -> Option<Self> = match key {
                _ if key == SOCKET.as_bytes() => socket,
                _ if key == FLAGS.as_bytes() => flags,
                _ if key == ATTRIBUTE.as_bytes() => attribute,
                _ => continue,
            };
            let odd = || -> Error { broken(format!("{} has an odd record", String::from_utf8_lossy(key))) };
            records.push(kind(value).ok_or_else(odd)?);
        }
        Ok(records)
    }
}

/// `LENGTH KEY=VALUE`, where the length counts its own digits.
fn line(key: &str, value: &[&[u8]]) -> Vec<u8> {
    let value = value.concat();
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), &value, b"\n"].concat()
}

/// Key and value of the first record, and what follows it.
fn first(header: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (length, _) = word(header)?;
    let (record, rest) = header.split_at_checked(usize::try_from(number(length, 10)?).ok()?)?;
    let (_, record) = word(record)?;
    let record = record.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], rest))
}

/// What stands before the first space, and what behind it.
fn word(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = text.iter().position(|byte| *byte == b' ')?;
    Some((&text[..space], &text[space + 1..]))
}

fn number(word: &[u8], radix: u32) -> Option<u32> {
    u32::from_str_radix(std::str::from_utf8(word).ok()?, radix).ok()
}

fn socket(value: &[u8]) -> Option<Record> {
    let (mode, rest) = word(value)?;
    let (uid, rest) = word(rest)?;
    let (gid, rest) = word(rest)?;
    let (seconds, path) = word(rest)?;
    Some(Record::Socket(Socket {
        mode: number(mode, 8)?,
        uid: number(uid, 10)?,
        gid: number(gid, 10)?,
        seconds: number(seconds, 10)?,
        path: path.to_vec(),
    }))
}

fn flags(value: &[u8]) -> Option<Record> {
    let (flags, path) = word(value)?;
    Some(Record::Flags(number(flags, 10)?, path.to_vec()))
}

fn attribute(value: &[u8]) -> Option<Record> {
    let (name_length, rest) = word(value)?;
    let (path_length, rest) = word(rest)?;
    let (name, rest) = rest.split_at_checked(usize::try_from(number(name_length, 10)?).ok()?)?;
    let rest = rest.strip_prefix(b" ")?;
    let (path, rest) = rest.split_at_checked(usize::try_from(number(path_length, 10)?).ok()?)?;
    let value = rest.strip_prefix(b" ")?;
    Some(Record::Attribute(Attribute { name: name.to_vec(), path: path.to_vec(), value: value.to_vec() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_hold_any_byte() {
        let odd = b"./a b\n12 STASIS.flags=\xff=".to_vec();
        let records = [
            Record::Socket(Socket { mode: 0o710, uid: 7, gid: 8, seconds: 9, path: odd.clone() }),
            Record::Flags(0x30, odd.clone()),
            Record::Attribute(Attribute { name: odd.clone(), path: odd.clone(), value: (0..=255).collect() }),
            // Just where its length takes one digit more.
            Record::Flags(1, vec![b'x'; 79]),
            Record::Flags(1, vec![b'x'; 80]),
            Record::Flags(1, vec![b'x'; 81]),
            Record::Attribute(Attribute { name: Vec::new(), path: Vec::new(), value: Vec::new() }),
        ];
        let mut header: Vec<u8> = records.iter().flat_map(Record::encode).collect();
        assert_eq!(Record::decode(&header).unwrap(), records);
        header.extend_from_slice(b"13 other=new\n");
        assert_eq!(Record::decode(&header).unwrap(), records);
    }

    #[test]
    fn damaged_records_are_errors() {
        let odd: [&[u8]; 9] = [
            b"x",
            b"0 a=b\n",
            b"99 a=b\n",
            b"6 a=bc\n",
            b"6 a=bc",
            b"25 STASIS.flags=x ./file\n",
            b"19 STASIS.flags=17\n",
            b"30 STASIS.xattr=9 1 a b value\n",
            b"99999999999999999999 a=b\n",
        ];
        for header in odd {
            assert!(Record::decode(header).is_err(), "{}", String::from_utf8_lossy(header));
        }
        let whole = Record::Attribute(Attribute { name: b"a".into(), path: b"b".into(), value: b"c".into() })
            .encode();
        for cut in 1..whole.len() {
            assert!(Record::decode(&whole[..cut]).is_err(), "{cut}");
        }
    }
}
