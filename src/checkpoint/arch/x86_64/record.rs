//! A thread's record in the image: its general registers and the whole extended state.
//!
//! ```text
//!  xsave area, standard format      image
//!  0    x87, SSE (fxsave, 512 B)    user_x86_fpregs_entry: cwd .. xmm_space
//!  512  header: xstate_bv           xsave.xstate_bv
//!  576  component 2   AVX           xsave.ymmh_space            the offsets from here on
//!       components 3, 4  MPX        xsave.bndreg_state, bndcsr_state      are the processor's own:
//!       components 5..7  AVX-512    xsave.opmask_reg, zmm_upper, hi16_zmm another one may
//!       component 9   PKRU          xsave.pkru                  have them elsewhere
//!       others (AMX, APX, ...)      stasis.img, by number, when they are in use
//! ```

use libc::user_regs_struct;

use super::Regs;
use super::compat;
use super::regs::{ERESTART_RESTARTBLOCK, USER32_CS};
use super::xsave::{component, layout};
use crate::checkpoint::image::{
    ThreadInfoX86, UserDescT, UserX86CetEntry, UserX86FpregsEntry, UserX86RegsEntry, UserX86RegsMode,
    UserX86XsaveEntry, XstateComponent,
};
use crate::checkpoint::{Error, Result};

const FXSAVE: usize = 512;
const HEADER_END: usize = 576;
/// Where the kernel tells a tracer which components the area has.
const SW_XFEATURES: usize = 464;

/// Puts the general registers into the record.
pub fn dump_general(Regs(regs): &Regs, info: &mut ThreadInfoX86) {
    info.gpregs = UserX86RegsEntry {
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        bp: regs.rbp,
        bx: regs.rbx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        ax: regs.rax,
        cx: regs.rcx,
        dx: regs.rdx,
        si: regs.rsi,
        di: regs.rdi,
        orig_ax: regs.orig_rax,
        ip: regs.rip,
        cs: regs.cs,
        flags: regs.eflags,
        sp: regs.rsp,
        ss: regs.ss,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        ds: regs.ds,
        es: regs.es,
        fs: regs.fs,
        gs: regs.gs,
        mode: Some(UserX86RegsMode::Native.into()),
    };
    if regs.cs == USER32_CS {
        narrow(&mut info.gpregs);
    }
}

/// Makes it the record of a 32-bit program's thread, as CRIU writes it.
fn narrow(entry: &mut UserX86RegsEntry) {
    let low = |value: u64| value & u64::from(u32::MAX);
    let UserX86RegsEntry { ax, bx, cx, dx, si, di, bp, sp, ip, orig_ax, .. } = entry;
    for value in [ax, bx, cx, dx, si, di, bp, sp, ip, orig_ax] {
        *value = low(*value);
    }
    let UserX86RegsEntry { r8, r9, r10, r11, r12, r13, r14, r15, .. } = entry;
    for value in [r8, r9, r10, r11, r12, r13, r14, r15] {
        *value = 0;
    }
    entry.mode = Some(UserX86RegsMode::Compat.into());
}

/// The same registers as the kernel has them: numbers of calls and their answers have a sign, and segments a base.
fn widen(info: &ThreadInfoX86) -> UserX86RegsEntry {
    let signed = |value: u64| i64::from(value as u32 as i32).cast_unsigned();
    let entry = info.gpregs.clone();
    UserX86RegsEntry {
        ax: signed(entry.ax),
        orig_ax: signed(entry.orig_ax),
        fs_base: compat::base(&info.tls, entry.fs).unwrap_or(0),
        gs_base: compat::base(&info.tls, entry.gs).unwrap_or(0),
        ..entry
    }
}

/// The instruction pointer of the record.
pub fn ip(info: &ThreadInfoX86) -> u64 {
    info.gpregs.ip
}

/// The stack pointer of the record.
pub fn sp(info: &ThreadInfoX86) -> u64 {
    info.gpregs.sp
}

