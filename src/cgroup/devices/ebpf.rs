//! The device policy on cgroup v2: an eBPF program that the kernel asks at every open(2) and mknod(2).
//!
//! ```text
//!   r2 = type, r3 = access, r4 = major, r5 = minor          from the context in r1
//!   for each exception:   if r2 != its type        goto next
//!                         if r3 & ~its access      goto next
//!                         if r4 != its major       goto next     unless any
//!                         if r5 != its minor       goto next     unless any
//!                         return !default
//!   next: ...
//!   return default
//! ```

use std::fs::File;
use std::path::Path;

use super::{Access, Devices, Policy};
use crate::sys::bpf::{
    BPF_F_ALLOW_MULTI, Insn, attach_device_program, detach_device_program, device_programs,
    load_device_program,
};
use crate::sys::{Context, Result};

const TYPE_BLOCK: i32 = 1;
const TYPE_CHAR: i32 = 2;

// Operation codes: class, width or operation, source.
const LOAD_WORD: u8 = 0x61;
const AND_IMM: u8 = 0x54;
const SHIFT_RIGHT_IMM: u8 = 0x74;
const MOVE_REG: u8 = 0xbc;
const MOVE_IMM: u8 = 0xb7;
const JUMP_NE_IMM: u8 = 0x56;
const JUMP_NE_REG: u8 = 0x5e;
const EXIT: u8 = 0x95;

const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn { code, registers: src << 4 | dst, off, imm }
}

/// The program that enforces a policy. Jumps compare 32 bits (class JMP32), as device numbers have.
pub fn program(policy: &Policy) -> Vec<Insn> {
    let mut all = vec![
        insn(LOAD_WORD, 2, 1, 0, 0),
        insn(AND_IMM, 2, 0, 0, 0xffff),
        insn(LOAD_WORD, 3, 1, 0, 0),
        insn(SHIFT_RIGHT_IMM, 3, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ];
    for (which, access) in &policy.exceptions {
        all.extend(exception(which, *access, !policy.allow));
    }
    all.extend(answer(policy.allow));
    all
}

fn answer(allow: bool) -> [Insn; 2] {
    [insn(MOVE_IMM, 0, 0, 0, i32::from(allow)), insn(EXIT, 0, 0, 0, 0)]
}

fn exception(which: &Devices, access: Access, allow: bool) -> Vec<Insn> {
    let mut block = vec![insn(JUMP_NE_IMM, 2, 0, 0, if which.block { TYPE_BLOCK } else { TYPE_CHAR })];
    if access != Access::ALL {
        block.push(insn(MOVE_REG, 1, 3, 0, 0));
        block.push(insn(AND_IMM, 1, 0, 0, i32::from(access.bits())));
        block.push(insn(JUMP_NE_REG, 1, 3, 0, 0));
    }
    if let Some(major) = which.major {
        block.push(insn(JUMP_NE_IMM, 4, 0, 0, major.cast_signed()));
    }
    if let Some(minor) = which.minor {
        block.push(insn(JUMP_NE_IMM, 5, 0, 0, minor.cast_signed()));
    }
    block.extend(answer(allow));
    // Every jump leads behind the block.
    let end = block.len();
    for (at, insn) in block.iter_mut().enumerate() {
        if matches!(insn.code, JUMP_NE_IMM | JUMP_NE_REG) {
            insn.off = (end - at - 1) as i16;
        }
    }
    block
}

/// Makes the group's policy `policy`. The new program is attached before old ones are detached: for a moment both
/// must agree, never none.
pub fn apply(dir: &Path, policy: &Policy) -> Result<()> {
    let group = File::open(dir).context(|| format!("open {}", dir.display()))?;
    let attach = || -> Result<()> {
        let old = device_programs(&group).context(|| "bpf(BPF_PROG_QUERY)")?;
        let new = load_device_program(&program(policy)).context(|| "bpf(BPF_PROG_LOAD)")?;
        attach_device_program(&group, &new, BPF_F_ALLOW_MULTI)
            .context(|| "failed to call BPF_PROG_ATTACH (BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI)")?;
        for program in old {
            detach_device_program(&group, &program)
                .context(|| "failed to call BPF_PROG_DETACH (BPF_CGROUP_DEVICE) on old filter program")?;
        }
        Ok(())
    };
    match attach() {
        // Without privileges over the host nothing can be forbidden that is not forbidden already.
        Err(_) if crate::init::credentials::in_user_namespace() => Ok(()),
        // A policy that allows all needs no program.
        Err(_) if policy.allow && policy.exceptions.is_empty() => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    /// A machine for the few instructions used.
    fn run(program: &[Insn], kind: u32, access: u32, major: u32, minor: u32) -> u32 {
        let context = [kind | access << 16, major, minor];
        let mut r = [0u32; 6];
        let mut at = 0;
        loop {
            let Insn { code, registers, off, imm } = program[at];
            let (dst, src) = ((registers & 15) as usize, (registers >> 4) as usize);
            at += 1;
            match code {
                LOAD_WORD => r[dst] = context[off as usize / 4],
                AND_IMM => r[dst] &= imm as u32,
                SHIFT_RIGHT_IMM => r[dst] >>= imm,
                MOVE_REG => r[dst] = r[src],
                MOVE_IMM => r[dst] = imm as u32,
                JUMP_NE_IMM if r[dst] != imm as u32 => at += off as usize,
                JUMP_NE_REG if r[dst] != r[src] => at += off as usize,
                JUMP_NE_IMM | JUMP_NE_REG => {}
                EXIT => return r[0],
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn the_program_answers_as_the_policy_says() {
        let program = program(&Policy::of(None, &[]).unwrap());
        const CHAR: u32 = TYPE_CHAR as u32;
        const BLOCK: u32 = TYPE_BLOCK as u32;
        for (kind, access, major, minor, allowed) in [
            (CHAR, 6, 1, 3, 1),    // rw of /dev/null
            (CHAR, 2, 1, 1, 0),    // r of /dev/mem
            (CHAR, 1, 1, 1, 1),    // mknod of it
            (BLOCK, 1, 8, 0, 1),   // mknod of a disk
            (BLOCK, 2, 8, 0, 0),   // reading it
            (BLOCK, 3, 8, 0, 0),   // both at once
            (CHAR, 6, 136, 77, 1), // any pty
            (CHAR, 6, 10, 200, 1), // tun
        ] {
            assert_eq!(run(&program, kind, access, major, minor), allowed, "{kind} {access} {major}:{minor}");
        }
    }

    #[test]
    fn the_kernel_accepts_the_program() {
        match load_device_program(&program(&Policy::of(None, &[]).unwrap())) {
            Ok(_) => {}
            // Kernels without BPF, or filters around us.
            Err(Errno::ENOSYS | Errno::EPERM) => {}
            Err(e) => panic!("{e}"),
        }
    }
}
