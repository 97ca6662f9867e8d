//! Every parser of what somebody else has written, as a function of bytes that may do anything but panic.
//!
//! ```text
//!   tests/fuzz/corpus/NAME/*  ──┬──>  tests/corpus.rs       cargo test: the files, and bounded mutations of them
//!                               └──>  tests/fuzz (libFuzzer) cargo fuzz: as long as one likes
//!                                         └──>  TARGETS below
//! ```
//!
//! A target returns whether it got to the end: where nothing in a corpus does, the corpus tests nothing.

use std::fs::{self, File};
use std::io::{Cursor, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxResources, LinuxSeccomp, Process, Spec};
use stasis::bundle;
use stasis::cgroup::devices::{Policy, ebpf};
use stasis::cgroup::systemd;
use stasis::checkpoint::image::{FileEntry, ImageDir, Kind, Reader, StasisExtension};
use stasis::checkpoint::memory::restore::free_window;
use stasis::checkpoint::task::{policy, process};
use stasis::checkpoint::{Result as Checked, show};
use stasis::container::state::{self, State};
use stasis::init::{lsm, mounts, program, rlimits, scheduling, seccomp, sysctl};
use stasis::sys::resolve;

/// A parser, and the name of its corpus.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]) -> bool,
    /// Inputs that a short run tries: as many as about two seconds allow.
    #[allow(dead_code)]
    pub short: u32,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "config", run: config, short: 3000 },
    Target { name: "seccomp", run: seccomp_profile, short: 1500 },
    Target { name: "paths", run: paths, short: 1500 },
    Target { name: "mounts", run: mount_options, short: 4000 },
    Target { name: "process", run: process_json, short: 4000 },
    Target { name: "state", run: state_json, short: 4000 },
    Target { name: "resources", run: resources, short: 4000 },
    Target { name: "record", run: record, short: 4000 },
    Target { name: "images", run: images, short: 800 },
];

/// config.json: read, checked, and turned into all that is computed of it before a process exists.
fn config(text: &[u8]) -> bool {
    let Ok(spec) = bundle::read(text) else { return false };
    let valid = bundle::validate::spec(&spec, Path::new("/bundle")).is_ok();
    state::labels(Path::new("/bundle"), &spec);
    if let Some(linux) = spec.linux() {
        if let Some(profile) = linux.seccomp() {
            let _ = seccomp::compile(profile);
        }
        for name in linux.sysctl().iter().flatten().map(|(name, _)| name) {
            assert!(!sysctl::path(name).is_empty() || name.is_empty());
        }
        if let Some(resources) = linux.resources() {
            of_resources(resources);
        }
    }
    if let Some(annotations) = spec.annotations() {
        let _ = systemd::of_annotations(annotations);
    }
    of_process(spec.process().as_ref()) && valid
}

fn of_process(process: Option<&Process>) -> bool {
    let Some(process) = process else { return false };
    let _ = rlimits::validate(process.rlimits().as_deref().unwrap_or_default());
    if let Some(scheduler) = process.scheduler() {
        let _ = scheduling::validate(scheduler);
    }
    if let Some(affinity) = process.exec_cpu_affinity() {
        for list in [affinity.initial(), affinity.cpu_affinity_final()].into_iter().flatten() {
            let _ = scheduling::parse_list(list);
        }
    }
    program::environment(process.env().as_deref().unwrap_or_default(), process.user().uid()).is_ok()
}

fn of_resources(resources: &LinuxResources) {
    for unified in [false, true] {
        let _ = systemd::of_resources(resources, unified);
    }
    if let Ok(policy) = Policy::of(Some(resources), &[]) {
        ebpf::program(&policy);
    }
}

/// The `seccomp` of a config.json.
fn seccomp_profile(text: &[u8]) -> bool {
    let Ok((profile, _)) = bundle::parse::<LinuxSeccomp>(text) else { return false };
    let Ok(program) = seccomp::compile(&profile) else { return false };
    // The kernel takes no longer one, and the last instruction has to end it.
    program.filters.last().is_some_and(|last| last.code & 7 == 6 || last.code & 7 == 5)
}

