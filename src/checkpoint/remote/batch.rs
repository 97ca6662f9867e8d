//! A batch of system calls as plain data: it can be built, printed, compared and tested without a task.
//!
//! Placed in a task's scratch memory it looks like this:
//!
//! ```text
//!   base                                    data_at              out_at
//!   ├ entry ┤├ entry ┤├ entry ┤ ...          ├ data (strings,     ├ out (what calls
//!     80 B     80 B     80 B                 │ structures)        │ write)
//!
//!   entry: │ nr │ arg0 .. arg5 │ result │ mode │ expect │       ten words of 8 bytes
//!   copy:  │ -1 │ to │ from │ len │ ...                   moves a result into a later entry or into data
//! ```
//!
//! Data and out stay in place for the whole batch; entries are placed a window at a time when there are more than
//! the scratch holds.

use std::fmt::Write as _;

use nix::errno::Errno;

use super::names;
use crate::checkpoint::error::Error;

/// Bytes of an entry.
pub(super) const ENTRY: usize = 80;
/// Words of an entry.
const WORDS: usize = ENTRY / 8;
/// Word of an entry that holds the result.
pub(super) const RESULT: usize = 7;
/// Number of the pseudo-call that copies memory.
const COPY: u64 = u64::MAX;

/// How the stub judges a result. The numbers are known to the assembly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// An errno ends the batch.
    Strict = 0,
    /// Any result will do.
    Tolerant = 1,
    /// Any other result ends the batch.
    Exact = 2,
    /// As `Strict`; and a child in which the call returns 0 exits at once.
    Birth = 3,
}

/// An argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// This number.
    Value(u64),
    /// Address of bytes of [`Batch::data`].
    Data {
        /// Where in the batch's data.
        offset: usize,
    },
    /// Address of a buffer of [`Batch::out`].
    Out {
        /// Where in the batch's buffers.
        offset: usize,
    },
    /// The result of an earlier call.
    Result(Call),
    /// A number of `len` bytes (at most 8) that an earlier call has written into a buffer.
    Load {
        /// Where in the batch's buffers.
        offset: usize,
        /// Bytes of the number; it is extended with zeros.
        len: usize,
    },
}

impl Arg {
    /// The address `bytes` further on, in data or a buffer.
    #[must_use]
    pub fn plus(self, bytes: usize) -> Self {
        match self {
            Self::Value(value) => Self::Value(value.wrapping_add(bytes as u64)),
            Self::Data { offset } => Self::Data { offset: offset + bytes },
            Self::Out { offset } => Self::Out { offset: offset + bytes },
            other => other,
        }
    }
}

/// Numbers become values; negative ones are sign-extended.
macro_rules! values {
    ($($t:ty),*) => {$(
        impl From<$t> for Arg {
            fn from(value: $t) -> Self {
                #[allow(clippy::cast_sign_loss, clippy::cast_possible_truncation, clippy::cast_lossless)]
                Self::Value(value as i128 as u64)
            }
        }
    )*};
}
values!(u8, u16, u32, u64, usize, i32, i64, isize);

impl From<Call> for Arg {
    fn from(call: Call) -> Self {
        Self::Result(call)
    }
}
impl From<Out> for Arg {
    fn from(out: Out) -> Self {
        out.arg()
    }
}

/// Names a call of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call(usize);

/// Names a buffer that calls of a batch write into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Out {
    offset: usize,
    len: usize,
}

impl Out {
    /// Its address.
    pub fn arg(self) -> Arg {
        Arg::Out { offset: self.offset }
    }
    /// Its length in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> usize {
        self.len
    }
    /// A 32-bit number in it, as an argument of a later call: `pipe2` then `fcntl`, for instance.
    pub fn load_u32(self, at: usize) -> Arg {
        Arg::Load { offset: self.offset + at, len: 4 }
    }
    /// A 64-bit number in it, as an argument of a later call.
    pub fn load_u64(self, at: usize) -> Arg {
        Arg::Load { offset: self.offset + at, len: 8 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    nr: i64,
    args: [Arg; 6],
    argc: usize,
    mode: Mode,
    expect: u64,
    /// Index into `topics`.
    topic: usize,
}

/// A field of data that takes an address or an earlier result.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Link {
    /// Where in data.
    at: usize,
    len: usize,
    to: Arg,
    /// The call that it must be done before.
    before: usize,
}

