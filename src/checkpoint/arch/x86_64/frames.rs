//! Frames of signals: what the kernel has put on the stack of a thread that handles one, and takes back at the end.
//!
//! ```text
//!   higher   fx + size   FP_XSTATE_MAGIC2
//!            fx + 576    components 2.. at the offsets of the processor
//!            fx + 512    header: which components are used
//!            fx + 464    FP_XSTATE_MAGIC1, length with all, components, size
//!            fx          x87, SSE                                           <──┐
//!            sigcontext  general registers, the address of fx ─────────────────┘
//!   lower    the handler
//! ```
//!
//! Of a frame that is larger than its own the kernel takes back x87 and SSE alone, without a word, and one that says that
//! components are used which the processor lacks kills the program. So a frame that another processor has made is cut
//! to the form that this one takes.

use super::xsave::{Layout, PKRU, TILES};

const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
/// Where the words of the kernel stand that tell of the rest.
const WORDS: usize = 464;
const HEADER: usize = 512;
const PARTS: usize = 576;
/// Bytes of the x87 state that a frame of a 32-bit program has before fx.
const OLD_STATE: u32 = 112;
/// How far below fx the sigcontext may begin.
const FAR: usize = 1024;

/// The saved state of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Where it begins, from the first byte that was looked at.
    pub offset: usize,
    /// Its length, without the mark behind it.
    pub size: usize,
    /// The stack of what was interrupted.
    pub stack: u64,
}

impl Frame {
    /// Bytes with the mark behind it.
    pub fn len(&self) -> usize {
        self.size + 4
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }
}

/// What does not fit this processor: component bits that a frame uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Misfit(pub u64);

/// The frames in memory that begins at `base`, a multiple of 64.
pub fn find(memory: &[u8], base: u64) -> Vec<Frame> {
    let mut found = Vec::new();
    for offset in (0..memory.len()).step_by(64) {
        if word(memory, offset + WORDS) != Some(MAGIC1) {
            continue;
        }
        let Some(size) = word(memory, offset + WORDS + 16).and_then(|size| usize::try_from(size).ok()) else {
            continue;
        };
        if size < PARTS || word(memory, offset + size) != Some(MAGIC2) {
            continue;
        }
        if let Some(stack) = interrupted(memory, offset, base + offset as u64) {
            found.push(Frame { offset, size, stack });
        }
    }
    found
}

/// The stack of what was interrupted, if a sigcontext leads to the state at `offset`.
fn interrupted(memory: &[u8], offset: usize, address: u64) -> Option<u64> {
    let below = offset.saturating_sub(FAR);
    let mut places = (below..offset.saturating_sub(7)).rev().step_by(4);
    if let Some(place) = places.find(|at| at % 8 == 0 && quad(memory, *at) == Some(address)) {
        return quad(memory, place.checked_sub(64)?);
    }
    let address = u32::try_from(address).ok()?.checked_sub(OLD_STATE)?;
    let places = (below..offset.saturating_sub(3)).rev().step_by(4);
    let mut places = places.filter(|at| word(memory, *at) == Some(address));
    word(memory, places.next()?.checked_sub(48)?).map(u64::from)
}

/// Makes what a processor of the layout `was` has saved fit one of the layout `here`. `area` has the length of the frame.
/// `mask`: what this one lacks is left out. Whether anything had to be changed.
pub fn refit(area: &mut [u8], was: &Layout, here: &Layout, mask: bool) -> Result<bool, Misfit> {
    let before = area.to_vec();
    let Some(size) = area.len().checked_sub(4).filter(|size| *size >= PARTS) else { return Ok(false) };
    let used = quad(area, HEADER).unwrap_or(0);
    let mut kept = used & 0b11;
    let mut moved = Vec::new();
    let mut missing = 0;
    for number in (2..64).filter(|number| used & 1 << number != 0) {
        let end = |(offset, length): (usize, usize)| offset.saturating_add(length);
        let (from, to) = (was.part(number), here.part(number));
        match (from, to) {
            (Some(from), Some(to)) if from.1 == to.1 && end(from) <= size && end(to) <= size => {
                kept |= 1 << number;
                moved.push((from, to));
            }
            _ if mask || from.is_some_and(|(at, _)| is_idle(number, &before, at)) => {}
            _ => missing |= 1 << number,
        }
    }
    if missing != 0 {
        return Err(Misfit(missing));
    }
    let limit = if kept & 1 << TILES == 0 { here.size() } else { size };
    let cut = size.min(limit.max(PARTS));
    if moved.iter().any(|(from, to)| from != to) {
        area[PARTS..size].fill(0);
        for ((from, length), (to, _)) in moved {
            area[to..to + length].copy_from_slice(&before[from..from + length]);
        }
    }
    area[HEADER..HEADER + 8].copy_from_slice(&kept.to_le_bytes());
    let says = quad(area, WORDS + 8).unwrap_or(0) & (here.mask() | 0b11);
    area[WORDS + 8..WORDS + 16].copy_from_slice(&says.to_le_bytes());
    let words = u32::try_from(cut).unwrap_or(u32::MAX);
    area[WORDS + 16..WORDS + 20].copy_from_slice(&words.to_le_bytes());
    area[cut..cut + 4].copy_from_slice(&MAGIC2.to_le_bytes());
    Ok(area != before)
}

