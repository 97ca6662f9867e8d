//! Images in which raw bytes follow the records.
//!
//! ```text
//!   pipes-data, fifo-data   record │ `bytes` bytes
//!   bpfmap-data             record │ `keys_bytes` bytes │ `values_bytes` bytes
//!   sk-queues               record │ `length` bytes
//!   ipcns-shm               record │ `size` bytes, padded to 4      (nothing where `in_pagemaps` is set)
//!   ipcns-sem               record │ `nsems` 16-bit words, padded to 8
//!   ipcns-msg               record │ `qnum` times: message record │ `msize` bytes, padded to 8
//! ```

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{
    BpfmapDataEntry, ImageDir, IpcMsg, IpcMsgEntry, IpcSemEntry, IpcShmEntry, Kind, PipeDataEntry, Reader,
    Record, SkPacketEntry, Writer,
};

/// A record that raw bytes follow.
pub trait Payload: Record {
    /// What follows it, decoded.
    type Data: std::fmt::Debug + Clone + Default + PartialEq;
    /// Appends what follows.
    fn write(&self, data: &Self::Data, to: &mut Writer) -> Result<()>;
    /// Reads what follows.
    fn read(&self, from: &mut Reader) -> Result<Self::Data>;
}

/// Writes an image of records with payload.
pub fn write<T: Payload>(dir: &ImageDir, kind: Kind, name: &str, all: &[(T, T::Data)]) -> Result<()> {
    let mut writer = dir.writer(kind, name)?;
    for (record, data) in all {
        writer.record(record)?;
        record.write(data, &mut writer)?;
    }
    writer.finish().map(drop)
}

/// Reads an image of records with payload.
pub fn read<T: Payload>(dir: &ImageDir, kind: Kind, name: &str) -> Result<Vec<(T, T::Data)>> {
    let mut reader = dir.reader(kind, name)?;
    let mut all = Vec::new();
    while let Some(record) = reader.record::<T>()? {
        let data = record.read(&mut reader)?;
        all.push((record, data));
    }
    Ok(all)
}

/// The length that a record gives must be that of its data, or the reader would lose its place.
fn matching(what: &str, claimed: u64, actual: usize) -> Result<()> {
    match claimed == actual as u64 {
        true => Ok(()),
        false => Err(Error::new(format!("a record of {what} says {claimed} where there are {actual}"))),
    }
}

impl Payload for PipeDataEntry {
    type Data = Vec<u8>;
    fn write(&self, data: &Vec<u8>, to: &mut Writer) -> Result<()> {
        matching("pipe data", u64::from(self.bytes), data.len())?;
        to.raw(data)
    }
    fn read(&self, from: &mut Reader) -> Result<Vec<u8>> {
        from.raw(u64::from(self.bytes))
    }
}

impl Payload for BpfmapDataEntry {
    type Data = Vec<u8>;
    fn write(&self, data: &Vec<u8>, to: &mut Writer) -> Result<()> {
        matching(
            "elements of a BPF map",
            u64::from(self.keys_bytes) + u64::from(self.values_bytes),
            data.len(),
        )?;
        to.raw(data)
    }
    fn read(&self, from: &mut Reader) -> Result<Vec<u8>> {
        from.raw(u64::from(self.keys_bytes) + u64::from(self.values_bytes))
    }
}

impl Payload for SkPacketEntry {
    type Data = Vec<u8>;
    fn write(&self, data: &Vec<u8>, to: &mut Writer) -> Result<()> {
        matching("socket data", u64::from(self.length), data.len())?;
        to.raw(data)
    }
    fn read(&self, from: &mut Reader) -> Result<Vec<u8>> {
        from.raw(u64::from(self.length))
    }
}

impl Payload for IpcShmEntry {
    type Data = Vec<u8>;
    fn write(&self, data: &Vec<u8>, to: &mut Writer) -> Result<()> {
        if self.in_pagemaps == Some(true) {
            return matching("shared memory", 0, data.len());
        }
        matching("shared memory", self.size, data.len())?;
        to.raw(data)?;
        to.pad(data.len(), 4)
    }
    fn read(&self, from: &mut Reader) -> Result<Vec<u8>> {
        if self.in_pagemaps == Some(true) {
            return Ok(Vec::new());
        }
        let data = from.raw(self.size)?;
        from.skip_padding(self.size, 4)?;
        Ok(data)
    }
}

impl Payload for IpcSemEntry {
    type Data = Vec<u16>;
    fn write(&self, values: &Vec<u16>, to: &mut Writer) -> Result<()> {
        matching("a semaphore set", u64::from(self.nsems), values.len())?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        to.raw(&bytes)?;
        to.pad(bytes.len(), 8)
    }
    fn read(&self, from: &mut Reader) -> Result<Vec<u16>> {
        let length = u64::from(self.nsems) * 2;
        let bytes = from.raw(length)?;
        from.skip_padding(length, 8)?;
        Ok(bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect())
    }
}

impl Payload for IpcMsgEntry {
    type Data = Vec<(IpcMsg, Vec<u8>)>;
    fn write(&self, messages: &Self::Data, to: &mut Writer) -> Result<()> {
        matching("a message queue", u64::from(self.qnum), messages.len())?;
        for (message, text) in messages {
            matching("a message", u64::from(message.msize), text.len())?;
            to.record(message)?;
            to.raw(text)?;
            to.pad(text.len(), 8)?;
        }
        Ok(())
    }
    fn read(&self, from: &mut Reader) -> Result<Self::Data> {
        let mut messages = Vec::new();
        for _ in 0..self.qnum {
            let message: IpcMsg = from.record()?.ok_or_else(|| {
                Error::new("the image is truncated: a message queue lacks messages").path(from.path())
            })?;
            let text = from.raw(u64::from(message.msize))?;
            from.skip_padding(u64::from(message.msize), 8)?;
            messages.push((message, text));
        }
        Ok(messages)
    }
}
