//! Where the processor keeps each component of its extended state: cpuid leaf 0x0d, as xsave(5) of the processor's manual.

use std::sync::OnceLock;

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

/// The components that this processor has, one bit each.
pub fn components() -> u64 {
    #[allow(unused_unsafe)]
    // SAFETY: as below.
    let leaf = unsafe { std::arch::x86_64::__cpuid_count(0x0d, 0) };
    u64::from(leaf.eax) | u64::from(leaf.edx) << 32
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
