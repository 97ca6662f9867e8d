//! The model becomes images.

use std::collections::BTreeMap;
use std::io::Write;

use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::*;
use crate::checkpoint::model::{Model, TcpStream, seal};
use crate::checkpoint::pieces;

/// Does `write` with all of them, on two threads where there are many.
fn each<T: Sync>(all: &BTreeMap<u32, T>, write: impl Fn(u32, &T) -> Result<()> + Sync) -> Result<()> {
    let all: Vec<(u32, &T)> = all.iter().map(|(id, one)| (*id, one)).collect();
    pieces::all(&all, |(id, one)| write(*id, one))?.into_iter().collect()
}

impl Model {
    /// Writes every image of the model, inventory.img last. CRIU expects some of them even when they are empty.
    /// Bulk data has to be there before: the set is sealed here.
    pub fn write(&self, dir: &ImageDir) -> Result<()> {
        dir.write(Kind::Pstree, "pstree.img", &self.pstree)?;
        self.write_tasks(dir)?;
        self.write_files(dir)?;
        self.write_namespaces(dir)?;
        if let Some(cpuinfo) = &self.cpuinfo {
            dir.write(Kind::Cpuinfo, "cpuinfo.img", std::slice::from_ref(cpuinfo))?;
        }
        if let Some(cgroup) = &self.cgroup {
            dir.write(Kind::Cgroup, "cgroup.img", std::slice::from_ref(cgroup))?;
        }
        if let Some(seccomp) = &self.seccomp {
            dir.write(Kind::Seccomp, "seccomp.img", std::slice::from_ref(seccomp))?;
        }
        if let Some(apparmor) = &self.apparmor {
            dir.write(Kind::Apparmor, "apparmor.img", std::slice::from_ref(apparmor))?;
        }
        if let Some(extension) = &self.extension {
            let extension = StasisExtension { digests: seal::lengths(dir)?, ..extension.clone() };
            dir.write(Kind::Stasis, seal::SEAL, std::slice::from_ref(&extension))?;
        }
        let inventory = InventoryEntry { img_version: self.version(), ..self.inventory.clone() };
        dir.write(Kind::Inventory, INVENTORY, std::slice::from_ref(&inventory))
    }

    fn write_tasks(&self, dir: &ImageDir) -> Result<()> {
        each(&self.cores, |id, core| {
            dir.write(Kind::Core, &format!("core-{id}.img"), std::slice::from_ref(core))
        })?;
        each(&self.ids, |pid, ids| {
            dir.write(Kind::Ids, &format!("ids-{pid}.img"), std::slice::from_ref(ids))
        })?;
        each(&self.mm, |pid, mm| dir.write(Kind::Mm, &format!("mm-{pid}.img"), std::slice::from_ref(mm)))?;
        each(&self.fs, |pid, fs| dir.write(Kind::Fs, &format!("fs-{pid}.img"), std::slice::from_ref(fs)))?;
        each(&self.fdinfo, |id, descriptors| {
            dir.write(Kind::Fdinfo, &format!("fdinfo-{id}.img"), descriptors)
        })
    }

    fn write_files(&self, dir: &ImageDir) -> Result<()> {
        dir.write(Kind::Files, "files.img", &self.files)?;
        payload::write(dir, Kind::PipesData, "pipes-data.img", &self.pipes_data)?;
        payload::write(dir, Kind::FifoData, "fifo-data.img", &self.fifo_data)?;
        payload::write(dir, Kind::SkQueues, "sk-queues.img", &self.sk_queues)?;
        if !self.bpf_data.is_empty() {
            payload::write(dir, Kind::BpfmapData, "bpfmap-data.img", &self.bpf_data)?;
        }
        dir.write(Kind::RemapFpath, "remap-fpath.img", &self.remaps)?;
        dir.write(Kind::TtyInfo, "tty-info.img", &self.tty_info)?;
        dir.write(Kind::TtyData, "tty-data.img", &self.tty_data)?;
        if !self.memfds.is_empty() {
            dir.write(Kind::MemfdInode, "memfd.img", &self.memfds)?;
        }
        if !self.filelocks.is_empty() {
            dir.write(Kind::FileLocks, "filelocks.img", &self.filelocks)?;
        }
        for (ino, TcpStream { entry, received, sent }) in &self.tcp_streams {
            let mut writer = dir.writer(Kind::TcpStream, &format!("tcp-stream-{ino:x}.img"))?;
            writer.record(entry)?;
            writer.raw(received)?;
            writer.raw(sent)?;
            writer.finish()?;
        }
        Ok(())
    }

    fn write_namespaces(&self, dir: &ImageDir) -> Result<()> {
        for (id, mounts) in &self.mountpoints {
            dir.write(Kind::Mnts, &format!("mountpoints-{id}.img"), mounts)?;
        }
        for (id, uts) in &self.utsns {
            dir.write(Kind::Utsns, &format!("utsns-{id}.img"), std::slice::from_ref(uts))?;
        }
        for (id, ipc) in &self.ipcns {
            dir.write(Kind::IpcVar, &format!("ipcns-var-{id}.img"), ipc.var.as_slice())?;
            payload::write(dir, Kind::IpcnsShm, &format!("ipcns-shm-{id}.img"), &ipc.shm)?;
            payload::write(dir, Kind::IpcnsMsg, &format!("ipcns-msg-{id}.img"), &ipc.msg)?;
            payload::write(dir, Kind::IpcnsSem, &format!("ipcns-sem-{id}.img"), &ipc.sem)?;
        }
        for (id, net) in &self.netns {
            dir.write(Kind::Netns, &format!("netns-{id}.img"), std::slice::from_ref(&net.entry))?;
            dir.write(Kind::Netdev, &format!("netdev-{id}.img"), &net.devices)?;
            for (dump, bytes) in &net.dumps {
                let name = dump.image(*id);
                dir.raw_create(&name)?
                    .write_all(&[&dump.magic(), &bytes[..]].concat())
                    .during("cannot write the image", || format!("write({name:?}, _, {})", bytes.len()))?;
            }
        }
        for (id, user) in &self.userns {
            dir.write(Kind::Userns, &format!("userns-{id}.img"), std::slice::from_ref(user))?;
        }
        for (id, clocks) in &self.timens {
            dir.write(Kind::Timens, &format!("timens-{id}.img"), std::slice::from_ref(clocks))?;
        }
        for (id, pid) in &self.pidns {
            dir.write(Kind::Pidns, &format!("pidns-{id}.img"), std::slice::from_ref(pid))?;
        }
        Ok(())
    }
}
