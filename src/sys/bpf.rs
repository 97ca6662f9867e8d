//! bpf(2), as far as the device filter of cgroup v2 needs it: load, attach, detach, query.

pub mod map;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::check;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_PROG_QUERY: libc::c_long = 16;

const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// Other programs may be attached beside this one, and all must agree.
pub const BPF_F_ALLOW_MULTI: u32 = 1 << 1;

/// One eBPF instruction: `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Insn {
    /// Class, operation and source.
    pub code: u8,
    /// Destination register in the low half, source register in the high half.
    pub registers: u8,
    /// Jump or memory offset.
    pub off: i16,
    /// Constant.
    pub imm: i32,
}

/// One `union bpf_attr` family: every request here fits in these 32-bit words, zeroes behind.
#[repr(C, align(8))]
struct Attr([u32; 32]);

impl Attr {
    fn new() -> Self {
        Self([0; 32])
    }
    fn word(mut self, at: usize, value: u32) -> Self {
        self.0[at] = value;
        self
    }
    fn pointer<T>(self, at: usize, value: *const T) -> Self {
        let value = value as u64;
        self.word(at, value as u32).word(at + 1, (value >> 32) as u32)
    }
}

fn bpf(command: libc::c_long, attr: &mut Attr) -> Result<i32, Errno> {
    // SAFETY: the kernel reads and writes within the structure, whose size it is told; the pointers inside were made
    // from slices that outlive the call.
    let ret =
        check(unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr.0, size_of::<Attr>() as u32) })?;
    i32::try_from(ret).map_err(|_| Errno::EOVERFLOW)
}

/// Loads a device program, and returns its descriptor.
pub fn load_device_program(instructions: &[Insn]) -> Result<OwnedFd, Errno> {
    let license = c"Apache-2.0";
    // prog_type, insn_cnt, insns (64), license (64), log_level, ...
    let mut attr = Attr::new()
        .word(0, BPF_PROG_TYPE_CGROUP_DEVICE)
        .word(1, u32::try_from(instructions.len()).map_err(|_| Errno::E2BIG)?)
        .pointer(2, instructions.as_ptr())
        .pointer(4, license.as_ptr());
    let fd = bpf(BPF_PROG_LOAD, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a device program to the cgroup directory.
pub fn attach_device_program(cgroup: impl AsFd, program: impl AsFd, flags: u32) -> Result<(), Errno> {
    // target_fd, attach_bpf_fd, attach_type, attach_flags
    let mut attr = Attr::new()
        .word(0, cgroup.as_fd().as_raw_fd() as u32)
        .word(1, program.as_fd().as_raw_fd() as u32)
        .word(2, BPF_CGROUP_DEVICE)
        .word(3, flags);
    bpf(BPF_PROG_ATTACH, &mut attr).map(drop)
}

/// Detaches a device program from the cgroup directory.
pub fn detach_device_program(cgroup: impl AsFd, program: impl AsFd) -> Result<(), Errno> {
    let mut attr = Attr::new()
        .word(0, cgroup.as_fd().as_raw_fd() as u32)
        .word(1, program.as_fd().as_raw_fd() as u32)
        .word(2, BPF_CGROUP_DEVICE);
    bpf(BPF_PROG_DETACH, &mut attr).map(drop)
}

/// The device programs attached to the cgroup directory itself.
pub fn device_programs(cgroup: impl AsFd) -> Result<Vec<OwnedFd>, Errno> {
    const MOST: u32 = 64;
    let mut ids = [0u32; MOST as usize];
    // target_fd, attach_type, query_flags, attach_flags, prog_ids (64), prog_cnt
    let mut attr = Attr::new()
        .word(0, cgroup.as_fd().as_raw_fd() as u32)
        .word(1, BPF_CGROUP_DEVICE)
        .pointer(4, ids.as_mut_ptr())
        .word(6, MOST);
    bpf(BPF_PROG_QUERY, &mut attr)?;
    let count = (attr.0[6].min(MOST)) as usize;
    let mut programs = Vec::with_capacity(count);
    for id in &ids[..count] {
        match bpf(BPF_PROG_GET_FD_BY_ID, &mut Attr::new().word(0, *id)) {
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(fd) => programs.push(unsafe { OwnedFd::from_raw_fd(fd) }),
            // Gone between the two calls.
            Err(Errno::ENOENT) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(programs)
}
