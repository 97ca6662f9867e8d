//! x86-64.

pub mod bridge;
mod calls;
pub mod compat;
pub mod features;
pub mod frames;
mod ia32;
mod instructions;
pub mod record;
mod regs;
pub(in crate::checkpoint) mod requests;
pub(in crate::checkpoint) mod stub;
pub mod xsave;

pub use calls::{call_name, map_compat_vdso, map_vdso};
pub use instructions::instructions;
pub use regs::{Regs, SYSCALL, SYSCALL_32};

use crate::checkpoint::image::Machine;
pub use crate::checkpoint::image::ThreadInfoX86 as ThreadInfo;

/// This architecture, as a core image names it.
pub const MACHINE: Machine = Machine::X8664;
