//! Real control groups, where this machine lets us make them: elsewhere these tests say that they are skipped.

use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;

use super::*;
use crate::sys::process::{Fork, Side};

/// A group with one sleeping process, gone afterwards.
struct Group {
    cgroup: Cgroup,
    child: Child,
}

impl Group {
    fn new(resources: &str) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("/stasis-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let resources: LinuxResources = serde_json::from_str(resources).unwrap();
        let cgroup = match Cgroup::locate(Some(Path::new(&name)), "unused", false)
            .and_then(|located| located.create(&resources, false, false))
        {
            Ok(cgroup) => cgroup,
            Err(e) => {
                eprintln!("skipped: no control groups can be made here: {e}");
                return None;
            }
        };
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let group = Self { cgroup, child };
        group.cgroup.add(group.pid()).unwrap();
        Some(group)
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.cgroup.thaw();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Err(e) = self.cgroup.delete() {
            eprintln!("{e}");
        }
    }
}

#[test]
fn processes_enter_and_the_group_can_be_removed() {
    let Some(group) = Group::new("{}") else { return };
    assert_eq!(group.cgroup.pids().unwrap(), [group.pid()]);
    assert_eq!(Cgroup::load(group.cgroup.paths().clone()), group.cgroup);
    assert!(group.cgroup.exists());
    let cgroup = group.cgroup.clone();
    drop(group);
    assert!(!cgroup.exists());
    assert!(cgroup.paths().values().all(|dir| !dir.exists()));
    cgroup.delete().unwrap();
}

#[test]
fn a_new_process_enters_by_itself() {
    let Some(group) = Group::new("{}") else { return };
    let Some(doors) = group.cgroup.doors() else { return };
    crate::sys::testing::in_child(0, || {
        let inside = |pid: i32| {
            let all = hierarchy::paths_of(&pid.to_string()).unwrap();
            let expected = hierarchy::paths_of(&group.pid().to_string()).unwrap();
            group.cgroup.paths().keys().filter(|c| !c.is_empty()).all(|c| all[c] == expected[c])
        };
        doors.enter().unwrap();
        assert!(inside(std::process::id() as i32));
        if let Some(unified) = doors.unified() {
            // SAFETY: this process has one thread.
            match unsafe { crate::init::setns::fork(Fork { into_cgroup: Some(unified), ..Fork::default() }) }
                .unwrap()
            {
                (Side::Child, _) => loop {
                    nix::unistd::pause();
                },
                (Side::Parent(pid, _), born) => {
                    let own = hierarchy::paths_of(&pid.to_string()).unwrap();
                    let expected = hierarchy::paths_of(&group.pid().to_string()).unwrap();
                    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
                    crate::sys::process::wait_child(pid.as_raw(), true).unwrap();
                    assert_eq!(own[""] == expected[""], born);
                }
            }
        }
    });
}

#[test]
fn processes_of_groups_inside_are_seen_and_killed() {
    let Some(mut group) = Group::new("{}") else { return };
    for dir in group.cgroup.paths().values() {
        std::fs::create_dir(dir.join("sub")).unwrap();
        if let Some(base) = dir.to_str().filter(|d| d.contains("cpuset")) {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let text = std::fs::read(format!("{base}/{file}")).unwrap();
                std::fs::write(format!("{base}/sub/{file}"), text).unwrap();
            }
        }
        std::fs::write(dir.join("sub/cgroup.procs"), group.pid().to_string()).unwrap();
    }
    assert!(group.cgroup.pids().unwrap().is_empty());
    assert_eq!(group.cgroup.all_pids().unwrap(), [group.pid()]);
    group.cgroup.kill(libc::SIGKILL).unwrap();
    assert!(!group.child.wait().unwrap().success());
    group.cgroup.delete().unwrap();
    assert!(!group.cgroup.exists());
}

#[test]
fn frozen_processes_stop_and_can_still_be_killed() {
    let Some(mut group) = Group::new("{}") else { return };
    assert!(!group.cgroup.is_frozen().unwrap());
    group.cgroup.freeze().unwrap();
    assert!(group.cgroup.is_frozen().unwrap());
    group.cgroup.thaw().unwrap();
    assert!(!group.cgroup.is_frozen().unwrap());
    group.cgroup.freeze().unwrap();
    group.cgroup.kill(libc::SIGKILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while group.child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "a frozen process outlived SIGKILL");
        std::thread::yield_now();
    }
}

