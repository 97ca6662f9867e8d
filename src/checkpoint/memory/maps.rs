//! `/proc/PID/maps` and the `VmFlags` of `/proc/PID/smaps`, parsed: proc_pid_maps(5), proc_pid_smaps(5).
//!
//! ```text
//! 7f92c6e86000-7f92c6ea8000 rw-p 00001000 fe:00 326279                     /usr/lib/libc.so.6
//! start        end          prot offset   dev   inode                      name
//! VmFlags: rd wr mr mw me ac
//! ```
//!
//! `smaps` walks the page tables of all that is mapped and costs milliseconds a gigabyte; `maps` costs microseconds.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStringExt;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::memory::pages::PAGE;
use crate::sys::procfs::read_bytes;

/// Bytes of `smaps` that are read before they are looked at.
const CHUNK: usize = 256 << 10;

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// First byte behind.
    pub end: u64,
    /// `PROT_*` bits.
    pub prot: u32,
    /// `MAP_SHARED` rather than `MAP_PRIVATE`.
    pub shared: bool,
    /// Where in the file it begins.
    pub offset: u64,
    /// Device of the file, major and minor.
    pub device: (u32, u32),
    /// Inode of the file; 0 where there is none.
    pub inode: u64,
    /// Path of the file, or a name in square brackets, or nothing. A newline is written as `\012`.
    pub name: OsString,
}

impl Mapping {
    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }
    /// Never true of a line that was parsed.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
    /// The name as bytes.
    pub fn name(&self) -> &[u8] {
        self.name.as_encoded_bytes()
    }
}

/// The two-letter words of a `VmFlags` line, as a set, and the number of the `ProtectionKey` line.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct VmFlags {
    words: [u32; 26],
    key: u16,
}

impl VmFlags {
    /// From the words of the line; unknown ones are kept, what is no word of two small letters is left out.
    pub fn parse(words: &[u8]) -> Self {
        let mut set = Self::default();
        for word in words.split(u8::is_ascii_whitespace) {
            if let &[a @ b'a'..=b'z', b @ b'a'..=b'z'] = word {
                set.words[usize::from(a - b'a')] |= 1 << (b - b'a');
            }
        }
        set
    }
    /// Takes the word, two small letters, out of the line.
    pub fn clear(&mut self, word: &[u8; 2]) {
        let [a, b] = word;
        if a.is_ascii_lowercase() && b.is_ascii_lowercase() {
            self.words[usize::from(a - b'a')] &= !(1 << (b - b'a'));
        }
    }
    /// The protection key, 0 where there is none.
    pub fn key(self) -> u16 {
        self.key
    }
    /// Whether the word, two small letters, is in the line.
    pub fn has(self, word: &[u8; 2]) -> bool {
        let [a, b] = word;
        a.is_ascii_lowercase()
            && b.is_ascii_lowercase()
            && self.words[usize::from(a - b'a')] & (1 << (b - b'a')) != 0
    }
}

/// Everything that `/proc/PID/maps` lists.
pub fn read(pid: i32) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/maps");
    let text = read_bytes(&path).during("cannot read the mappings", || format!("read({path:?})"))?;
    lines(&text).map(line).collect()
}

/// Everything that `/proc/PID/smaps` lists, with its flags.
pub fn read_with_flags(pid: i32) -> Result<Vec<(Mapping, VmFlags)>> {
    let path = format!("/proc/{pid}/smaps");
    let read = || format!("read({path:?})");
    let mut file = File::open(&path).during("cannot read the mappings", read)?;
    let mut smaps = Smaps::default();
    let (mut text, mut filled) = (vec![0; CHUNK], 0);
    loop {
        if filled == text.len() {
            text.resize(2 * filled, 0);
        }
        let n = match file.read(&mut text[filled..]) {
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            n => n.during("cannot read the mappings", read)?,
        };
        filled += n;
        // The kernel gives a page at a time, and every call costs: they are gathered.
        if n != 0 && filled + PAGE as usize <= text.len() {
            continue;
        }
        let whole = if n == 0 {
            filled
        } else {
            text[..filled].iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1)
        };
        smaps.take(&text[..whole])?;
        text.copy_within(whole..filled, 0);
        filled -= whole;
        if n == 0 {
            return Ok(smaps.found);
        }
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|&b| b == b'\n').filter(|line| !line.is_empty())
}

