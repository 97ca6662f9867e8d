//! /proc/PID/mountinfo.
//!
//! ```text
//!   36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue
//!   id parent dev root point options  optional fields     type source    super options
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::device;
use crate::sys::procfs::read_bytes;

/// MS_NOSYMFOLLOW, for which nix has no name.
pub const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(libc::MS_NOSYMFOLLOW);

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Mount id.
    pub id: u32,
    /// Mount that it lies on.
    pub parent: u32,
    /// Device of its file system, in the kernel's encoding.
    pub dev: u32,
    /// Directory of the file system that is its root.
    pub root: String,
    /// Where it lies, from the root of the process.
    pub point: PathBuf,
    /// MS_* bits of the mount.
    pub flags: MsFlags,
    /// Peer group; 0 for none.
    pub shared: u32,
    /// Peer group it receives from; 0 for none.
    pub master: u32,
    /// File system.
    pub fstype: String,
    /// What was mounted.
    pub source: String,
    /// MS_* bits of the file system.
    pub super_flags: MsFlags,
    /// The other options of the file system.
    pub options: String,
}

/// The mounts that a process sees: each after the one that it lies on, otherwise in the order of the kernel's list.
pub fn of(pid: &str) -> Result<Vec<Mount>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = read_bytes(&path).during("cannot read the mount table", || format!("read({path:?})"))?;
    Ok(parents_first(parse(&text)?))
}

/// Since Linux 6.8 the list is by age: a tree that was made before it was attached comes before what it lies on.
fn parents_first(mut left: Vec<Mount>) -> Vec<Mount> {
    let all: BTreeSet<u32> = left.iter().map(|m| m.id).collect();
    let mut placed = BTreeSet::new();
    let mut sorted = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let before = left.len();
        let mut later = Vec::new();
        for mount in left {
            let parent = mount.parent;
            if parent == mount.id || !all.contains(&parent) || placed.contains(&parent) {
                placed.insert(mount.id);
                sorted.push(mount);
            } else {
                later.push(mount);
            }
        }
        left = later;
        if left.len() == before {
            // The kernel changed it while we read.
            sorted.append(&mut left);
        }
    }
    sorted
}

/// Reads a whole table.
pub fn parse(text: &[u8]) -> Result<Vec<Mount>> {
    let text = std::str::from_utf8(text).map_err(|_| {
        Error::new("a mount has a name that is not UTF-8, which the images have no place for")
    })?;
    text.lines()
        .map(|line| {
            line_of(line)
                .ok_or_else(|| Error::new(format!("the mount table has an unreadable line, {line:?}")))
        })
        .collect()
}

fn line_of(line: &str) -> Option<Mount> {
    let (own, file_system) = line.split_once(" - ")?;
    let mut words = own.split(' ');
    let (id, parent, dev) = (words.next()?, words.next()?, words.next()?);
    let (major, minor) = dev.split_once(':')?;
    let (root, point, options) = (words.next()?, words.next()?, words.next()?);
    let (mut shared, mut master, mut unbindable) = (0, 0, false);
    for word in words {
        match word.split_once(':') {
            Some(("shared", id)) => shared = id.parse().ok()?,
            Some(("master", id)) => master = id.parse().ok()?,
            None if word == "unbindable" => unbindable = true,
            _ => {}
        }
    }
    let mut words = file_system.split(' ');
    let (fstype, source) = (words.next()?, words.next()?);
    let mut flags = MsFlags::empty();
    for word in options.split(',') {
        flags |= mount_flag(word);
    }
    if !flags.intersects(MsFlags::MS_RELATIME | MsFlags::MS_NOATIME) {
        flags |= MsFlags::MS_STRICTATIME;
    }
    flags |= match (shared, master, unbindable) {
        (0, 0, true) => MsFlags::MS_UNBINDABLE,
        (0, 0, false) => MsFlags::MS_PRIVATE,
        (0, ..) => MsFlags::MS_SLAVE,
        (_, 0, _) => MsFlags::MS_SHARED,
        _ => MsFlags::MS_SHARED | MsFlags::MS_SLAVE,
    };
    let (mut super_flags, mut rest) = (MsFlags::empty(), Vec::new());
    for word in words.next().unwrap_or("").split(',') {
        match word {
            "rw" | "" => {}
            "ro" => super_flags |= MsFlags::MS_RDONLY,
            "sync" => super_flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => super_flags |= MsFlags::MS_DIRSYNC,
            other => rest.push(other),
        }
    }
    Some(Mount {
        id: id.parse().ok()?,
        parent: parent.parse().ok()?,
        dev: device::kernel(major.parse().ok()?, minor.parse().ok()?),
        root: unescape(root),
        point: unescape(point).into(),
        flags,
        shared,
        master,
        fstype: unescape(fstype),
        source: unescape(source),
        super_flags,
        options: unescape(&rest.join(",")),
    })
}

