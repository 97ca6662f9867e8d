//! The leaves together: whole root file systems in private mount namespaces, hostile ones among them.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use super::mounts::{Mount, Mounter};
use super::rootfs::{Setup, finish, pivot, prepare};
use super::{devices, masked};
use crate::sys::Result;
use crate::sys::procfs::Procfs;
use crate::sys::testing::in_child;

/// An empty root file system, and a file that it must not reach.
struct Fixture {
    dir: tempfile::TempDir,
    rootfs: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = fs::canonicalize(dir.path()).unwrap().join("rootfs");
        fs::create_dir(&rootfs).unwrap();
        fs::write(dir.path().join("secret"), b"host").unwrap();
        Self { dir, rootfs }
    }

    fn spec(&self, mounts: &str, rest: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},"mounts":{mounts},
                "process":{{"user":{{"uid":0,"gid":0}},"cwd":"/","args":["x"]}},
                "linux":{{"namespaces":[{{"type":"mount"}}]{rest}}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    fn setup<'a>(&'a self, spec: &'a Spec) -> Setup<'a> {
        Setup {
            spec,
            rootfs: &self.rootfs,
            bundle: self.dir.path(),
            user_namespace: super::credentials::in_user_namespace(),
            no_pivot: false,
            unified: None,
            sources: vec![],
        }
    }

    /// Goes all the way in.
    fn enter(&self, mounts: &str, rest: &str) -> Result<()> {
        let spec = self.spec(mounts, rest);
        let mut setup = self.setup(&spec);
        let root = prepare(&mut setup, &|_| Ok(None))?;
        pivot(&setup, &root)?;
        finish(&setup, &root)?;
        masked::apply(&spec)
    }
}

const PROC: &str = r#"{"destination":"/proc","type":"proc","source":"proc"}"#;
const DEV: &str = r#"{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","mode=755"]}"#;

/// Runs in a new mount namespace.
fn test(body: impl FnOnce(Fixture)) {
    in_child(libc::CLONE_NEWNS | libc::CLONE_NEWIPC, || body(Fixture::new()));
}

fn mount_options(point: &str) -> String {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = text.lines().rev().find(|l| l.split(' ').nth(4) == Some(point));
    line.unwrap_or_else(|| panic!("{point} is not mounted in {text}")).to_owned()
}

