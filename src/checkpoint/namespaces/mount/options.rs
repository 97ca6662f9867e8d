//! Options of file systems that a container can change while they are mounted.

use std::ffi::CString;
use std::os::fd::AsFd;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::namespaces::mountinfo::Mount;
use crate::sys::mount::FsContext;

/// By file system: the names of the options, each with the value that the kernel does not show, if there is one.
/// The others of a tmpfs, owner and mode, are those of its root directory, which comes with the contents.
const CHANGEABLE: [(&str, &[(&str, &str)]); 3] = [
    ("tmpfs", &[("size", ""), ("nr_inodes", ""), ("huge", "never")]),
    ("proc", &[("hidepid", "0"), ("gid", "0")]),
    ("devpts", &[("uid", ""), ("gid", ""), ("mode", ""), ("ptmxmode", ""), ("max", "")]),
];

/// What turns the options `have` into `want`, as far as they can be changed; nothing if they are the same.
fn change(fstype: &str, have: &str, want: &str) -> Vec<(&'static str, String)> {
    let known = CHANGEABLE.iter().find(|(name, _)| *name == fstype).map_or(&[][..], |(_, known)| known);
    let wanted = known.iter().filter_map(|(key, hidden)| {
        let shown = value(want, key);
        // What the images don't show has the value that is not shown, or is up to config.json.
        let lifted = (value(have, key).is_some() && !hidden.is_empty()).then_some(*hidden);
        shown.or(lifted).map(|to| (*key, to.to_owned()))
    });
    // A remounted devpts forgets the options that are not given again: all or none.
    let wanted: Vec<_> = wanted.collect();
    let differs = wanted.iter().any(|(key, to)| value(have, key) != Some(to));
    if differs { wanted } else { Vec::new() }
}

fn value<'a>(options: &'a str, key: &str) -> Option<&'a str> {
    options.split(',').filter_map(|option| option.split_once('=')).find(|(k, _)| *k == key).map(|(_, v)| v)
}

/// Whether a file system has other options than those of the images.
pub(super) fn differ(mount: &Mount, want: &str) -> bool {
    !change(&mount.fstype, &mount.options, want).is_empty()
}

/// Gives the file system of a mount the options of the images.
pub(super) fn set(mount: &Mount, place: impl AsFd, want: &str) -> Result<()> {
    let all = change(&mount.fstype, &mount.options, want);
    let text = |s: &str| CString::new(s).map_err(|_| Error::new("a mount option has a zero byte"));
    let context = FsContext::pick(&place)
        .during("cannot change the options of the file system", || "fspick(_)".into())?;
    for (key, to) in &all {
        context
            .string(&text(key)?, &text(to)?)
            .during("cannot change the options of the file system", || {
                format!("fsconfig(_, {key:?}, {to:?})")
            })?;
    }
    context.reconfigure().during("cannot change the options of the file system", || {
        format!("fsconfig(_, FSCONFIG_CMD_RECONFIGURE) with {all:?}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_change_all_or_none() {
        let of = |fstype, have, want| {
            let all = change(fstype, have, want);
            all.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
        };
        assert_eq!(of("tmpfs", "size=64k,mode=755,inode64", "size=64k,mode=700"), "");
        assert_eq!(of("tmpfs", "size=64k,mode=755", "size=8k,nr_inodes=9"), "size=8k,nr_inodes=9");
        assert_eq!(of("tmpfs", "size=64k,huge=always", ""), "huge=never");
        assert_eq!(of("proc", "hidepid=invisible,gid=7", "gid=7"), "hidepid=0,gid=7");
        assert_eq!(of("proc", "", "hidepid=4"), "hidepid=4");
        assert_eq!(
            of("devpts", "gid=5,mode=620,ptmxmode=666", "gid=5,mode=600,ptmxmode=666"),
            "gid=5,mode=600,ptmxmode=666"
        );
        assert_eq!(of("ext4", "data=ordered", "data=journal"), "");
    }
}
