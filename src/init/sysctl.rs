//! Kernel parameters of the container's namespaces.
//!
//! Whether a parameter belongs to a namespace that the container has to itself is decided by [`crate::bundle`] before
//! anything is made. Here they are written, through a procfs that is proved to be one: inside the root file system
//! `/proc/sys` could be anything (CVE-2025-52881).

use std::collections::HashMap;

use nix::fcntl::OFlag;

use crate::sys::procfs::Procfs;
use crate::sys::{Context, Result};

/// The path below /proc/sys. A name may use dots or slashes; the first one met says which of the two separates, and the
/// other then stands for a dot within a part: `net/ipv4/conf/eth0.100/forwarding`.
pub fn path(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'.' => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

/// Writes all. In the order of their names, as config.json has none.
pub fn apply(sysctls: &HashMap<String, String>, procfs: &Procfs) -> Result<()> {
    let mut names: Vec<_> = sysctls.iter().collect();
    names.sort_unstable();
    for (name, value) in names {
        let path = format!("sys/{}", path(name));
        let mut file = procfs
            .file(&path, OFlag::O_WRONLY | OFlag::O_TRUNC)
            .context(|| format!("open sysctl {name} file: open /proc/{path}"))?;
        std::io::Write::write_all(&mut file, value.as_bytes())
            .context(|| format!("failed to write sysctl {name} = {value:?}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;

    #[test]
    fn both_ways_to_write_a_name_are_understood() {
        assert_eq!(path("net.ipv4.conf.eth0/100.forwarding"), "net/ipv4/conf/eth0.100/forwarding");
        assert_eq!(path("net/ipv4/conf/eth0.100/forwarding"), "net/ipv4/conf/eth0.100/forwarding");
        assert_eq!(path("kernel.shmmax"), "kernel/shmmax");
    }

    #[test]
    fn parameters_of_a_namespace_are_written_whatever_covers_proc() {
        in_child(libc::CLONE_NEWIPC | libc::CLONE_NEWNS, || {
            let none: Option<&str> = None;
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("none"), "/proc/sys", Some("tmpfs"), flags, none).unwrap();
            let procfs = Procfs::open().unwrap();
            let wanted = HashMap::from([("kernel.msgmax".to_owned(), "4321".to_owned())]);
            apply(&wanted, &procfs).unwrap();
            assert_eq!(procfs.read("sys/kernel/msgmax").unwrap(), "4321\n");
        });
    }

    #[test]
    fn names_cannot_leave_proc_sys() {
        in_child(libc::CLONE_NEWNS, || {
            let procfs = Procfs::open().unwrap();
            for name in ["../sysrq-trigger", "no/such", "kernel.no_such"] {
                let wanted = HashMap::from([(name.to_owned(), "h".to_owned())]);
                assert!(apply(&wanted, &procfs).is_err(), "{name}");
            }
        });
    }
}
