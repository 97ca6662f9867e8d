//! Kinds of image files, told apart by the magic words they begin with.
//!
//! ```text
//!   inventory.img    │ INVENTORY │ records...
//!   other images     │ COMMON    │ its kind  │ records...
//!   stats, caches    │ SERVICE   │ its kind  │ records...
//!   pages, tarballs  │ raw bytes
//! ```

use std::fmt;

/// First word of most images.
pub const COMMON: u32 = 0x5456_4319;
/// First word of images that only tools read.
pub const SERVICE: u32 = 0x5510_5940;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $magic:literal $title:literal),* $(,)?) => {
        /// What an image file holds.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Kind { $($(#[$doc])* $name),* }

        impl Kind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The word that marks it.
            pub const fn magic(self) -> u32 {
                match self { $(Self::$name => $magic),* }
            }

            /// Its name in CRIU's tools.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title),* }
            }
        }
    };
}

kinds! {
    /// AppArmor policies.
    Apparmor = 0x5942_3047 "APPARMOR",
    /// An automounter.
    Autofs = 0x4935_3943 "AUTOFS",
    /// Registered binary formats.
    BinfmtMisc = 0x6734_3323 "BINFMT_MISC",
    /// Contents of BPF maps.
    BpfmapData = 0x6432_4033 "BPFMAP_DATA",
    /// BPF maps.
    BpfmapFile = 0x5750_6142 "BPFMAP_FILE",
    /// Control groups.
    Cgroup = 0x5938_3330 "CGROUP",
    /// A thread.
    Core = 0x5505_3847 "CORE",
    /// The processor.
    Cpuinfo = 0x6140_4013 "CPUINFO",
    /// A table of descriptors.
    Fdinfo = 0x5621_3732 "FDINFO",
    /// Content of fifos.
    FifoData = 0x5933_3054 "FIFO_DATA",
    /// File locks.
    FileLocks = 0x5432_3616 "FILE_LOCKS",
    /// Open files of all kinds.
    Files = 0x5630_3138 "FILES",
    /// Working directory and root.
    Fs = 0x5140_3912 "FS",
    /// A removed file.
    GhostFile = 0x5258_3605 "GHOST_FILE",
    /// Ids of what processes share.
    Ids = 0x5443_2030 "IDS",
    /// The set as a whole.
    Inventory = 0x5831_3116 "INVENTORY",
    /// Limits of System V IPC.
    IpcVar = 0x5311_5007 "IPC_VAR",
    /// Message queues.
    IpcnsMsg = 0x5545_3737 "IPCNS_MSG",
    /// Semaphores.
    IpcnsSem = 0x5957_3019 "IPCNS_SEM",
    /// Shared memory segments.
    IpcnsShm = 0x4628_3044 "IPCNS_SHM",
    /// Inodes of watches.
    IrmapCache = 0x5700_4059 "IRMAP_CACHE",
    /// Memfds.
    MemfdInode = 0x4845_3499 "MEMFD_INODE",
    /// An address space.
    Mm = 0x5749_2820 "MM",
    /// A mount table.
    Mnts = 0x5556_3928 "MNTS",
    /// A network device.
    Netdev = 0x5737_3951 "NETDEV",
    /// A network namespace.
    Netns = 0x5593_3752 "NETNS",
    /// A map of pages, of a process or of shared memory.
    Pagemap = 0x5608_4025 "PAGEMAP",
    /// A pid namespace.
    Pidns = 0x6115_7326 "PIDNS",
    /// Content of pipes.
    PipesData = 0x5645_3709 "PIPES_DATA",
    /// The process tree.
    Pstree = 0x5027_3030 "PSTREE",
    /// Where removed files are.
    RemapFpath = 0x5913_3954 "REMAP_FPATH",
    /// Seccomp filters.
    Seccomp = 0x6441_3049 "SECCOMP",
    /// Content of unix sockets.
    SkQueues = 0x5626_4026 "SK_QUEUES",
    /// Stasis's own image, which CRIU does not open.
    Stasis = 0x5374_6173 "STASIS",
    /// Figures of an operation.
    Stats = 0x5709_3306 "STATS",
    /// An established connection.
    TcpStream = 0x5146_5506 "TCP_STREAM",
    /// Clocks.
    Timens = 0x4311_4433 "TIMENS",
    /// Input of terminals.
    TtyData = 0x5941_3026 "TTY_DATA",
    /// Terminals.
    TtyInfo = 0x5945_3036 "TTY_INFO",
    /// A user namespace.
    Userns = 0x5547_4906 "USERNS",
    /// A uts namespace.
    Utsns = 0x5447_3203 "UTSNS",
}

impl Kind {
    /// The words that an image of this kind begins with.
    pub fn header(self) -> Vec<u8> {
        let first = match self {
            Self::Inventory => None,
            Self::Stats | Self::IrmapCache => Some(SERVICE),
            _ => Some(COMMON),
        };
        first.into_iter().chain([self.magic()]).flat_map(u32::to_le_bytes).collect()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}
