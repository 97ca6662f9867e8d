//! Driving a task from outside: ptrace and the syscall batch.
//!
//! What only the task itself can do (read its timers, map its memory, fork its children) is done by a *batch*:
//! an array of system calls that a few hundred bytes of position-independent assembly walk inside the task.
//!
//! ```text
//!   driver                                     task (seized, stopped)
//!   ──────                                     ──────────────────────
//!   Batch { openat, fcntl, mmap, ... }
//!      │ place: addresses filled in                vdso page            scratch (mapped by the stub)
//!      ├──────────────────────────────────────────────────────────────> │ entries │ data │ out │
//!      │ SETREGS rip = run, CONT                   │ code │ stub │ ◄──── walks entries, writes results
//!      │ wait ◄── stops at tgkill(self, X) ─────── │      │ heal │
//!      └ Results <──────────────────────────────────────────────────── │ results │ out │
//! ```
//!
//! One round trip serves thousands of calls. The task's own registers and signal mask stand in the stub's record;
//! if the driver dies in the middle, the stub puts them back by itself (see [`Injection`]).
//!
//! | file          | what it knows                                                     |
//! |---------------|-------------------------------------------------------------------|
//! | `ptrace`      | the requests, one function each                                   |
//! | `wait`        | waiting for one thread with a deadline                            |
//! | `thread`      | a seized thread                                                   |
//! | `rseq`        | interrupted restartable sequences                                 |
//! | `batch`       | a batch as data, and its placing in memory                        |
//! | `names`       | system calls as strace prints them                                |
//! | `vdso`        | the end of the vdso and its slots                                |
//! | `injection`   | running batches: live tasks, and tasks being restored             |
//! | `beside`      | batches in more threads of the same process                      |
//! | `apart`       | the stub of a process that runs on another one's memory           |
//! | `clone`       | children and threads of a task being restored; zombies            |
//! | `leave`       | the last step of a restore                                        |
//! | `conduit`     | passing descriptors into a task                                   |

mod apart;
mod batch;
mod beside;
mod clone;
mod conduit;
mod injection;
mod leave;
mod lift;
mod memory;
mod names;
mod pin;
pub(super) mod ptrace;
mod rseq;
mod signals;
mod start;
mod thread;
mod vdso;
mod wait;

#[cfg(test)]
mod tests;

pub use batch::{Arg, Batch, Call, Out, Results};
pub use beside::Beside;
pub use clone::{CloneArgs, Exit};
pub use conduit::Conduit;
pub use injection::Injection;
pub use leave::Final;
pub use memory::Facts;
pub use thread::{Dispatch, RseqConfig, Thread};
pub use wait::Stop;
