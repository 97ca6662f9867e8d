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

mod arg;
mod place;
mod results;

use std::fmt::Write as _;

use nix::errno::Errno;

pub use arg::{Arg, Call, Out};
pub(super) use place::{ENTRY, Placing, RESULT};
pub use results::Results;

use super::names;
use crate::checkpoint::error::Error;

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

fn push_number(text: &mut String, value: u64) {
    let signed = value.cast_signed();
    let _ = if (-4096..=0xffff).contains(&signed) {
        write!(text, "{signed}")
    } else {
        write!(text, "{value:#x}")
    };
}