/// System calls to be made by a task, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    calls: Vec<Entry>,
    data: Vec<u8>,
    /// Offset and length of each piece of data, ascending.
    pieces: Vec<(usize, usize)>,
    links: Vec<Link>,
    out_len: usize,
    topics: Vec<String>,
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self {
            calls: Vec::new(),
            data: Vec::new(),
            pieces: Vec::new(),
            links: Vec::new(),
            out_len: 0,
            topics: vec!["the task's system call failed".into()],
        }
    }

    /// Says what the calls from here on are for, as the clause that an error starts with: "cannot set the timer".
    pub fn about(&mut self, what: impl Into<String>) {
        self.topics.push(what.into());
    }

    /// Bytes that calls read (or write). Aligned to 16.
    pub fn data(&mut self, bytes: &[u8]) -> Arg {
        let offset = self.data.len();
        self.data.extend_from_slice(bytes);
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        self.pieces.push((offset, bytes.len()));
        Arg::Data { offset }
    }

    /// A string, with the NUL that ends it.
    pub fn string(&mut self, bytes: &[u8]) -> Arg {
        let mut terminated = bytes.to_vec();
        terminated.push(0);
        self.data(&terminated)
    }

    /// Words one after the other: structures whose fields are all 64 bits wide.
    pub fn words(&mut self, words: &[u64]) -> Arg {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.data(&bytes)
    }

    /// Puts `to` into 8 bytes of data, `at` bytes after the start of `data`, before the next call is made: a
    /// pointer inside a structure, or an earlier result.
    pub fn link(&mut self, data: Arg, at: usize, to: impl Into<Arg>) {
        self.link_len(data, at, 8, to.into());
    }

    /// As [`Self::link`], into a field of 4 bytes.
    pub fn link_u32(&mut self, data: Arg, at: usize, to: impl Into<Arg>) {
        self.link_len(data, at, 4, to.into());
    }

    fn link_len(&mut self, data: Arg, at: usize, len: usize, to: Arg) {
        if let Arg::Data { offset } = data {
            self.links.push(Link { at: offset + at, len, to, before: self.calls.len() });
        }
    }

    /// Room for what calls write; zero before the batch runs. Aligned to 16.
    pub fn out(&mut self, len: usize) -> Out {
        let out = Out { offset: self.out_len, len };
        self.out_len += len.next_multiple_of(16);
        out
    }

    /// Appends a call. An errno as its result ends the batch with an error.
    pub fn call(&mut self, nr: libc::c_long, args: &[Arg]) -> Call {
        let mut all = [Arg::Value(0); 6];
        let argc = args.len().min(6);
        all[..argc].copy_from_slice(&args[..argc]);
        let topic = self.topics.len() - 1;
        self.calls.push(Entry { nr, args: all, argc, mode: Mode::Strict, expect: 0, topic });
        Call(self.calls.len() - 1)
    }

    /// Lets the call fail: its errno is its result, and the batch goes on.
    pub fn tolerate(&mut self, call: Call) -> Call {
        self.calls[call.0].mode = Mode::Tolerant;
        call
    }

    /// Any other result than this ends the batch with an error.
    pub fn expect(&mut self, call: Call, result: impl Into<Arg>) -> Call {
        if let Arg::Value(expect) = result.into() {
            self.calls[call.0].mode = Mode::Exact;
            self.calls[call.0].expect = expect;
        }
        call
    }

    /// Marks a call that makes a child: should the driver die at that moment, the child exits.
    pub(super) fn birth(&mut self, call: Call) -> Call {
        self.calls[call.0].mode = Mode::Birth;
        call
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.calls.len()
    }
    /// True if there is no call.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }
    /// System call numbers, in order.
    pub fn numbers(&self) -> impl Iterator<Item = libc::c_long> + '_ {
        self.calls.iter().map(|entry| entry.nr)
    }
    /// The calls with these numbers, and those arguments of theirs that are plain numbers.
    pub(super) fn plain_args(&self) -> impl Iterator<Item = (i64, [Option<u64>; 6])> + '_ {
        self.calls.iter().map(|entry| {
            (entry.nr, entry.args.map(|arg| if let Arg::Value(value) = arg { Some(value) } else { None }))
        })
    }

    /// Bytes that all entries take, copies included.
    pub(super) fn entries_len(&self) -> usize {
        let args = self.calls.iter().flat_map(|entry| &entry.args).filter(|arg| arg.is_dynamic()).count();
        let links = self.links.iter().filter(|link| link.to.is_dynamic()).count();
        (self.calls.len() + args + links) * ENTRY
    }
    pub(super) fn data_len(&self) -> usize {
        self.data.len()
    }
    pub(super) fn out_len(&self) -> usize {
        self.out_len
    }

    /// The data as it stands in the task before the first call: addresses are filled in.
    pub(super) fn placed_data(&self, data_at: u64, out_at: u64) -> Vec<u8> {
        let mut data = self.data.clone();
        for link in &self.links {
            let value = match link.to {
                Arg::Value(value) => value,
                Arg::Data { offset } => data_at + offset as u64,
                Arg::Out { offset } => out_at + offset as u64,
                Arg::Result(_) | Arg::Load { .. } => continue,
            };
            if let Some(field) = data.get_mut(link.at..link.at + link.len) {
                field.copy_from_slice(&value.to_ne_bytes()[..link.len]);
            }
        }
        data
    }

    /// The entries from call `from` on, as many as `room` bytes hold, for memory at `base`.
    pub(super) fn window(&self, from: usize, room: usize, at: &Placing, results: &[i64]) -> Window {
        let mut window = Window { words: Vec::new(), entries: Vec::new(), next: from };
        // First link that is not done before an earlier call.
        let mut link = self.links.partition_point(|link| link.before < from);
        while let Some(entry) = self.calls.get(window.next) {
            let index = window.next;
            let links = self.links[link..].iter().take_while(|link| link.before <= index);
            let links: Vec<&Link> = links.filter(|link| link.to.is_dynamic()).collect();
            let ops = 1 + links.len() + entry.args.iter().filter(|arg| arg.is_dynamic()).count();
            if window.words.len() * 8 + ops * ENTRY > room {
                break;
            }
            for link in links {
                window.copy(at, at.data + link.at as u64, link.to, link.len, from, results);
            }
            // The entry stands behind the copies into it.
            let copies = entry.args.iter().filter(|arg| arg.is_dynamic()).count();
            let entry_at = at.base + (window.words.len() * 8 + copies * ENTRY) as u64;
            let mut words = [0u64; WORDS];
            words[0] = entry.nr.cast_unsigned();
            for (slot, arg) in entry.args.iter().enumerate() {
                words[1 + slot] = match *arg {
                    Arg::Value(value) => value,
                    Arg::Data { offset } => at.data + offset as u64,
                    Arg::Out { offset } => at.out + offset as u64,
                    Arg::Result(_) | Arg::Load { .. } => {
                        let to = entry_at + 8 * (1 + slot as u64);
                        let len = if let Arg::Load { len, .. } = *arg { len } else { 8 };
                        window.copy(at, to, *arg, len, from, results);
                        0
                    }
                };
            }
            words[8] = entry.mode as u64;
            words[9] = entry.expect;
            window.entries.push(window.words.len() / WORDS);
            window.words.extend_from_slice(&words);
            window.next += 1;
            while self.links.get(link).is_some_and(|link| link.before <= index) {
                link += 1;
            }
        }
        window
    }

    /// The error of a call that ended the batch.
    pub(super) fn error(&self, index: usize, result: i64, results: &[i64]) -> Error {
        let entry = &self.calls[index];
        let what = self.topics[entry.topic].as_str();
        let call = self.strace(index, results);
        match i32::try_from(-result) {
            Ok(errno @ 1..=4095) => Error::new(what).call(call, Errno::from_raw(errno)),
            _ => Error::new(format!("{what}: {call} gave {result}, not {}", entry.expect.cast_signed())),
        }
    }

    /// A call as strace prints it: `openat(-100, "/etc/passwd", 0)`.
    pub(super) fn strace(&self, index: usize, results: &[i64]) -> String {
        let entry = &self.calls[index];
        let mut text = names::name(entry.nr);
        text.push('(');
        for (i, arg) in entry.args[..entry.argc].iter().enumerate() {
            if i > 0 {
                text.push_str(", ");
            }
            match *arg {
                Arg::Value(value) => push_number(&mut text, value),
                Arg::Data { offset } => self.push_data(&mut text, offset),
                Arg::Out { .. } => text.push_str("<buffer>"),
                Arg::Result(Call(of)) => match results.get(of) {
                    Some(result) => push_number(&mut text, result.cast_unsigned()),
                    None => text.push('?'),
                },
                Arg::Load { .. } => text.push('?'),
            }
        }
        text.push(')');
        text
    }

    fn push_data(&self, text: &mut String, offset: usize) {
        let piece = self.pieces.partition_point(|&(start, _)| start <= offset);
        let (start, len) = piece.checked_sub(1).map_or((0, 0), |i| self.pieces[i]);
        let bytes = self.data.get(offset..start + len).unwrap_or_default();
        match bytes.split_last() {
            Some((0, string)) if !string.is_empty() && string.iter().all(|b| (b' '..=b'~').contains(b)) => {
                let _ = write!(text, "{:?}", String::from_utf8_lossy(string));
            }
            _ => {
                let _ = write!(text, "<{} bytes>", bytes.len());
            }
        }
    }
}

