//! Device numbers, which CRIU writes in two ways.
//!
//! ```text
//!   kernel (mountinfo, `dev`):   major << 20 | minor
//!   stat   (`rdev`, 32 bits):    minor & ff | major << 8 | (minor & ~ff) << 12
//! ```

/// As the kernel has it inside: in `MntEntry::root_dev`, `InotifyWdEntry::s_dev`, `GhostFileEntry::dev`.
pub const fn kernel(major: u64, minor: u64) -> u32 {
    ((major as u32) << 20) | (minor as u32 & 0xf_ffff)
}

/// Major and minor number out of [`kernel`].
pub const fn from_kernel(dev: u32) -> (u32, u32) {
    (dev >> 20, dev & 0xf_ffff)
}

/// As stat(2) gives it in 32 bits: in `GhostFileEntry::rdev`, `TtyInfoEntry::rdev`.
pub const fn stat(major: u64, minor: u64) -> u32 {
    (minor as u32 & 0xff) | ((major as u32 & 0xfff) << 8) | ((minor as u32 & 0xf_ff00) << 12)
}

/// Major and minor number out of [`stat`].
pub const fn from_stat(dev: u32) -> (u32, u32) {
    ((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & 0xf_ff00))
}
