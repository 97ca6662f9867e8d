//! Parts of the processor that a process has to ask for: AMX, the only one so far.
//!
//! A thread's state has room for tiles from its first use of one on, and ptrace(2) makes no room: the thread has to use
//! one by itself. That is no system call, so it is no batch either but four instructions behind the stub:
//!
//! ```text
//!   ldtilecfg [rbx]    a configuration, in the scratch
//!   tilezero tmm0      faults, and the kernel makes room
//!   tilerelease
//!   jmp rbp            to the stub's stop
//! ```

use super::xsave::TILES;
use crate::checkpoint::error::Result;
use crate::checkpoint::image::XstateComponent;
use crate::checkpoint::remote::{Batch, Injection, Out};

/// Components that a process may use only when it has asked for them.
const ON_REQUEST: u64 = 1 << TILES;

const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;

const INSTRUCTIONS: [u8; 17] =
    [0xc4, 0xe2, 0x78, 0x49, 0x03, 0xc4, 0xe2, 0x7b, 0x49, 0xc0, 0xc4, 0xe2, 0x78, 0x49, 0xc0, 0xff, 0xe5];

/// One tile of 16 rows of 64 bytes, in palette 1.
fn configuration() -> [u8; 64] {
    let mut bytes = [0; 64];
    (bytes[0], bytes[16], bytes[48]) = (1, 64, 16);
    bytes
}

/// Asks a process for the features that it may use. arch_prctl(2), Linux 5.16
pub fn ask(batch: &mut Batch) -> Out {
    let features = batch.out(8);
    let call = batch.call(libc::SYS_arch_prctl, &[ARCH_GET_XCOMP_PERM.into(), features.arg()]);
    batch.tolerate(call);
    features
}

/// Those of its features that a process has asked for.
pub fn on_request(features: u64) -> Option<u64> {
    Some(features & ON_REQUEST).filter(|asked| *asked != 0)
}

/// Asks for them in a process being restored.
pub fn request(injection: &mut Injection, features: u64) -> Result<()> {
    if on_request(features).is_some() {
        injection
            .syscall(libc::SYS_arch_prctl, &[ARCH_REQ_XCOMP_PERM.into(), TILES.into()])
            .map_err(|e| e.remedy("restore on a machine with AMX"))?;
    }
    Ok(())
}

/// Makes room in the state of a thread being restored for these parts of it. Its process must have asked for them.
pub fn make_room(injection: &mut Injection, extras: &[XstateComponent]) -> Result<()> {
    if !extras.iter().any(|component| component.number == TILES) {
        return Ok(());
    }
    injection.run_code(&INSTRUCTIONS, &configuration(), "tilezero(tmm0)")
}