#[test]
fn processes_of_frozen_groups_inside_are_killed() {
    let Some(mut group) = Group::new("{}") else { return };
    let dir = group.cgroup.paths().get("freezer").or(group.cgroup.paths().get(""));
    let Some(inside) = dir.map(|dir| dir.join("ice")) else { return };
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(inside.join("cgroup.procs"), group.pid().to_string()).unwrap();
    freezer::switch(&inside, true).unwrap();
    group.cgroup.kill(libc::SIGKILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while group.child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "a process of a frozen group inside outlived SIGKILL");
        std::thread::yield_now();
    }
}

#[test]
fn limits_are_written_and_updated() {
    let Some(group) = Group::new("{}") else { return };
    if group.cgroup.is_unified() {
        return;
    }
    let update = |json: &str| group.cgroup.update(&serde_json::from_str(json).unwrap());
    let value =
        |controller: &str, file: &str| file::read_number(&group.cgroup.paths()[controller], file).unwrap();
    update(r#"{"memory":{"limit":104857600},"cpu":{"shares":512,"quota":50000,"period":100000},"pids":{"limit":7}}"#)
        .unwrap();
    assert_eq!(value("memory", "memory.limit_in_bytes"), 104_857_600);
    assert_eq!(value("cpu", "cpu.shares"), 512);
    assert_eq!(value("cpu", "cpu.cfs_quota_us"), 50_000);
    assert_eq!(value("pids", "pids.max"), 7);
    // What is not named stays.
    update(r#"{"memory":{"limit":-1},"pids":{"limit":-1}}"#).unwrap();
    assert_eq!(value("pids", "pids.max"), u64::MAX);
    assert_eq!(value("cpu", "cpu.shares"), 512);
    assert!(
        update(r#"{"cpu":{"shares":1}}"#).unwrap_err().to_string().contains("minimum allowed cpu-shares")
    );
    let e = update(r#"{"unified":{"memory.high":"1"}}"#).unwrap_err().to_string();
    assert!(e.contains("cannot use unified on cgroup v1"), "{e}");
}

#[test]
fn the_device_policy_is_in_force() {
    let Some(group) = Group::new("{}") else { return };
    let linux = r#"{"resources":{"devices":[{"allow":false,"access":"rwm"}]}}"#;
    group.cgroup.apply(&serde_json::from_str(linux).unwrap()).unwrap();
    // Applying the same again changes nothing.
    group.cgroup.apply(&serde_json::from_str(linux).unwrap()).unwrap();
    let procs = group.cgroup.main_dir().unwrap().join("cgroup.procs");
    let script = format!(
        "echo 0 > {} && cat /dev/zero | head -c1 >/dev/null && ! head -c1 /dev/kmsg 2>/dev/null",
        procs.display()
    );
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
}

#[test]
fn statistics_have_every_section() {
    let Some(group) = Group::new("{}") else { return };
    let stats = serde_json::to_value(group.cgroup.stats().unwrap()).unwrap();
    for section in ["cpu", "cpuset", "memory", "pids", "blkio", "hugetlb", "intel_rdt", "network_interfaces"]
    {
        assert!(stats.get(section).is_some(), "{section}");
    }
    assert_eq!(stats["pids"]["current"], 1);
}

#[test]
fn the_systemd_driver_has_the_directories_of_its_unit() {
    let wanted = Some(Path::new("a.slice:p:x"));
    let Ok(cgroup) = Cgroup::locate(wanted, "x", true) else { return };
    assert!(cgroup.main_dir().unwrap().ends_with("a.slice/p-x.scope"), "{cgroup:?}");
    assert_eq!(Cgroup::load(cgroup.paths.clone()).by_systemd(), cgroup);
    assert!(Cgroup::locate(Some(Path::new("/docker/x")), "x", true).is_err());
}

#[test]
fn groups_inside_stay_inside() {
    let paths = [("cpu", "/c/x"), ("pids", "/p/x")].map(|(k, v)| (k.to_owned(), v.into()));
    let cgroup = Cgroup::load(paths.into());
    let inside = |list: &[(&str, &str)]| {
        cgroup.inside(&list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    };
    assert_eq!(inside(&[]).unwrap(), cgroup);
    assert_eq!(inside(&[("", "/")]).unwrap(), cgroup);
    let all = inside(&[("", "/a/b")]).unwrap();
    assert_eq!(all.paths()["cpu"], Path::new("/c/x/a/b"));
    assert_eq!(all.paths()["pids"], Path::new("/p/x/a/b"));
    let one = inside(&[("cpu", "a")]).unwrap();
    assert_eq!((&*one.paths()["cpu"], &*one.paths()["pids"]), (Path::new("/c/x/a"), Path::new("/p/x")));
    for bad in [[("", "../y")], [("cpu", "a/../../y")], [("nope", "a")]] {
        assert!(inside(&bad).is_err(), "{bad:?}");
    }
}
