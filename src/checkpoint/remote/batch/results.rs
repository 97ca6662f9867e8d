//! What the calls of a batch gave.

use nix::errno::Errno;

use super::{Call, Out};

/// What the calls of a batch gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Results {
    pub(in crate::checkpoint::remote) results: Vec<i64>,
    pub(in crate::checkpoint::remote) out: Vec<u8>,
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
