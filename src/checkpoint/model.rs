//! The plain model of a checkpointed container, between live tasks and images.
//!
//! ```text
//!   live tasks ──dump──▶ Model ──write──▶ images ──read──▶ Model ──validate──▶ restore ──▶ live tasks
//! ```
//!
//! It is ordinary data: no descriptors, no pids of this host. What may be larger than memory (pages, ghost files,
//! tmpfs contents) is in files of its own, which the rooms that know them write and read through [`ImageDir`].

mod criu;
mod extension;
mod owners;
mod read;
mod seal;
#[cfg(test)]
pub(crate) mod tests;
mod validate;
mod write;

pub use seal::reseal;

use std::collections::BTreeMap;

use crate::checkpoint::arch::compat;
use crate::checkpoint::image::*;

/// Everything that the images hold, apart from bulk data.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Model {
    /// inventory.img.
    pub inventory: InventoryEntry,
    /// pstree.img: processes, parents before children.
    pub pstree: Vec<PstreeEntry>,
    /// core-N.img by thread id inside the container: process leaders and threads.
    pub cores: BTreeMap<u32, CoreEntry>,
    /// ids-N.img by process id.
    pub ids: BTreeMap<u32, TaskKobjIdsEntry>,
    /// mm-N.img by process id.
    pub mm: BTreeMap<u32, MmEntry>,
    /// fs-N.img by process id.
    pub fs: BTreeMap<u32, FsEntry>,
    /// fdinfo-N.img by id of the descriptor table.
    pub fdinfo: BTreeMap<u32, Vec<FdinfoEntry>>,
    /// files.img.
    pub files: Vec<FileEntry>,
    /// pipes-data.img.
    pub pipes_data: Vec<(PipeDataEntry, Vec<u8>)>,
    /// fifo-data.img.
    pub fifo_data: Vec<(PipeDataEntry, Vec<u8>)>,
    /// sk-queues.img.
    pub sk_queues: Vec<(SkPacketEntry, Vec<u8>)>,
    /// tcp-stream-N.img by `ino` of the socket.
    pub tcp_streams: BTreeMap<u32, TcpStream>,
    /// bpfmap-data.img.
    pub bpf_data: Vec<(BpfmapDataEntry, Vec<u8>)>,
    /// remap-fpath.img.
    pub remaps: Vec<RemapFilePathEntry>,
    /// ghost-file-N.img: the records; what the files held is moved by [`ghost::write`] and [`ghost::restore`].
    /// A dump writes these images itself, [`Model::write`] does not.
    pub ghosts: BTreeMap<u32, GhostFileEntry>,
    /// memfd.img.
    pub memfds: Vec<MemfdInodeEntry>,
    /// tty-info.img.
    pub tty_info: Vec<TtyInfoEntry>,
    /// tty-data.img.
    pub tty_data: Vec<TtyDataEntry>,
    /// filelocks.img.
    pub filelocks: Vec<FileLockEntry>,
    /// seccomp.img.
    pub seccomp: Option<SeccompEntry>,
    /// cgroup.img.
    pub cgroup: Option<CgroupEntry>,
    /// cpuinfo.img.
    pub cpuinfo: Option<CpuinfoEntry>,
    /// apparmor.img.
    pub apparmor: Option<ApparmorEntry>,
    /// mountpoints-N.img by id of the mount namespace.
    pub mountpoints: BTreeMap<u32, Vec<MntEntry>>,
    /// utsns-N.img.
    pub utsns: BTreeMap<u32, UtsnsEntry>,
    /// ipcns-*-N.img.
    pub ipcns: BTreeMap<u32, IpcNamespace>,
    /// netns-N.img, netdev-N.img, and what `ip addr save` and the like would write.
    pub netns: BTreeMap<u32, NetNamespace>,
    /// userns-N.img.
    pub userns: BTreeMap<u32, UsernsEntry>,
    /// timens-N.img: the clocks of a time namespace; 0 stands for the container where it has none of its own.
    pub timens: BTreeMap<u32, TimensEntry>,
    /// pidns-N.img.
    pub pidns: BTreeMap<u32, PidnsEntry>,
    /// stasis.img; absent in sets that CRIU wrote.
    pub extension: Option<StasisExtension>,
}

impl Model {
    /// Whether a process runs a 32-bit program.
    pub fn is_compat(&self, pid: u32) -> bool {
        let info = self.cores.get(&pid).and_then(|core| core.thread_info.as_ref());
        info.is_some_and(compat::is_compat)
    }
}

/// One IPC namespace.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct IpcNamespace {
    /// Its limits.
    pub var: Option<IpcVarEntry>,
    /// Shared memory segments, with their bytes where they are not in pagemaps.
    pub shm: Vec<(IpcShmEntry, Vec<u8>)>,
    /// Semaphore sets and their values.
    pub sem: Vec<(IpcSemEntry, Vec<u16>)>,
    /// Message queues and their messages.
    pub msg: Vec<(IpcMsgEntry, Messages)>,
}

/// Messages of a queue, oldest first.
pub type Messages = Vec<(IpcMsg, Vec<u8>)>;

/// One network namespace.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct NetNamespace {
    /// Its sysctls, or where it comes from.
    pub entry: NetnsEntry,
    /// Its devices.
    pub devices: Vec<NetDeviceEntry>,
    /// The messages in ifaddr-N.img, route-N.img, route6-N.img, rule-N.img.
    pub dumps: BTreeMap<NetDump, Vec<u8>>,
    /// An image of CRIU's that has packet filters in the language of `nft` or `iptables`.
    pub text: Option<String>,
}

impl NetNamespace {
    /// Whether what is in it was kept.
    pub fn is_kept(&self) -> bool {
        !self.dumps.is_empty()
    }
}

/// An established TCP connection.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct TcpStream {
    /// Its state.
    pub entry: TcpStreamEntry,
    /// Received and not yet read.
    pub received: Vec<u8>,
    /// Sent and not yet acknowledged, then not yet sent.
    pub sent: Vec<u8>,
}
