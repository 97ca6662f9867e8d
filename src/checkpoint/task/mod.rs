//! Processes and threads: which there are, what they are made of apart from memory and descriptors, and how they are
//! stopped, recreated and let go.
//!
//! One file a concern, each with its dump, its restore and its refusals:
//!
//! ```text
//!  freeze       seize every thread of the cgroup's subtree         tree         pids, sessions, groups, zombies; the plan
//!  status       /proc/PID/status and its kin, parsed               threads      per-thread state: robust list, rseq, comm, ...
//!  registers    general registers, xsave, interrupted calls        signals      actions, masks, queues, alternate stack
//!  credentials  ids, capabilities, securebits, no_new_privs        seccomp      filters; the destination's replaces the lowest
//!  timers       interval and POSIX timers                          limits       rlimits, oom score, loginuid
//!  scheduling   policy, nice, affinity                             modes        what prctl(2) has set
//!  cookies      who may share a processor's core                   keys         what is in a thread's keyrings
//!  frames       what handlers return to, on another processor
//!  labels       AppArmor profiles, labels of SELinux           sessions     what exec has started: second roots
//! ```

pub mod cookies;
pub mod credentials;
pub mod frames;
pub mod freeze;
pub mod keys;
pub mod labels;
pub mod limits;
pub mod modes;
pub mod placement;
pub mod policy;
pub mod privileges;
pub mod process;
pub mod revive;
pub mod scheduling;
pub mod seccomp;
pub mod sessions;
pub mod sharing;
pub mod signals;
pub mod status;
pub mod threads;
pub mod timers;
pub mod tree;
