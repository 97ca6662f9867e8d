//! The stub: walks a batch inside the task, and heals the task if the driver dies. Never uses the task's stack.
//!
//! ```text
//!   rbx  next entry            r12  marker, with X in its low byte     r14  scratch, 0 before there is one
//!   rbp  end of the entries    r13  tgid << 32 | tid, for tgkill       r15  length of the scratch
//!
//!   boot ──► syscall (mmap or mremap of the scratch; the driver has set its registers) ──► stop
//!   run ──► entry: copy or syscall ──► judge the result ──► next entry; at the end or at a bad result: stop
//!   stop ──► r8 = the processor we are on (as getcpu of the vdso finds it: the limit of segment 0x7b)
//!        ──► tgkill(self, X). Traced: the driver has the word. Not traced: X does nothing, and we fall into heal
//!   heal ──► block all signals, unmap the scratch, flags, mask, registers, back into the program
//! ```
//!
//! One slot holds the code, which is the same everywhere, and a record:
//!
//! ```text
//!   │ code │ magic │ tid │ mask │ all ones │ flags │ rsp │ rax rcx rdx rsi rdi rbp rbx r8 .. r15 │ rip │
//! ```

use std::arch::global_asm;

use super::Regs;
use super::regs::{PLAIN_FLAGS, USER32_CS};

/// Marks a slot that is in use.
pub const MAGIC: u64 = 0x0153_4953_4154_53c7;
/// Upper bits of `r12` while a thread is inside a stub; the low byte is the signal X.
const MARKER: u64 = 0x5354_4153_4953_0100;
/// The number of the processor in `r8` at the stop.
pub fn processor(Regs(regs): &Regs) -> i32 {
    (regs.r8 & 0xfff) as i32
}

/// Words of the record.
const RECORD_WORDS: usize = 22;

global_asm!(
    r#"
    .pushsection .rodata.stasis_stub, "a"
    .balign 16
    .globl  stasis_stub_begin, stasis_stub_run, stasis_stub_stop, stasis_stub_stopped, stasis_stub_jump, stasis_stub_code_end
    .hidden stasis_stub_begin, stasis_stub_run, stasis_stub_stop, stasis_stub_stopped, stasis_stub_jump, stasis_stub_code_end
stasis_stub_begin:
    syscall
    mov     rbx, rax
    cmp     rax, -4096
    ja      stasis_stub_stop
    mov     r14, rax
    mov     r15, rbp
    jmp     stasis_stub_stop

stasis_stub_run:
    cmp     rbx, rbp
    jae     stasis_stub_stop
    mov     rax, [rbx]
    mov     rdi, [rbx + 8]
    mov     rsi, [rbx + 16]
    mov     rdx, [rbx + 24]
    test    rax, rax
    js      20f
    mov     r10, [rbx + 32]
    mov     r8, [rbx + 40]
    mov     r9, [rbx + 48]
    syscall
    mov     ecx, [rbx + 64]
    cmp     ecx, 3
    jne     10f
    test    rax, rax
    jz      30f
10: mov     [rbx + 56], rax
    cmp     ecx, 1
    je      12f
    cmp     ecx, 2
    je      11f
    cmp     rax, -4096
    jbe     12f
    jmp     stasis_stub_stop
11: cmp     rax, [rbx + 72]
    jne     stasis_stub_stop
12: add     rbx, 80
    jmp     stasis_stub_run

20: mov     rcx, rdx
    rep movsb
    jmp     12b

30: mov     eax, 231
    xor     edi, edi
    syscall

stasis_stub_stop:
    xor     r8d, r8d
    mov     eax, 0x7b
    lsl     r8d, eax
    mov     rdi, r13
    shr     rdi, 32
    mov     esi, r13d
    movzx   edx, r12b
    mov     eax, 234
    syscall
stasis_stub_stopped:
    mov     eax, 14
    mov     edi, 2
    lea     rsi, [rip + stasis_stub_code_end + 24]
    xor     edx, edx
    mov     r10d, 8
    syscall
    test    r14, r14
    jz      40f
    mov     eax, 11
    mov     rdi, r14
    mov     rsi, r15
    syscall
40: lea     rsp, [rip + stasis_stub_code_end + 32]
    popfq
    mov     rsp, [rip + stasis_stub_code_end + 40]
    mov     eax, 14
    mov     edi, 2
    lea     rsi, [rip + stasis_stub_code_end + 16]
    mov     edx, 0
    mov     r10d, 8
    syscall
    mov     rax, [rip + stasis_stub_code_end + 48]
    mov     rcx, [rip + stasis_stub_code_end + 56]
    mov     rdx, [rip + stasis_stub_code_end + 64]
    mov     rsi, [rip + stasis_stub_code_end + 72]
    mov     rdi, [rip + stasis_stub_code_end + 80]
    mov     rbp, [rip + stasis_stub_code_end + 88]
    mov     rbx, [rip + stasis_stub_code_end + 96]
    mov     r8,  [rip + stasis_stub_code_end + 104]
    mov     r9,  [rip + stasis_stub_code_end + 112]
    mov     r10, [rip + stasis_stub_code_end + 120]
    mov     r11, [rip + stasis_stub_code_end + 128]
    mov     r13, [rip + stasis_stub_code_end + 144]
    mov     r14, [rip + stasis_stub_code_end + 152]
    mov     r15, [rip + stasis_stub_code_end + 160]
    mov     r12, [rip + stasis_stub_code_end + 136]
stasis_stub_jump:
    jmp     qword ptr [rip + stasis_stub_code_end + 168]
    .balign 8
stasis_stub_code_end:
    .popsection
"#
);

