//! Mappings of which the kernel chooses the address: rings of io_uring, since Linux 6.4.
//!
//! ```text
//!   free      ......XX..........XX....XX......       XX: what the task has mapped
//!   plugged   ######XX####____##XX####XX######       one hole is left, and mmap(NULL) finds it
//!   done      ......XX....RRRR..XX....XX......
//! ```

use std::ops::Range;

use crate::checkpoint::error::Result;
use crate::checkpoint::memory::maps;
use crate::checkpoint::memory::plan::TASK_SIZE;
use crate::checkpoint::remote::{Arg, Batch, Injection};

/// Not below 4 GiB. Since Linux 6.6; others do not look at it.
const MAP_ABOVE4G: i32 = 0x80;
/// `mmap_min_addr` is not higher anywhere; the kernel does not look for holes below when it is told so.
const LOWEST: u64 = 1 << 20;

/// Maps `range` of a stopped task from descriptor `fd`.
pub fn map(injection: &mut Injection, range: &Range<u64>, prot: u32, fd: i32, offset: u64) -> Result<()> {
    let taken = maps::read(injection.thread().tid())?;
    let taken = taken.iter().map(|mapping| mapping.start..mapping.end).filter(|m| m.end <= TASK_SIZE);
    let plugs = gaps(taken, range);
    let mut batch = Batch::new();
    batch.about("cannot map a ring where it was");
    for plug in &plugs {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        let args =
            [plug.start.into(), size(plug), libc::PROT_NONE.into(), flags.into(), (-1).into(), 0.into()];
        let call = batch.call(libc::SYS_mmap, &args);
        batch.expect(call, plug.start);
    }
    let flags = libc::MAP_SHARED | if range.start >= 1 << 32 { MAP_ABOVE4G } else { 0 };
    let args = [0.into(), size(range), prot.into(), flags.into(), fd.into(), offset.into()];
    let call = batch.call(libc::SYS_mmap, &args);
    batch.expect(call, range.start);
    for plug in &plugs {
        batch.call(libc::SYS_munmap, &[plug.start.into(), size(plug)]);
    }
    injection.run(&batch).map(drop)
}

fn size(range: &Range<u64>) -> Arg {
    (range.end - range.start).into()
}

/// What lies between the mappings, which are in order, but for one hole.
fn gaps(taken: impl Iterator<Item = Range<u64>>, hole: &Range<u64>) -> Vec<Range<u64>> {
    let mut all = Vec::new();
    let mut at = LOWEST;
    let mut push = |gap: Range<u64>| {
        if gap.start < gap.end {
            all.push(gap);
        }
    };
    let end = TASK_SIZE..TASK_SIZE;
    for mapping in taken.chain(std::iter::once(end)) {
        push(at..mapping.start.min(hole.start));
        push(at.max(hole.end)..mapping.start);
        at = at.max(mapping.end);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_the_hole_is_plugged() {
        let taken = [0x20_0000..0x30_0000, 0x30_0000..0x40_0000, 0x80_0000..0x90_0000];
        let found = gaps(taken.into_iter(), &(0x50_0000..0x60_0000));
        let expected =
            [0x10_0000..0x20_0000, 0x40_0000..0x50_0000, 0x60_0000..0x80_0000, 0x90_0000..TASK_SIZE];
        assert_eq!(found, expected);
    }
}
