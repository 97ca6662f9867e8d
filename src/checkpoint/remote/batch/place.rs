//! A batch as it stands in the memory of a task.

use super::{Arg, Batch, Call, Link};

/// Bytes of an entry.
pub(in crate::checkpoint::remote) const ENTRY: usize = 80;
/// Words of an entry.
const WORDS: usize = ENTRY / 8;
/// Word of an entry that holds the result.
pub(in crate::checkpoint::remote) const RESULT: usize = 7;
/// Number of the pseudo-call that copies memory.
const COPY: u64 = u64::MAX;

impl Batch {
    /// Bytes that all entries take, copies included.
    pub(in crate::checkpoint::remote) fn entries_len(&self) -> usize {
        let args = self.calls.iter().flat_map(|entry| &entry.args).filter(|arg| arg.is_dynamic()).count();
        let links = self.links.iter().filter(|link| link.to.is_dynamic()).count();
        (self.calls.len() + args + links) * ENTRY
    }
    pub(in crate::checkpoint::remote) fn data_len(&self) -> usize {
        self.data.len()
    }
    pub(in crate::checkpoint::remote) fn out_len(&self) -> usize {
        self.out_len
    }

    /// The data as it stands in the task before the first call: addresses are filled in.
    pub(in crate::checkpoint::remote) fn placed_data(&self, data_at: u64, out_at: u64) -> Vec<u8> {
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
    pub(in crate::checkpoint::remote) fn window(
        &self,
        from: usize,
        room: usize,
        at: &Placing,
        results: &[i64],
    ) -> Window {
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
}

/// Where the parts of a batch stand in the task.
#[derive(Debug, Clone, Copy)]
pub(in crate::checkpoint::remote) struct Placing {
    pub(in crate::checkpoint::remote) base: u64,
    pub(in crate::checkpoint::remote) data: u64,
    pub(in crate::checkpoint::remote) out: u64,
}

/// Entries as they stand in memory.
#[derive(Debug)]
pub(in crate::checkpoint::remote) struct Window {
    pub(in crate::checkpoint::remote) words: Vec<u64>,
    /// Which entry each call of the window is; the others are copies.
    pub(in crate::checkpoint::remote) entries: Vec<usize>,
    /// The first call that is not in this window.
    pub(in crate::checkpoint::remote) next: usize,
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
