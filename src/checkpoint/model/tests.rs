//! A model with everything in it, through images and back, and past CRIU's own decoder.

use std::process::Command;

use crate::checkpoint::image::tests::sample;
use crate::checkpoint::image::*;
use crate::checkpoint::model::{IpcNamespace, Model, NetNamespace, TcpStream, reseal};

/// Every image once, each record with every field set.
fn full() -> Model {
    let mut inventory: InventoryEntry = sample();
    inventory.img_version = IMG_VERSION;
    let text = |n: u32| vec![b'x'; n as usize];
    let packet: SkPacketEntry = sample();
    let pipe: PipeDataEntry = sample();
    let stream: TcpStreamEntry = sample();
    let mut shm: IpcShmEntry = sample();
    shm.in_pagemaps = None;
    let message: IpcMsg = sample();
    let msg = (sample::<IpcMsgEntry>(), vec![(message.clone(), text(message.msize))]);
    let mut remap: RemapFilePathEntry = sample();
    remap.remap_type = Some(RemapType::Ghost as i32);
    let mut ghost: GhostFileEntry = sample();
    ghost.chunks = None;
    let mut process: PstreeEntry = sample();
    process.threads = vec![1, 5];
    let extensions = vec![Extension { critical: false, ..sample() }];
    Model {
        inventory,
        pstree: vec![process],
        cores: [(1, sample()), (5, sample())].into(),
        ids: [(1, sample())].into(),
        mm: [(1, sample())].into(),
        fs: [(1, sample())].into(),
        fdinfo: [(1, vec![sample()])].into(),
        files: vec![sample(), sample()],
        pipes_data: vec![(pipe.clone(), text(pipe.bytes))],
        bpf_data: Vec::new(),
        fifo_data: vec![(pipe.clone(), text(pipe.bytes))],
        sk_queues: vec![(packet.clone(), text(packet.length))],
        remaps: vec![remap],
        ghosts: [(1, ghost)].into(),
        memfds: vec![sample()],
        tty_info: vec![sample()],
        tty_data: vec![sample()],
        filelocks: vec![sample()],
        tcp_streams: [(
            1,
            TcpStream { received: text(stream.inq_len), sent: text(stream.outq_len), entry: stream },
        )]
        .into(),
        seccomp: Some(sample()),
        cgroup: Some(sample()),
        cpuinfo: Some(sample()),
        apparmor: Some(sample()),
        mountpoints: [(1, vec![sample()])].into(),
        utsns: [(1, sample())].into(),
        ipcns: [(
            1,
            IpcNamespace {
                var: Some(sample()),
                shm: vec![(shm, text(1))],
                sem: vec![(sample(), vec![7])],
                msg: vec![msg],
            },
        )]
        .into(),
        netns: [(
            1,
            NetNamespace {
                entry: sample(),
                devices: vec![sample()],
                // Of those that say what they are.
                dumps: NetDump::ALL
                    .into_iter()
                    .filter(|dump| *dump != NetDump::Connections)
                    .map(|dump| (dump, Vec::new()))
                    .collect(),
                text: None,
            },
        )]
        .into(),
        userns: [(1, sample())].into(),
        timens: [(0, sample()), (1, sample())].into(),
        pidns: [(1, sample())].into(),
        // The seal is nobody's but the reader's.
        extension: Some(StasisExtension { digests: Vec::new(), extensions, ..sample() }),
    }
}

pub(crate) fn written(model: &Model) -> (tempfile::TempDir, ImageDir) {
    let place = tempfile::tempdir().unwrap();
    let images = ImageDir::create(place.path()).unwrap();
    for (id, entry) in &model.ghosts {
        ghost::write(&images, *id, entry, None).unwrap();
    }
    model.write(&images).unwrap();
    images.publish(false).unwrap();
    let images = ImageDir::open(place.path()).unwrap();
    (place, images)
}

#[test]
fn a_full_model_comes_back() {
    let model = full();
    let (_place, images) = written(&model);
    assert_eq!(Model::read(&images).unwrap(), model);
}

