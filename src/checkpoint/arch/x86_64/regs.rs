//! General registers; those of threads that were stopped inside a system call are made good.
//!
//! The kernel leaves a code in `rax` of an interrupted call that it acts on when the thread resumes:
//!
//! | rax  | meaning                  | in an image              | in the stub's record           |
//! |------|--------------------------|--------------------------|--------------------------------|
//! | -512 | restart if SA_RESTART    | call again               | call again                     |
//! | -513 | restart always           | call again               | call again                     |
//! | -514 | restart if no handler    | call again               | call again                     |
//! | -516 | restart_syscall(2)       | see below                | restart_syscall: the state is  |
//! |      |                          |                          | still there                    |
//!
//! A thread that simply goes on gets its raw registers back. One that is restored elsewhere has no kernel that
//! remembers the call, so the image says "about to make it again". With a timeout that is:
//!
//! ```text
//!  until a moment              futex(FUTEX_WAIT_BITSET), clock_nanosleep(TIMER_ABSTIME)      the same call
//!  for a while, rest is known  select, ppoll: written where the timeout stood                 the same call
//!                              nanosleep, clock_nanosleep: written to the last argument       takes its timeout from there
//!  for a while                 poll; futex(FUTEX_WAIT); a sleep without that argument         from the beginning
//!  anything else                                                                              EINTR
//! ```
//!
//! A 32-bit program has other numbers for its calls, arguments in other registers, and an instruction of its own for
//! them, as long as this architecture's.

use libc::user_regs_struct;

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
pub(super) const ERESTART_RESTARTBLOCK: i64 = -516;
/// The instruction that makes a system call.
pub const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// The one of 32-bit programs, `int $0x80`; 64-bit code can make their calls with it, too.
pub const SYSCALL_32: [u8; 2] = [0xcd, 0x80];
const SYSCALL_LEN: u64 = SYSCALL.len() as u64;
/// `mov $NUMBER, %eax`
const MOV_EAX: u8 = 0xb8;
const TIMER_ABSTIME: u64 = 1;
/// Code segment of 64-bit programs.
const USER64_CS: u64 = 0x33;
/// Code segment of 32-bit programs.
pub(super) const USER32_CS: u64 = 0x23;
/// Direction and trap flags off, interrupts on.
pub(super) const PLAIN_FLAGS: u64 = 0x202;

/// The numbers of the calls that can be made again.
struct Numbers {
    restart: i64,
    /// Made again as they are.
    plain: &'static [i64],
    nanosleep: i64,
    clock_nanosleep: &'static [i64],
}

const NATIVE: Numbers = Numbers {
    restart: libc::SYS_restart_syscall,
    plain: &[libc::SYS_poll, libc::SYS_futex],
    nanosleep: libc::SYS_nanosleep,
    clock_nanosleep: &[libc::SYS_clock_nanosleep],
};

/// poll, futex, futex_time64; nanosleep; clock_nanosleep, clock_nanosleep_time64.
const COMPAT: Numbers =
    Numbers { restart: 0, plain: &[168, 240, 422], nanosleep: 162, clock_nanosleep: &[267, 407] };

/// The general registers of a thread.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Regs(pub(super) user_regs_struct);

impl Regs {
    /// The instruction pointer.
    pub fn ip(&self) -> u64 {
        self.0.rip
    }

    /// Moves the instruction pointer.
    pub fn set_ip(&mut self, ip: u64) {
        self.0.rip = ip;
    }

    /// Sets the thread pointer.
    pub fn set_tls(&mut self, tls: u64) {
        self.0.fs_base = tls;
    }

    /// Whether the thread runs a program of this architecture, not one of its 32-bit ancestor.
    pub fn is_native(&self) -> bool {
        self.0.cs == USER64_CS
    }

    /// Whether the thread runs a 32-bit program.
    pub fn is_compat(&self) -> bool {
        self.0.cs == USER32_CS
    }

    /// These registers, for 64-bit code in the thread of a 32-bit program.
    #[must_use]
    pub fn native(&self) -> Self {
        Self(user_regs_struct { cs: USER64_CS, ..self.0 })
    }

