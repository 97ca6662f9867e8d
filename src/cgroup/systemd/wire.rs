//! D-Bus messages, as far as talking to systemd needs them.
//!
//! ```text
//!   'l' type flags 1 | body length | serial | fields: array of (code, variant) | to 8 | body
//! ```
//!
//! Everything is aligned to its size, counted from the start of the message; the body starts at a multiple of 8, so that
//! it can be put together by itself.

use crate::sys::{Error, Result};

/// A value in a message. Which of them there are is what systemd's properties are made of.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `b`
    Bool(bool),
    /// `i`
    I32(i32),
    /// `x`
    I64(i64),
    /// `u`
    U32(u32),
    /// `t`
    U64(u64),
    /// `d`
    F64(f64),
    /// `s`
    Str(String),
    /// `ay`
    Bytes(Vec<u8>),
    /// `au`
    U32s(Vec<u32>),
    /// `as`
    Strs(Vec<String>),
    /// `a(ss)`
    Pairs(Vec<(String, String)>),
}

impl Value {
    /// Its type, in D-Bus' letters.
    pub fn signature(&self) -> &'static str {
        match self {
            Self::Bool(_) => "b",
            Self::I32(_) => "i",
            Self::I64(_) => "x",
            Self::U32(_) => "u",
            Self::U64(_) => "t",
            Self::F64(_) => "d",
            Self::Str(_) => "s",
            Self::Bytes(_) => "ay",
            Self::U32s(_) => "au",
            Self::Strs(_) => "as",
            Self::Pairs(_) => "a(ss)",
        }
    }
}

/// Bytes of a message being put together.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    /// `u`
    pub fn u32(&mut self, n: u32) {
        self.align(4);
        self.0.extend(n.to_le_bytes());
    }

    fn u64(&mut self, n: u64) {
        self.align(8);
        self.0.extend(n.to_le_bytes());
    }

    /// `s`, and `o`.
    pub fn string(&mut self, text: &str) {
        self.u32(length(text.len()));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, text: &str) {
        // The signatures are our own, and short.
        self.0.push(u8::try_from(text.len()).unwrap_or(0));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// An array whose elements are aligned to `element`.
    pub fn array(&mut self, element: usize, content: impl FnOnce(&mut Self)) {
        self.u32(0);
        let at = self.0.len() - 4;
        self.align(element);
        let start = self.0.len();
        content(self);
        let size = length(self.0.len() - start);
        self.0[at..at + 4].copy_from_slice(&size.to_le_bytes());
    }

    /// Begins a structure.
    pub fn structure(&mut self) {
        self.align(8);
    }

    /// `v`
    pub fn variant(&mut self, value: &Value) {
        self.signature(value.signature());
        match value {
            Value::Bool(b) => self.u32(u32::from(*b)),
            Value::I32(n) => self.u32(n.cast_unsigned()),
            Value::I64(n) => self.u64(n.cast_unsigned()),
            Value::U32(n) => self.u32(*n),
            Value::U64(n) => self.u64(*n),
            Value::F64(n) => self.u64(n.to_bits()),
            Value::Str(text) => self.string(text),
            Value::Bytes(bytes) => self.array(1, |w| w.0.extend(bytes)),
            Value::U32s(all) => self.array(4, |w| all.iter().for_each(|n| w.u32(*n))),
            Value::Strs(all) => self.array(4, |w| all.iter().for_each(|s| w.string(s))),
            Value::Pairs(all) => self.array(8, |w| {
                for (a, b) in all {
                    w.structure();
                    w.string(a);
                    w.string(b);
                }
            }),
        }
    }

    /// What has been written.
    pub fn bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Messages of ours are far from 4 GiB; one that were would be refused by the bus.
fn length(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// A method call. `signature` is that of `body`.
pub fn call(serial: u32, path: &str, interface: &str, member: &str, signature: &str, body: &[u8]) -> Vec<u8> {
    let destination =
        if interface == "org.freedesktop.DBus" { interface } else { "org.freedesktop.systemd1" };
    let mut w = Writer(vec![b'l', 1, 0, 1]);
    w.u32(length(body.len()));
    w.u32(serial);
    w.array(8, |w| {
        let fields = [
            (1, "o", path),
            (2, "s", interface),
            (3, "s", member),
            (6, "s", destination),
            (8, "g", signature),
        ];
        for (code, kind, text) in fields {
            if code == 8 && text.is_empty() {
                continue;
            }
            w.structure();
            w.0.push(code);
            w.signature(kind);
            if kind == "g" { w.signature(text) } else { w.string(text) }
        }
    });
    w.align(8);
    w.0.extend(body);
    w.0
}

/// What a message says about itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// 2: an answer, 3: an error, 4: a signal.
    pub kind: u8,
    /// Name of the signal.
    pub member: String,
    /// Name of the error.
    pub error: String,
    /// Which call it answers.
    pub reply_to: u32,
}

/// Reads values off a message.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// From the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| Error::new("a message of D-Bus is truncated"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn align(&mut self, to: usize) -> Result<()> {
        self.take(self.at.next_multiple_of(to) - self.at).map(drop)
    }

    fn u8(&mut self) -> Result<u8> {
        self.take(1).map(|b| b[0])
    }

    /// `u`
    pub fn u32(&mut self) -> Result<u32> {
        self.align(4)?;
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn text(&mut self, n: usize) -> Result<String> {
        let text = String::from_utf8_lossy(self.take(n)?).into_owned();
        self.take(1)?;
        Ok(text)
    }

    /// `s`, and `o`.
    pub fn string(&mut self) -> Result<String> {
        let n = self.u32()? as usize;
        self.text(n)
    }

    /// `g`
    pub fn signature(&mut self) -> Result<String> {
        let n = self.u8()? as usize;
        self.text(n)
    }
}