/// CRIU's decoder must read whatever is written. It knows 3.17 or later; what v4 added it skips.
#[test]
fn crit_reads_every_image() {
    if Command::new("crit").arg("--version").output().is_err() {
        eprintln!("SKIPPED: crit is not installed");
        return;
    }
    let (place, images) = written(&full());
    let mut decoded = 0;
    for name in images.names().unwrap() {
        // Ours alone, what iproute2 saves, and what the python definitions of an older crit lack.
        let saved = NetDump::ALL.map(|dump| dump.image(1)).contains(&name);
        if saved || name == "stasis.img" {
            continue;
        }
        let out = Command::new("crit").args(["decode", "-i"]).arg(place.path().join(&name)).output().unwrap();
        let errors = String::from_utf8_lossy(&out.stderr);
        let newer = name.starts_with("pidns") && errors.contains("Unknown magic");
        assert!(out.status.success() || newer, "{name}: {errors}");
        decoded += 1;
    }
    let stats = StatsEntry { dump: Some(sample()), restore: None };
    stats.write(place.path()).unwrap();
    let out =
        Command::new("crit").args(["decode", "-i"]).arg(place.path().join("stats-dump")).output().unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains("\"frozen_time\": 1"), "{out:?}");
    assert!(decoded >= 35, "{decoded}");
}

/// Without a seal, as CRIU writes sets.
#[test]
fn every_cut_image_is_an_error() {
    let (place, images) = written(&Model { extension: None, ..full() });
    for name in images.names().unwrap() {
        let path = place.path().join(&name);
        let whole = std::fs::read(&path).unwrap();
        if whole.len() > 12 {
            std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
            let error = Model::read(&images).expect_err(&name).to_string();
            assert!(error.contains("truncated") && error.contains(&name), "{name}: {error}");
        }
        std::fs::write(&path, &whole[1..]).unwrap();
        assert!(Model::read(&images).is_err(), "{name}");
        std::fs::write(&path, whole).unwrap();
    }
    assert!(Model::read(&images).is_ok());
}

/// An image that ends between two records looks whole.
#[test]
fn a_seal_tells_of_records_that_are_missing() {
    let mut model = full();
    model.pstree = vec![model.pstree[0].clone()];
    let mount = model.mountpoints.values().next().unwrap()[0].clone();
    model.mountpoints.values_mut().for_each(|mounts| mounts.push(mount.clone()));
    let (place, images) = written(&model);
    let name = images.names().unwrap().into_iter().find(|n| n.starts_with("mountpoints-")).unwrap();
    let path = place.path().join(&name);
    let whole = std::fs::read(&path).unwrap();
    let half = whole.len().div_ceil(2) + 4;
    std::fs::write(&path, &whole[..half]).unwrap();
    let cut: Vec<MntEntry> = images.read(Kind::Mnts, &name).unwrap();
    assert_eq!(cut, [mount]);
    let error = Model::read(&images).unwrap_err().to_string();
    assert!(error.contains("truncated") && error.contains(&name), "{error}");
    reseal(&images).unwrap();
    assert_eq!(Model::read(&images).unwrap().extension, model.extension);
    std::fs::write(&path, &whole).unwrap();
    assert!(Model::read(&images).unwrap_err().to_string().contains("has grown"));
    std::fs::remove_file(&path).unwrap();
    assert!(Model::read(&images).unwrap_err().to_string().contains(&name));
}

#[test]
fn a_directory_without_inventory_is_no_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    let error = Model::read(&ImageDir::open(place.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("no complete checkpoint"), "{error}");
}

#[test]
fn another_version_is_refused() {
    let mut model = full();
    model.inventory.img_version = 4;
    let (place, dir) = written(&model);
    std::fs::remove_file(place.path().join(INVENTORY)).unwrap();
    dir.write(Kind::Inventory, INVENTORY, std::slice::from_ref(&model.inventory)).unwrap();
    let error = Model::read(&dir).unwrap_err().to_string();
    assert!(error.contains("version 4"), "{error}");
}

