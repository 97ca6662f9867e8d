//! What processes share: memory, descriptor table, file system state, signal handlers. kcmp(2) tells; the ids of the
//! image say it, and clone3(2) makes it again from parent to child.
//!
//! ```text
//!   owner    the first process of the tree with this memory: all that is asked, saved and filled is its
//!     │      mm-1.img, pagemap-1.img, pages-N.img
//!     └── tenant, made with CLONE_VM (and CLONE_SIGHAND)      the same mm-7.img, a pagemap-7.img without pages
//!          └── tenant ...
//!
//!   restore    the owner is filled before it has its first tenant: what takes the place of its memory takes the
//!              tenant's, too. All of them run their batches in one window, by turns; the owner, who is the last to
//!              leave, unmaps it
//! ```
//!
//! CRIU makes no such processes, so a set with tenants has a critical extension. A parent that waits in vfork(2) stands
//! still for nobody: its child is let run until it has a memory of its own, see `freeze`.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use crate::checkpoint::context::{Dump, LiveTask};
use crate::checkpoint::error::Context;
use crate::checkpoint::image::TaskKobjIdsEntry;
use crate::checkpoint::model::Model;
use crate::checkpoint::task::tree::Step;
use crate::checkpoint::{Error, Result};
use crate::sys::kcmp::{What, kcmp};

/// The extension of a set in which processes share memory: each tenant with its owner.
pub const EXTENSION: &str = "shared-memory";

/// Ids by process. Namespaces add theirs.
pub fn ids(dump: &mut Dump<'_>) -> Result<BTreeMap<u32, TaskKobjIdsEntry>> {
    let live: Vec<(i32, i32)> = dump.tasks.iter().filter(|t| !t.zombie).map(|t| (t.pid, t.vpid)).collect();
    let mut all: BTreeMap<u32, TaskKobjIdsEntry> = BTreeMap::new();
    let classes = [What::Vm, What::Files, What::Fs, What::Sighand].map(|what| classes(&live, what));
    let [vm, files, fs, sighand] = classes;
    let classes = [vm?, files?, fs?, sighand?];
    for (i, (_, vpid)) in live.iter().enumerate() {
        let [vm_id, files_id, fs_id, sighand_id] = [0, 1, 2, 3].map(|kind: usize| classes[kind][i]);
        let entry = TaskKobjIdsEntry { vm_id, files_id, fs_id, sighand_id, ..TaskKobjIdsEntry::default() };
        all.insert(vpid.cast_unsigned(), entry);
    }
    Ok(all)
}

/// The processes that run on the memory of one before them in the tree, with the first such one, its owner.
pub fn tenants(model: &Model) -> BTreeMap<u32, u32> {
    let mut owners = BTreeMap::new();
    let live = model.pstree.iter().filter_map(|entry| Some((entry.pid, model.ids.get(&entry.pid)?.vm_id)));
    live.filter(|(_, memory)| *memory != 0)
        .filter_map(|(pid, memory)| {
            let owner = *owners.entry(memory).or_insert(pid);
            (owner != pid).then_some((pid, owner))
        })
        .collect()
}

/// Says in the model that there are tenants.
pub fn record(model: &mut Model) -> Result<()> {
    let tenants = tenants(model);
    if tenants.is_empty() { Ok(()) } else { model.set_critical_extension(EXTENSION, &tenants) }
}

/// Which of the stopped processes run on the memory of one before them, by pid on this host.
pub fn stopped_tenants(tasks: &[LiveTask]) -> Result<BTreeSet<i32>> {
    let live: Vec<(i32, i32)> = tasks.iter().filter(|t| !t.zombie).map(|t| (t.pid, t.vpid)).collect();
    let mut seen = BTreeSet::new();
    let ids = classes(&live, What::Vm)?;
    Ok(live.iter().zip(ids).filter(|(_, id)| !seen.insert(*id)).map(|((pid, _), _)| *pid).collect())
}

