//! Address spaces.

use std::collections::BTreeSet;

use crate::checkpoint::error::Result;
use crate::checkpoint::image::{MmEntry, VmaEntry, vma};
use crate::checkpoint::model::Model;
use crate::checkpoint::model::validate::require;

/// End of user memory with four levels of page tables.
const TASK_SIZE: u64 = 1 << 47;
const PAGE: u64 = 4096;
/// More entries than any kernel writes.
const AUXV_MAX: usize = 256;

pub(super) fn check(model: &Model) -> Result<()> {
    let files: BTreeSet<u32> = model.files.iter().map(|f| f.id).collect();
    for (pid, mm) in &model.mm {
        let image = format!("mm-{pid}.img");
        check_bounds(mm, &image)?;
        require(files.contains(&mm.exe_file_id), &image, || format!("there is no file {}", mm.exe_file_id))?;
        for vma in &mm.vmas {
            check_vma(vma, &image)?;
            let backed = vma.status & (vma::FILE_PRIVATE | vma::FILE_SHARED) != 0;
            let found = u32::try_from(vma.shmid).is_ok_and(|id| files.contains(&id));
            require(!backed || found, &image, || {
                format!("the mapping at {:#x} has no file {}", vma.start, vma.shmid)
            })?;
        }
        check_overlaps(mm, &image)?;
    }
    Ok(())
}

fn check_bounds(mm: &MmEntry, image: &str) -> Result<()> {
    let pairs = [
        (mm.mm_start_code, mm.mm_end_code),
        (mm.mm_start_data, mm.mm_end_data),
        (mm.mm_start_brk, mm.mm_brk),
        (mm.mm_arg_start, mm.mm_arg_end),
        (mm.mm_env_start, mm.mm_env_end),
        (mm.mm_start_stack, mm.mm_start_stack),
    ];
    for (start, end) in pairs {
        let sane = start <= end && end < TASK_SIZE;
        require(sane, image, || format!("the bounds {start:#x} to {end:#x} are not in user memory"))?;
    }
    require(mm.mm_saved_auxv.len() <= AUXV_MAX, image, || "the auxiliary vector is too long".into())
}

fn check_vma(vma: &VmaEntry, image: &str) -> Result<()> {
    let (start, end) = (vma.start, vma.end);
    let aligned = start.is_multiple_of(PAGE) && end.is_multiple_of(PAGE) && vma.pgoff.is_multiple_of(PAGE);
    // The vsyscall page lies above user memory; it is listed, never mapped.
    let inside = end <= TASK_SIZE || vma.status & vma::VSYSCALL != 0;
    require(aligned && inside && start < end, image, || format!("{start:#x} to {end:#x} is no mapping"))
}

fn check_overlaps(mm: &MmEntry, image: &str) -> Result<()> {
    let mut ranges: Vec<(u64, u64)> =
        mm.vmas.iter().filter(|v| v.status & vma::GUARD == 0).map(|v| (v.start, v.end)).collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if let [(_, end), (start, _)] = pair {
            require(end <= start, image, || format!("mappings overlap at {start:#x}"))?;
        }
    }
    Ok(())
}
