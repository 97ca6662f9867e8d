//! kcmp(2): are two kernel objects, seen through two processes, the same one?
//!
//! The answer is an order, not only an equality, so that n objects are told apart with n log n calls.

use std::cmp::Ordering;

use nix::errno::Errno;

/// What is compared; see kcmp(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The open file descriptions of one descriptor each.
    File(i32, i32),
    /// Address spaces.
    Vm,
    /// Descriptor tables.
    Files,
    /// Root, working directory, umask.
    Fs,
    /// Signal handlers.
    Sighand,
    /// I/O contexts.
    Io,
    /// System V semaphore adjustments.
    SysvSem,
}

/// Compares an object of process `a` with one of process `b`.
pub fn kcmp(a: i32, b: i32, what: What) -> nix::Result<Ordering> {
    let (kind, x, y) = match what {
        What::File(x, y) => (0, x, y),
        What::Vm => (1, 0, 0),
        What::Files => (2, 0, 0),
        What::Fs => (3, 0, 0),
        What::Sighand => (4, 0, 0),
        What::Io => (5, 0, 0),
        What::SysvSem => (6, 0, 0),
    };
    // SAFETY: with these kinds the two last arguments are numbers, not pointers.
    order(unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind, i64::from(x), i64::from(y)) })
}

#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}

/// Compares descriptor `fd` of process `a` with the target that epoll descriptor `efd` of process `b` holds under
/// number `tfd`; `toff` counts the targets that were added under the same number. ENOENT: there is none.
pub fn epoll_target(a: i32, fd: i32, b: i32, efd: i32, tfd: u32, toff: u32) -> nix::Result<Ordering> {
    let slot = EpollSlot { efd: efd as u32, tfd, toff };
    // SAFETY: the last argument points to a kcmp_epoll_slot that outlives the call.
    order(unsafe { libc::syscall(libc::SYS_kcmp, a, b, 7, i64::from(fd), &raw const slot) })
}

fn order(result: libc::c_long) -> nix::Result<Ordering> {
    match Errno::result(result)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3: unequal without an order, which kernels with kcmp(2) proper never answer.
        _ => Err(Errno::EOPNOTSUPP),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_duplicate_is_the_same_and_a_second_open_is_not() {
        let a = std::fs::File::open("/dev/null").unwrap();
        let b = std::fs::File::open("/dev/null").unwrap();
        let c = a.try_clone().unwrap();
        let me = std::process::id() as i32;
        let cmp = |x: &std::fs::File, y: &std::fs::File| {
            kcmp(me, me, What::File(x.as_raw_fd(), y.as_raw_fd())).unwrap()
        };
        assert_eq!(cmp(&a, &c), Ordering::Equal);
        assert_ne!(cmp(&a, &b), Ordering::Equal);
        assert_eq!(cmp(&a, &b), cmp(&b, &a).reverse());
        assert_eq!(kcmp(me, me, What::File(a.as_raw_fd(), 9999)).unwrap_err(), Errno::EBADF);
    }

    #[test]
    fn epoll_targets_are_found() {
        use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
        let (r, _w) = nix::unistd::pipe().unwrap();
        let (other, _x) = nix::unistd::pipe().unwrap();
        let ep = Epoll::new(EpollCreateFlags::empty()).unwrap();
        ep.add(&r, EpollEvent::new(EpollFlags::EPOLLIN, 7)).unwrap();
        let me = std::process::id() as i32;
        let tfd = r.as_raw_fd() as u32;
        let e = ep.0.as_raw_fd();
        assert_eq!(epoll_target(me, r.as_raw_fd(), me, e, tfd, 0).unwrap(), Ordering::Equal);
        assert_ne!(epoll_target(me, other.as_raw_fd(), me, e, tfd, 0).unwrap(), Ordering::Equal);
        assert_eq!(epoll_target(me, r.as_raw_fd(), me, e, 9999, 0).unwrap_err(), Errno::ENOENT);
    }
}
