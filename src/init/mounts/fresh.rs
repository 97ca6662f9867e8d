//! A new file system, made option by option: fsopen(2) to fsmount(2).

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::{MS_RDONLY, MS_REMOUNT};
use nix::errno::Errno;

use super::{attributes, c_string, join_options};
use crate::sys::mount::FsContext;
use crate::sys::{Context, Error, Result};

/// The MS_* bits that a superblock has, with their names as mount options.
const SUPERBLOCK: &[(u64, &std::ffi::CStr)] = &[
    (MS_RDONLY, c"ro"),
    (libc::MS_SYNCHRONOUS, c"sync"),
    (libc::MS_DIRSYNC, c"dirsync"),
    (libc::MS_LAZYTIME, c"lazytime"),
    (libc::MS_MANDLOCK, c"mand"),
];

/// A new file system as a detached mount.
pub(crate) fn fresh(kind: &str, source: &Path, flags: u64, data: &str) -> Result<OwnedFd> {
    let unsupported = libc::MS_I_VERSION | MS_REMOUNT | libc::MS_MOVE;
    let (data, label) = split_context(data);
    // Quoting and escapes are the file system's own business: mount(2) hands it the whole string.
    if flags & unsupported != 0 || data.contains(['"', '\\']) {
        return Err(Error::call("fsopen", Errno::ENOTSUP));
    }
    let call = || format!("fsopen {kind}");
    let context = FsContext::open(&c_string(kind.as_bytes())?).context(call)?;
    let explain = |what: &str, errno: Errno| {
        let complaints = context.complaints();
        let e = Error::call(what, errno);
        if complaints.is_empty() { e } else { e.context(complaints) }
    };
    if !source.as_os_str().is_empty() {
        context
            .string(c"source", &c_string(source.as_os_str().as_bytes())?)
            .map_err(|e| explain("fsconfig source", e))?;
    }
    for (flag, name) in SUPERBLOCK {
        if flags & flag != 0 {
            context.flag(name).map_err(|e| explain("fsconfig", e))?;
        }
    }
    for option in data.split(',').filter(|o| !o.is_empty()) {
        let set = match option.split_once('=') {
            Some((key, value)) => context.string(&c_string(key.as_bytes())?, &c_string(value.as_bytes())?),
            None => context.flag(&c_string(option.as_bytes())?),
        };
        set.map_err(|e| explain(&format!("fsconfig {option}"), e))?;
    }
    if let Some(label) = label {
        context
            .string(c"context", &c_string(label.as_bytes())?)
            .map_err(|e| explain(&format!("fsconfig context={label}"), e))?;
    }
    context.mount(attributes(flags)).map_err(|e| explain(&format!("fsmount {kind}"), e))
}

/// Adds SELinux's label of all that is in a mount to its options. It may have commas in it.
pub(crate) fn with_context(data: &str, label: Option<&str>) -> String {
    match label {
        Some(label) if !label.is_empty() => join_options(data, &format!("context=\"{label}\"")),
        _ => data.to_owned(),
    }
}

/// Takes that label off again: fsconfig(2) wants it without quotes.
fn split_context(data: &str) -> (&str, Option<&str>) {
    let label = data.strip_suffix('"').and_then(|d| d.rsplit_once("context=\""));
    match label {
        Some(("", label)) => ("", Some(label)),
        Some((rest, label)) if rest.ends_with(',') => (&rest[..rest.len() - 1], Some(label)),
        _ => (data, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_label_of_a_mount_is_its_last_option() {
        assert_eq!(with_context("mode=755", None), "mode=755");
        assert_eq!(with_context("mode=755", Some("")), "mode=755");
        let label = "u:object_r:file_t:s0:c1,c2";
        for (data, joined) in
            [("", format!("context=\"{label}\"")), ("mode=755", format!("mode=755,context=\"{label}\""))]
        {
            assert_eq!(with_context(data, Some(label)), joined);
            assert_eq!(split_context(&joined), (data, Some(label)));
        }
        for other in ["", "mode=755", "fscontext=\"x\"", "a=\"b"] {
            assert_eq!(split_context(other), (other, None));
        }
    }
}
