//! A system call that depends on the pid namespace of the caller.
//!
//! A thread cannot move into another pid namespace, only its children are born there; so a child makes the call, on
//! borrowed memory and descriptors, and ends.

use nix::errno::Errno;

/// More than the child needs.
const STACK: usize = 64 << 10;

/// Of a child that was killed before it did anything.
const UNDONE: libc::c_long = -(libc::EINTR as libc::c_long);

struct Order {
    nr: libc::c_long,
    args: [libc::c_long; 4],
    done: libc::c_long,
}

/// Has a child make a system call; the result, or the error.
///
/// # Safety
///
/// As for the call itself. Its pointers have to live until this returns, and must not be used by others meanwhile.
pub(super) unsafe fn call(nr: libc::c_long, args: [libc::c_long; 4]) -> nix::Result<libc::c_long> {
    let mut order = Order { nr, args, done: UNDONE };
    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
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
    match order.done {
        done @ 0.. => Ok(done),
        error => Err(Errno::from_raw(-error as i32)),
    }
}

extern "C" fn child(order: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `call` passes an order that nobody else uses meanwhile, and its caller answers for what is in it.
    unsafe {
        let order = &mut *order.cast::<Order>();
        let [a, b, c, d] = order.args;
        order.done = libc::syscall(order.nr, a, b, c, d);
        if order.done < 0 {
            order.done = -libc::c_long::from(*libc::__errno_location());
        }
    }
    0
}
