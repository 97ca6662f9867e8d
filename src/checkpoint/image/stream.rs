//! Reading and writing one image: records, each after its length, and the raw bytes that follow some of them.
//!
//! ```text
//!   │ magic words │ length u32 │ record │ [raw] │ length u32 │ record │ [raw] │ ... end of file
//! ```
//!
//! What is read may have been written by an attacker, or be cut off: lengths are limited before memory is taken,
//! and errors name the image and the number of the record.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::kind::Kind;
use crate::checkpoint::image::record::Record;
use crate::checkpoint::image::wire;

/// Longest record. The largest real ones are mm-N.img: 64 MiB describe 1.5 million mappings.
pub const RECORD_MAX: usize = 64 << 20;
/// Memory that the decoded records of one image, and their raw bytes, may take.
pub const IMAGE_MAX: usize = 1 << 30;

/// Writes one image.
#[derive(Debug)]
pub struct Writer {
    file: BufWriter<File>,
    path: PathBuf,
}

impl Writer {
    /// Begins an image of `kind` in an empty file; `path` is for messages.
    pub fn new(file: File, path: PathBuf, kind: Kind) -> Result<Self> {
        let mut writer = Self { file: BufWriter::new(file), path };
        writer.raw(&kind.header())?;
        Ok(writer)
    }

    /// Appends a record.
    pub fn record<T: Record>(&mut self, record: &T) -> Result<()> {
        let bytes = record.encode_to_vec();
        let length =
            u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= RECORD_MAX).ok_or_else(|| {
                Error::new(format!("a {} of {} bytes is too long", T::SCHEMA.name, bytes.len()))
                    .path(&self.path)
            })?;
        self.raw(&length.to_le_bytes())?;
        self.raw(&bytes)
    }

    /// Appends raw bytes.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .during("cannot write the image", || format!("write(_, _, {})", bytes.len()))
            .map_err(|e| e.path(&self.path))
    }

    /// Appends zeros until a payload of `length` bytes fills a multiple of `unit`.
    pub fn pad(&mut self, length: usize, unit: usize) -> Result<()> {
        let zeros = length.next_multiple_of(unit) - length;
        self.raw(&vec![0; zeros])
    }

    /// Hands everything to the kernel; without it, an error of the last bytes would be lost.
    pub fn finish(self) -> Result<File> {
        let path = self.path;
        self.file
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .during("cannot write the image", || "write(_, _, _)".into())
            .map_err(|e| e.path(path))
    }
}

/// Reads one image.
#[derive(Debug)]
pub struct Reader<R = BufReader<File>> {
    input: R,
    path: PathBuf,
    kind: Kind,
    records: usize,
    budget: usize,
}

impl Reader {
    /// Begins to read a file that should be an image of `kind`; `path` is for messages.
    pub fn new(file: File, path: PathBuf, kind: Kind) -> Result<Self> {
        Self::from_input(BufReader::new(file), path, kind)
    }
}

impl<R: Read> Reader<R> {
    /// Begins to read what should be an image of `kind`; `path` is for messages.
    pub fn from_input(input: R, path: PathBuf, kind: Kind) -> Result<Self> {
        let mut reader = Self { input, path, kind, records: 0, budget: IMAGE_MAX };
        let expected = kind.header();
        let mut found = vec![0; expected.len()];
        let n = reader.fill(&mut found)?;
        if n < expected.len() {
            return Err(Error::new(format!("the image is truncated: {n} bytes, not even its magic words"))
                .path(&reader.path));
        }
        if found != expected {
            return Err(Error::new(format!("this is not an image of the kind {kind}"))
                .path(&reader.path)
                .remedy("its magic words differ: the file is damaged or is something else"));
        }
        Ok(reader)
    }

    /// The next record, or none at the end of the image.
    pub fn record<T: Record>(&mut self) -> Result<Option<T>> {
        let mut length = [0; 4];
        match self.fill(&mut length)? {
            0 => return Ok(None),
            4 => self.records += 1,
            _ => return Err(self.truncated("the length of record", self.records + 1)),
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > RECORD_MAX {
            return Err(self.bad(format!("claims a length of {length} bytes")));
        }
        let bytes = self.bytes(length)?;
        if bytes.len() < length {
            return Err(self.truncated("record", self.records));
        }
        self.spend(size_of::<T>())?;
        wire::check(T::SCHEMA, &bytes, &mut self.budget).map_err(|defect| {
            let e = self.bad(defect.to_string());
            match defect {
                wire::Defect::Unknown(..) => {
                    e.remedy("the image was written by a later version; restore it with that")
                }
                _ => e,
            }
        })?;
        T::decode(bytes.as_slice()).map(Some).map_err(|e| self.bad(e.to_string()))
    }

    /// All records that are left.
    pub fn records<T: Record>(&mut self) -> Result<Vec<T>> {
        let mut all = Vec::new();
        while let Some(record) = self.record()? {
            all.push(record);
        }
        Ok(all)
    }

    /// The only record of an image.
    pub fn only<T: Record>(&mut self) -> Result<T> {
        let record = self.record()?.ok_or_else(|| {
            Error::new(format!("the image is truncated: it has no {}", T::SCHEMA.name)).path(&self.path)
        })?;
        match self.fill(&mut [0])? {
            0 => Ok(record),
            _ => Err(Error::new("the image goes on after its only record").path(&self.path)),
        }
    }

    /// Raw bytes after a record.
    pub fn raw(&mut self, length: u64) -> Result<Vec<u8>> {
        let length = usize::try_from(length)
            .ok()
            .filter(|n| *n <= IMAGE_MAX)
            .ok_or_else(|| self.bad(format!("claims {length} bytes of data")))?;
        self.spend(length)?;
        let bytes = self.bytes(length)?;
        if bytes.len() < length {
            return Err(self.truncated("the data of record", self.records));
        }
        Ok(bytes)
    }

    /// Skips the padding after a payload of `length` bytes.
    pub fn skip_padding(&mut self, length: u64, unit: u64) -> Result<()> {
        let padding = length.checked_next_multiple_of(unit).map_or(0, |padded| padded - length);
        self.raw(padding).map(drop)
    }

    /// The image, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is left of the file, to read raw bytes from that do not fit into memory.
    pub fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// What is left of the file, not yet read.
    pub fn into_input(self) -> R {
        self.input
    }

    /// At most `length` bytes; memory is taken as they come, not as they were promised.
    fn bytes(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        (&mut self.input)
            .take(length as u64)
            .read_to_end(&mut bytes)
            .during("cannot read the image", || "read(_, _, _)".into())
            .map_err(|e| e.path(&self.path))?;
        Ok(bytes)
    }

    /// Fills the buffer as far as the file goes.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let bytes = self.bytes(buffer.len())?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn spend(&mut self, size: usize) -> Result<()> {
        match self.budget.checked_sub(size) {
            Some(left) => self.budget = left,
            None => return Err(self.bad("makes the image larger than any real one".into())),
        }
        Ok(())
    }

    fn bad(&self, what: String) -> Error {
        Error::new(format!("record {} of {} {what}", self.records, self.kind)).path(&self.path)
    }

    fn truncated(&self, part: &str, number: usize) -> Error {
        Error::new(format!("the image is truncated: {part} {number} is cut off"))
            .path(&self.path)
            .remedy("the file was not copied whole, or the disk was full")
    }
}
