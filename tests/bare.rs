//! The engine without the runtime: a program in namespaces that util-linux makes is dumped, killed, and restored into
//! new ones that wait with a busybox in them. What the runtime adds (cgroups, hooks, state) is tested elsewhere.
//!
//! `BARE="a b"` runs other fixtures than the default ones.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use stasis::checkpoint::context::{Options, Source, Target};
use stasis::checkpoint::dump::dump;
use stasis::checkpoint::image::ImageDir;
use stasis::checkpoint::model::Model;
use stasis::checkpoint::restore::restore;
use stasis::checkpoint::{Freezer, Result};

/// Programs that need nothing of a runtime.
const FIXTURES: &str = "idle children threads registers signals";

/// Finds processes by their pid namespace; nobody forks in the moments that matter here.
struct ByNamespace(PathBuf);

impl Freezer for ByNamespace {
    fn freeze(&mut self) -> Result<()> {
        Ok(())
    }
    fn thaw(&mut self) -> Result<()> {
        Ok(())
    }
    fn is_frozen(&self) -> Result<bool> {
        Ok(false)
    }
    fn pids(&self) -> Result<Vec<i32>> {
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        Ok(pids.filter(|pid| namespace(*pid).as_ref() == Some(&self.0)).collect())
    }
}

fn namespace(pid: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

/// A process as init of its own pid and mount namespaces, with `root` as its root.
struct Cage {
    outer: Child,
    init: i32,
}

impl Cage {
    fn new(root: &Path, program: &[&str]) -> Self {
        let script = r#"cd "$0" && mount --make-rprivate / && mount --bind . . && cd "$0" && mkdir -p old &&
            mount -t proc proc proc && pivot_root . old && cd / && /bin/busybox umount -l /old && exec "$@""#;
        let outer = Command::new("unshare")
            .args(["--pid", "--mount", "--ipc", "--uts", "--fork", "--kill-child", "sh", "-c", script])
            .arg(root)
            .args(program)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = outer.id();
        let init = wait("the cage", || {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
            children.split_whitespace().next()?.parse().ok()
        });
        Self { outer, init }
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        let _ = self.outer.kill();
        let _ = self.outer.wait();
    }
}

fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waiting for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn root(dir: &Path, fixture: &str) -> PathBuf {
    let root = dir.join("root");
    for sub in ["bin", "proc", "t", "data", "tmp", "dev"] {
        fs::create_dir_all(root.join(sub)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let source = format!("{}/tests/fixtures/{fixture}.c", env!("CARGO_MANIFEST_DIR"));
    let done = Command::new("gcc")
        .args(["-static", "-O1", "-pthread", "-w", "-o"])
        .arg(root.join("fixture"))
        .arg(&source)
        .status()
        .unwrap();
    assert!(done.success(), "gcc {source}");
    root
}

fn options(dir: &Path, leave_running: bool) -> Options {
    Options {
        image_path: dir.join("images"),
        work_path: Some(dir.join("work")),
        leave_running,
        ..Options::default()
    }
}

fn spec() -> oci_spec::runtime::Spec {
    use oci_spec::runtime::{Capability, LinuxCapabilitiesBuilder, ProcessBuilder, SpecBuilder};
    let all: std::collections::HashSet<Capability> = caps::all()
        .into_iter()
        .filter_map(|cap| cap.to_string().trim_start_matches("CAP_").parse().ok())
        .collect();
    let sets = LinuxCapabilitiesBuilder::default().bounding(all).build().unwrap();
    let process = ProcessBuilder::default()
        .capabilities(sets)
        .rlimits(Vec::new())
        .no_new_privileges(false)
        .build()
        .unwrap();
    SpecBuilder::default().process(process).build().unwrap()
}

fn run(fixture: &str) -> std::result::Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let root = root(dir, fixture);
    let mut cage = Cage::new(&root, &["/fixture", "one", "two", "three"]);
    wait("the fixture to be ready", || root.join("t/ready").exists().then_some(()));
    let source = Source {
        id: "bare".into(),
        init: cage.init,
        rootfs: root.clone(),
        spec: spec(),
        external_mounts: BTreeMap::new(),
        stdio: (0..3)
            .map(|fd| {
                fs::read_link(format!("/proc/{}/fd/{fd}", cage.init)).unwrap().to_string_lossy().into_owned()
            })
            .collect(),
        cgroups: BTreeMap::new(),
        state_dir: Some(dir.into()),
    };
    let mut freezer = ByNamespace(namespace(cage.init).unwrap());
    let fail = |what: &str, e: &dyn std::fmt::Display| format!("{fixture}: {what}: {e}");

    // Twice, to see that the first has left no trace.
    for _ in 0..2 {
        let report =
            dump(&options(dir, true), &source, &mut freezer).map_err(|e| fail("dump and go on", &e))?;
        eprintln!("{fixture}: went on: {}, frozen {:?}", report.phases, report.frozen);
    }
    let report = dump(&options(dir, false), &source, &mut freezer).map_err(|e| fail("dump", &e))?;
    eprintln!("{fixture}: dump {}, frozen {:?}", report.phases, report.frozen);
    cage.outer.wait().unwrap();

    let cage = Cage::new(&root, &["/bin/busybox", "sleep", "10000"]);
    wait("the stub", || {
        (fs::read_link(format!("/proc/{}/exe", cage.init)).ok()?.ends_with("busybox")
            && fs::read_to_string(format!("/proc/{}/comm", cage.init)).ok()? == "busybox\n"
            && fs::read_to_string(format!("/proc/{}/wchan", cage.init)).ok()?.contains("nanosleep"))
        .then_some(())
    });
    let opened = |path: String, flags: OFlag| nix::fcntl::open(path.as_str(), flags, Mode::empty()).unwrap();
    let null = || Some(OwnedFd::from(fs::File::options().read(true).write(true).open("/dev/null").unwrap()));
    let target = Target {
        state_dir: None,
        id: "bare".into(),
        init: cage.init,
        init_pidfd: stasis::sys::pidfd::open(cage.init, 0).unwrap(),
        root: opened(format!("/proc/{}/root", cage.init), OFlag::O_PATH | OFlag::O_DIRECTORY),
        spec: spec(),
        cgroups: BTreeMap::new(),
        stdio: [null(), null(), null()],
        console: None,
        entrants: Vec::new(),
    };
    let images = ImageDir::open(dir.join("images")).unwrap();
    let model = Model::read(&images).map_err(|e| fail("read", &e))?;
    model.validate().map_err(|e| fail("validate", &e))?;
    let report = restore(&options(dir, false), &target, &model, &images, &mut || Ok(()))
        .map_err(|e| fail("restore", &e))?;
    eprintln!("{fixture}: restore {}", report.phases);
    fs::write(root.join("t/go"), "").unwrap();
    let result = wait("the fixture's result", || {
        let dead = !Path::new(&format!("/proc/{}", cage.init)).exists();
        fs::read_to_string(root.join("t/result")).ok().or_else(|| dead.then(|| "it died without one".into()))
    });
    if result == "ok" { Ok(()) } else { Err(format!("{fixture}: {result}")) }
}

#[test]
fn fixtures_survive() {
    let list = std::env::var("BARE").unwrap_or_else(|_| FIXTURES.into());
    let failed: Vec<String> = list.split_whitespace().filter_map(|fixture| run(fixture).err()).collect();
    assert!(failed.is_empty(), "\n{}", failed.join("\n"));
}
