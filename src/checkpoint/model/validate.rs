//! Is the model one that a dump could have written? What is not so here would surprise the rooms later.
//!
//! ```text
//!   pstree ──pid──▶ cores, ids, mm, fs        every arrow: the id leads somewhere, and once only
//!     ids ──files_id──▶ fdinfo ──id──▶ files ──▶ pipes-data, sk-queues, tty-info, memfd
//!     mm.vmas ──shmid──▶ files
//!     cores ──index──▶ seccomp, ──cg_set──▶ cgroup
//! ```
//!
//! Numbers that memory is taken by, or that become addresses, are within what the kernel itself would give.

mod files;
mod memory;
mod spaces;
mod tasks;

use std::collections::BTreeSet;
use std::fmt::Display;

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::model::Model;

impl Model {
    /// Checks that ids are unique and lead somewhere, and that sizes and addresses are sane.
    pub fn validate(&self) -> Result<()> {
        tasks::check(self)?;
        memory::check(self)?;
        files::check(self)?;
        spaces::check(self)
    }
}

/// The complaint, unless `fine`.
fn require(fine: bool, image: &str, what: impl FnOnce() -> String) -> Result<()> {
    match fine {
        true => Ok(()),
        false => Err(Error::new(format!("the images are inconsistent: {}", what())).path(image)),
    }
}

/// The ids, if each occurs once.
fn unique<T: Ord + Copy + Display>(
    ids: impl IntoIterator<Item = T>,
    image: &str,
    of: &str,
) -> Result<BTreeSet<T>> {
    let mut seen = BTreeSet::new();
    for id in ids {
        require(seen.insert(id), image, || format!("{of} {id} occurs twice"))?;
    }
    Ok(seen)
}
