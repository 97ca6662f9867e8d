//! A pre-dump that stops nobody.
//!
//! ```text
//!   program      runs ────────────────────────────────────────────>
//!   per process  scan: what was written is protected again, and found
//!                copy it          ── what is written from now on is found by the next scan
//! ```
//!
//! The last rounds of a pre-copy have to be short, for what is written during one is what the next has to copy. A page is
//! protected before it is copied, so that what is copied is at least as new as the protection; a write that is newer
//! takes it away again. Mappings that are new come to be watched only where all stand still (see `track`): until then
//! this does not save their pages, and when these are more than a few it is not enough.

use std::cmp::Ordering;

use crate::checkpoint::image::VmaEntry;
use crate::checkpoint::memory::capture::TaskPages;
use crate::checkpoint::memory::layout;
use crate::checkpoint::memory::pages::{PAGE, Pagemap};
use crate::checkpoint::memory::parent::{Known, Parent};
use crate::checkpoint::memory::track::{self, Tracking};
use crate::checkpoint::precopy::FEW;
use crate::checkpoint::predump::Round;
use crate::checkpoint::task::status::{self, Status};
use crate::checkpoint::{Freezer, Result};
use crate::sys::kcmp::{What, kcmp};

/// Finds what has been written since the round before. `known`: the pages that the rounds have so far.
///
/// None: a round that stops all is needed, because not all processes are watched, or not in a way that needs no stop.
pub fn round(
    init: i32,
    freezer: &dyn Freezer,
    tracking: &mut Tracking,
    known: &mut Known,
) -> Result<Option<Round>> {
    let mut pids = running(init, freezer)?;
    let watched: Vec<i32> =
        pids.iter().map(|(pid, _)| *pid).filter(|pid| tracking.needs_no_stop(*pid)).collect();
    // What runs on the memory of one that is watched is watched with it.
    let is_tenant = |pid: i32| watched.iter().any(|other| kcmp(pid, *other, What::Vm) == Ok(Ordering::Equal));
    pids.retain(|(pid, _)| watched.contains(pid) || !is_tenant(*pid));
    if !pids.iter().all(|(pid, _)| tracking.needs_no_stop(*pid)) {
        return Ok(None);
    }
    let (mut looked, mut left) = (Vec::new(), 0);
    for (pid, vpid) in pids {
        match unwatched(pid) {
            Ok((mappings, bytes)) => {
                looked.push((pid, vpid, mappings));
                left += bytes;
            }
            // It has ended meanwhile.
            Err(_) if !is_alive(pid) => {}
            Err(error) => return Err(error.pid(vpid.cast_signed())),
        }
    }
    if left > FEW * PAGE {
        return Ok(None);
    }
    let mut parent = Parent::given(None, std::mem::take(known));
    let mut found = Vec::new();
    for ((pid, vpid, mappings), id) in looked.iter().zip(1..) {
        let earlier = parent.of(*vpid, tracking.scan(*pid));
        let pages = Pagemap::open(*pid)
            .and_then(|mut map| TaskPages::find(&mut map, (*pid, *vpid), id, mappings.iter(), &earlier));
        match pages {
            Ok(pages) => found.push(pages),
            Err(_) if !is_alive(*pid) => {}
            Err(error) => return Err(error.pid(vpid.cast_signed())),
        }
    }
    Round::new(found, tracking).map(Some)
}

/// The mappings of a process, and how many bytes of them the scan leaves out.
fn unwatched(pid: i32) -> Result<(Vec<VmaEntry>, u64)> {
    let mappings: Vec<VmaEntry> = layout::private(pid)?;
    let pages = Pagemap::open(pid)?.unwatched(&track::ranges(&mappings), false)?;
    let bytes = pages.iter().map(|range| range.end - range.start).sum();
    Ok((mappings, bytes))
}

/// The processes of the container that have memory: pids on this host and inside.
fn running(init: i32, freezer: &dyn Freezer) -> Result<Vec<(i32, u32)>> {
    let depth = status::depth(init)?;
    let look = |pid: i32| {
        let status = Status::of(pid).ok().filter(|status| !matches!(status.state, 'Z' | 'X'))?;
        Some((pid, status.pid_at(depth).unwrap_or(pid).cast_unsigned()))
    };
    Ok(freezer.pids()?.into_iter().filter_map(look).collect())
}

fn is_alive(pid: i32) -> bool {
    Status::of(pid).is_ok_and(|status| !matches!(status.state, 'Z' | 'X'))
}
