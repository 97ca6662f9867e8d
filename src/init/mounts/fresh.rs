//! A new file system, made option by option: fsopen(2) to fsmount(2).

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::{MS_RDONLY, MS_REMOUNT};
use nix::errno::Errno;

use super::{attributes, c_string};
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
    context.mount(attributes(flags)).map_err(|e| explain(&format!("fsmount {kind}"), e))
}