fn mount_flag(word: &str) -> MsFlags {
    match word {
        "ro" => MsFlags::MS_RDONLY,
        "nosuid" => MsFlags::MS_NOSUID,
        "nodev" => MsFlags::MS_NODEV,
        "noexec" => MsFlags::MS_NOEXEC,
        "noatime" => MsFlags::MS_NOATIME,
        "nodiratime" => MsFlags::MS_NODIRATIME,
        "relatime" => MsFlags::MS_RELATIME,
        "nosymfollow" => NOSYMFOLLOW,
        _ => MsFlags::empty(),
    }
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 4);
        match digits.and_then(|d| u8::from_str_radix(d, 8).ok()).filter(u8::is_ascii) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

impl Mount {
    /// Whether its file system, or the mount itself, is read-only.
    pub fn read_only(&self) -> bool {
        (self.flags | self.super_flags).contains(MsFlags::MS_RDONLY)
    }

    /// Whether it lies at, or below, a path.
    pub fn within(&self, path: &Path) -> bool {
        self.point.starts_with(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let line = b"36 35 98:3 /a\\040b /mnt\\134x rw,noatime,nosuid,nosymfollow master:1 shared:7 - ext3 /dev/ro\\011ot ro,errors=x\n";
        let mounts = parse(line).unwrap();
        let m = &mounts[0];
        assert_eq!((m.id, m.parent, m.dev, m.shared, m.master), (36, 35, (98 << 20) | 3, 7, 1));
        assert_eq!(
            (m.root.as_str(), m.point.to_str().unwrap(), m.source.as_str()),
            ("/a b", "/mnt\\x", "/dev/ro\tot")
        );
        assert_eq!((m.fstype.as_str(), m.options.as_str()), ("ext3", "errors=x"));
        assert!(m.flags.contains(
            MsFlags::MS_NOSUID | NOSYMFOLLOW | MsFlags::MS_NOATIME | MsFlags::MS_SHARED | MsFlags::MS_SLAVE
        ));
        assert!(m.read_only() && !m.flags.contains(MsFlags::MS_RDONLY));
    }

    #[test]
    fn what_was_made_before_it_was_attached_comes_after_what_it_lies_on() {
        let line = |id, parent, point| format!("{id} {parent} 8:1 / {point} rw - ext4 x rw\n");
        let table =
            [line(1, 3, "/a/b"), line(2, 4, "/a"), line(3, 4, "/a"), line(4, 9, "/"), line(5, 1, "/a/b/c")];
        let sorted = parents_first(parse(table.concat().as_bytes()).unwrap());
        assert_eq!(sorted.iter().map(|m| m.id).collect::<Vec<_>>(), [4, 2, 3, 1, 5]);
        let torn = [line(1, 2, "/a"), line(2, 1, "/b"), line(3, 3, "/")];
        assert_eq!(parents_first(parse(torn.concat().as_bytes()).unwrap()).len(), 3);
    }

    #[test]
    fn our_own_table_is_readable_and_nonsense_is_not() {
        assert!(!of("self").unwrap().is_empty());
        assert!(parse(b"36 35 98:0 / /").is_err());
        assert!(parse(b"36 35 980 / / rw - ext3 x rw").is_err());
        assert!(parse(b"36 35 98:0 / /\xff rw - ext3 x rw").is_err());
    }
}
