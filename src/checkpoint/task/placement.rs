//! NUMA policies of single mappings, as mbind(2) sets them: from which nodes their memory comes.
//!
//! ```text
//!   mappings ──> get_mempolicy(MPOL_F_ADDR) of each: mode ──> of those that have one: nodes ──> extension `task`
//! ```
//!
//! A copy of a process has its policies, and may be asked when the process runs again: a process with tens of thousands
//! of mappings need not stand still for that. What a copy does not have, or shares, is asked for before.
//!
//! `numa_maps` has the same, but walks all page tables, and cannot tell a mapping's policy from that of the thread.

use std::ops::Range;

use prost::Message;

use crate::checkpoint::image::{MappingPolicy, TaskExtra};
use crate::checkpoint::model::Model;
use crate::checkpoint::remote::{Batch, Injection};
use crate::checkpoint::task::process::EXTENSION;
use crate::checkpoint::task::scheduling::{MPOL_DEFAULT, NODE_BITS, NODES};
use crate::checkpoint::{Error, Result};

const MPOL_F_ADDR: u64 = 2;
/// Pages that are there go where the policy says.
const MPOL_MF_MOVE: u64 = 2;
/// Mappings asked for at once.
const CHUNK: usize = 512;

/// Which of the mappings have a policy of their own. The process is asked, or its copy.
pub fn ask(mappings: &[Range<u64>], injection: &mut Injection) -> Result<Vec<MappingPolicy>> {
    let mut found = Vec::new();
    for chunk in mappings.chunks(CHUNK) {
        for (mapping, mode) in modes(chunk, injection)? {
            let nodes = nodes(mapping, injection)?;
            found.push(MappingPolicy { start: mapping.start, end: mapping.end, mode, nodes });
        }
    }
    Ok(found)
}

/// Records the policies of a process whose threads have been recorded.
pub fn record(model: &mut Model, vpid: u32, mut policies: Vec<MappingPolicy>) -> Result<()> {
    if policies.is_empty() {
        return Ok(());
    }
    policies.sort_unstable_by_key(|policy| policy.start);
    let missing = || Error::new("the process whose mappings have NUMA policies was not recorded");
    let data = model.extension_data(EXTENSION).ok_or_else(missing)?;
    let mut extra = TaskExtra::decode(data).map_err(|_| missing())?;
    extra.threads.iter_mut().find(|thread| thread.tid == vpid).ok_or_else(missing)?.placement = policies;
    model.set_extension_data(EXTENSION, extra.encode_to_vec());
    Ok(())
}

fn modes<'a>(chunk: &'a [Range<u64>], injection: &mut Injection) -> Result<Vec<(&'a Range<u64>, u32)>> {
    let mut batch = Batch::new();
    let mut asked = Vec::with_capacity(chunk.len());
    for mapping in chunk {
        let mode = batch.out(4);
        let args = [mode.arg(), 0.into(), 0.into(), mapping.start.into(), MPOL_F_ADDR.into()];
        let call = batch.call(libc::SYS_get_mempolicy, &args);
        // A kernel without NUMA has no policies, and [vsyscall] is no mapping.
        asked.push((mapping, mode, batch.tolerate(call)));
    }
    let results = injection.run(&batch)?;
    let asked = asked.into_iter().filter(|(_, _, call)| results.ret(*call) == 0);
    let told = asked.map(|(mapping, mode, _)| (mapping, results.u32(mode, 0)));
    Ok(told.filter(|(_, mode)| *mode != MPOL_DEFAULT).collect())
}

fn nodes(mapping: &Range<u64>, injection: &mut Injection) -> Result<Option<Vec<u8>>> {
    let mut batch = Batch::new();
    batch.about("cannot read the NUMA policy of a mapping");
    let nodes = batch.out(NODES);
    let args = [0.into(), nodes.arg(), NODE_BITS.into(), mapping.start.into(), MPOL_F_ADDR.into()];
    batch.call(libc::SYS_get_mempolicy, &args);
    let results = injection.run(&batch)?;
    let nodes = results.out(nodes);
    Ok(nodes.iter().any(|b| *b != 0).then(|| nodes.to_vec()))
}

/// Sets them again.
pub fn restore(injection: &mut Injection, policies: &[MappingPolicy]) -> Result<()> {
    policies.chunks(CHUNK).try_for_each(|chunk| set(chunk, injection))
}

fn set(chunk: &[MappingPolicy], injection: &mut Injection) -> Result<()> {
    let mut batch = Batch::new();
    batch.about("cannot restore the NUMA policy of a mapping");
    for policy in chunk {
        let length = policy.end.checked_sub(policy.start).ok_or_else(|| {
            Error::new(format!("the image has a policy of a mapping that ends before {:#x}", policy.start))
        })?;
        let (nodes, bits) = match policy.nodes.as_ref().filter(|nodes| nodes.len() == NODES) {
            Some(nodes) => (batch.data(nodes), NODE_BITS),
            None => (0.into(), 0),
        };
        let to = [policy.mode.into(), nodes, bits.into(), MPOL_MF_MOVE.into()];
        let [mode, nodes, bits, flags] = to;
        batch.call(libc::SYS_mbind, &[policy.start.into(), length.into(), mode, nodes, bits, flags]);
    }
    injection.run(&batch).map(|_| ())
}