#[test]
fn a_usual_container_finds_what_it_expects() {
    test(|fixture| {
        let mounts = format!(
            r#"[{PROC},{DEV},
            {{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620"]}},
            {{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","noexec","nodev","mode=1777","size=65536k"]}},
            {{"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]}},
            {{"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]}},
            {{"destination":"/data/file","source":"{}","options":["bind","ro","nosuid"]}}]"#,
            fixture.dir.path().join("secret").display()
        );
        fixture.enter(&mounts, r#","maskedPaths":["/proc/cpuinfo","/sys/kernel","/sys/./kernel","/sys/module","/nothing"],"readonlyPaths":["/proc/sys"]"#).unwrap();
        for (path, major, minor) in devices::DEFAULT {
            let meta = fs::metadata(path).unwrap();
            assert!(meta.file_type().is_char_device(), "{path}");
            assert_eq!(meta.rdev(), libc::makedev(*major, *minor), "{path}");
            assert_eq!(meta.permissions().mode() & 0o777, 0o666, "{path}");
        }
        assert_eq!(fs::read_link("/dev/ptmx").unwrap(), Path::new("pts/ptmx"));
        assert_eq!(fs::read_link("/dev/fd").unwrap(), Path::new("/proc/self/fd"));
        assert!(Path::new("/dev/pts/ptmx").exists());
        assert_eq!(fs::read("/data/file").unwrap(), b"host");
        assert!(fs::write("/data/file", b"x").is_err());
        assert!(mount_options("/data/file").contains(" ro,nosuid"));
        assert!(mount_options("/dev/shm").contains("nosuid,nodev,noexec"));
        assert_eq!(fs::metadata("/dev/shm").unwrap().permissions().mode() & 0o7777, 0o1777);
        assert!(fs::write("/proc/sys/kernel/hostname", b"x").is_err());
        assert!(fs::metadata("/proc/cpuinfo").unwrap().file_type().is_char_device());
        assert_eq!(fs::read_dir("/sys/kernel").unwrap().count(), 0);
        assert_eq!(fs::read_dir("/sys/module").unwrap().count(), 0);
        assert!(fs::create_dir("/sys/module/x").is_err());
        // Nothing of the host is left.
        let points = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!points.contains("/sys/fs/cgroup"), "{points}");
        assert_eq!(fs::read_dir("/").unwrap().count(), 4);
    });
}

#[test]
fn links_in_the_root_lead_nowhere_else() {
    test(|fixture| {
        let host = fixture.dir.path().join("host");
        fs::create_dir(&host).unwrap();
        symlink(&host, fixture.rootfs.join("link")).unwrap();
        symlink("../host", fixture.rootfs.join("up")).unwrap();
        for name in ["link", "up"] {
            let mounts = format!(r#"[{{"destination":"/{name}/x","type":"tmpfs","source":"tmpfs"}}]"#);
            let spec = fixture.spec(&mounts, "");
            // Refused or done inside, but never outside.
            let _ = prepare(&mut fixture.setup(&spec), &|_| Ok(None));
            assert_eq!(fs::read_dir(&host).unwrap().count(), 0, "{name}");
        }
    });
}

#[test]
fn a_mount_goes_to_what_was_looked_at() {
    for calls in [&[][..], &["fsopen"]] {
        test(|fixture| {
            forget(calls);
            let host = fixture.dir.path().join("host");
            let (looked_at, renamed) = (fixture.rootfs.join("a"), fixture.rootfs.join("b"));
            fs::create_dir(&host).unwrap();
            fs::create_dir(&looked_at).unwrap();
            let json = r#"{"destination":"/a","type":"tmpfs","source":"tmpfs"}"#;
            let mount = Mount::parse(&serde_json::from_str(json).unwrap(), fixture.dir.path()).unwrap();
            let root = fs::File::open(&fixture.rootfs).unwrap();
            let procfs = Procfs::mounted().unwrap();
            let mounter = Mounter {
                root: root.as_fd(),
                root_path: &fixture.rootfs,
                procfs: &procfs,
                label: None,
                cgroup_namespace: false,
                unified: None,
            };
            let (target, existed) = mounter.directory_target(&mount).unwrap();
            assert!(existed);
            // Now its owner exchanges it (CVE-2021-30465).
            fs::rename(&looked_at, &renamed).unwrap();
            symlink(&host, &looked_at).unwrap();
            mounter.place(&mount, &target, mount.flags, &mount.data).unwrap();
            mount_options(renamed.to_str().unwrap());
            let points = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!points.contains(host.to_str().unwrap()), "{points}");
        });
    }
}

#[test]
fn proc_and_sysfs_are_not_mounted_through_links() {
    test(|fixture| {
        fs::create_dir(fixture.rootfs.join("real")).unwrap();
        symlink("real", fixture.rootfs.join("proc")).unwrap();
        let e = fixture.enter(&format!("[{PROC}]"), "").unwrap_err().to_string();
        assert!(e.contains("must be mounted on ordinary directory"), "{e}");
    });
}

#[test]
fn nothing_is_mounted_over_proc_or_the_root() {
    for (destination, words) in [
        ("/proc", "not of type proc"),
        ("/proc/sys", "inside /proc"),
        ("/proc/../proc/self", "inside /proc"),
        ("/", "on the top of rootfs"),
        ("/a/..", "on the top of rootfs"),
    ] {
        test(|fixture| {
            fs::create_dir(fixture.rootfs.join("a")).unwrap();
            let mounts =
                format!(r#"[{PROC},{{"destination":"{destination}","type":"tmpfs","source":"tmpfs"}}]"#);
            let e = fixture.enter(&mounts, "").unwrap_err().to_string();
            assert!(e.contains(words), "{destination}: {e}");
        });
    }
}

#[test]
fn files_that_lxcfs_emulates_may_be_bound_over() {
    test(|fixture| {
        let source = fixture.dir.path().join("secret");
        let mounts = format!(
            r#"[{PROC},{{"destination":"/proc/meminfo","source":"{}","options":["bind"]}}]"#,
            source.display()
        );
        fixture.enter(&mounts, "").unwrap();
        assert_eq!(fs::read("/proc/meminfo").unwrap(), b"host");
    });
}

#[test]
fn a_false_null_device_masks_nothing() {
    test(|fixture| {
        // CVE-2025-31133: /dev is the image's, and its null is a link to what the attacker wants to write.
        fs::create_dir_all(fixture.rootfs.join("dev")).unwrap();
        fs::write(fixture.rootfs.join("dev/null"), b"false").unwrap();
        let source = fixture.rootfs.join("dev");
        let mounts = format!(
            r#"[{PROC},{{"destination":"/dev","source":"{}","options":["bind"]}}]"#,
            source.display()
        );
        let e = fixture.enter(&mounts, r#","maskedPaths":["/proc/kcore"]"#).unwrap_err().to_string();
        assert!(e.contains("/dev/null is invalid"), "{e}");
    });
}

#[test]
fn a_read_only_root_keeps_its_writable_mounts() {
    test(|fixture| {
        let mounts = format!(
            r#"[{PROC},{DEV},{{"destination":"/tmp","type":"tmpfs","source":"tmpfs","options":["ro"]}},
               {{"destination":"/var","type":"tmpfs","source":"tmpfs"}}]"#
        );
        let mut spec = fixture.spec(&mounts, "");
        let root = oci_spec::runtime::RootBuilder::default().path("rootfs").readonly(true).build().unwrap();
        spec.set_root(Some(root));
        let mut setup = fixture.setup(&spec);
        let root = prepare(&mut setup, &|_| Ok(None)).unwrap();
        pivot(&setup, &root).unwrap();
        finish(&setup, &root).unwrap();
        let error = |path: &str| fs::write(path, b"x").unwrap_err().raw_os_error();
        assert_eq!(error("/x"), Some(libc::EROFS));
        assert_eq!(error("/tmp/x"), Some(libc::EROFS));
        fs::write("/var/x", b"x").unwrap();
    });
}

#[test]
fn flags_and_recursive_attributes_reach_the_mounts_below() {
    test(|fixture| {
        let host = fixture.dir.path().join("host");
        fs::create_dir_all(host.join("sub")).unwrap();
        let (tmpfs, none): (_, Option<&str>) = (Some("tmpfs"), None);
        nix::mount::mount(tmpfs, &host.join("sub"), tmpfs, nix::mount::MsFlags::empty(), none).unwrap();
        let mounts = format!(
            r#"[{PROC},{{"destination":"/one","source":"{0}","options":["rbind","ro"]}},
               {{"destination":"/all","source":"{0}","options":["rbind","rro","rnosuid"]}},
               {{"destination":"/slave","source":"{0}","options":["bind","slave","nodev"]}}]"#,
            host.display()
        );
        fixture.enter(&mounts, "").unwrap();
        assert!(fs::write("/one/x", b"x").is_err());
        fs::write("/one/sub/x", b"x").unwrap();
        assert!(fs::write("/all/sub/y", b"x").is_err());
        assert!(mount_options("/all/sub").contains(" ro,nosuid"));
        assert!(mount_options("/slave").contains("nodev"));
        assert!(!Path::new("/slave/sub/x").exists());
    });
}

#[test]
fn a_tmpfs_can_start_with_what_it_hides() {
    test(|fixture| {
        let etc = fixture.rootfs.join("etc/sub");
        fs::create_dir_all(&etc).unwrap();
        fs::write(etc.join("file"), b"old").unwrap();
        std::os::unix::fs::chown(etc.join("file"), Some(7), Some(8)).unwrap();
        fs::set_permissions(etc.join("file"), fs::Permissions::from_mode(0o4711)).unwrap();
        symlink("/outside", etc.join("link")).unwrap();
        let mounts = format!(
            r#"[{PROC},{{"destination":"/etc","type":"tmpfs","source":"tmpfs","options":["tmpcopyup"]}}]"#
        );
        fixture.enter(&mounts, "").unwrap();
        assert_eq!(fs::read("/etc/sub/file").unwrap(), b"old");
        let meta = fs::metadata("/etc/sub/file").unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o4711, 7, 8));
        assert_eq!(fs::read_link("/etc/sub/link").unwrap(), Path::new("/outside"));
        fs::write("/etc/sub/file", b"new").unwrap();
        assert!(mount_options("/etc").contains("tmpfs"));
    });
}

#[test]
fn a_missing_source_is_named_in_the_words_that_clients_match() {
    test(|fixture| {
        let mounts = r#"[{"destination":"/x","source":"/no/such","options":["bind"]}]"#;
        let e = fixture.enter(mounts, "").unwrap_err().to_string();
        assert!(e.contains("no such file or directory") && e.contains("/no/such"), "{e}");
    });
}

#[test]
fn an_unknown_option_is_an_error_that_names_it() {
    test(|fixture| {
        let mounts = r#"[{"destination":"/x","type":"tmpfs","source":"tmpfs","options":["sise=1k"]}]"#;
        let e = fixture.enter(mounts, "").unwrap_err().to_string();
        assert!(e.contains("sise") && e.contains("invalid argument"), "{e}");
    });
}

#[test]
fn the_root_can_be_moved_instead_of_pivoted() {
    test(|fixture| {
        fs::write(fixture.rootfs.join("here"), b"").unwrap();
        let spec = fixture.spec(&format!("[{PROC}]"), "");
        let mut setup = fixture.setup(&spec);
        setup.no_pivot = true;
        let root = prepare(&mut setup, &|_| Ok(None)).unwrap();
        pivot(&setup, &root).unwrap();
        assert!(Path::new("/here").exists());
        assert!(!Path::new("/usr").exists());
    });
}

#[test]
fn devices_of_config_json_are_made_with_their_owner() {
    test(|fixture| {
        let rest = r#","devices":[{"path":"/dev/null","type":"c","major":1,"minor":3,"fileMode":384,"uid":3,"gid":4},
            {"path":"/dev/sub/pipe","type":"p"}]"#;
        fixture.enter(&format!("[{PROC},{DEV}]"), rest).unwrap();
        let meta = fs::metadata("/dev/null").unwrap();
        assert_eq!((meta.mode() & 0o777, meta.uid(), meta.gid()), (0o600, 3, 4));
        assert!(fs::metadata("/dev/sub/pipe").unwrap().file_type().is_fifo());
    });
}

#[test]
fn devices_are_bound_onto_whatever_the_image_has() {
    test(|fixture| {
        let dev = fixture.rootfs.join("dev");
        fs::create_dir(&dev).unwrap();
        nix::unistd::mkfifo(&dev.join("null"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        symlink(fixture.dir.path().join("secret"), dev.join("zero")).unwrap();
        let spec = fixture.spec(&format!("[{PROC}]"), "");
        let mut setup = Setup { user_namespace: true, ..fixture.setup(&spec) };
        let root = prepare(&mut setup, &|_| Ok(None)).unwrap();
        pivot(&setup, &root).unwrap();
        for (path, major, minor) in devices::DEFAULT {
            assert_eq!(fs::metadata(path).unwrap().rdev(), libc::makedev(*major, *minor), "{path}");
        }
    });
}

/// Makes system calls unknown, as in an older kernel.
fn forget(calls: &[&str]) {
    use libseccomp::{ScmpAction, ScmpFilterContext, ScmpSyscall};
    let mut filter = ScmpFilterContext::new(ScmpAction::Allow).unwrap();
    for call in calls {
        let call = ScmpSyscall::from_name(call).unwrap();
        filter.add_rule(ScmpAction::Errno(libc::ENOSYS), call).unwrap();
    }
    filter.load().unwrap();
}

#[test]
fn older_kernels_do_with_fewer_calls() {
    for calls in [&["mount_setattr"][..], &["mount_setattr", "fsopen"]] {
        test(|fixture| {
            let source = fixture.dir.path().display();
            let mounts = format!(
                r#"[{PROC},{DEV},{{"destination":"/tmp","type":"tmpfs","source":"tmpfs","options":["ro","noexec"]}},
                {{"destination":"/data","source":"{source}","options":["rbind","ro","nosuid","rslave"]}},
                {{"destination":"/plain","source":"{source}","options":["bind","rw","rprivate"]}}]"#
            );
            forget(calls);
            // An empty directory to mask another is made by fsopen(2) alone.
            fixture
                .enter(&mounts, r#","maskedPaths":["/proc/kcore"],"readonlyPaths":["/proc/sys"]"#)
                .unwrap();
            assert!(mount_options("/data").contains(" ro,nosuid"), "{}", mount_options("/data"));
            assert!(mount_options("/plain").contains(" rw"), "{}", mount_options("/plain"));
            assert!(mount_options("/tmp").contains(" ro,"), "{}", mount_options("/tmp"));
            assert!(mount_options("/proc/sys").contains(" ro"));
            assert_eq!(fs::read("/data/secret").unwrap(), b"host");
        });
    }
}

#[test]
fn in_a_user_namespace_devices_are_bound() {
    in_child(libc::CLONE_NEWUSER | libc::CLONE_NEWNS, || {
        fs::write("/proc/self/setgroups", "deny").unwrap();
        fs::write("/proc/self/uid_map", "0 0 1").unwrap();
        fs::write("/proc/self/gid_map", "0 0 1").unwrap();
        let fixture = Fixture::new();
        fixture.enter(&format!("[{DEV}]"), r#","maskedPaths":["/dev/zero"]"#).unwrap();
        assert_eq!(fs::metadata("/dev/full").unwrap().rdev(), libc::makedev(1, 7));
        assert_eq!(fs::metadata("/dev/zero").unwrap().rdev(), libc::makedev(1, 3));
    });
}

fn mounted_v1() -> &'static [crate::cgroup::hierarchy::Hierarchy] {
    crate::cgroup::hierarchy::v1_mounts(&crate::cgroup::hierarchy::own_paths().unwrap())
}

#[test]
fn the_cgroup_mount_shows_every_tree() {
    if crate::cgroup::is_unified() || mounted_v1().is_empty() {
        eprintln!("skipped: this host mounts no cgroup v1");
        return;
    }
    let mounts = format!(
        r#"[{PROC},{{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup",
           "options":["nosuid","noexec","nodev","ro"]}}]"#
    );
    for namespaces in ["", r#",{"type":"cgroup"}"#] {
        let unshared = if namespaces.is_empty() { 0 } else { libc::CLONE_NEWCGROUP };
        in_child(libc::CLONE_NEWNS | unshared, || {
            let fixture = Fixture::new();
            let mut spec = fixture.spec(&mounts, "");
            let json = serde_json::to_string(&spec).unwrap();
            let json = json.replace(r#"{"type":"mount"}"#, &format!(r#"{{"type":"mount"}}{namespaces}"#));
            spec = serde_json::from_str(&json).unwrap();
            let wanted = mounted_v1();
            let mut setup = fixture.setup(&spec);
            let root = prepare(&mut setup, &|_| Ok(None)).unwrap();
            pivot(&setup, &root).unwrap();
            for hierarchy in wanted {
                let point = Path::new("/sys/fs/cgroup").join(hierarchy.mount_point.file_name().unwrap());
                assert!(point.join("cgroup.procs").exists(), "{}", point.display());
                assert!(mount_options(point.to_str().unwrap()).contains(" ro,nosuid"));
                assert!(fs::create_dir(point.join("x")).is_err());
            }
        });
    }
}

#[test]
fn owners_of_a_mount_can_be_mapped() {
    test(|fixture| {
        let host = fixture.dir.path().join("host");
        fs::create_dir(&host).unwrap();
        fs::write(host.join("file"), b"").unwrap();
        let mounts = format!(
            r#"[{PROC},{{"destination":"/mapped","source":"{}","options":["rbind","idmap"],
               "uidMappings":[{{"containerID":0,"hostID":1234,"size":1}}],
               "gidMappings":[{{"containerID":0,"hostID":5678,"size":1}}]}}]"#,
            host.display()
        );
        let spec = fixture.spec(&mounts, "");
        let mut setup = fixture.setup(&spec);
        for m in super::rootfs::parse_mounts(&spec, setup.bundle, setup.rootfs).unwrap() {
            match super::mounts::source(&m, &spec, setup.rootfs) {
                Err(e) if e.to_string().contains("doesn't support idmap mounts") => {
                    return eprintln!("skipped: {e}");
                }
                source => setup.sources.push(source.unwrap()),
            }
        }
        use super::mounts::Source;
        assert!(matches!(setup.sources[..], [Source::Own, Source::Ready(_)]));
        let root = prepare(&mut setup, &|_| Ok(None)).unwrap();
        pivot(&setup, &root).unwrap();
        let meta = fs::metadata("/mapped/file").unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 5678));
    });
}