    fn numbers(&self) -> &'static Numbers {
        if self.is_compat() { &COMPAT } else { &NATIVE }
    }

    /// As [`Self::make_call`], for an `int $0x80`.
    pub fn make_call_32(&mut self, nr: u64, args: [u64; 4]) {
        let regs = &mut self.0;
        regs.rax = nr;
        [regs.rbx, regs.rcx, regs.rdx, regs.rsi] = args;
        self.outside_calls();
        self.0.eflags = PLAIN_FLAGS;
    }

    /// Sets number and arguments of a system call that an instruction at `ip` is to make. The kernel takes the thread
    /// for one outside of any call, and touches nothing of this when it resumes.
    pub fn make_call(&mut self, nr: libc::c_long, args: [u64; 6]) {
        let regs = &mut self.0;
        regs.rax = nr.cast_unsigned();
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        self.outside_calls();
        self.0.eflags = PLAIN_FLAGS;
    }

    /// Makes the kernel take the thread for one that is in no system call.
    pub fn outside_calls(&mut self) {
        self.0.orig_rax = u64::MAX;
    }

    /// What a system call has returned.
    pub fn answer(&self) -> i64 {
        self.0.rax.cast_signed()
    }

    /// False for a thread in a system call that no function of the vdso makes.
    pub fn may_be_in_vdso(&self) -> bool {
        let nr = self.0.orig_rax.cast_signed();
        // That of a 32-bit program makes all its calls, and a thread that sleeps in one cannot be let out of it.
        !self.is_compat()
            && (nr < 0
                || matches!(
                    nr,
                    libc::SYS_clock_gettime
                        | libc::SYS_clock_getres
                        | libc::SYS_gettimeofday
                        | libc::SYS_time
                        | libc::SYS_getcpu
                        | libc::SYS_getrandom
                ))
    }

    /// Registers as an image keeps them: a restored thread makes an interrupted call again, or sees EINTR.
    ///
    /// An instruction pointer inside a restartable sequence is not handled here: it needs the task's memory.
    #[must_use]
    pub fn for_image(&self) -> Self {
        self.cook(|cooked| cooked.rax = i64::from(-libc::EINTR).cast_unsigned())
    }

    /// Registers that the stub itself can go back to, in the same thread.
    #[must_use]
    pub fn for_stub(&self) -> Self {
        self.cook(|cooked| {
            cooked.rax = self.numbers().restart.cast_unsigned();
            cooked.rip = cooked.rip.wrapping_sub(SYSCALL_LEN);
        })
    }

    fn cook(&self, block: impl FnOnce(&mut user_regs_struct)) -> Self {
        let regs = &self.0;
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
        Self(cooked)
    }

    /// The registers with which a thread makes the call again whose rest only the kernel remembers, if it can be made
    /// again. `read` fills a buffer from the thread's memory, and says whether it could.
    pub fn again(&self, read: &dyn Fn(u64, &mut [u8]) -> bool) -> Option<Self> {
        let raw = &self.0;
        if raw.orig_rax.cast_signed() < 0 || raw.rax.cast_signed() != ERESTART_RESTARTBLOCK {
            return None;
        }
        let (numbers, compat) = (self.numbers(), self.is_compat());
        let instruction = if compat { SYSCALL_32 } else { SYSCALL };
        let mut number = raw.orig_rax.cast_signed();
        if number == numbers.restart {
            // It was interrupted before, and the kernel has put its own number there. The program's stands in its code.
            let mut code = [0; 7];
            if !read(raw.rip.wrapping_sub(7), &mut code) || code[0] != MOV_EAX || code[5..] != instruction {
                return None;
            }
            number = i64::from(i32::from_le_bytes([code[1], code[2], code[3], code[4]]));
        }
        let mut regs = *raw;
        let args =
            if compat { [raw.rbx, raw.rcx, raw.rdx, raw.rsi] } else { [raw.rdi, raw.rsi, raw.rdx, raw.r10] };
        if number == numbers.nanosleep {
            let timeout = if compat { &mut regs.rbx } else { &mut regs.rdi };
            *timeout = if args[1] == 0 { args[0] } else { args[1] };
        } else if numbers.clock_nanosleep.contains(&number) {
            if args[1] & TIMER_ABSTIME == 0 && args[3] != 0 {
                regs.rdx = args[3];
            }
        } else if !numbers.plain.contains(&number) {
            return None;
        }
        regs.rax = number.cast_unsigned();
        regs.rip = raw.rip.wrapping_sub(SYSCALL_LEN);
        regs.orig_rax = u64::MAX;
        Some(Self(regs))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn regs(orig_rax: i64, rax: i64) -> Regs {
        let mut regs = empty();
        regs.orig_rax = orig_rax.cast_unsigned();
        regs.rax = rax.cast_unsigned();
        regs.rip = 0x1002;
        Regs(regs)
    }

    #[test]
    fn interrupted_calls_are_made_again() {
        for code in [-512, -513, -514] {
            for cooked in [regs(0, code).for_image().0, regs(0, code).for_stub().0] {
                assert_eq!((cooked.rax, cooked.rip, cooked.orig_rax), (0, 0x1000, u64::MAX));
            }
        }
    }

    #[test]
    fn restart_block_depends_on_who_goes_on() {
        let image = regs(35, -516).for_image().0;
        assert_eq!((image.rax.cast_signed(), image.rip), (-4, 0x1002));
        let stub = regs(35, -516).for_stub().0;
        assert_eq!((stub.rax, stub.rip), (219, 0x1000));
    }

    #[test]
    fn a_program_may_hold_such_numbers_outside_of_calls() {
        let cooked = regs(-1, -512).for_image().0;
        assert_eq!((cooked.rax.cast_signed(), cooked.rip), (-512, 0x1002));
        let finished = regs(0, 5).for_image().0;
        assert_eq!((finished.rax, finished.rip), (5, 0x1002));
    }

    #[test]
    fn a_sleep_goes_on_with_what_is_left() {
        let mut raw = user_regs_struct {
            rip: 0x1000,
            rax: (-516_i64).cast_unsigned(),
            orig_rax: 230,
            r10: 0x70,
            ..empty()
        };
        raw.rdx = 0x60;
        let none = |_: u64, _: &mut [u8]| false;
        assert_eq!(Regs(raw).again(&none).unwrap().0.rdx, 0x70);
        raw.rsi = TIMER_ABSTIME;
        assert_eq!(Regs(raw).again(&none).unwrap().0.rdx, 0x60);
        raw.orig_rax = 1;
        assert!(Regs(raw).again(&none).is_none(), "write(2) is not among them");
    }

    #[test]
    fn calls_of_32_bit_programs_have_their_own_numbers() {
        let raw = |nr: u64| user_regs_struct {
            cs: USER32_CS,
            rip: 0x1002,
            rax: (-516_i64).cast_unsigned(),
            orig_rax: nr,
            rbx: 0x50,
            rcx: 0x60,
            ..empty()
        };
        let none = |_: u64, _: &mut [u8]| false;
        let sleep = Regs(raw(162)).again(&none).unwrap().0;
        assert_eq!((sleep.rax, sleep.rip, sleep.rbx), (162, 0x1000, 0x60));
        let until = user_regs_struct { rcx: TIMER_ABSTIME, rsi: 0x70, rdx: 0x80, ..raw(407) };
        assert_eq!(Regs(until).again(&none).unwrap().0.rdx, 0x80);
        assert!(Regs(raw(35)).again(&none).is_none(), "nanosleep of 64-bit programs");
        assert_eq!(Regs(raw(162)).for_stub().0.rax, 0);
        let poll = |_: u64, into: &mut [u8]| {
            into.copy_from_slice(&[0xb8, 168, 0, 0, 0, 0xcd, 0x80]);
            true
        };
        assert_eq!(Regs(raw(0)).again(&poll).unwrap().0.rax, 168);
    }

    #[test]
    fn a_call_interrupted_before_is_known_by_its_code() {
        let raw = user_regs_struct {
            rip: 0x1000,
            rax: (-516_i64).cast_unsigned(),
            orig_rax: libc::SYS_restart_syscall.cast_unsigned(),
            rdx: 1500,
            ..empty()
        };
        let code = |bytes: [u8; 7]| {
            move |at: u64, into: &mut [u8]| {
                assert_eq!((at, into.len()), (0xff9, 7));
                into.copy_from_slice(&bytes);
                true
            }
        };
        let poll = Regs(raw).again(&code([0xb8, 7, 0, 0, 0, 0x0f, 0x05])).unwrap().0;
        assert_eq!((poll.rax, poll.rip, poll.rdx), (7, 0xffe, 1500));
        assert!(Regs(raw).again(&code([0x90, 7, 0, 0, 0, 0x0f, 0x05])).is_none());
    }

    /// All zero, and outside of any call.
    pub(in crate::checkpoint::arch::x86_64) fn empty() -> user_regs_struct {
        user_regs_struct {
            r15: 0,
            r14: 0,
            r13: 0,
            r12: 0,
            rbp: 0,
            rbx: 0,
            r11: 0,
            r10: 0,
            r9: 0,
            r8: 0,
            rax: 0,
            rcx: 0,
            rdx: 0,
            rsi: 0,
            rdi: 0,
            orig_rax: u64::MAX,
            rip: 0,
            cs: 0,
            eflags: 0,
            rsp: 0,
            ss: 0,
            fs_base: 0,
            gs_base: 0,
            ds: 0,
            es: 0,
            fs: 0,
            gs: 0,
        }
    }
}
