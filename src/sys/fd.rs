//! close_range(2): all descriptors from a number on, at once. And how many there may be.

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

use super::check;

/// Closes every descriptor from `first` on. Falls back to reading /proc/self/fd before Linux 5.9.
///
/// Nothing in this process may use such a descriptor afterwards, which is why only a process that is about to
/// execute a program or to wait as an empty shell calls it.
pub fn close_from(first: u32) -> Result<(), Errno> {
    close_range(first, 0)
}

/// Sets close-on-exec on every descriptor from `first` on.
pub fn cloexec_from(first: u32) -> Result<(), Errno> {
    close_range(first, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, flags: libc::c_uint) -> Result<(), Errno> {
    // SAFETY: no memory is involved; that no owner of a closed descriptor uses it again is the caller's promise.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) }).map(drop)
}

/// While it lives, this process may have as many descriptors as it can be allowed. Shells and services begin with a
/// soft limit of 1024, for programs that use select(2): getrlimit(2), `RLIMIT_NOFILE`.
#[derive(Debug)]
pub struct Room(Option<(rlim_t, rlim_t)>);

impl Room {
    /// Raises the soft limit, and the hard one too for those with CAP_SYS_RESOURCE: to what the kernel has for anybody
    /// (`fs.nr_open`).
    pub fn make() -> Self {
        let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|n| n.trim().parse().ok());
        let raise = || {
            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            let set = |limit| setrlimit(Resource::RLIMIT_NOFILE, limit, limit);
            let most: rlim_t = most.unwrap_or(hard).max(hard);
            set(most).or_else(|_| set(hard)).map(|()| (soft, hard))
        };
        // Who may not have more fails when he needs it.
        Self(raise().ok())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some((soft, hard)) = self.0 {
            // It takes nothing to lower it.
            let _ = setrlimit(Resource::RLIMIT_NOFILE, soft, hard);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;
    use std::os::fd::AsRawFd;

    #[test]
    fn there_is_room_for_a_while() {
        in_child(0, || {
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, 99, hard).unwrap();
            let room = Room::make();
            // More where this process may.
            assert!(getrlimit(Resource::RLIMIT_NOFILE).unwrap() >= (hard, hard));
            drop(room);
            assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (99, hard));
        });
    }

    #[test]
    fn close_from_closes_only_from_there_on() {
        in_child(0, || {
            let file = std::fs::File::open("/dev/null").unwrap();
            let copy = file.try_clone().unwrap();
            let low = file.as_raw_fd().min(copy.as_raw_fd());
            let high = file.as_raw_fd().max(copy.as_raw_fd());
            close_from(high as u32).unwrap();
            assert!(std::path::Path::new(&format!("/proc/self/fd/{low}")).exists());
            assert!(!std::path::Path::new(&format!("/proc/self/fd/{high}")).exists());
            std::mem::forget((file, copy));
        });
    }
}
