//! The pid that a pid namespace has given last: `/proc/sys/kernel/ns_last_pid`.
//!
//! The file shows, and takes, that of the namespace of whoever reads it. A thread cannot move into another pid
//! namespace, only its children are born there; so a child does it, on borrowed memory, and ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

const FILE: &str = "/proc/sys/kernel/ns_last_pid";

/// More than the child needs.
const STACK: usize = 64 << 10;

/// Of a child that was killed before it did anything.
const UNDONE: libc::c_long = -(libc::EINTR as libc::c_long);

/// What the child is to do, and what came of it.
struct Order {
    fd: libc::c_int,
    write: bool,
    text: [u8; 16],
    len: usize,
    done: libc::c_long,
}

/// The last pid of the namespace that children of this thread are born in, before the child that looked.
pub fn get() -> io::Result<u32> {
    let file = File::open(FILE)?;
    let text = [0; 16];
    let order = in_child(Order { fd: file.as_raw_fd(), write: false, text, len: 16, done: UNDONE })?;
    let text = order.text.get(..order.len).and_then(|text| std::str::from_utf8(text).ok());
    let last: u32 =
        text.and_then(|text| text.trim().parse().ok()).ok_or(io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(last.saturating_sub(1))
}

/// Makes the next pid the one after `last`.
pub fn set(last: u32) -> io::Result<()> {
    let file = File::options().write(true).open(FILE)?;
    let number = last.to_string();
    let mut text = [0; 16];
    text[..number.len()].copy_from_slice(number.as_bytes());
    in_child(Order { fd: file.as_raw_fd(), write: true, text, len: number.len(), done: UNDONE })?;
    Ok(())
}

fn in_child(mut order: Order) -> nix::Result<Order> {
    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK;
    // SAFETY: the stack is aligned, large enough, and lives until the child is gone: CLONE_VFORK keeps this thread
    // here until then. The child touches nothing but its stack and the order.
    let pid = Errno::result(unsafe {
        let top = stack.as_mut_ptr_range().end.cast();
        libc::clone(child, top, flags, (&raw mut order).cast())
    })?;
    // SAFETY: no memory is passed. It has no exit signal, hence __WALL.
    while Errno::result(unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) })
        == Err(Errno::EINTR)
    {}
    // A result below zero is an error number, as the kernel has it.
    order.len = usize::try_from(order.done).map_err(|_| Errno::from_raw(-order.done as i32))?;
    Ok(order)
}

extern "C" fn child(order: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `in_child` passes an order that nobody else uses meanwhile; its buffer has at least `len` bytes.
    unsafe {
        let order = &mut *order.cast::<Order>();
        let call = if order.write { libc::SYS_pwrite64 } else { libc::SYS_pread64 };
        order.done = libc::syscall(call, order.fd, order.text.as_mut_ptr(), order.len, 0);
        if order.done < 0 {
            order.done = -libc::c_long::from(*libc::__errno_location());
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing;

    #[test]
    fn the_next_pid_follows() {
        testing::in_child(libc::CLONE_NEWPID, || {
            // The first process of the namespace must live, or no other can be made.
            let first = std::process::Command::new("sleep").arg("1000").spawn();
            assert_eq!(get().unwrap(), 1);
            set(4000).unwrap();
            assert_eq!(get().unwrap(), 4000);
            assert!(set(u32::MAX).is_err());
            first.unwrap().kill().unwrap();
        });
    }
}
