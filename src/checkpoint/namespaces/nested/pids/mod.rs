//! Pid namespaces that the container has made: `unshare -pf`, `bwrap --unshare-pid`, a container in the container.
//!
//! ```text
//!   container        1    7 ── 8              21          the images name every process by its id here
//!   pid:[21]                   1 ── 2 ── 3    4 (joined)  and the extension `pids` says what it is called
//!   pid:[22]                        1                     in the namespaces below
//! ```
//!
//! A process has an id in its own pid namespace and in every one around it, so its id in the container's tells it from
//! all others. That one is in pstree.img, core-N.img and wherever else images name a process; so are sessions and process
//! groups. What a process itself says or hears of others (the target of a timer, what a queued signal tells of its
//! sender) is as the process has it.
//!
//! **Images.** The critical extension `pids`: the namespaces, each with the one around it, its first process, and the id
//! that it has given last; the inner ids of processes, threads, and of sessions and groups whose leader is gone; the
//! threads whose children are born elsewhere; and which proc file system shows which namespace. CRIU would make one
//! namespace of all, so it must refuse the set.
//!
//! **Restore.** `clone3(set_tid[])` takes an id for each level. The first process of a namespace makes it, by
//! CLONE_NEWPID, where it stands in the tree; there is no other way, for its parent is outside.
//!
//! ```text
//!   tree       parent outside ── clone3(CLONE_NEWPID, set_tid = [1, 8]) ──▶ first process; its door is opened
//!              it ── clone3(set_tid = [2, 9]) ──▶ children inside
//!              what has joined: parent outside ── setns(door) ── clone3(set_tid = [4, 21]) ── setns(its own)
//!   mounts     a proc of such a namespace, and all that lies on it, when the door is there: the mount namespaces that
//!              have one have been made without
//!   threads    setns(door) or unshare(CLONE_NEWPID) in those whose children are born elsewhere: after that, no thread
//!              can be made any more
//! ```
//!
//! A process sees nobody outside of its namespace, so it cannot be put into a process group of outside: it must be born
//! there. The tree is planned so; what cannot come out is refused.
//!
//! A namespace whose first process is gone and was waited for lets nobody in. Where something still holds it, it is made
//! again with a first process that ends.

mod dump;
mod levels;
mod restore;

pub use dump::{gather, show};
#[cfg(test)]
pub(in crate::checkpoint) use levels::tests;
pub use levels::{Ids, Level, Pids};
pub use restore::{arrive, door_to, enter, finish, give_back, hand, leave_for};

/// The name of the extension in stasis.img: what CRIU would restore wrong without.
pub const EXTENSION: &str = "pids";
