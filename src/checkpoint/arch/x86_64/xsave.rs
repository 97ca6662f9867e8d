//! Where the processor keeps each component of its extended state: cpuid leaf 0x0d, as xsave(5) of the processor's manual.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

/// The number of protection keys among the components.
pub const PKRU: u32 = 9;
/// The number of AMX's tiles, for which a thread has room only after it has asked for it.
pub const TILES: u32 = 18;

/// One component of the standard-format xsave area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Component {
    /// Where it starts.
    pub offset: usize,
    /// How long it is.
    pub size: usize,
}

/// Component `number` of the xsave area; None if this processor has none such, or keeps it for the kernel alone.
pub fn component(number: u32) -> Option<Component> {
    // Asked once: in a virtual machine the instruction traps, and every thread of a container needs the answers.
    static KNOWN: [OnceLock<Option<Component>>; 64] = [const { OnceLock::new() }; 64];
    *KNOWN.get(usize::try_from(number).ok()?)?.get_or_init(|| ask(number))
}

/// Where the components stand that programs may use: number, offset and length of each, by number.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout(Vec<(u32, u32, u32)>);

impl Layout {
    /// Of these components.
    #[cfg(test)]
    pub fn of(parts: &[(u32, u32, u32)]) -> Self {
        Self(parts.to_vec())
    }

    /// Whether nothing is known of it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One bit for each component but the first two.
    pub fn mask(&self) -> u64 {
        self.0.iter().fold(0, |mask, (number, ..)| mask | 1 << (number & 63))
    }

    /// Offset and length of a component.
    pub fn part(&self, number: u32) -> Option<(usize, usize)> {
        let (_, offset, length) = self.0.iter().find(|part| part.0 == number)?;
        Some((usize::try_from(*offset).ok()?, usize::try_from(*length).ok()?))
    }

    /// How long a state is that a thread has from its start on: the last component of it ends it.
    pub fn size(&self) -> usize {
        const HEADER_END: usize = 576;
        let (offset, length) = self
            .0
            .iter()
            .rev()
            .find_map(|part| self.part(part.0).filter(|_| part.0 != TILES))
            .unwrap_or((0, 0));
        HEADER_END.max(offset.saturating_add(length))
    }
}

/// That of this machine: of what the processor has, and the kernel gives to programs.
pub fn layout() -> Layout {
    let given = given();
    let part = |number: u32| {
        let Component { offset, size } = component(number).filter(|_| given & 1 << number != 0)?;
        Some((number, u32::try_from(offset).ok()?, u32::try_from(size).ok()?))
    };
    Layout((2..63).filter_map(part).collect())
}

/// The components that the kernel has switched on: the register XCR0.
fn given() -> u64 {
    /// In ecx of cpuid leaf 1: the kernel uses xsave.
    const OSXSAVE: u32 = 1 << 27;
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has the instruction.
    let leaf = unsafe { std::arch::x86_64::__cpuid(1) };
    if leaf.ecx & OSXSAVE == 0 {
        return 0;
    }
    // SAFETY: the processor has the instruction, and the kernel lets it be used.
    unsafe { xcr0() }
}

#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: the caller has seen that the kernel uses xsave; this register is always there then.
    unsafe { std::arch::x86_64::_xgetbv(0) }
}

fn ask(number: u32) -> Option<Component> {
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has the instruction; an unknown leaf answers zeros.
    let (size, offset, supervisor) = unsafe {
        let leaf = std::arch::x86_64::__cpuid_count(0x0d, number);
        (leaf.eax as usize, leaf.ebx as usize, leaf.ecx & 1 != 0)
    };
    (number >= 2 && size != 0 && !supervisor).then_some(Component { offset, size })
}

#[cfg(test)]
mod tests {
    #[test]
    fn avx_follows_the_header() {
        if std::arch::is_x86_feature_detected!("avx") {
            assert_eq!(super::component(2), Some(super::Component { offset: 576, size: 256 }));
        }
        assert_eq!(super::component(0), None);
    }
}