/// The general registers of the record. Segments are this kernel's own: an image may not choose them.
pub fn restore_general(info: &ThreadInfoX86, Regs(current): &Regs) -> Result<Regs> {
    let compat = compat::is_compat(info);
    let native = info.gpregs.mode.is_none_or(|mode| mode == i32::from(UserX86RegsMode::Native));
    if !compat && (!native || info.gpregs.cs == USER32_CS) {
        return Err(Error::new("the registers of the image are of an unknown kind"));
    }
    let entry = &if compat { widen(info) } else { info.gpregs.clone() };
    let mut regs = Regs(user_regs_struct {
        r15: entry.r15,
        r14: entry.r14,
        r13: entry.r13,
        r12: entry.r12,
        rbp: entry.bp,
        rbx: entry.bx,
        r11: entry.r11,
        r10: entry.r10,
        r9: entry.r9,
        r8: entry.r8,
        rax: entry.ax,
        rcx: entry.cx,
        rdx: entry.dx,
        rsi: entry.si,
        rdi: entry.di,
        orig_rax: entry.orig_ax,
        rip: entry.ip,
        cs: if compat { USER32_CS } else { current.cs },
        eflags: entry.flags,
        rsp: entry.sp,
        ss: current.ss,
        fs_base: entry.fs_base,
        gs_base: entry.gs_base,
        ds: entry.ds,
        es: entry.es,
        fs: entry.fs,
        gs: entry.gs,
    });
    // CRIU lets calls whose rest only the kernel remembers fail with EINTR, but the number of the call stays in its
    // images. None of these fails so by itself: what it was is made again.
    if entry.orig_ax.cast_signed() >= 0 && entry.ax.cast_signed() == i64::from(-libc::EINTR) {
        regs.0.rax = ERESTART_RESTARTBLOCK.cast_unsigned();
    }
    Ok(regs.again(&|_, _| false).unwrap_or_else(|| regs.for_image()))
}

/// The record of an extended state as PTRACE_GETREGSET(NT_X86_XSTATE) gives it, still without general registers; and
/// what has no place in it.
pub fn dump_extended(area: &[u8]) -> Result<(ThreadInfoX86, Vec<XstateComponent>)> {
    if area.len() < FXSAVE {
        return Err(Error::new(format!("the extended state has {} bytes, fewer than 512", area.len())));
    }
    let mut entry = UserX86FpregsEntry {
        cwd: half(area, 0),
        swd: half(area, 2),
        twd: half(area, 4),
        fop: half(area, 6),
        rip: quad(area, 8),
        rdp: quad(area, 16),
        mxcsr: word(area, 24),
        mxcsr_mask: word(area, 28),
        st_space: words(&area[32..160]),
        xmm_space: words(&area[160..416]),
        padding: Vec::new(),
        xsave: None,
    };
    let mut extras = Vec::new();
    if area.len() >= HEADER_END {
        let used = quad(area, FXSAVE);
        let part = |number: u32| {
            let c = component(number)?;
            area.get(c.offset..c.offset + c.size)
        };
        let words_of = |number| part(number).map(words).unwrap_or_default();
        let quads_of = |number| part(number).map(quads).unwrap_or_default();
        entry.xsave = Some(UserX86XsaveEntry {
            xstate_bv: used & KNOWN,
            ymmh_space: words_of(2),
            bndreg_state: quads_of(3),
            bndcsr_state: quads_of(4),
            opmask_reg: quads_of(5),
            zmm_upper: quads_of(6),
            hi16_zmm: quads_of(7),
            pkru: words_of(9),
            cet: None::<UserX86CetEntry>,
        });
        for number in (2..63).filter(|n| used & !KNOWN & (1 << n) != 0) {
            let data = part(number).map(<[u8]>::to_vec).unwrap_or_default();
            extras.push(XstateComponent { number, data });
        }
    }
    Ok((ThreadInfoX86 { fpregs: entry, tls: no_segments(), ..ThreadInfoX86::default() }, extras))
}

/// Whether this register is as Linux starts every program with it, no protection key but 0 may be used, or as the processor
/// starts.
pub fn is_first_pkru(pkru: u32) -> bool {
    [0, 0x5555_5554].contains(&pkru)
}

/// Leaves out what this processor lacks of the components that a thread uses.
pub fn mask(info: &mut ThreadInfoX86, extras: &mut Vec<XstateComponent>) {
    let here = here();
    if let Some(xsave) = &mut info.fpregs.xsave {
        xsave.xstate_bv &= here;
    }
    extras.retain(|extra| here & 1 << (extra.number & 63) != 0);
}

/// Components that the kernel or the processor counts as used while the program makes no use of them: a processor
/// without them does as well.
fn idle(xsave: &UserX86XsaveEntry) -> u64 {
    let mut idle = 0;
    if xsave.bndreg_state.iter().chain(&xsave.bndcsr_state).all(|word| *word == 0) {
        idle |= 1 << 3 | 1 << 4;
    }
    if xsave.pkru.first().is_none_or(|pkru| is_first_pkru(*pkru)) {
        idle |= 1 << 9;
    }
    idle
}

/// Components that CRIU's record has fields for.
const KNOWN: u64 = 0b10_1111_1111;

