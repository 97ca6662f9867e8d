//! Where the program begins on x86-64: what [`super::ensure`] does, before there is a C library.
//!
//! ```text
//!   stasis_entry ─┬─ a command that enters no container, or second time here ────────────> _start
//!                 └─ read-only overlay of our directory ── execveat ──> stasis_entry
//!                        └─ anything fails: nothing is left of it ────────────────────────> _start ─ ensure
//! ```
//!
//! The start of a static program costs half a millisecond where CPUID traps to a hypervisor (glibc asks for the caches
//! with dozens of them), and as much again for relocations and the command line. Executing ourselves a second time
//! need not pay that twice. Nothing rests on this being right: `ensure` looks at what we run from all the same.
//!
//! `argv` is searched for the names of commands wherever they stand; a container of such a name costs time, no more.
//! The second start is known by the name that execveat(2) gives a program without one, `/dev/fd/N`.

use std::arch::global_asm;

global_asm!(
    r#"
    .pushsection .rodata.stasis_entry, "a"
.Lexe:      .asciz "/proc/self/exe"
.Loverlay:  .asciz "overlay"
.Llower:    .asciz "lowerdir"
.Lxino:     .asciz "xino"
.Loff:      .asciz "off"
    .popsection

    .pushsection .text.stasis_entry, "ax"
    .globl  stasis_entry
    .hidden stasis_entry
    .type   stasis_entry, @function
stasis_entry:
    mov     r15, rsp                    # argc, argv, 0, envp, 0, auxv
    mov     r14, rdx
    lea     rbx, [r15 + 16]

10: mov     rdi, [rbx]                  # a command that enters a container? Reading past a short word is harmless:
    test    rdi, rdi                    # the strings are followed by the name of the program, and that by zeros.
    jz      90f
    mov     rax, [rdi]
    cmp     eax, {run}
    je      20f
    mov     rcx, {restore}
    cmp     rax, rcx
    je      20f
    mov     rcx, {receive}
    cmp     rax, rcx
    je      20f
    mov     rcx, {create}
    mov     rdx, {seven}
    and     rdx, rax
    cmp     rdx, rcx
    je      20f
    mov     rcx, {exec}
    mov     rdx, {five}
    and     rdx, rax
    cmp     rdx, rcx
    je      20f
    add     rbx, 8
    jmp     10b

20: mov     rax, [r15]                  # the second start?
    lea     r13, [r15 + rax * 8 + 16]
    mov     rbx, r13
21: add     rbx, 8
    cmp     qword ptr [rbx - 8], 0
    jne     21b
22: mov     rax, [rbx]
    test    rax, rax
    jz      90f
    add     rbx, 16
    cmp     rax, {at_execfn}
    jne     22b
    mov     rdi, [rbx - 8]
    mov     rcx, {dev_fd}
    cmp     [rdi], rcx
    je      90f

    sub     rsp, 8192                   # our path: directory and name
    mov     eax, {readlink}
    lea     rdi, [rip + .Lexe]
    mov     rsi, rsp
    mov     edx, 4000
    syscall
    lea     rcx, [rax - 1]
    cmp     rcx, 3998
    ja      90f
    xor     ecx, ecx
    xor     r9d, r9d
30: mov     dl, [rsp + rcx]
    cmp     dl, 58                      # what overlayfs would have to be told with a backslash
    je      90f
    cmp     dl, 92
    je      90f
    cmp     dl, 44
    je      90f
    cmp     dl, 47
    cmove   r9, rcx
    inc     rcx
    cmp     rcx, rax
    jb      30b
    test    r9, r9
    jz      90f
    lea     rsi, [rsp + r9 + 1]
    lea     rdi, [rsp + 4096]
    sub     rcx, r9
    dec     rcx
    rep movsb
    mov     byte ptr [rdi], 0
    mov     rcx, {scratch}
    mov     [rsp + r9], rcx

    mov     eax, {fsopen}
    lea     rdi, [rip + .Loverlay]
    mov     esi, 1
    syscall
    test    eax, eax
    js      90f
    mov     r12d, eax
    mov     eax, {fsconfig}
    mov     edi, r12d
    mov     esi, 1
    lea     rdx, [rip + .Llower]
    mov     r10, rsp
    xor     r8d, r8d
    syscall
    test    eax, eax
    js      80f
    mov     eax, {fsconfig}
    mov     edi, r12d
    mov     esi, 1
    lea     rdx, [rip + .Lxino]
    lea     r10, [rip + .Loff]
    xor     r8d, r8d
    syscall
    mov     eax, {fsconfig}
    mov     edi, r12d
    mov     esi, 6
    xor     edx, edx
    xor     r10d, r10d
    xor     r8d, r8d
    syscall
    test    eax, eax
    js      80f
    mov     eax, {fsmount}
    mov     edi, r12d
    mov     esi, 1
    mov     edx, {attributes}
    syscall
    test    eax, eax
    js      80f
    mov     ebp, eax
    mov     eax, {openat}
    mov     edi, ebp
    lea     rsi, [rsp + 4096]
    mov     edx, {path_only}
    xor     r10d, r10d
    syscall
    test    eax, eax
    js      70f
    mov     ebx, eax
    mov     eax, {execveat}
    mov     edi, ebx
    lea     rsi, [rip + .Lexe + 14]     # the empty string
    lea     rdx, [r15 + 8]
    mov     r10, r13
    mov     r8d, {at_empty_path}
    syscall

    mov     eax, {close}
    mov     edi, ebx
    syscall
70: mov     eax, {close}
    mov     edi, ebp
    syscall
80: mov     eax, {close}
    mov     edi, r12d
    syscall
90: mov     rsp, r15
    mov     rdx, r14
    jmp     _start
    .size   stasis_entry, . - stasis_entry
    .popsection
    "#,
    run = const word(b"run\0") as u32,
    exec = const word(b"exec\0"),
    create = const word(b"create\0"),
    restore = const word(b"restore\0"),
    receive = const word(b"receive\0"),
    five = const (1_u64 << 40) - 1,
    seven = const (1_u64 << 56) - 1,
    dev_fd = const word(b"/dev/fd/"),
    // A second layer, which a read-only overlay must have; there is nothing of our name in it.
    scratch = const word(b":/run\0"),
    at_execfn = const libc::AT_EXECFN,
    at_empty_path = const libc::AT_EMPTY_PATH,
    attributes = const super::MOUNT_ATTR_RDONLY | super::MOUNT_ATTR_NOSUID | super::MOUNT_ATTR_NODEV,
    path_only = const libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC,
    readlink = const libc::SYS_readlink,
    fsopen = const libc::SYS_fsopen,
    fsconfig = const libc::SYS_fsconfig,
    fsmount = const libc::SYS_fsmount,
    openat = const libc::SYS_openat,
    execveat = const libc::SYS_execveat,
    close = const libc::SYS_close,
);

/// Up to eight bytes as they lie in memory.
const fn word(text: &[u8]) -> u64 {
    let (mut word, mut i) = (0, text.len());
    while i > 0 {
        i -= 1;
        word = word << 8 | text[i] as u64;
    }
    word
}