impl Arg {
    /// Known only while the batch runs.
    fn is_dynamic(&self) -> bool {
        matches!(self, Self::Result(_) | Self::Load { .. })
    }
}

fn push_number(text: &mut String, value: u64) {
    let signed = value.cast_signed();
    let _ = if (-4096..=0xffff).contains(&signed) {
        write!(text, "{signed}")
    } else {
        write!(text, "{value:#x}")
    };
}

/// Where the parts of a batch stand in the task.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placing {
    pub(super) base: u64,
    pub(super) data: u64,
    pub(super) out: u64,
}

/// Entries as they stand in memory.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) words: Vec<u64>,
    /// Which entry each call of the window is; the others are copies.
    pub(super) entries: Vec<usize>,
    /// The first call that is not in this window.
    pub(super) next: usize,
}

impl Window {
    /// An entry that copies what `arg` stands for to the address `to`.
    fn copy(&mut self, at: &Placing, to: u64, arg: Arg, len: usize, from: usize, results: &[i64]) {
        let mut words = [0u64; WORDS];
        words[0] = COPY;
        words[1] = to;
        words[3] = len as u64;
        words[2] = match arg {
            Arg::Load { offset, .. } => at.out + offset as u64,
            // The copy carries a result of an earlier window itself, in a word that copies don't use.
            Arg::Result(Call(of)) if of < from => {
                words[4] = results.get(of).copied().unwrap_or(0).cast_unsigned();
                at.base + (self.words.len() * 8) as u64 + 4 * 8
            }
            Arg::Result(Call(of)) => {
                let entry = self.entries.get(of - from).copied().unwrap_or(0);
                at.base + (entry * ENTRY) as u64 + (RESULT * 8) as u64
            }
            Arg::Value(_) | Arg::Data { .. } | Arg::Out { .. } => return,
        };
        self.words.extend_from_slice(&words);
    }
}

