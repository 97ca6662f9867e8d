//! Peers that no process of the container has: who does?

use std::collections::{BTreeMap, BTreeSet};

/// The processes outside the container that hold these sockets, as `process 12 (dbus-daemon)`. What nobody holds is on
/// its way in some other socket, or is held where we may not look.
pub fn holders(sockets: &BTreeSet<u32>, inside: &BTreeSet<i32>) -> BTreeMap<u32, String> {
    let mut found = BTreeMap::new();
    let Ok(all) = std::fs::read_dir("/proc") else { return found };
    let pids = all.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids.filter(|pid| !inside.contains(pid)) {
        if found.len() == sockets.len() {
            break;
        }
        let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for link in fds.flatten().filter_map(|e| std::fs::read_link(e.path()).ok()) {
            let Some(inode) = link.to_str().and_then(inode) else { continue };
            if sockets.contains(&inode) && !found.contains_key(&inode) {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                found.insert(inode, format!("process {pid} ({})", name.trim_end()));
            }
        }
    }
    found
}

/// `socket:[4711]`
fn inode(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_holder_is_named() {
        let (a, _b) = UnixStream::pair().unwrap();
        let socket = nix::sys::stat::fstat(&a).unwrap().st_ino as u32;
        let me = std::process::id().cast_signed();
        let held = holders(&BTreeSet::from([socket]), &BTreeSet::new());
        assert!(held[&socket].starts_with(&format!("process {me} (")), "{held:?}");
        assert!(holders(&BTreeSet::from([socket]), &BTreeSet::from([me])).is_empty());
        assert_eq!(inode("socket:[12]"), Some(12));
        assert_eq!(inode("pipe:[12]"), None);
    }
}