/// One mount a line: destination, type, source, options.
fn mount_options(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let mut all = true;
    for line in text.lines() {
        let mut words = line.split(' ').map(str::to_owned);
        let mut mount = oci_spec::runtime::Mount::default();
        mount.set_destination(words.next().unwrap_or_default().into());
        mount.set_typ(words.next());
        mount.set_source(words.next().map(PathBuf::from));
        mount.set_options(Some(words.collect()));
        match mounts::Mount::parse(&mount, Path::new("/bundle")) {
            Ok(m) => {
                assert!(m.flags & m.cleared == 0, "set and cleared: {line}");
                assert!(!m.is_bind() || m.source.is_absolute(), "a relative source: {line}");
                mounts::attributes(m.flags);
            }
            Err(_) => all = false,
        }
    }
    all
}

/// What `exec --process` reads.
fn process_json(text: &[u8]) -> bool {
    let Ok((process, _)) = bundle::parse::<Process>(text) else { return false };
    let valid = bundle::validate_process(&process).and_then(|()| lsm::validate(&process)).is_ok();
    of_process(Some(&process)) && valid
}

/// state.json of another version, or of a torn disk.
fn state_json(text: &[u8]) -> bool {
    let Ok(state) = State::read(text) else { return false };
    state.annotations();
    let _ = state.owns_pid_namespace();
    let again = serde_json::to_vec(&state).expect("what was read can be written");
    let again = State::read(&again).expect("and be read again");
    assert_eq!(again.bundle(), state.bundle());
    true
}

/// What `update --resources` reads.
fn resources(text: &[u8]) -> bool {
    let Ok(resources) = serde_json::from_slice::<LinuxResources>(text) else { return false };
    of_resources(&resources);
    true
}

/// One image of records: its kind by the first byte, its records as those of the files and of Stasis' own.
fn record(bytes: &[u8]) -> bool {
    let Some((kind, rest)) = bytes.split_first() else { return false };
    let kind = Kind::ALL[usize::from(*kind) % Kind::ALL.len()];
    let image = [&kind.header(), rest].concat();
    let read = |input| Reader::from_input(Cursor::new(input), PathBuf::from("x.img"), kind);
    let files = read(image.clone()).and_then(|mut r| r.records::<FileEntry>());
    let own = read(image).and_then(|mut r| r.records::<StasisExtension>());
    files.is_ok() || own.is_ok()
}

/// A directory of images: all that `image` shows of it, and what a restore plans before it makes anything.
///
/// The bytes are its files: a length, a name, a length of four bytes, the content; the top bit of a length stands for
/// that many zeros, for pages are long and nobody looks into them.
fn images(bytes: &[u8]) -> bool {
    let Ok(dir) = tempfile::Builder::new().prefix("stasis-fuzz-").tempdir_in(memory()) else { return false };
    let mut rest = Cursor::new(bytes);
    while let Some((name, content, zeros)) = file_of(&mut rest) {
        let made = File::create(dir.path().join(name));
        let _ = made.and_then(|mut file| {
            file.write_all(&content).and_then(|()| file.set_len(zeros.max(content.len() as u64)))
        });
    }
    if let Ok(images) = ImageDir::open(dir.path()) {
        let _ = show::verify(&images).to_string();
    }
    shown(dir.path()).is_ok()
}

fn shown(dir: &Path) -> Checked<()> {
    static SPEC: LazyLock<Spec> = LazyLock::new(Spec::default);
    let (images, model) = show::open(dir)?;
    show::summary(&images, &model)?.to_string();
    show::tree(&images, &model).iter().for_each(|x| drop(x.to_string()));
    show::memory(&images, &model).iter().for_each(|x| drop(x.to_string()));
    show::files(&model).iter().for_each(|x| drop(x.to_string()));
    for clamp in [false, true] {
        let _ = policy::admit(&model, &SPEC, clamp);
    }
    process::plan(&model)?;
    free_window(&model, 1 << 20)?;
    Ok(())
}