/// What the calls of a batch gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Results {
    pub(super) results: Vec<i64>,
    pub(super) out: Vec<u8>,
}

impl Results {
    /// The result of a call, a negative errno where it was tolerated.
    pub fn ret(&self, call: Call) -> i64 {
        self.results[call.0]
    }
    /// The result of a call that gives a descriptor or another small number.
    pub fn int(&self, call: Call) -> i32 {
        i32::try_from(self.ret(call)).unwrap_or(i32::MAX)
    }
    /// The result of a tolerated call.
    pub fn result(&self, call: Call) -> nix::Result<i64> {
        match self.ret(call) {
            errno @ -4095..=-1 => Err(Errno::from_raw(i32::try_from(-errno).unwrap_or(0))),
            value => Ok(value),
        }
    }
    /// What was written into a buffer.
    pub fn out(&self, out: Out) -> &[u8] {
        &self.out[out.offset..out.offset + out.len]
    }
    /// A 32-bit number of a buffer.
    pub fn u32(&self, out: Out, at: usize) -> u32 {
        u32::from_ne_bytes(self.array(out, at))
    }
    /// A 32-bit number of a buffer.
    pub fn i32(&self, out: Out, at: usize) -> i32 {
        i32::from_ne_bytes(self.array(out, at))
    }
    /// A 64-bit number of a buffer.
    pub fn u64(&self, out: Out, at: usize) -> u64 {
        u64::from_ne_bytes(self.array(out, at))
    }
    fn array<const N: usize>(&self, out: Out, at: usize) -> [u8; N] {
        let mut array = [0; N];
        if let Some(bytes) = self.out(out).get(at..at + N) {
            array.copy_from_slice(bytes);
        }
        array
    }
}