/// Bytes of the line that has the protection key: a few more than there are.
const KEY_LINE: usize = 32;

/// What has been read of `smaps` so far.
#[derive(Debug, Default)]
struct Smaps {
    found: Vec<(Mapping, VmFlags)>,
    /// Bytes from the end of a mapping's first line to its flags. It has two dozen lines in between, of no interest here,
    /// which mostly are as long as those of the mapping before.
    between: usize,
}

impl Smaps {
    /// Takes some whole lines more.
    fn take(&mut self, text: &[u8]) -> Result<()> {
        const FLAGS: &[u8] = b"VmFlags:";
        let (mut at, mut first) = (0, None);
        while at < text.len() {
            let end = text[at..].iter().position(|&b| b == b'\n').map_or(text.len(), |len| at + len);
            let here = &text[at..end];
            let start = std::mem::replace(&mut at, (end + 1).min(text.len()));
            if let Some(words) = here.strip_prefix(FLAGS) {
                let flags = &mut self.found.last_mut().ok_or_else(|| malformed(here))?.1;
                // It is in the line before, which may have been left out.
                let key = lines(&text[start.saturating_sub(KEY_LINE)..start]).last().map_or(Ok(None), key)?;
                *flags = VmFlags { key: key.unwrap_or(flags.key), ..VmFlags::parse(words) };
                self.between = first.take().map_or(self.between, |first| start - first);
            } else if let Some(key) = key(here)? {
                self.found.last_mut().ok_or_else(|| malformed(here))?.1.key = key;
            } else if here.first().is_some_and(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b)) {
                self.found.push((line(here)?, VmFlags::default()));
                first = Some(at);
                let next = at + self.between;
                if text.get(next - 1) == Some(&b'\n')
                    && text.get(next..).is_some_and(|rest| rest.starts_with(FLAGS))
                {
                    at = next;
                }
            }
        }
        Ok(())
    }
}

/// The key in a line that tells of one.
fn key(line: &[u8]) -> Result<Option<u16>> {
    let Some(number) = line.strip_prefix(b"ProtectionKey:") else { return Ok(None) };
    let number = std::str::from_utf8(number).ok().and_then(|number| number.trim().parse().ok());
    number.map(Some).ok_or_else(|| malformed(line))
}

fn line(text: &[u8]) -> Result<Mapping> {
    parse(text).ok_or_else(|| malformed(text))
}

fn malformed(text: &[u8]) -> Error {
    Error::new(format!("cannot understand the mapping {:?}", String::from_utf8_lossy(text)))
}