fn file_of(rest: &mut Cursor<&[u8]>) -> Option<(String, Vec<u8>, u64)> {
    let mut length = [0];
    rest.read_exact(&mut length).ok()?;
    let mut name = vec![0; usize::from(length[0])];
    rest.read_exact(&mut name).ok()?;
    let mut length = [0; 4];
    rest.read_exact(&mut length).ok()?;
    let length = u32::from_le_bytes(length);
    let zeros = if length >> 31 == 1 { u64::from(length << 1 >> 1) } else { 0 };
    let mut content = Vec::new();
    if zeros == 0 {
        rest.take(u64::from(length)).read_to_end(&mut content).ok()?;
    }
    let name = String::from_utf8(name).ok().filter(|n| !n.contains(['/', '\0']) && !n.starts_with('.'))?;
    Some((name, content, zeros.min(1 << 24)))
}

/// A hostile root file system, made line by line, and then looked into.
///
/// ```text
///   dir NAME            link NAME TARGET            file NAME
///   open PATH           beneath PATH                mkdir PATH           make PATH
/// ```
///
/// Whatever the lines say, what is opened is inside, and nothing appears outside.
fn paths(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let Ok(outer) = tempfile::Builder::new().prefix("stasis-fuzz-").tempdir_in(memory()) else {
        return false;
    };
    let root = outer.path().join("root");
    let victim = outer.path().join("victim");
    fs::create_dir(&root).and_then(|()| fs::create_dir(&victim)).expect("two directories");
    let fd = File::open(&root).expect("the root");
    // The names are the input's, their place is ours.
    let place = |name: &str| {
        let plain = name.split('/').filter(|part| !part.is_empty() && *part != ".." && !part.contains('\0'));
        root.join(plain.collect::<PathBuf>())
    };
    let mode = Mode::from_bits_truncate(0o755);
    let mut opened = 0;
    for line in text.lines().take(64) {
        let mut words = line.split(' ');
        let (verb, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let found = match verb {
            // Through a link of the input's own this would be our mistake, not the code's.
            "dir" | "file" | "link" if !inside(&place(name), &root) => continue,
            "dir" => {
                let _ = fs::create_dir(place(name));
                continue;
            }
            "file" => {
                let _ = File::options().write(true).create_new(true).open(place(name));
                continue;
            }
            "link" => {
                let target = words.next().unwrap_or_default().replace("VICTIM", &victim.to_string_lossy());
                let _ = symlink(target, place(name));
                continue;
            }
            "open" => resolve::open_in_root(&fd, name, OFlag::O_PATH),
            "beneath" => resolve::open_beneath(&fd, name, OFlag::O_PATH),
            "mkdir" => resolve::make_dir_in_root(&fd, name, mode),
            "make" => resolve::make_file_in_root(&fd, Path::new(name), mode, mode),
            _ => continue,
        };
        if let Ok(found) = found {
            let real = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).expect("a path");
            assert!(real.starts_with(&root), "{line:?} leads to {}", real.display());
            opened += 1;
        }
    }
    assert_eq!(fs::read_dir(&victim).expect("the victim").count(), 0, "something was made outside");
    assert_eq!(fs::read_dir(outer.path()).expect("its parent").count(), 2, "something was made beside");
    opened > 0
}

/// True where the directory that would hold it is below the root, links followed.
fn inside(path: &Path, root: &Path) -> bool {
    path.parent().and_then(|dir| dir.canonicalize().ok()).is_some_and(|dir| dir.starts_with(root))
}

/// A directory that is not on a disk, if there is one.
fn memory() -> PathBuf {
    let shm = PathBuf::from("/dev/shm");
    if shm.is_dir() { shm } else { std::env::temp_dir() }
}
