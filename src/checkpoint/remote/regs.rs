//! Register sets of threads that were stopped inside a system call or a restartable sequence.
//!
//! The kernel leaves a code in `rax` of an interrupted call that it acts on when the thread resumes:
//!
//! | rax  | meaning                  | in an image              | in the stub's record           |
//! |------|--------------------------|--------------------------|--------------------------------|
//! | -512 | restart if SA_RESTART    | call again               | call again                     |
//! | -513 | restart always           | call again               | call again                     |
//! | -514 | restart if no handler    | call again               | call again                     |
//! | -516 | restart_syscall(2)       | -EINTR: the state in the | restart_syscall: the state is  |
//! |      |                          | kernel is lost           | still there                    |
//!
//! A thread that simply goes on gets its raw registers back.

use libc::user_regs_struct;

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;

/// Registers as an image keeps them: a restored thread makes an interrupted call again, or sees EINTR.
///
/// `rip` inside a restartable sequence is not handled here: it needs the task's memory, see
/// [`super::Injection::image_regs`].
pub fn cooked_for_image(regs: &user_regs_struct) -> user_regs_struct {
    cook(regs, |cooked| cooked.rax = i64::from(-libc::EINTR).cast_unsigned())
}

/// Registers that the stub itself can go back to, in the same thread.
pub fn cooked_for_stub(regs: &user_regs_struct) -> user_regs_struct {
    cook(regs, |cooked| {
        cooked.rax = libc::SYS_restart_syscall.cast_unsigned();
        cooked.rip = cooked.rip.wrapping_sub(SYSCALL_LEN);
    })
}

fn cook(regs: &user_regs_struct, block: impl FnOnce(&mut user_regs_struct)) -> user_regs_struct {
    let mut cooked = *regs;
    if regs.orig_rax.cast_signed() >= 0 {
        match regs.rax.cast_signed() {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {
                cooked.rax = regs.orig_rax;
                cooked.rip = regs.rip.wrapping_sub(SYSCALL_LEN);
            }
            ERESTART_RESTARTBLOCK => block(&mut cooked),
            _ => {}
        }
    }
    cooked.orig_rax = u64::MAX;
    cooked
}

/// Where a restartable sequence goes when it is interrupted: `descriptor` is the task's `struct rseq_cs`.
/// None if `rip` is not inside it.
pub(super) fn abort_ip(descriptor: &[u8; 32], rip: u64) -> Option<u64> {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&descriptor[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    let (start, len, abort) = (word(8), word(16), word(24));
    (rip.wrapping_sub(start) < len).then_some(abort)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regs(orig_rax: i64, rax: i64) -> user_regs_struct {
        // SAFETY: a plain structure of integers, for which zero is a value.
        let mut regs: user_regs_struct = unsafe { std::mem::zeroed() };
        regs.orig_rax = orig_rax.cast_unsigned();
        regs.rax = rax.cast_unsigned();
        regs.rip = 0x1002;
        regs
    }

    #[test]
    fn interrupted_calls_are_made_again() {
        for code in [-512, -513, -514] {
            for cooked in [cooked_for_image(&regs(0, code)), cooked_for_stub(&regs(0, code))] {
                assert_eq!((cooked.rax, cooked.rip, cooked.orig_rax), (0, 0x1000, u64::MAX));
            }
        }
    }

    #[test]
    fn restart_block_depends_on_who_goes_on() {
        let image = cooked_for_image(&regs(35, -516));
        assert_eq!((image.rax.cast_signed(), image.rip), (-4, 0x1002));
        let stub = cooked_for_stub(&regs(35, -516));
        assert_eq!((stub.rax, stub.rip), (219, 0x1000));
    }

    #[test]
    fn a_program_may_hold_such_numbers_outside_of_calls() {
        let cooked = cooked_for_image(&regs(-1, -512));
        assert_eq!((cooked.rax.cast_signed(), cooked.rip), (-512, 0x1002));
        let finished = cooked_for_image(&regs(0, 5));
        assert_eq!((finished.rax, finished.rip), (5, 0x1002));
    }

    #[test]
    fn only_inside_a_sequence() {
        let words: [u64; 4] = [0, 0x2000, 0x10, 0x3000];
        let mut descriptor = [0u8; 32];
        for (to, from) in descriptor.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&from.to_ne_bytes());
        }
        assert_eq!(abort_ip(&descriptor, 0x2000), Some(0x3000));
        assert_eq!(abort_ip(&descriptor, 0x200f), Some(0x3000));
        assert_eq!(abort_ip(&descriptor, 0x2010), None);
        assert_eq!(abort_ip(&descriptor, 0x1fff), None);
    }
}