/// Whether a component that counts as used says no more than where programs start.
fn is_idle(number: u32, area: &[u8], at: usize) -> bool {
    match number {
        3 | 4 => area.get(at..at + 64).is_some_and(|part| part.iter().all(|byte| *byte == 0)),
        PKRU => word(area, at).is_some_and(super::record::is_first_pkru),
        _ => false,
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

fn quad(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame as the kernel lays it out: 440 bytes, then the state, 64-byte aligned.
    fn frame(size: usize, used: u64, says: u64, base: u64) -> Vec<u8> {
        let mut memory = vec![0; 512 + size + 4];
        memory[288..296].copy_from_slice(&(base + 512).to_le_bytes());
        memory[224..232].copy_from_slice(&0x7000_u64.to_le_bytes());
        let area = &mut memory[512..];
        area[WORDS..WORDS + 4].copy_from_slice(&MAGIC1.to_le_bytes());
        area[WORDS + 4..WORDS + 8].copy_from_slice(&(size as u32 + 4).to_le_bytes());
        area[WORDS + 8..WORDS + 16].copy_from_slice(&says.to_le_bytes());
        area[WORDS + 16..WORDS + 20].copy_from_slice(&(size as u32).to_le_bytes());
        area[HEADER..HEADER + 8].copy_from_slice(&used.to_le_bytes());
        area[size..size + 4].copy_from_slice(&MAGIC2.to_le_bytes());
        memory
    }

    /// AVX, AVX-512 and protection keys; AVX alone; the same as the first, without room for bounds.
    fn layouts() -> [Layout; 3] {
        let large = [(2, 576, 256), (5, 1088, 64), (6, 1152, 512), (7, 1664, 1024), (9, 2688, 8)];
        let other = [(2, 576, 256), (5, 832, 64), (6, 896, 512), (7, 1408, 1024), (9, 2432, 8)];
        [Layout::of(&large), Layout::of(&[(2, 576, 256)]), Layout::of(&other)]
    }

    #[test]
    fn a_frame_is_found_with_what_it_interrupted() {
        let memory = frame(832, 0b111, 0b111, 0x40_0000);
        assert_eq!(find(&memory, 0x40_0000), [Frame { offset: 512, size: 832, stack: 0x7000 }]);
        assert_eq!(find(&memory, 0x50_0000), [], "nothing leads to it");
        assert_eq!(find(&memory[..memory.len() - 1], 0x40_0000), [], "it is cut off");
    }

    #[test]
    fn the_frame_of_the_kernel_is_found() {
        use std::sync::Mutex;
        static SEEN: Mutex<Vec<Frame>> = Mutex::new(Vec::new());
        extern "C" fn handler(_: i32) {
            let here = 0u8;
            let base = (&raw const here as u64) / 64 * 64;
            let mut copy = vec![0u8; 16 << 10];
            let mem = std::fs::File::open("/proc/self/mem").unwrap();
            let read = std::os::unix::fs::FileExt::read_at(&mem, &mut copy, base).unwrap();
            *SEEN.lock().unwrap() = find(&copy[..read], base);
        }
        crate::sys::testing::in_child(0, || {
            use nix::sys::signal::{SigHandler, Signal, raise, signal};
            // SAFETY: the handler runs at raise(3), where nothing is held.
            unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(handler)).unwrap() };
            raise(Signal::SIGUSR1).unwrap();
            let seen = SEEN.lock().unwrap();
            let here = super::super::xsave::layout();
            assert!(seen.iter().any(|frame| frame.size == here.size()), "{seen:x?} of {here:?}");
        });
    }

    #[test]
    fn a_smaller_processor_gets_a_smaller_frame() {
        let [large, small, _] = layouts();
        let fit = |memory: &mut Vec<u8>, mask| refit(&mut memory[512..], &large, &small, mask);
        let all = large.mask() | 0b11;
        // What it lacks is not used.
        let mut memory = frame(2696, 0b111, all, 0);
        memory[512 + 576] = 7;
        assert_eq!(fit(&mut memory, false), Ok(true));
        assert_eq!(find(&memory, 0), [Frame { offset: 512, size: 832, stack: 0x7000 }]);
        assert_eq!((memory[512 + 576], quad(&memory, 512 + WORDS + 8)), (7, Some(0b111)));
        // The key that all programs start with is no use of it, another one is.
        let mut memory = frame(2696, 0b10_0000_0111, all, 0);
        memory[512 + 2688..512 + 2692].copy_from_slice(&0x5555_5554_u32.to_le_bytes());
        assert_eq!(fit(&mut memory.clone(), false), Ok(true));
        memory[512 + 2688] = 0x50;
        assert_eq!(fit(&mut memory, false), Err(Misfit(1 << 9)));
        assert_eq!(fit(&mut memory, true), Ok(true));
        assert_eq!(quad(&memory, 512 + HEADER), Some(0b111));
        // Upper halves of AVX-512.
        let mut memory = frame(2696, 0b100_0111, all, 0);
        assert_eq!(fit(&mut memory, false), Err(Misfit(1 << 6)));
    }

    #[test]
    fn a_larger_processor_takes_the_frame_as_it_is() {
        let [large, small, other] = layouts();
        let mut memory = frame(832, 0b111, 0b111, 0);
        assert_eq!(refit(&mut memory[512..], &small, &large, false), Ok(false));
        // Elsewhere on this one, with room for it.
        let mut memory = frame(2696, 0b110_0111, large.mask() | 0b11, 0);
        memory[512 + 1152] = 9;
        assert_eq!(refit(&mut memory[512..], &large, &other, false), Ok(true));
        assert_eq!((memory[512 + 896], memory[512 + 1152]), (9, 0));
        assert_eq!(find(&memory, 0)[0].size, 2440);
        // And without.
        let mut memory = frame(2440, 0b1000_0111, other.mask() | 0b11, 0);
        assert_eq!(refit(&mut memory[512..], &other, &large, false), Err(Misfit(1 << 7)));
    }
}
