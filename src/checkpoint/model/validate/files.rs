//! Descriptors, open files and what they hold.

use std::collections::{BTreeMap, BTreeSet};

use crate::checkpoint::error::Result;
use crate::checkpoint::image::{FdTypes, FileEntry};
use crate::checkpoint::model::Model;
use crate::checkpoint::model::validate::{require, tasks, unique};

/// The kernel's ceiling of descriptor numbers (sysctl_nr_open_max).
const FD_MAX: u32 = 0x7fff_ffc0;

pub(super) fn check(model: &Model) -> Result<()> {
    let of = |kind| model.files.iter().filter(move |f| f.r#type() == kind);
    // A tun descriptor has the number of its path.
    let tuns: BTreeSet<u32> = of(FdTypes::Tunf).map(|f| f.id).collect();
    let others = || model.files.iter().filter(|f| f.r#type() != FdTypes::Reg || !tuns.contains(&f.id));
    unique(others().map(|f| f.id), "files.img", "file")?;
    let types: BTreeMap<u32, i32> = others().map(|f| (f.id, f.r#type)).collect();
    for file in &model.files {
        check_file(file)?;
    }
    check_tables(model, &types)?;
    check_contents(model, &types)
}

/// The part that the type names is there and agrees on the id.
fn check_file(file: &FileEntry) -> Result<()> {
    let part = match file.r#type() {
        FdTypes::Reg => file.reg.as_ref().map(|e| e.id),
        FdTypes::Pipe => file.pipe.as_ref().map(|e| e.id),
        FdTypes::Fifo => file.fifo.as_ref().map(|e| e.id),
        FdTypes::Inetsk => file.isk.as_ref().map(|e| e.id),
        FdTypes::Unixsk => file.usk.as_ref().map(|e| e.id),
        FdTypes::Eventfd => file.efd.as_ref().map(|e| e.id),
        FdTypes::Eventpoll => file.epfd.as_ref().map(|e| e.id),
        FdTypes::Inotify => file.ify.as_ref().map(|e| e.id),
        FdTypes::Signalfd => file.sgfd.as_ref().map(|e| e.id),
        FdTypes::Packetsk => file.psk.as_ref().map(|e| e.id),
        FdTypes::Tty => file.tty.as_ref().map(|e| e.id),
        FdTypes::Fanotify => file.ffy.as_ref().map(|e| e.id),
        FdTypes::Netlinksk => file.nlsk.as_ref().map(|e| e.id),
        FdTypes::Ns => file.nsf.as_ref().map(|e| e.id),
        FdTypes::Tunf => file.tunf.as_ref().map(|e| e.id),
        FdTypes::Ext => file.ext.as_ref().map(|e| e.id),
        FdTypes::Timerfd => file.tfd.as_ref().map(|e| e.id),
        FdTypes::Memfd => file.memfd.as_ref().map(|e| e.id),
        FdTypes::Bpfmap => file.bpf.as_ref().map(|e| e.id),
        FdTypes::Pidfd => file.pidfd.as_ref().map(|e| e.id),
        FdTypes::Und | FdTypes::CtlTty | FdTypes::AutofsPipe => None,
    };
    require(part == Some(file.id), "files.img", || {
        format!("file {} is not what its type {} says", file.id, file.r#type)
    })?;
    let device = file.tunf.as_ref().and_then(|tun| tun.netdev.as_deref());
    require(device.is_none_or(crate::container::net_devices::is_valid), "files.img", || {
        format!("the network device of file {} has no name of one", file.id)
    })?;
    let name = file.reg.as_ref().map_or(&[][..], |reg| &reg.name);
    require(!name.contains(&0), "files.img", || format!("the path of file {} has a zero byte", file.id))
}

fn check_tables(model: &Model, types: &BTreeMap<u32, i32>) -> Result<()> {
    for (pid, ids) in &model.ids {
        let dead = model.cores.get(pid).and_then(|c| c.tc.as_ref()).is_none_or(|tc| !tasks::alive(tc));
        let image = format!("fdinfo-{}.img", ids.files_id);
        let found = dead || model.fdinfo.contains_key(&ids.files_id);
        require(found, &image, || format!("process {pid} has no descriptors"))?;
    }
    for (id, table) in &model.fdinfo {
        let image = format!("fdinfo-{id}.img");
        unique(table.iter().map(|d| d.fd), &image, "descriptor")?;
        for descriptor in table {
            let fd = descriptor.fd;
            require(fd < FD_MAX, &image, || format!("there is no descriptor {fd}"))?;
            let matches = types.get(&descriptor.id) == Some(&descriptor.r#type);
            require(matches, &image, || format!("descriptor {fd} has no such file, {}", descriptor.id))?;
        }
    }
    for (pid, fs) in &model.fs {
        for id in [fs.cwd_id, fs.root_id] {
            let directory = types.get(&id) == Some(&(FdTypes::Reg as i32));
            require(directory, &format!("fs-{pid}.img"), || format!("there is no directory {id}"))?;
        }
    }
    Ok(())
}

fn check_contents(model: &Model, types: &BTreeMap<u32, i32>) -> Result<()> {
    unique(model.pipes_data.iter().map(|(e, _)| e.pipe_id), "pipes-data.img", "pipe")?;
    unique(model.fifo_data.iter().map(|(e, _)| e.pipe_id), "fifo-data.img", "fifo")?;
    unique(model.bpf_data.iter().map(|(e, _)| e.map_id), "bpfmap-data.img", "map")?;
    let rights = model.sk_queues.iter().flat_map(|(e, _)| &e.scm).flat_map(|scm| &scm.rights);
    for id in rights {
        require(types.contains_key(id), "sk-queues.img", || format!("a packet carries no such file, {id}"))?;
    }
    unique(model.remaps.iter().map(|r| r.orig_id), "remap-fpath.img", "file")?;
    let terminals = unique(model.tty_info.iter().map(|t| t.id), "tty-info.img", "terminal")?;
    let memfds: BTreeSet<u64> = model.memfds.iter().map(|m| m.inode_id).collect();
    for file in &model.files {
        if let Some(tty) = &file.tty {
            let id = tty.tty_info_id;
            require(terminals.contains(&id), "tty-info.img", || format!("there is no terminal {id}"))?;
        }
        if let Some(memfd) = &file.memfd {
            let id = u64::from(memfd.inode_id);
            require(memfds.contains(&id), "memfd.img", || format!("there is no memfd {id}"))?;
        }
    }
    for memfd in &model.memfds {
        require(i64::try_from(memfd.size).is_ok(), "memfd.img", || {
            format!("a memfd has {} bytes", memfd.size)
        })?;
    }
    for input in &model.tty_data {
        let id = input.tty_id;
        require(terminals.contains(&id), "tty-data.img", || format!("there is no terminal {id}"))?;
    }
    Ok(())
}
