//! Images become a model. Which images there are follows from inventory.img and pstree.img, never from a listing:
//! a stray file in the directory is nobody's business.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::*;
use crate::checkpoint::model::{IpcNamespace, Model, NetNamespace, TcpStream, seal};
use crate::checkpoint::namespaces::nested::{EXTENSION, Space};
use crate::checkpoint::namespaces::net;
use crate::checkpoint::task::process::DEAD;

/// Most processes and threads of a set: the kernel's own limit.
const TASKS_MAX: usize = 1 << 22;

impl Model {
    /// Reads every image but bulk data. The result is well-formed, not yet consistent: see [`Model::validate`].
    pub fn read(dir: &ImageDir) -> Result<Self> {
        if !dir.exists(INVENTORY) {
            return Err(Error::new("there is no complete checkpoint in the directory")
                .path(dir.path().join(INVENTORY))
                .remedy("give the directory that `checkpoint --image-path` was given"));
        }
        let inventory: InventoryEntry = dir.read_one(Kind::Inventory, INVENTORY)?;
        if inventory.pre_dump_mode.is_some() && !dir.exists("pstree.img") {
            return Err(Error::new("the images are those of a pre-dump: memory alone")
                .path(dir.path())
                .remedy("restore the dump that was made with --parent-path after it"));
        }
        let mut model = Self { inventory, ..Self::default() };
        model.check_version(dir)?;
        model.extension = one(dir, Kind::Stasis, seal::SEAL)?;
        if let Some(extension) = &mut model.extension {
            seal::check(dir, &std::mem::take(&mut extension.digests))?;
        }
        if let Some(name) = model.unknown_extension() {
            return Err(Error::new(format!("the images hold what this version does not know: {name}"))
                .path(dir.path())
                .remedy("restore them with the version that wrote them"));
        }
        model.inventory.img_version = IMG_VERSION;
        model.pstree = dir.read(Kind::Pstree, "pstree.img")?;
        model.read_tasks(dir)?;
        model.read_files(dir)?;
        model.read_namespaces(dir)?;
        model.cpuinfo = one(dir, Kind::Cpuinfo, "cpuinfo.img")?;
        model.cgroup = one(dir, Kind::Cgroup, "cgroup.img")?;
        model.seccomp = one(dir, Kind::Seccomp, "seccomp.img")?;
        model.apparmor = one(dir, Kind::Apparmor, "apparmor.img")?;
        if model.extension.is_none() {
            model.adopt();
        }
        Ok(model)
    }

    fn check_version(&self, dir: &ImageDir) -> Result<()> {
        match self.inventory.img_version {
            IMG_VERSION | IMG_VERSION_CRITICAL => Ok(()),
            other => Err(Error::new(format!(
                "the images are of version {other}, this is for version {IMG_VERSION}"
            ))
            .path(dir.path().join(INVENTORY))
            .remedy("restore them with the version that wrote them")),
        }
    }

    fn read_tasks(&mut self, dir: &ImageDir) -> Result<()> {
        let threads = self.pstree.iter().map(|p| p.threads.len().max(1)).sum::<usize>();
        if threads > TASKS_MAX {
            return Err(Error::new(format!("the images have {threads} threads")).path(dir.path()));
        }
        for process in &mut self.pstree {
            let pid = process.pid;
            let core = |id| dir.read_one::<CoreEntry>(Kind::Core, &format!("core-{id}.img"));
            let leader = core(pid)?;
            if leader.tc.as_ref().is_some_and(|tc| tc.task_state == DEAD) {
                // CRIU leaves the thread of a zombie without a number.
                process.threads = vec![pid];
            }
            self.cores.insert(pid, leader);
            for &id in &process.threads {
                if let Entry::Vacant(place) = self.cores.entry(id) {
                    place.insert(core(id)?);
                }
            }
            insert(&mut self.ids, pid, one(dir, Kind::Ids, &format!("ids-{pid}.img"))?);
            insert(&mut self.mm, pid, one(dir, Kind::Mm, &format!("mm-{pid}.img"))?);
            insert(&mut self.fs, pid, one(dir, Kind::Fs, &format!("fs-{pid}.img"))?);
            let inline = self.cores.get(&pid).and_then(|core| core.ids.clone());
            if let (Some(ids), None) = (inline, self.ids.get(&pid)) {
                self.ids.insert(pid, ids);
            }
        }
        for id in self.distinct(|ids| Some(ids.files_id)) {
            if let Some(table) = many(dir, Kind::Fdinfo, &format!("fdinfo-{id}.img"))? {
                self.fdinfo.insert(id, table);
            }
        }
        Ok(())
    }

    fn read_files(&mut self, dir: &ImageDir) -> Result<()> {
        self.files = many(dir, Kind::Files, "files.img")?.unwrap_or_default();
        self.pipes_data = with_payload(dir, Kind::PipesData, "pipes-data.img")?;
        self.fifo_data = with_payload(dir, Kind::FifoData, "fifo-data.img")?;
        self.sk_queues = with_payload(dir, Kind::SkQueues, "sk-queues.img")?;
        self.bpf_data = with_payload(dir, Kind::BpfmapData, "bpfmap-data.img")?;
        self.remaps = many(dir, Kind::RemapFpath, "remap-fpath.img")?.unwrap_or_default();
        for remap in self.remaps.iter().filter(|r| r.remap_type() == RemapType::Ghost) {
            // The top bit marked ghosts before there was a type.
            let id = remap.remap_id & !(1 << 31);
            self.ghosts.insert(id, ghost::read(dir, id)?);
        }
        self.memfds = many(dir, Kind::MemfdInode, "memfd.img")?.unwrap_or_default();
        self.tty_info = many(dir, Kind::TtyInfo, "tty-info.img")?.unwrap_or_default();
        self.tty_data = many(dir, Kind::TtyData, "tty-data.img")?.unwrap_or_default();
        self.filelocks = many(dir, Kind::FileLocks, "filelocks.img")?.unwrap_or_default();
        for socket in self.files.iter().filter_map(|file| file.isk.as_ref()) {
            let name = format!("tcp-stream-{:x}.img", socket.ino);
            if dir.exists(&name) {
                let mut reader = dir.reader(Kind::TcpStream, &name)?;
                let entry: TcpStreamEntry = reader.record()?.unwrap_or_default();
                let received = reader.raw(u64::from(entry.inq_len))?;
                let sent = reader.raw(u64::from(entry.outq_len))?;
                self.tcp_streams.insert(socket.ino, TcpStream { entry, received, sent });
            }
        }
        Ok(())
    }

