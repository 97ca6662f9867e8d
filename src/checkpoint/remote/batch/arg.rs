//! What calls of a batch take and give: numbers, addresses in its data and its buffers, earlier results.

/// An argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// This number.
    Value(u64),
    /// Address of bytes of [`Batch::data`](super::Batch::data).
    Data {
        /// Where in the batch's data.
        offset: usize,
    },
    /// Address of a buffer of [`Batch::out`](super::Batch::out).
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
pub struct Call(pub(super) usize);

/// Names a buffer that calls of a batch write into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Out {
    pub(super) offset: usize,
    pub(super) len: usize,
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

impl Arg {
    /// Known only while the batch runs.
    pub(super) fn is_dynamic(&self) -> bool {
        matches!(self, Self::Result(_) | Self::Load { .. })
    }
}