#[test]
fn the_console_covers_whatever_is_there() {
    in_child(libc::CLONE_NEWNS, || {
        let fixture = Fixture::new();
        let pts = r#"{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["newinstance","ptmxmode=0666"]}"#;
        let spec = fixture.spec(&format!("[{PROC},{DEV},{pts}]"), "");
        let mut setup = fixture.setup(&spec);
        let root = prepare(&mut setup, &|_| Ok(None)).unwrap();
        // CVE-2025-52565: a link in place of the console.
        symlink("/proc/self/mem", fixture.rootfs.join("dev/console")).unwrap();
        pivot(&setup, &root).unwrap();
        let master = fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        let number = {
            use std::os::fd::AsRawFd;
            let (mut unlock, mut number): (libc::c_int, libc::c_uint) = (0, 0);
            // SAFETY: each request reads or writes one int.
            unsafe {
                assert_eq!(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw mut unlock), 0);
                assert_eq!(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number), 0);
            }
            number
        };
        let slave = fs::File::options().read(true).open(format!("/dev/pts/{number}")).unwrap();
        use std::os::fd::AsFd;
        match devices::mount_console(slave.as_fd()) {
            // The terminal is mounted over the link itself, or the link is refused: it is never followed.
            Ok(()) => assert!(mount_options("/dev/console").contains("devpts")),
            Err(e) => {
                assert!(e.to_string().contains("/dev/console") || e.to_string().contains("move_mount"), "{e}")
            }
        }
    });
}

