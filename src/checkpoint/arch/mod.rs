//! What differs from one processor architecture to the next. The rest of the engine knows none of it, so that another
//! architecture is another directory here.
//!
//! | file       | what an architecture says in it                                                           |
//! |------------|-------------------------------------------------------------------------------------------|
//! | `regs`     | [`Regs`]: instruction and thread pointer, how a call is made, interrupted calls made good |
//! | `requests` | how ptrace(2) reads and writes registers                                                  |
//! | `stub`     | the assembly that makes calls inside a task, and how the driver enters and leaves it      |
//! | `record`   | [`ThreadInfo`]: registers as CRIU's core image keeps them                                 |
//! | `features` | parts of the processor that a program has to ask for                                      |
//! | `frames`   | what stands on the stack of a thread that handles a signal                                |
//! | `compat`   | 32-bit programs, which the architecture's kernel runs beside its own                       |
//! | `bridge`   | code that leads from the vdso of another kernel to this one's                              |
//! | `instructions` | which of `/proc/cpuinfo`'s flags programs rely on without asking                     |
//! | `calls`    | system calls that only this architecture has                                              |

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("src/checkpoint/arch has no directory for this architecture yet");
