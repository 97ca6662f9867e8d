//! What a file of an archive has besides its content.

use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat};
use tar::Entry;

use super::unpack::Policy;
use super::{XATTR, broken, magic_path};
use crate::checkpoint::error::{Context, Error, Result};
use crate::sys::xattr;

/// Owner, mode, times and attributes, to be set when the content is in place.
pub(super) struct Meta {
    pub(super) uid: Uid,
    pub(super) gid: Gid,
    pub(super) mode: Mode,
    pub(super) modified: TimeSpec,
    pub(super) xattrs: Vec<(CString, Vec<u8>)>,
}

impl Meta {
    /// Of an entry of the archive.
    pub(super) fn of<R: Read>(entry: &mut Entry<'_, R>, policy: &Policy) -> Result<Self> {
        let header = entry.header();
        let id = |n: io::Result<u64>| n.map_err(broken).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let (uid, gid) = policy.owner(id(header.uid())?, id(header.gid())?)?;
        let mode = Mode::from_bits_truncate(header.mode().map_err(broken)?);
        let seconds = i64::try_from(header.mtime().map_err(broken)?).unwrap_or(0);
        let mut meta = Self { uid, gid, mode, modified: TimeSpec::new(seconds, 0), xattrs: Vec::new() };
        let Some(records) = entry.pax_extensions().map_err(broken)? else { return Ok(meta) };
        for record in records {
            let record = record.map_err(broken)?;
            match record.key() {
                Ok("mtime") => meta.modified = record.value().ok().and_then(time).unwrap_or(meta.modified),
                Ok(key) => {
                    if let Some(name) = key.strip_prefix(XATTR) {
                        let name = CString::new(name)
                            .map_err(|_| Error::new("an extended attribute has a zero byte in its name"))?;
                        let mut value = record.value_bytes().to_vec();
                        policy.owners.attribute(&name, &mut value)?;
                        meta.xattrs.push((name, value));
                    }
                }
                Err(_) => return Err(Error::new("an extended attribute has an odd name")),
            }
        }
        Ok(meta)
    }

    /// Sets them.
    pub(super) fn apply(&self, file: BorrowedFd<'_>) -> Result<()> {
        let path = magic_path(file);
        let kind = fstatat(file, "", AtFlags::AT_EMPTY_PATH)
            .map(|s| SFlag::from_bits_truncate(s.st_mode) & SFlag::S_IFMT)
            .during("cannot fill the tmpfs", || "fstat(_)".into())?;
        fchownat(file, "", Some(self.uid), Some(self.gid), AtFlags::AT_EMPTY_PATH)
            .during("cannot set the owner", || format!("fchownat(_, {}, {})", self.uid, self.gid))?;
        if kind != SFlag::S_IFLNK {
            let at = nix::fcntl::AT_FDCWD;
            fchmodat(at, path.as_c_str(), self.mode, FchmodatFlags::FollowSymlink)
                .during("cannot set the mode", || format!("fchmodat(_, {:o})", self.mode))?;
        }
        for (name, value) in &self.xattrs {
            set_attribute(&path, name, value)?;
        }
        let at = nix::fcntl::AT_FDCWD;
        let times = UtimensatFlags::FollowSymlink;
        utimensat(at, path.as_c_str(), &TimeSpec::UTIME_NOW, &self.modified, times)
            .during("cannot set the time", || "utimensat(_)".into())
    }
}

/// Sets an extended attribute, but for what this machine's security module has to say.
pub(super) fn set_attribute(file: &CStr, name: &CStr, value: &[u8]) -> Result<()> {
    match xattr::set(file, name, value) {
        // The label follows this machine's policy, and this machine may have another module or none.
        Err(Errno::EOPNOTSUPP | Errno::EPERM | Errno::EINVAL) if name.to_bytes() == b"security.selinux" => {
            Ok(())
        }
        result => result.during("cannot set the extended attribute", || {
            format!("setxattr(_, {name:?}, {})", value.len())
        }),
    }
}

/// Seconds with a fraction.
fn time(text: &str) -> Option<TimeSpec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Some(TimeSpec::new(seconds.parse().ok()?, digits.parse().ok()?))
}