#[test]
fn a_user_is_entered_with_groups_and_terminals() {
    in_child(0, || {
        let user = serde_json::from_str(r#"{"uid":12,"gid":34,"additionalGids":[56,78]}"#).unwrap();
        let procfs = crate::sys::procfs::Later::default();
        super::credentials::become_user(&user, &procfs).unwrap();
        super::credentials::clear_keep_capabilities().unwrap();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        assert!(status.contains("Uid:\t12\t12\t12\t12\n") && status.contains("Gid:\t34\t34\t34\t34\n"));
        assert!(status.contains("Groups:\t56 78 \n"), "{status}");
        // Kept for capset(2) to set, though not in force.
        assert!(
            !status.contains("CapPrm:\t0000000000000000") && status.contains("CapEff:\t0000000000000000")
        );
    });
}

#[test]
fn mappings_are_written_from_outside() {
    let json = r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"user"}],
        "uidMappings":[{"containerID":0,"hostID":1000,"size":10},{"containerID":10,"hostID":2000,"size":5}],
        "gidMappings":[{"containerID":0,"hostID":3000,"size":10}]}}"#;
    let spec: Spec = serde_json::from_str(json).unwrap();
    let maps = super::credentials::IdMaps::of(&spec).unwrap();
    crate::sys::namespace::with_idle_child(libc::CLONE_NEWUSER, |pid| {
        maps.write(pid).unwrap();
        let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
        let words: Vec<_> = map.split_whitespace().collect();
        assert_eq!(words, ["0", "1000", "10", "10", "2000", "5"]);
    })
    .unwrap();
    assert_eq!(super::credentials::host_id(maps.uids, 12), Some(2002));
    assert_eq!(super::credentials::host_id(maps.uids, 15), None);
}
