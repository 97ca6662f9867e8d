//! What processes share: memory, descriptor table, file system state, signal handlers. kcmp(2) tells; the ids of the
//! image say it.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::checkpoint::context::Dump;
use crate::checkpoint::error::Context;
use crate::checkpoint::image::TaskKobjIdsEntry;
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
        if live[..i].iter().enumerate().any(|(j, _)| classes[0][j] == vm_id) {
            return Err(Error::new("the process shares its memory with another one")
                .pid(*vpid)
                .remedy("wait until the child of vfork(2) has called exec"));
        }
        let entry = TaskKobjIdsEntry { vm_id, files_id, fs_id, sighand_id, ..TaskKobjIdsEntry::default() };
        all.insert(vpid.cast_unsigned(), entry);
    }
    Ok(all)
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
