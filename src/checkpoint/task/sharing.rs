//! What processes share: memory, descriptor table, file system state, signal handlers. kcmp(2) tells; the ids of the
//! image say it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::image::TaskKobjIdsEntry;
use crate::checkpoint::task::freeze::in_vfork;
use crate::checkpoint::task::status::Status;
use crate::checkpoint::task::tree::Step;
use crate::checkpoint::{Error, Result};
use crate::sys::kcmp::{What, kcmp};

/// Ids by process. Namespaces add theirs.
pub fn ids(dump: &mut Dump<'_>) -> Result<BTreeMap<u32, TaskKobjIdsEntry>> {
    let live: Vec<(i32, i32)> = dump.tasks.iter().filter(|t| !t.zombie).map(|t| (t.pid, t.vpid)).collect();
    let mut all: BTreeMap<u32, TaskKobjIdsEntry> = BTreeMap::new();
    let classes = [What::Vm, What::Files, What::Fs, What::Sighand].map(|what| classes(&live, what));
    let [vm, files, fs, sighand] = classes;
    let classes = [vm?, files?, fs?, sighand?];
    for (i, (_, vpid)) in live.iter().enumerate() {
        let [vm_id, files_id, fs_id, sighand_id] = [0, 1, 2, 3].map(|kind: usize| classes[kind][i]);
        if classes[0][..i].contains(&vm_id) {
            return Err(shared_memory(*vpid));
        }
        let entry = TaskKobjIdsEntry { vm_id, files_id, fs_id, sighand_id, ..TaskKobjIdsEntry::default() };
        all.insert(vpid.cast_unsigned(), entry);
    }
    Ok(all)
}

fn shared_memory(vpid: i32) -> Error {
    Error::new("the process shares its memory with another one")
        .pid(vpid)
        .remedy("wait until the child of vfork(2) has called exec")
}

/// Refuses processes (pid on this host, pid inside) that run on another one's memory, looked at while they run. Whose
/// parent waits for it in vfork(2) is let go on when all is frozen, until it has a memory of its own.
pub fn refusals(live: &[(i32, i32)]) -> Vec<Error> {
    // Somebody has ended meanwhile: the dump looks again.
    let Ok(ids) = classes(live, What::Vm) else { return Vec::new() };
    let shared = |id: u32| ids.iter().filter(|other| **other == id).count() > 1;
    let waited_for = |pid: i32| Status::of(pid).is_ok_and(|status| in_vfork(status.ppid));
    let mut alone = BTreeSet::new();
    let all = live.iter().zip(&ids).filter(|((pid, _), id)| shared(**id) && !waited_for(*pid));
    all.filter(|(_, id)| !alone.insert(**id)).map(|((_, vpid), _)| shared_memory(*vpid)).collect()
}

/// A descriptor table or a working directory is handed on from parent to child. Refuses what is shared in another way:
/// with a process whose common ancestor has let go of it.
pub fn check(root: i32, steps: &[Step], ids: &BTreeMap<u32, TaskKobjIdsEntry>) -> Result<()> {
    let of = |pid: i32| ids.get(&pid.cast_unsigned());
    let mut tables: BTreeSet<u32> = of(root).map(|ids| ids.files_id).into_iter().collect();
    let mut directories: BTreeSet<u32> = of(root).map(|ids| ids.fs_id).into_iter().collect();
    for step in steps {
        let (by, pid) = match *step {
            Step::Fork { by, pid, .. } => (Some(by), pid),
            Step::Enter { pid } => (None, pid),
            _ => continue,
        };
        let Some(own) = of(pid) else { continue };
        let parent = by.and_then(of);
        let files = parent.is_some_and(|p| p.files_id == own.files_id) || tables.insert(own.files_id);
        let fs = parent.is_some_and(|p| p.fs_id == own.fs_id) || directories.insert(own.fs_id);
        if !files || !fs {
            let what = if files { "working directory" } else { "descriptor table" };
            return Err(Error::new(format!("the process shares its {what} with one that is not its parent"))
                .pid(pid)
                .remedy("such a process cannot be dumped; end it"));
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
            let entry = |files_id| TaskKobjIdsEntry { files_id, fs_id: 100 + files_id, ..Default::default() };
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
