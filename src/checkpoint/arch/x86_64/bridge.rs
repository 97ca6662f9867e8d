//! Bridging the vdso of another kernel: what stands at the entries of its functions.

/// Bytes of a [`jump`].
pub const JUMP_LEN: u64 = 14;

/// Goes on at `to`, with every register as it is: `jmp [rip]`, and the address behind it.
pub fn jump(to: u64) -> Vec<u8> {
    let mut code = vec![0xff, 0x25, 0, 0, 0, 0];
    code.extend(to.to_le_bytes());
    code
}

/// A function of the vdso by its system call, which takes the same arguments: `mov eax, NR; syscall; ret`.
pub fn by_call(name: &[u8]) -> Option<Vec<u8>> {
    let name = name.strip_prefix(b"__vdso_").unwrap_or(name);
    if name == b"getrandom" {
        return Some(GETRANDOM.to_vec());
    }
    let nr = match name {
        b"gettimeofday" => libc::SYS_gettimeofday,
        b"time" => libc::SYS_time,
        b"clock_gettime" => libc::SYS_clock_gettime,
        b"clock_getres" => libc::SYS_clock_getres,
        b"getcpu" => libc::SYS_getcpu,
        _ => return None,
    };
    let nr = u32::try_from(nr).ok()?.to_le_bytes();
    Some([&[0xb8][..], &nr, &[0x0f, 0x05, 0xc3]].concat())
}

/// getrandom(2), which is asked for the size of its state by a length of -1: it has none.
const GETRANDOM: [u8; 22] = [
    0x49, 0x83, 0xf8, 0xff, // cmp r8, -1
    0x74, 0x08, // je 1f
    0xb8, 0x3e, 0x01, 0x00, 0x00, // mov eax, 318
    0x0f, 0x05, // syscall
    0xc3, // ret
    0x48, 0xc7, 0xc0, 0xda, 0xff, 0xff, 0xff, // 1: mov rax, -ENOSYS
    0xc3, // ret
];

/// Whether a function keeps state for its callers in a layout of its own kernel, so that no other kernel's can go on
/// with it.
pub fn has_state(name: &[u8]) -> bool {
    matches!(name, b"getrandom" | b"__vdso_getrandom")
}

/// Whether a function neither asks the kernel nor reads its data, and so is as good as ever.
pub fn stands_alone(name: &[u8]) -> bool {
    name == b"__vdso_sgx_enter_enclave"
}