/// What is shared is handed on from parent to child. Refuses what is shared in another way: with a process whose common
/// ancestor has let go of it.
pub fn check(root: i32, steps: &[Step], ids: &BTreeMap<u32, TaskKobjIdsEntry>) -> Result<()> {
    type Kind = (&'static str, fn(&TaskKobjIdsEntry) -> u32);
    const KINDS: [Kind; 4] = [
        ("memory", |ids| ids.vm_id),
        ("descriptor table", |ids| ids.files_id),
        ("working directory", |ids| ids.fs_id),
        ("signal handlers", |ids| ids.sighand_id),
    ];
    let of = |pid: i32| ids.get(&pid.cast_unsigned());
    let mut seen: BTreeSet<(&str, u32)> =
        of(root).into_iter().flat_map(|i| KINDS.map(|k| (k.0, k.1(i)))).collect();
    for step in steps {
        let (by, pid) = match *step {
            Step::Fork { by, pid, .. } => (Some(by), pid),
            Step::Enter { pid } => (None, pid),
            _ => continue,
        };
        let Some(own) = of(pid) else { continue };
        let parent = by.and_then(of);
        for (what, id) in KINDS {
            // Some sets of images say nothing of it.
            let own = id(own);
            if own != 0 && parent.map(id) != Some(own) && !seen.insert((what, own)) {
                return Err(Error::new(format!(
                    "the process shares its {what} with one that is not its parent"
                ))
                .pid(pid)
                .remedy("such a process cannot be dumped; end it"));
            }
        }
        if parent
            .is_some_and(|p| p.sighand_id == own.sighand_id && own.sighand_id != 0 && p.vm_id != own.vm_id)
        {
            return Err(
                Error::new("the process shares signal handlers with its parent, but no memory").pid(pid)
            );
        }
    }
    Ok(())
}

/// A number for each process, equal where the object is the same. kcmp's order makes it a sort, not a comparison of
/// all pairs.
fn classes(live: &[(i32, i32)], what: What) -> Result<Vec<u32>> {
    let mut sorted: Vec<usize> = Vec::new();
    let mut ids = vec![0; live.len()];
    let mut next = 1;
    for i in 0..live.len() {
        let mut failed = Ok(());
        let at = sorted.binary_search_by(|&j| {
            let (a, b) = (live[j].0, live[i].0);
            kcmp(a, b, what)
                .during("cannot compare two processes", || format!("kcmp({a}, {b}, {what:?})"))
                .unwrap_or_else(|error| {
                    failed = Err(error);
                    Ordering::Equal
                })
        });
        failed?;
        match at {
            Ok(j) => ids[i] = ids[sorted[j]],
            Err(place) => {
                sorted.insert(place, i);
                ids[i] = next;
                next += 1;
            }
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_comes_from_the_parent() {
        let ids = |files: [u32; 3]| {
            let entry = |files_id| TaskKobjIdsEntry { files_id, ..Default::default() };
            BTreeMap::from([(1, entry(files[0])), (5, entry(files[1])), (6, entry(files[2]))])
        };
        let fork = |by, pid| Step::Fork { by, pid, helper: false };
        let siblings = [fork(1, 5), fork(1, 6)];
        check(1, &siblings, &ids([1, 2, 3])).unwrap();
        check(1, &siblings, &ids([1, 1, 1])).unwrap();
        let error = check(1, &siblings, &ids([1, 2, 2])).unwrap_err();
        assert!(error.fields().pid == Some(6) && error.to_string().contains("descriptor table"), "{error}");
        check(1, &[fork(1, 5), fork(5, 6)], &ids([1, 2, 2])).unwrap();
        assert!(check(1, &[fork(1, 5), fork(5, 6)], &ids([1, 2, 1])).is_err(), "the grandchild of init");
        let mut all = ids([1, 2, 3]);
        all.values_mut().for_each(|ids| ids.sighand_id = 1);
        let error = check(1, &siblings, &BTreeMap::from_iter(all.clone().into_iter().take(2))).err();
        assert!(error.is_none(), "as little is known of their memory: {error:?}");
        all.values_mut().zip(7..).for_each(|(ids, vm_id)| ids.vm_id = vm_id);
        let error = check(1, &siblings, &all).unwrap_err();
        assert!(error.to_string().contains("signal handlers"), "{error}");
    }

    #[test]
    fn the_first_of_the_tree_owns_the_memory() {
        use crate::checkpoint::image::PstreeEntry;

        let mut model = Model::default();
        for (pid, vm_id) in [(1, 3), (9, 4), (5, 4), (6, 3), (7, 0), (8, 0)] {
            model.pstree.push(PstreeEntry { pid, threads: vec![pid], ..PstreeEntry::default() });
            model.ids.insert(pid, TaskKobjIdsEntry { vm_id, ..TaskKobjIdsEntry::default() });
        }
        model.pstree.push(PstreeEntry { pid: 2, ..PstreeEntry::default() });
        assert_eq!(tenants(&model), BTreeMap::from([(5, 9), (6, 1)]));
    }

    #[test]
    fn a_child_of_fork_shares_nothing() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let me = std::process::id().cast_signed();
        let live = [(me, 1), (child.id().cast_signed(), 2), (me, 3)];
        let ids = classes(&live, What::Files).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(ids[0], ids[2]);
        assert_ne!(ids[0], ids[1]);
    }
}
