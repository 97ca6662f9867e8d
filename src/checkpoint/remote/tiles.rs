//! The first use of AMX tiles in a thread being restored.
//!
//! A thread's state has room for tiles from its first use of one on, and ptrace(2) makes no room: the thread has to use
//! one by itself. That is no system call, so it is no batch either but four instructions behind the stub:
//!
//! ```text
//!   ldtilecfg [rbx]    rbx = a configuration, in the scratch
//!   tilezero tmm0      faults, and the kernel makes room
//!   tilerelease
//!   jmp rbp            rbp = the stub's stop
//! ```

use super::injection::Injection;
use super::start::enter;
use super::stub::{self, Place};
use crate::checkpoint::error::{Error, Result};

const INSTRUCTIONS: [u8; 17] =
    [0xc4, 0xe2, 0x78, 0x49, 0x03, 0xc4, 0xe2, 0x7b, 0x49, 0xc0, 0xc4, 0xe2, 0x78, 0x49, 0xc0, 0xff, 0xe5];

/// One tile of 16 rows of 64 bytes, in palette 1.
fn configuration() -> [u8; 64] {
    let mut bytes = [0; 64];
    (bytes[0], bytes[16], bytes[48]) = (1, 64, 16);
    bytes
}

impl Injection {
    /// Makes room for tiles in the thread's state. Its process must have asked for them.
    pub fn use_tiles(&mut self) -> Result<()> {
        if self.window == 0 {
            return Err(Error::new("tiles are for tasks that are being restored"));
        }
        let at = self.code + (stub::code().len() as u64).next_multiple_of(16);
        self.memory.force(at, &INSTRUCTIONS)?;
        self.memory.write(self.scratch, &configuration())?;
        let mut regs = enter(self, Place::Stop);
        (regs.rbx, regs.rbp) = (self.scratch, regs.rip);
        regs.rip = at;
        self.drive(&regs, || "tilezero(tmm0)".to_owned()).map(drop)
    }
}