/// The components that a thread uses, all of which must be among those that are `here`.
fn used(xsave: &UserX86XsaveEntry, extras: &[XstateComponent], here: u64) -> Result<u64> {
    let mut used = xsave.xstate_bv & KNOWN & !(idle(xsave) & !here);
    for extra in extras {
        used |= 1 << (extra.number & 63);
    }
    let missing = used & !here;
    if missing == 0 {
        return Ok(used);
    }
    Err(Error::new(format!(
        "the program uses processor features that this machine lacks: {} (xsave components {missing:#x} of {here:#x})",
        names(missing)
    ))
    .remedy("restore on a machine with the same processor features"))
}

/// The components that programs have here, one bit each.
fn here() -> u64 {
    layout().mask() | 0b11
}

/// Refuses a thread whose registers this machine lacks, before anything is made.
pub fn admit(info: &ThreadInfoX86, extras: &[XstateComponent]) -> Result<()> {
    match &info.fpregs.xsave {
        Some(xsave) => used(xsave, extras, here()).map(drop),
        None => Ok(()),
    }
}

/// Builds the area for PTRACE_SETREGSET. `current` is what this processor gives a fresh thread: its length and its mask
/// of components say what can be restored here.
pub fn restore_extended(info: &ThreadInfoX86, extras: &[XstateComponent], current: &[u8]) -> Result<Vec<u8>> {
    let entry = &info.fpregs;
    let mut area = vec![0; current.len()];
    if area.len() < FXSAVE || entry.st_space.len() != 32 || entry.xmm_space.len() != 64 {
        return Err(Error::new("the image's floating point state has the wrong size"));
    }
    for (at, value) in [(0, entry.cwd), (2, entry.swd), (4, entry.twd), (6, entry.fop)] {
        let value = u16::try_from(value)
            .map_err(|_| Error::new("the image's floating point control words have more than 16 bits"))?;
        area[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    area[8..16].copy_from_slice(&entry.rip.to_le_bytes());
    area[16..24].copy_from_slice(&entry.rdp.to_le_bytes());
    area[24..28].copy_from_slice(&entry.mxcsr.to_le_bytes());
    area[28..32].copy_from_slice(&entry.mxcsr_mask.to_le_bytes());
    put_words(&mut area[32..160], &entry.st_space);
    put_words(&mut area[160..416], &entry.xmm_space);
    let Some(xsave) = &entry.xsave else { return Ok(area) };
    if area.len() < HEADER_END {
        return Err(Error::new("the image has extended processor state, this processor has none")
            .remedy("restore on a processor with xsave"));
    }
    let used = used(xsave, extras, quad(current, SW_XFEATURES))?;
    area[FXSAVE..FXSAVE + 8].copy_from_slice(&used.to_le_bytes());
    let mut part = |number: u32, bytes: &[u8]| -> Result<()> {
        if used & (1 << number) == 0 {
            return Ok(());
        }
        let place = component(number)
            .filter(|c| c.size == bytes.len())
            .and_then(|c| area.get_mut(c.offset..c.offset + c.size))
            .ok_or_else(|| {
                Error::new(format!(
                    "xsave component {number} has {} bytes in the image, others here",
                    bytes.len()
                ))
            })?;
        place.copy_from_slice(bytes);
        Ok(())
    };
    part(2, &bytes32(&xsave.ymmh_space))?;
    part(3, &bytes64(&xsave.bndreg_state))?;
    part(4, &bytes64(&xsave.bndcsr_state))?;
    part(5, &bytes64(&xsave.opmask_reg))?;
    part(6, &bytes64(&xsave.zmm_upper))?;
    part(7, &bytes64(&xsave.hi16_zmm))?;
    part(9, &bytes32(&xsave.pkru))?;
    for extra in extras {
        part(extra.number & 63, &extra.data)?;
    }
    Ok(area)
}

/// The three empty thread-local segments of a 64-bit program, as CRIU writes them.
fn no_segments() -> Vec<UserDescT> {
    (12..15)
        .map(|entry_number| UserDescT {
            entry_number,
            seg_not_present: true,
            read_exec_only: true,
            ..UserDescT::default()
        })
        .collect()
}

/// The names of components, one bit each.
pub fn names(components: u64) -> String {
    let name = |n: u32| match n {
        2 => "AVX".to_owned(),
        3 | 4 => "MPX".to_owned(),
        5..=7 => "AVX-512".to_owned(),
        9 => "protection keys".to_owned(),
        17 | 18 => "AMX".to_owned(),
        19 => "APX".to_owned(),
        n => format!("component {n}"),
    };
    let mut all: Vec<String> = (0..64).filter(|n| components & (1 << n) != 0).map(name).collect();
    all.dedup();
    all.join(", ")
}

fn half(area: &[u8], at: usize) -> u32 {
    u32::from(u16::from_le_bytes([area[at], area[at + 1]]))
}
fn word(area: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([area[at], area[at + 1], area[at + 2], area[at + 3]])
}
fn quad(area: &[u8], at: usize) -> u64 {
    u64::from(word(area, at)) | u64::from(word(area, at + 4)) << 32
}
fn words(area: &[u8]) -> Vec<u32> {
    area.chunks_exact(4).map(|c| word(c, 0)).collect()
}
fn quads(area: &[u8]) -> Vec<u64> {
    area.chunks_exact(8).map(|c| quad(c, 0)).collect()
}
fn put_words(area: &mut [u8], values: &[u32]) {
    area.copy_from_slice(&bytes32(values));
}
fn bytes32(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
fn bytes64(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::regs::tests::empty;
    use super::*;

    fn general(gpregs: UserX86RegsEntry) -> ThreadInfoX86 {
        ThreadInfoX86 { gpregs, ..ThreadInfoX86::default() }
    }
    fn restored(rip: u64, rax: u64, orig_rax: u64) -> user_regs_struct {
        let zero = UserX86RegsEntry { ip: rip, ax: rax, orig_ax: orig_rax, ..UserX86RegsEntry::default() };
        let segments = user_regs_struct { cs: 0x33, ss: 0x2b, ..empty() };
        restore_general(&general(zero), &Regs(segments)).unwrap().0
    }
    #[test]
    fn registers_of_32_bit_programs_have_a_sign_and_a_segment() {
        let live = user_regs_struct {
            cs: USER32_CS,
            rip: 0x1002,
            rax: (-512_i64).cast_unsigned(),
            orig_rax: 3,
            r11: 7,
            gs: 0x63,
            gs_base: 0x804_c0a0,
            ..empty()
        };
        let mut info = ThreadInfoX86::default();
        dump_general(&Regs(live), &mut info);
        let there = (info.gpregs.ax, info.gpregs.r11, info.gpregs.mode);
        assert_eq!(there, (0xffff_fe00, 0, Some(UserX86RegsMode::Compat.into())));
        info.gpregs.gs_base = 0;
        info.tls = vec![UserDescT { entry_number: 12, base_addr: 0x804_c0a0, ..UserDescT::default() }];
        let back = restore_general(&info, &Regs(user_regs_struct { cs: 0x33, ..empty() })).unwrap().0;
        assert_eq!((back.rip, back.rax, back.orig_rax), (0x1000, 3, u64::MAX));
        assert_eq!((back.cs, back.gs_base), (USER32_CS, 0x804_c0a0));
    }
    #[test]
    fn interrupted_calls() {
        let code = |n: i64| n.cast_unsigned();
        let read = restored(0x1000, code(-512), 0);
        assert_eq!((read.rip, read.rax, read.orig_rax), (0xffe, 0, u64::MAX));
        let nanosleep = restored(0x1000, code(-516), 35);
        assert_eq!((nanosleep.rip, nanosleep.rax), (0xffe, 35));
        for call in [libc::SYS_poll, libc::SYS_futex, libc::SYS_nanosleep, libc::SYS_clock_nanosleep] {
            let criu = restored(0x1000, code(-4), code(call));
            assert_eq!((criu.rip, criu.rax, criu.orig_rax), (0xffe, code(call), u64::MAX));
        }
        let accept = restored(0x1000, code(-4), code(libc::SYS_accept));
        assert_eq!((accept.rip, accept.rax), (0x1000, code(-4)));
        let ours = restored(0x1000, code(-4), u64::MAX);
        assert_eq!((ours.rip, ours.rax), (0x1000, code(-4)));
        let unknown = restored(0x1000, code(-516), 219);
        assert_eq!((unknown.rip, unknown.rax.cast_signed()), (0x1000, -4));
        let finished = restored(0x1000, 7, 0);
        assert_eq!((finished.rip, finished.rax), (0x1000, 7));
        // Outside a call the same number in rax is the program's own.
        let own = restored(0x1000, code(-512), u64::MAX);
        assert_eq!((own.rip, own.rax.cast_signed()), (0x1000, -512));
        assert_eq!(own.cs, 0x33);
    }

    #[test]
    fn the_image_does_not_choose_segments() {
        let evil = UserX86RegsEntry { cs: 0x10, ss: 0x18, ..UserX86RegsEntry::default() };
        let here = Regs(user_regs_struct { cs: 0x33, ss: 0x2b, ..empty() });
        let regs = restore_general(&general(evil.clone()), &here).unwrap().0;
        assert_eq!((regs.cs, regs.ss), (0x33, 0x2b));
        assert!(restore_general(&general(UserX86RegsEntry { cs: 0x23, ..evil }), &here).is_err());
    }

    fn sample() -> Vec<u8> {
        let len = (2..20).filter_map(component).map(|c| c.offset + c.size).max().unwrap_or(HEADER_END);
        let mut area: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
        area[416..HEADER_END].fill(0);
        let all = (2..20).filter(|n| component(*n).is_some()).fold(3_u64, |all, n| all | 1 << n);
        area[SW_XFEATURES..SW_XFEATURES + 8].copy_from_slice(&all.to_le_bytes());
        area[FXSAVE..FXSAVE + 8].copy_from_slice(&all.to_le_bytes());
        area
    }

    #[test]
    fn everything_this_processor_has_survives() {
        let area = sample();
        let (info, extras) = dump_extended(&area).unwrap();
        let back = restore_extended(&info, &extras, &area).unwrap();
        assert_eq!(back[..416], area[..416]);
        assert_eq!(back[FXSAVE..FXSAVE + 8], area[FXSAVE..FXSAVE + 8]);
        for c in (2..20).filter_map(component) {
            assert_eq!(back[c.offset..c.offset + c.size], area[c.offset..c.offset + c.size], "{c:?}");
        }
    }

    #[test]
    fn what_nobody_uses_may_be_missing_here() {
        let area = sample();
        let (mut info, extras) = dump_extended(&area).unwrap();
        let mut poor = area.clone();
        let without = quad(&area, SW_XFEATURES) & !(0b11 << 3 | 1 << 9);
        poor[SW_XFEATURES..SW_XFEATURES + 8].copy_from_slice(&without.to_le_bytes());
        let xsave = info.fpregs.xsave.as_mut().unwrap();
        xsave.xstate_bv |= 0b11 << 3 | 1 << 9;
        (xsave.bndreg_state, xsave.bndcsr_state) = (vec![0; 8], vec![0; 8]);
        xsave.pkru = vec![0x5555_5554, 0];
        let back = restore_extended(&info, &extras, &poor).unwrap();
        assert_eq!(quad(&back, FXSAVE) & !without, 0);
        for (bounds, pkru) in [(1, 0x5555_5554), (0, 0x5555_5550)] {
            let xsave = info.fpregs.xsave.as_mut().unwrap();
            (xsave.bndcsr_state[0], xsave.pkru[0]) = (bounds, pkru);
            assert!(restore_extended(&info, &extras, &poor).is_err());
        }
    }

    #[test]
    fn a_component_of_another_size_is_refused() {
        let area = sample();
        let (mut info, extras) = dump_extended(&area).unwrap();
        let xsave = info.fpregs.xsave.as_mut().unwrap();
        if xsave.xstate_bv & 1 << 2 != 0 {
            xsave.ymmh_space.push(0);
            let error = restore_extended(&info, &extras, &area).unwrap_err().to_string();
            assert!(error.contains("component 2 has 260 bytes"), "{error}");
        }
    }

    #[test]
    fn a_larger_area_than_that_of_the_image_is_zero_behind() {
        let area = sample();
        let (info, extras) = dump_extended(&area).unwrap();
        let larger = [area.clone(), vec![7; 4096]].concat();
        let back = restore_extended(&info, &extras, &larger).unwrap();
        assert_eq!(back.len(), larger.len());
        assert!(back[area.len()..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn features_that_are_missing_here_are_named() {
        let area = sample();
        let (mut info, extras) = dump_extended(&area).unwrap();
        let mut poor = area.clone();
        poor[SW_XFEATURES..SW_XFEATURES + 8].copy_from_slice(&3_u64.to_le_bytes());
        let error = restore_extended(&info, &extras, &poor).unwrap_err().to_string();
        assert!(error.contains("AVX"), "{error}");
        admit(&info, &extras).unwrap();
        // A component that no processor has had so far.
        let beyond = XstateComponent { number: 40, data: vec![0; 64] };
        let error = admit(&info, &[beyond]).unwrap_err().to_string();
        assert!(error.contains("component 40") && error.contains("restore on a machine"), "{error}");
        info.fpregs.st_space.pop();
        assert!(restore_extended(&info, &extras, &area).is_err());
    }
}
