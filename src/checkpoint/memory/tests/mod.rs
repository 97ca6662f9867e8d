//! Real programs: their memory is dumped, put into another process, and looked at by the program itself.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::checkpoint::context::{Dump, LiveTask, NewTask, Options, Restore, Source, Target};
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{ImageDir, vma as status};
use crate::checkpoint::memory::copy::Disk;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::nested::Made;
use crate::checkpoint::namespaces::user::Owners;
use crate::checkpoint::remote::{Batch, Conduit, Final, Injection, Thread};
use crate::sys::pidfd;

/// A program with a pipe at either end, killed and reaped when it is dropped.
struct Program {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }
    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }
    /// Lets the program look at itself; what it says.
    fn verdict(&mut self) -> String {
        self.input.write_all(b"\n").unwrap();
        let mut text = String::new();
        self.output.read_to_string(&mut text).unwrap();
        format!("{text}{}", self.child.wait().unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn stop(pid: i32) -> (Thread, Injection) {
    let thread = Thread::seize(pid).unwrap();
    thread.stop(Instant::now() + Duration::from_secs(5)).unwrap();
    let injection = Injection::start(&thread).unwrap();
    (thread, injection)
}

fn compile(dir: &Path, source: &str, name: &str) -> PathBuf {
    let (code, program) = (dir.join(format!("{name}.c")), dir.join(name));
    std::fs::write(&code, source).unwrap();
    let flags = ["-O1", "-w", "-o"];
    assert!(Command::new("gcc").args(flags).arg(&program).arg(&code).status().unwrap().success());
    program
}

fn source() -> Source {
    Source {
        id: "test".into(),
        init: 0,
        rootfs: "/".into(),
        spec: oci_spec::runtime::Spec::default(),
        external_mounts: BTreeMap::new(),
        stdio: Vec::new(),
        state_dir: None,
        cgroups: BTreeMap::new(),
    }
}

/// The files of a dump, in the place of the files room.
#[derive(Default)]
struct Paths(RefCell<BTreeMap<u32, PathBuf>>);

impl Paths {
    fn register(&self, dump: &mut Dump<'_>, _file: OwnedFd, link: &Path, _access: u32) -> Result<u32> {
        let id = dump.new_id();
        self.0.borrow_mut().insert(id, link.to_owned());
        Ok(id)
    }
    fn open(&self) -> BTreeMap<u32, File> {
        self.0.borrow().iter().map(|(id, path)| (*id, File::open(path).unwrap())).collect()
    }
}

/// What a dump leaves for a restore.
struct Saved {
    model: Model,
    last: Final,
}

fn save(program: &Program, images: &ImageDir, paths: &Paths) -> Saved {
    let (thread, mut injection) = stop(program.pid());
    let mut batch = Batch::new();
    let asked = mm::Ask::new(&mut batch);
    let space = asked.answer(&injection.run(&batch).unwrap());
    let last = Final {
        regs: injection.image_regs().unwrap(),
        sigmask: injection.sigmask().unwrap(),
        unmap_window: true,
    };
    let (options, source) = (Options::default(), source());
    let task = LiveTask {
        pid: program.pid(),
        vpid: 1,
        pidfd: pidfd::open(program.pid(), 0).unwrap(),
        status: crate::checkpoint::task::status::Status::of(program.pid()).unwrap(),
        zombie: false,
        threads: vec![thread],
        injection: Some(injection),
        space,
    };
    let mut dump = Dump::new(&options, &source, images, vec![task]);
    let mut register = |dump: &mut Dump<'_>, file: OwnedFd, link: &Path, access: u32| {
        paths.register(dump, file, link, access)
    };
    dump::capture(&mut dump, &mut register).unwrap().write(images, Disk::Later).unwrap();
    for task in &mut dump.tasks {
        task.injection.take().unwrap().finish().unwrap();
    }
    Saved { model: dump.model, last }
}

/// Puts what was saved into a new process, which then runs.
fn put(saved: &Saved, images: &ImageDir, paths: &Paths) -> Result<Program> {
    let program = Program::start(&mut Command::new("cat"));
    let (thread, mut injection) = stop(program.pid());
    let conduit = Conduit::open(&mut injection, 100)?;
    injection.settle(restore::free_window(&saved.model, Injection::FOOTPRINT)?)?;
    let mut task =
        NewTask { pid: program.pid(), vpid: 1, pidfd: pidfd::open(program.pid(), 0).unwrap(), injection };
    let target = Target {
        state_dir: None,
        id: "test".into(),
        init: program.pid(),
        init_pidfd: pidfd::open(program.pid(), 0).unwrap(),
        root: File::open("/").unwrap().into(),
        spec: oci_spec::runtime::Spec::default(),
        cgroups: BTreeMap::new(),
        stdio: [None, None, None],
        console: None,
        entrants: Vec::new(),
    };
    let options = Options::default();
    let context = Restore {
        options: &options,
        target: &target,
        model: &saved.model,
        images,
        owners: Owners::default(),
        made: Made::default(),
    };
    let mut memories = Memories::open(&context, std::iter::empty())?;
    let files = paths.open();
    let open = |id: u32| files.get(&id).map(File::as_fd).ok_or_else(|| Error::new("no such file"));
    memories.restore(&mut task, &open, &conduit)?;
    conduit.close(&mut task.injection)?;
    task.injection.leave(&saved.last)?.detach()?;
    drop(thread);
    Ok(program)
}

/// All mappings of a program, as a restore must bring them back. Two that touch and agree are one: relocated parts of
/// a library that were made read-only stand apart from its constants only for the memory they count as.
fn maps_of(program: &Program) -> Vec<String> {
    let mut found = maps::read(program.pid()).unwrap();
    found.dedup_by(|next, last| {
        let same = |m: &maps::Mapping| (m.prot, m.shared, m.device, m.inode, m.name.clone());
        let join = last.end == next.start && same(last) == same(next) && next.inode != 0;
        if join {
            last.end = next.end;
        }
        join
    });
    let line = |m: maps::Mapping| {
        let range = vmas::Range(m.start, m.end);
        format!("{range} {} {} {:x} {:?}", m.prot, m.shared, m.offset, m.name)
    };
    found.into_iter().map(line).collect()
}

#[test]
fn a_program_with_memory_of_all_kinds_goes_on_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let victim = compile(dir.path(), include_str!("victim.c"), "victim");
    let images = ImageDir::create(dir.path().join("images")).unwrap();
    let paths = Paths::default();
    let mut program = Program::start(Command::new(victim).arg(dir.path().join("file")));
    assert_eq!(program.line(), "ready\n");
    let before = maps_of(&program);
    let saved = save(&program, &images, &paths);
    assert_eq!(maps_of(&program), before);
    let locks = saved.model.mm[&1].vmas.iter().any(|v| v.flags & 0x2000 != 0);

    for _twice in 0..2 {
        let mut again = put(&saved, &images, &paths).unwrap();
        assert_eq!(maps_of(&again), before);
        assert_eq!(again.verdict(), "ok\nexit status: 0", "locks: {locks}");
    }
    assert_eq!(program.verdict(), "ok\nexit status: 0");
    let mm = &saved.model.mm[&1];
    assert!(mm.vmas.iter().any(|v| v.status & status::GUARD != 0));
}
