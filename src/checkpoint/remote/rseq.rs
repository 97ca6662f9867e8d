//! Restartable sequences: an interrupted one starts again.

/// Where a restartable sequence goes when it is interrupted: `descriptor` is the task's `struct rseq_cs`.
/// None if `ip` is not inside it.
pub(super) fn abort_ip(descriptor: &[u8; 32], ip: u64) -> Option<u64> {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&descriptor[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    let (start, len, abort) = (word(8), word(16), word(24));
    (ip.wrapping_sub(start) < len).then_some(abort)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_inside_a_sequence() {
        let words: [u64; 4] = [0, 0x2000, 0x10, 0x3000];
        let mut descriptor = [0u8; 32];
        for (to, from) in descriptor.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&from.to_ne_bytes());
        }
        assert_eq!(abort_ip(&descriptor, 0x2000), Some(0x3000));
        assert_eq!(abort_ip(&descriptor, 0x200f), Some(0x3000));
        assert_eq!(abort_ip(&descriptor, 0x2010), None);
        assert_eq!(abort_ip(&descriptor, 0x1fff), None);
    }
}
