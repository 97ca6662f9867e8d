//! Images that CRIU has written, in the shape that ours have.

use crate::checkpoint::image::CoreEntry;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::{cgroup, mount};

impl Model {
    /// Changes what CRIU writes in another way than we do.
    pub(super) fn adopt(&mut self) {
        if let Some(groups) = self.cgroup.take() {
            self.cgroup = Some(cgroup::rooted(groups));
        }
        for table in self.mountpoints.values_mut() {
            *table = mount::in_kernels_order(std::mem::take(table));
        }
        self.cores.values_mut().for_each(adopt_core);
    }
}

fn adopt_core(core: &mut CoreEntry) {
    let Some(tc) = &mut core.tc else { return };
    // Since 4.0 every thread has its own set of control groups, its process has none.
    tc.cg_set = tc.cg_set.or(core.thread_core.as_ref().and_then(|thread| thread.cg_set));
    // The kernel shows hexadecimal digits, which CRIU reads as decimal ones.
    tc.personality = u32::from_str_radix(&tc.personality.to_string(), 16).unwrap_or(tc.personality);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::{TaskCoreEntry, ThreadCoreEntry};

    #[test]
    fn a_process_has_its_group_and_its_personality() {
        // ADDR_NO_RANDOMIZE, and READ_IMPLIES_EXEC.
        for (theirs, personality) in [(40_000, 0x4_0000), (400_000, 0x40_0000), (0, 0)] {
            let mut core = CoreEntry {
                tc: Some(TaskCoreEntry { personality: theirs, ..TaskCoreEntry::default() }),
                thread_core: Some(ThreadCoreEntry { cg_set: Some(4), ..ThreadCoreEntry::default() }),
                ..CoreEntry::default()
            };
            adopt_core(&mut core);
            let tc = core.tc.unwrap();
            assert_eq!((tc.personality, tc.cg_set), (personality, Some(4)));
        }
    }
}