/// The smallest container: one process, one descriptor, one mapping.
pub(crate) fn small() -> Model {
    let mut model = full();
    let tc = model.cores.get_mut(&1).unwrap().tc.as_mut().unwrap();
    tc.signals_s = None;
    for core in model.cores.values_mut() {
        core.thread_core.as_mut().unwrap().signals_p = None;
    }
    let mm = model.mm.get_mut(&1).unwrap();
    mm.vmas = vec![VmaEntry { start: 0x1000, end: 0x3000, status: vma::REGULAR, ..Default::default() }];
    model.pstree[0].ppid = 0;
    model.pstree[0].pid = 1;
    model.files.truncate(1);
    model.fdinfo.insert(1, vec![FdinfoEntry { id: 1, fd: 0, r#type: 1, ..Default::default() }]);
    let filter = SeccompFilter { filter: vec![0; 16], prev: None, flags: None };
    model.seccomp = Some(SeccompEntry {
        seccomp_filters: vec![filter.clone(), SeccompFilter { prev: Some(0), ..filter }],
    });
    let member = CgMemberEntry { name: "cpu".into(), path: "/ab".into(), cgns_prefix: Some(3) };
    model.cgroup.as_mut().unwrap().sets[0].ctls = vec![member];
    model.mountpoints.get_mut(&1).unwrap()[0].mountpoint = "/".into();
    model
}

fn refused(change: impl FnOnce(&mut Model), words: &str) {
    let mut model = small();
    change(&mut model);
    let error = model.validate().expect_err(words).to_string();
    assert!(error.contains(words), "{error}");
}

#[test]
fn a_small_model_is_valid() {
    small().validate().unwrap();
}

#[test]
fn inconsistent_models_are_refused() {
    refused(|m| m.pstree.clear(), "no process");
    refused(|m| m.pstree.push(m.pstree[0].clone()), "process 1 occurs twice");
    refused(|m| m.pstree[0].ppid = 7, "parent 7 of process 1");
    refused(|m| m.pstree[0].pid = 1 << 23, "out of range");
    refused(|m| m.pstree[0].threads.push(1 << 21), "thread 2097152 has no state");
    refused(|m| m.cores.get_mut(&1).unwrap().mtype = 3, "architecture");
    refused(|m| m.cores.get_mut(&1).unwrap().tc.as_mut().unwrap().task_state = 9, "state 9");
    refused(|m| drop(m.mm.remove(&1)), "no memory");
    refused(|m| m.mm.get_mut(&1).unwrap().vmas[0].start = 0x1001, "is no mapping");
    refused(|m| m.mm.get_mut(&1).unwrap().vmas[0].end = 1 << 48, "is no mapping");
    refused(|m| m.mm.values_mut().for_each(|mm| mm.vmas.extend_from_within(..)), "overlap at 0x1000");
    refused(|m| m.mm.get_mut(&1).unwrap().vmas[0].status |= vma::FILE_SHARED, "has no file 0");
    refused(|m| m.mm.get_mut(&1).unwrap().mm_brk = 1 << 50, "not in user memory");
    refused(|m| m.mm.get_mut(&1).unwrap().exe_file_id = 5, "no file 5");
    refused(|m| m.files.push(m.files[0].clone()), "file 1 occurs twice");
    refused(|m| m.files[0].r#type = 2, "descriptor 0 has no such file");
    refused(|m| m.files[0].reg = None, "not what its type 1 says");
    refused(|m| m.fdinfo.get_mut(&1).unwrap()[0].id = 9, "no such file, 9");
    refused(|m| m.fs.get_mut(&1).unwrap().cwd_id = 9, "no directory 9");
    refused(|m| m.seccomp.as_mut().unwrap().seccomp_filters[0].prev = Some(0), "comes after it");
    refused(|m| m.cgroup.as_mut().unwrap().sets[0].ctls[0].path = "/a/../../b".into(), "no path");
    refused(|m| m.mountpoints.get_mut(&1).unwrap()[0].mountpoint = "/../etc".into(), "no place");
    refused(|m| m.utsns.get_mut(&1).unwrap().nodename = "x".repeat(65), "longer than 64");
    refused(|m| m.ipcns.get_mut(&1).unwrap().shm[0].0.size = 1 << 60, "a segment has");
}