/// Size of what comes before the fields.
pub const FIXED: usize = 16;

/// Sizes of the fields (padded) and of the body, from the first 16 bytes.
pub fn sizes(fixed: &[u8; FIXED]) -> Result<(usize, usize)> {
    if fixed[0] != b'l' || fixed[3] != 1 {
        return Err(Error::new("what answers is not D-Bus"));
    }
    let number =
        |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]) as usize;
    let (fields, body) = (number(12), number(4));
    if fields > 1 << 20 || body > 16 << 20 {
        return Err(Error::new("a message of D-Bus is too long"));
    }
    Ok((fields.next_multiple_of(8), body))
}

/// Reads the fields of a header.
pub fn header(kind: u8, fields: &[u8], length: usize) -> Result<Header> {
    let mut header = Header { kind, ..Header::default() };
    let mut r = Reader::new(&fields[..length.min(fields.len())]);
    while r.at < r.bytes.len() {
        r.align(8)?;
        let code = r.u8()?;
        match (code, r.signature()?.as_str()) {
            (3, "s") => header.member = r.string()?,
            (4, "s") => header.error = r.string()?,
            (5, "u") => header.reply_to = r.u32()?,
            (_, "s" | "o") => drop(r.string()?),
            (_, "g") => drop(r.signature()?),
            (_, "u") => drop(r.u32()?),
            (code, kind) => return Err(Error::new(format!("a field {code} of D-Bus has the type {kind:?}"))),
        }
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_laid_out_as_the_specification_says() {
        let mut body = Writer::default();
        body.string("a.scope");
        body.array(8, |w| {
            w.structure();
            w.string("PIDs");
            w.variant(&Value::U32s(vec![7]));
        });
        let body = body.bytes();
        assert_eq!(body[..12], *b"\x07\0\0\0a.scope\0");
        // The array's size, padding, the structure: name, signature, size, 7.
        assert_eq!(body[12..16], 24u32.to_le_bytes());
        assert_eq!(body[16..28], *b"\x04\0\0\0PIDs\0\x02au");
        assert_eq!(body[28..], *b"\0\0\0\0\x04\0\0\0\x07\0\0\0");
        let message = call(9, "/p", "i.f", "Do", "sa(sv)", &body);
        let fixed: [u8; FIXED] = message[..FIXED].try_into().unwrap();
        let (fields, length) = sizes(&fixed).unwrap();
        assert_eq!((FIXED + fields + length, length), (message.len(), body.len()));
        let exact = u32::from_le_bytes(fixed[12..].try_into().unwrap()) as usize;
        let header = header(1, &message[FIXED..], exact).unwrap();
        assert_eq!(header.member, "Do");
        assert_eq!(message[FIXED + fields..], body);
    }

    #[test]
    fn what_is_cut_off_or_foreign_is_refused() {
        assert!(Reader::new(b"\x09\0\0\0abc").string().is_err());
        assert!(sizes(b"B\x02\0\x01\0\0\0\0\0\0\0\0\0\0\0\0").is_err());
        assert!(sizes(b"l\x02\0\x01\xff\xff\xff\xff\0\0\0\0\0\0\0\0").is_err());
        assert!(header(2, b"\x05\x01u\0\x01", 5).is_err());
    }
}