    fn read_namespaces(&mut self, dir: &ImageDir) -> Result<()> {
        for id in self.distinct(|ids| ids.mnt_ns_id) {
            insert(&mut self.mountpoints, id, many(dir, Kind::Mnts, &format!("mountpoints-{id}.img"))?);
        }
        for id in self.distinct(|ids| ids.uts_ns_id) {
            insert(&mut self.utsns, id, one(dir, Kind::Utsns, &format!("utsns-{id}.img"))?);
        }
        for id in self.distinct(|ids| ids.ipc_ns_id) {
            let var = format!("ipcns-var-{id}.img");
            if dir.exists(&var) {
                let ipc = IpcNamespace {
                    var: dir.read(Kind::IpcVar, &var)?.into_iter().next(),
                    shm: with_payload(dir, Kind::IpcnsShm, &format!("ipcns-shm-{id}.img"))?,
                    sem: with_payload(dir, Kind::IpcnsSem, &format!("ipcns-sem-{id}.img"))?,
                    msg: with_payload(dir, Kind::IpcnsMsg, &format!("ipcns-msg-{id}.img"))?,
                };
                self.ipcns.insert(id, ipc);
            }
        }
        for id in self.distinct(|ids| ids.net_ns_id) {
            if let Some(entry) = one(dir, Kind::Netns, &format!("netns-{id}.img"))? {
                let devices = many(dir, Kind::Netdev, &format!("netdev-{id}.img"))?.unwrap_or_default();
                let texts = ["nftables", "iptables", "ip6tables"].map(|name| format!("{name}-{id}.img"));
                let filters = |name: &String| {
                    raw(dir, name).map_or(true, |text| !net::is_lock(&String::from_utf8_lossy(&text)))
                };
                let text = texts.into_iter().find(filters);
                let mut dumps = BTreeMap::new();
                for dump in NetDump::ALL {
                    let name = dump.image(id);
                    let bytes = raw(dir, &name)?;
                    // CRIU leaves an empty one where `ip` cannot save.
                    if !bytes.is_empty() {
                        let messages = bytes.strip_prefix(&dump.magic()[..]).ok_or_else(|| {
                            Error::new("the image is not what `ip` saves").path(dir.path().join(&name))
                        })?;
                        dumps.insert(dump, messages.to_vec());
                    }
                }
                self.netns.insert(id, NetNamespace { entry, devices, dumps, text });
            }
        }
        for id in self.distinct(|ids| ids.user_ns_id) {
            insert(&mut self.userns, id, one(dir, Kind::Userns, &format!("userns-{id}.img"))?);
        }
        for id in self.distinct(|ids| ids.time_ns_id).into_iter().chain([0]) {
            insert(&mut self.timens, id, one(dir, Kind::Timens, &format!("timens-{id}.img"))?);
        }
        for id in self.distinct(|ids| ids.pid_ns_id) {
            insert(&mut self.pidns, id, one(dir, Kind::Pidns, &format!("pidns-{id}.img"))?);
        }
        Ok(())
    }

    /// The ids that processes have in one field.
    fn distinct(&self, field: impl Fn(&TaskKobjIdsEntry) -> Option<u32>) -> BTreeSet<u32> {
        let held = self.extension::<Vec<Space>>(EXTENSION).unwrap_or_default();
        let held = held.into_iter().map(|space| space.record()).collect::<Vec<_>>();
        self.ids.values().chain(&self.inventory.root_ids).chain(&held).filter_map(field).collect()
    }
}

fn insert<T>(map: &mut BTreeMap<u32, T>, id: u32, value: Option<T>) {
    if let Some(value) = value {
        map.insert(id, value);
    }
}

/// An image without records, which need not be there.
fn raw(dir: &ImageDir, name: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if dir.exists(name) {
        let read = dir.raw_open(name)?.take(RECORD_MAX as u64 + 1).read_to_end(&mut bytes);
        read.during("cannot read the image", || format!("read({name:?})"))?;
        if bytes.len() > RECORD_MAX {
            return Err(Error::new("the image is too long").path(dir.path().join(name)));
        }
    }
    Ok(bytes)
}

/// An image of one record, which need not be there.
fn one<T: Record>(dir: &ImageDir, kind: Kind, name: &str) -> Result<Option<T>> {
    dir.exists(name).then(|| dir.read_one(kind, name)).transpose()
}

/// An image of records, which need not be there.
fn many<T: Record>(dir: &ImageDir, kind: Kind, name: &str) -> Result<Option<Vec<T>>> {
    dir.exists(name).then(|| dir.read(kind, name)).transpose()
}

/// An image of records with payload, which need not be there.
fn with_payload<T: payload::Payload>(dir: &ImageDir, kind: Kind, name: &str) -> Result<Vec<(T, T::Data)>> {
    if dir.exists(name) { payload::read(dir, kind, name) } else { Ok(Vec::new()) }
}