fn parse(text: &[u8]) -> Option<Mapping> {
    let mut rest = text;
    let mut word = || {
        let end = rest.iter().position(|&b| b == b' ').unwrap_or(rest.len());
        let word = std::str::from_utf8(&rest[..end]).ok();
        rest = rest.get(end + 1..).unwrap_or_default();
        word
    };
    let (start, end) = word()?.split_once('-')?;
    let access = word()?.as_bytes();
    let offset = word()?;
    let (major, minor) = word()?.split_once(':')?;
    let inode = word()?;
    let name = rest.iter().position(|&b| b != b' ').map_or(&[][..], |at| &rest[at..]);
    let &[r, w, x, s] = access else { return None };
    let mut prot = 0;
    for (letter, bit) in [(r, libc::PROT_READ), (w, libc::PROT_WRITE), (x, libc::PROT_EXEC)] {
        if letter != b'-' {
            prot |= bit.cast_unsigned();
        }
    }
    let mapping = Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        prot,
        shared: match s {
            b's' => true,
            b'p' => false,
            _ => return None,
        },
        offset: u64::from_str_radix(offset, 16).ok()?,
        device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: inode.parse().ok()?,
        name: OsString::from_vec(name.to_vec()),
    };
    (mapping.start < mapping.end).then_some(mapping)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &[u8] = b"\
55dd4f36c000-55dd4f36e000 r--p 00000000 fe:00 247030                     /usr/bin/a file (deleted)
Size:                  8 kB
ProtectionKey:         3
VmFlags: rd mr mw me sd 
7ffc46537000-7ffc46558000 rw-p 00000000 00:00 0                          [stack]
Rss:                   8 kB
VmFlags: rd wr mr mw me gd ac 
7f0000000000-7f0000001000 rwxs 0000f000 00:01 77 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex 
";

    #[test]
    fn smaps_gives_mappings_and_flags() {
        let found = with_flags(SMAPS).unwrap();
        assert_eq!(found.len(), 4);
        let (file, flags) = &found[0];
        assert_eq!(file.name(), b"/usr/bin/a file (deleted)");
        assert_eq!((file.device, file.inode), ((0xfe, 0), 247_030));
        assert!(flags.has(b"rd") && flags.has(b"sd") && !flags.has(b"wr"));
        assert_eq!((flags.key(), found[1].1.key()), (3, 0));
        let (stack, flags) = &found[1];
        assert_eq!((stack.len(), stack.prot), (0x21000, 3));
        assert!(flags.has(b"gd"));
        let (shared, flags) = &found[2];
        assert!(shared.shared && shared.name().is_empty() && shared.prot == 7);
        assert_eq!(shared.offset, 0xf000);
        assert_eq!(*flags, VmFlags::default());
        assert_eq!(found[3].0.end, 0xffff_ffff_ff60_1000);
    }

    fn with_flags(text: &[u8]) -> Result<Vec<(Mapping, VmFlags)>> {
        let mut smaps = Smaps::default();
        smaps.take(text).map(|()| smaps.found)
    }

    #[test]
    fn lines_of_any_length_and_number_may_lie_between() {
        let entry = |n: u64, between: &str, flags: &str| {
            format!("{:x}-{:x} rw-p 00000000 00:00 0\n{between}VmFlags: {flags}\n", n << 12, (n + 1) << 12)
        };
        let (small, large) = ("Rss: 8 kB\nPss: 8 kB\n", "Rss: 123456789 kB\nPss: 8 kB\nNew: 1\n");
        let all = [
            (small, "rd"),
            (small, "wr"),
            (large, "ex"),
            (small, "sh"),
            (large, "gd"),
            (large, "dc"),
            ("", "lo"),
        ];
        let text: Vec<String> =
            (1..).zip(all).map(|(n, (between, flags))| entry(n, between, flags)).collect();
        let expected: Vec<_> = all.iter().map(|(_, flags)| VmFlags::parse(flags.as_bytes())).collect();
        let flags = |found: Vec<(Mapping, VmFlags)>| found.into_iter().map(|(_, f)| f).collect::<Vec<_>>();
        assert_eq!(flags(with_flags(text.concat().as_bytes()).unwrap()), expected);
        // However it is cut.
        let mut smaps = Smaps::default();
        text.concat().split_inclusive('\n').for_each(|line| smaps.take(line.as_bytes()).unwrap());
        assert_eq!(flags(smaps.found), expected);
    }

    #[test]
    fn malformed_lines_are_named() {
        for text in [
            "x-y rw-p 0 0:0 0",
            "2000-1000 rw-p 0 0:0 0",
            "1000-2000 rw- 0 0:0 0",
            "1000-2000 rw-q 0 0:0 0",
            "1000",
        ] {
            let error = line(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn this_process_can_be_read_both_ways() {
        let here = 0u8;
        let address = &raw const here as u64;
        let pid = std::process::id().cast_signed();
        let covers = |m: &Mapping| m.start <= address && address < m.end;
        assert!(read(pid).unwrap().iter().any(covers));
        let found = read_with_flags(pid).unwrap();
        let (_, flags) = found.iter().find(|(m, _)| covers(m)).unwrap();
        assert!(flags.has(b"rd") && flags.has(b"wr"));
    }
}
