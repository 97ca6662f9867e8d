//! CRIU's image format: what is on the disk, and nothing of what it means.
//!
//! ```text
//!   model.rs ──▶ records (one file a family) ──▶ stream: length + bytes ──▶ dir: staging, publish
//!                                            ◀── wire: every field known? within limits?  ◀──
//! ```
//!
//! Records and fields carry the names of CRIU's published definitions (v4.2): `reg_file_entry` is [`RegFileEntry`].
//! The constants below are the bits that CRIU gives to numbers in them.

pub mod anon;
pub mod apparmor;
pub mod bpf;
pub mod cgroup;
pub mod core;
pub mod cpuinfo;
pub mod creds;
mod desk;
pub mod device;
mod dir;
mod extra;
pub mod file;
mod flush;
pub mod fsnotify;
pub mod ghost;
pub mod inventory;
pub mod ipc;
mod kind;
pub mod legacy;
pub mod mm;
pub mod mount;
pub mod namespace;
pub mod net;
pub mod packet;
pub mod payload;
pub mod pipe;
pub mod pstree;
mod record;
pub mod regfile;
pub mod seccomp;
pub mod socket;
mod stasis;
pub mod stats;
mod stream;
#[cfg(test)]
pub(crate) mod tests;
pub mod timer;
pub mod tty;
pub mod unix;
pub mod wire;
pub mod x86;

pub use self::anon::*;
pub use self::apparmor::*;
pub use self::bpf::*;
pub use self::cgroup::*;
pub use self::core::*;
pub use self::cpuinfo::*;
pub use self::creds::*;
pub use self::dir::{INVENTORY, ImageDir, TOUCHED};
pub use self::extra::*;
pub use self::file::*;
pub use self::fsnotify::*;
pub use self::inventory::*;
pub use self::ipc::*;
pub use self::kind::{COMMON, Kind, SERVICE};
pub use self::legacy::*;
pub use self::mm::*;
pub use self::mount::*;
pub use self::namespace::*;
pub use self::net::*;
pub use self::packet::*;
pub use self::pipe::*;
pub use self::pstree::*;
pub use self::record::Record;
pub use self::regfile::*;
pub use self::seccomp::*;
pub use self::socket::*;
pub use self::stasis::*;
pub use self::stats::*;
pub use self::stream::{IMAGE_MAX, RECORD_MAX, Reader, Writer};
pub use self::timer::*;
pub use self::tty::*;
pub use self::unix::*;
pub use self::x86::*;

/// Version of the image set that CRIU reads.
pub const IMG_VERSION: u32 = 2;
/// Version of a set that CRIU must not read: it has critical extensions.
pub const IMG_VERSION_CRITICAL: u32 = 3;

/// Bits of [`VmaEntry::status`].
pub mod vma {
    /// Memory that is saved and put back.
    pub const REGULAR: u32 = 1 << 0;
    /// The stack of the main thread.
    pub const STACK: u32 = 1 << 1;
    /// The vsyscall page.
    pub const VSYSCALL: u32 = 1 << 2;
    /// The vdso.
    pub const VDSO: u32 = 1 << 3;
    /// The brk heap.
    pub const HEAP: u32 = 1 << 5;
    /// A private mapping of a file.
    pub const FILE_PRIVATE: u32 = 1 << 6;
    /// A shared mapping of a file.
    pub const FILE_SHARED: u32 = 1 << 7;
    /// Shared anonymous memory.
    pub const ANON_SHARED: u32 = 1 << 8;
    /// Private anonymous memory.
    pub const ANON_PRIVATE: u32 = 1 << 9;
    /// A System V shared memory segment.
    pub const SYSVIPC: u32 = 1 << 10;
    /// A mapped packet socket.
    pub const SOCKET: u32 = 1 << 11;
    /// The vvar pages.
    pub const VVAR: u32 = 1 << 12;
    /// A ring of Linux AIO.
    pub const AIORING: u32 = 1 << 13;
    /// A memfd.
    pub const MEMFD: u32 = 1 << 14;
    /// A shadow stack.
    pub const SHSTK: u32 = 1 << 15;
    /// Not a mapping: a range under MADV_GUARD_INSTALL, listed after the mappings.
    pub const GUARD: u32 = 1 << 16;
    /// The uprobes page of the kernel.
    pub const UPROBES: u32 = 1 << 17;
}

/// Bits of [`PagemapEntry::flags`].
pub mod pagemap {
    /// The pages are in the parent set.
    pub const PARENT: u32 = 1 << 0;
    /// The pages may be filled in later.
    pub const LAZY: u32 = 1 << 1;
    /// The pages are in pages-N.img.
    pub const PRESENT: u32 = 1 << 2;
}