unsafe extern "C" {
    static stasis_stub_begin: u8;
    static stasis_stub_run: u8;
    static stasis_stub_stop: u8;
    static stasis_stub_stopped: u8;
    static stasis_stub_jump: u8;
    static stasis_stub_code_end: u8;
}

/// Places in the code, as bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Makes the one call that the registers hold, whose result becomes the scratch.
    Boot,
    /// Walks entries.
    Run,
    /// Stops at once.
    Stop,
    /// Where the instruction pointer stands when the driver has the word.
    Stopped,
    /// The last instruction, behind which the thread is in its program again.
    Jump,
}

pub fn offset(place: Place) -> u64 {
    let label = match place {
        Place::Boot => &raw const stasis_stub_begin,
        Place::Run => &raw const stasis_stub_run,
        Place::Stop => &raw const stasis_stub_stop,
        Place::Stopped => &raw const stasis_stub_stopped,
        Place::Jump => &raw const stasis_stub_jump,
    };
    (label as usize - &raw const stasis_stub_begin as usize) as u64
}

/// What the registers of a thread in the stub stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Where the stub stands.
    pub code: u64,
    /// The signal X.
    pub signal: i32,
    /// Thread group and thread, as tgkill(2) takes them.
    pub ids: (i32, i32),
    /// Address and length of the scratch; 0 before there is one.
    pub scratch: (u64, u64),
}

/// Registers that enter the stub at `place`. `template` gives segments, thread and stack pointer.
pub fn enter(template: &Regs, frame: &Frame, place: Place) -> Regs {
    let mut entering = *template;
    entering.outside_calls();
    let regs = &mut entering.0;
    regs.eflags = PLAIN_FLAGS;
    regs.rip = frame.code + offset(place);
    regs.r12 = MARKER | u64::from(frame.signal.cast_unsigned());
    regs.r13 = u64::from(frame.ids.0.cast_unsigned()) << 32 | u64::from(frame.ids.1.cast_unsigned());
    (regs.r14, regs.r15) = frame.scratch;
    entering
}

/// Entering at [`Place::Run`]: the entries to be walked.
pub fn set_entries(Regs(regs): &mut Regs, start: u64, end: u64) {
    (regs.rbx, regs.rbp) = (start, end);
}

/// Entering at code other than the stub's: it finds `data` in `rbx`, and the stub's stop in `rbp`.
pub fn set_code(Regs(regs): &mut Regs, code: u64, data: u64) {
    (regs.rbx, regs.rbp) = (data, regs.rip);
    regs.rip = code;
}

/// At the stop: the entry that was not finished, or the end.
pub fn next_entry(Regs(regs): &Regs) -> u64 {
    regs.rbx
}

/// Entering at [`Place::Boot`]: a call whose result becomes the address of a scratch of `len` bytes, unless it is an
/// error.
pub fn set_boot(entering: &mut Regs, nr: libc::c_long, args: [u64; 6], len: u64) {
    entering.make_call(nr, args);
    entering.0.rbp = len;
}

/// At the stop: the result of the call at [`Place::Boot`].
pub fn boot_answer(Regs(regs): &Regs) -> i64 {
    regs.rbx.cast_signed()
}

/// At the stop: address and length of the scratch.
pub fn scratch(Regs(regs): &Regs) -> (u64, u64) {
    (regs.r14, regs.r15)
}

/// The signal X of a thread that is inside a stub.
pub fn signal_inside(Regs(regs): &Regs) -> Option<i32> {
    (regs.r12 & !0xff == MARKER).then_some((regs.r12 & 0xff) as i32)
}

/// The last instruction of the stub, at which `r12` has been restored already.
const JUMP: [u8; 2] = [0xff, 0x25];
/// The same into a 32-bit program: behind the instruction pointer's 32 bits stands its segment.
const JUMP_32: [u8; 2] = [0xff, 0x2d];

/// Whether this is the last instruction of a stub.
pub fn is_jump(code: [u8; 2]) -> bool {
    [JUMP, JUMP_32].contains(&code)
}

/// The code, ready to be written anywhere.
pub fn code() -> &'static [u8] {
    let begin = &raw const stasis_stub_begin;
    let len = &raw const stasis_stub_code_end as usize - begin as usize;
    // SAFETY: the assembler put the code between the two symbols, in read-only memory that is never unmapped.
    unsafe { std::slice::from_raw_parts(begin, len) }
}

/// Bytes of a slot: code and record.
pub fn slot_len() -> u64 {
    (code().len() + RECORD_WORDS * 8).next_multiple_of(16) as u64
}

/// Where the magic of a slot stands, as bytes from its start. The tid follows it.
pub fn magic_offset() -> u64 {
    code().len() as u64
}

/// A slot for this thread: it heals to `mask` and `regs`.
pub fn slot(tid: i32, mask: u64, Regs(regs): &Regs) -> Vec<u8> {
    let compat = regs.cs == USER32_CS;
    let record: [u64; RECORD_WORDS] = [
        MAGIC,
        i64::from(tid).cast_unsigned(),
        mask,
        u64::MAX,
        regs.eflags,
        regs.rsp,
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rbp,
        regs.rbx,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        if compat { regs.rip & 0xffff_ffff | USER32_CS << 32 } else { regs.rip },
    ];
    let mut bytes = code().to_vec();
    let jump = usize::try_from(offset(Place::Jump)).unwrap_or(0);
    if let Some(instruction) = bytes.get_mut(jump..jump + JUMP.len()).filter(|_| compat) {
        instruction.copy_from_slice(&JUMP_32);
    }
    bytes.extend(record.iter().flat_map(|word| word.to_ne_bytes()));
    bytes.resize(usize::try_from(slot_len()).unwrap_or(bytes.len()), 0);
    bytes
}
