//! Reading and writing the files of a control group.

use std::io::Write;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::sys::procfs::read_open;
use crate::sys::{Context, Error, Result};

/// Opens a file of the directory. The name is a plain name, except for what `unified` of config.json says, so
/// anything else is refused: it could lead to another group.
pub(super) fn open_file(dir: &Path, name: &str, flags: OFlag) -> Result<std::fs::File, Errno> {
    if name.is_empty() || name.contains('/') || name == ".." {
        return Err(Errno::EINVAL);
    }
    open(&dir.join(name), flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty()).map(Into::into)
}

/// Reads a whole file.
pub(super) fn read(dir: &Path, name: &str) -> Result<String> {
    let call = || format!("open {}", dir.join(name).display());
    let mut file = open_file(dir, name, OFlag::O_RDONLY).context(call)?;
    read_open(&mut file).context(|| format!("read {}", dir.join(name).display()))
}

/// Writes a file with one write(2).
pub(super) fn write(dir: &Path, name: &str, value: &str) -> Result<()> {
    let call = || format!("open {}", dir.join(name).display());
    let mut file = open_file(dir, name, OFlag::O_WRONLY).context(call)?;
    loop {
        return match file.write(value.as_bytes()) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => Err(e),
        }
        .context(|| format!("failed to write {value:?}: write {}", dir.join(name).display()));
    }
}

/// A number from a file; `max` is the greatest.
pub(super) fn read_number(dir: &Path, name: &str) -> Result<u64> {
    parse_number(read(dir, name)?.trim())
        .ok_or_else(|| Error::new(format!("{} is not a number", dir.join(name).display())))
}

/// A number as the kernel prints it. Negative ones, of counters that have underflown, are 0, as with runc.
pub(super) fn parse_number(text: &str) -> Option<u64> {
    if text == "max" {
        return Some(u64::MAX);
    }
    match text.parse() {
        Ok(n) => Some(n),
        Err(_) if text.parse::<i64>().is_ok_and(|n| n < 0) => Some(0),
        Err(_) => None,
    }
}

/// The value of `key` in a file of `key value` lines.
pub(super) fn read_key(dir: &Path, name: &str, key: &str) -> Result<Option<u64>> {
    let text = read(dir, name)?;
    Ok(pairs(&text).find(|(k, _)| *k == key).map(|(_, v)| v))
}

/// The lines of the form `key value`.
pub(super) fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, parse_number(value.trim())?))
    })
}

/// True if the failure only says that there is no such file.
pub(super) fn is_missing(e: &Error) -> bool {
    matches!(e.errno(), Some(Errno::ENOENT | Errno::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_number("max"), Some(u64::MAX));
        assert_eq!(parse_number("-1"), Some(0));
        assert_eq!(parse_number("12"), Some(12));
        assert_eq!(parse_number("x"), None);
        assert_eq!(pairs("a 1\nb max\nnonsense\n").collect::<Vec<_>>(), [("a", 1), ("b", u64::MAX)]);
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("x"), "1\n").unwrap();
        assert_eq!(read_number(dir.path(), "x").unwrap(), 1);
        for name in ["../x", "/etc/passwd", "..", ""] {
            assert_eq!(write(dir.path(), name, "1").unwrap_err().errno(), Some(Errno::EINVAL), "{name}");
        }
    }
}
