//! Driving real children. Each test forks its own, which run on a copy of the test's memory and make no library
//! calls that take locks.

use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use super::*;

mod healing;

/// A forked child that is killed and reaped at the end.
struct Child(i32);

impl Child {
    fn fork(program: impl FnOnce()) -> Self {
        // SAFETY: the child only runs the test's program, which takes no locks, and leaves by _exit.
        match unsafe { libc::fork() } {
            0 => {
                program();
                // SAFETY: ends the child without running destructors of the parent's.
                unsafe { libc::_exit(0) }
            }
            pid => Self(pid),
        }
    }
    fn spawn(program: &mut std::process::Command) -> Self {
        Self(program.spawn().unwrap().id().cast_signed())
    }
    fn seize(&self) -> Thread {
        let thread = Thread::seize(self.0).unwrap();
        thread.stop(soon()).unwrap();
        thread
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, null_mut(), 0);
        }
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn pause() {
    // SAFETY: no arguments.
    unsafe { libc::pause() };
}

#[test]
fn a_live_batch_runs_in_the_child() {
    let child = Child::fork(|| {
        loop {
            pause();
        }
    });
    let thread = child.seize();
    let before = thread.regs().unwrap();
    let mut injection = Injection::start(&thread).unwrap();
    let mut batch = Batch::new();
    let pid = batch.call(libc::SYS_getpid, &[]);
    let pair = batch.out(8);
    batch.call(libc::SYS_pipe2, &[pair.arg(), 0.into()]);
    let hello = batch.data(b"hello");
    let put = batch.call(libc::SYS_write, &[pair.load_u32(4), hello, 5.into()]);
    let got = batch.out(16);
    batch.call(libc::SYS_read, &[pair.load_u32(0), got.arg(), put.into()]);
    batch.call(libc::SYS_close, &[pair.load_u32(0)]);
    let results = injection.run(&batch).unwrap();
    assert_eq!(results.ret(pid), i64::from(child.0));
    assert_eq!(&results.out(got)[..6], b"hello\0");
    injection.finish().unwrap();
    let after = thread.regs().unwrap();
    assert_eq!(format!("{before:?}"), format!("{after:?}"));
}

extern "C" fn pauses(_: *mut libc::c_void) -> i32 {
    loop {
        pause();
    }
}

/// More stubs than the tail of a vdso has room for: the others stand on section headers, which come back.
extern "C" fn ignore(_: libc::c_int) {}

/// Gets more signals than it can handle.
fn storm() -> Child {
    Child::fork(|| {
        // SAFETY: zeroes are valid in all of them, and each outlives its call.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            libc::sigaction(libc::SIGALRM, &raw const action, null_mut());
            let every = libc::timespec { tv_sec: 0, tv_nsec: 1000 };
            let every = libc::itimerspec { it_interval: every, it_value: every };
            let mut timer = std::mem::zeroed();
            libc::timer_create(libc::CLOCK_MONOTONIC, null_mut(), &raw mut timer);
            libc::timer_settime(timer, 0, &raw const every, null_mut());
        }
        loop {
            pause();
        }
    })
}

/// More of them than processors: what comes between two steps of the kernel is what this is about.
#[test]
fn threads_in_a_storm_of_signals_stop() {
    let storms: [Child; 8] = std::array::from_fn(|_| storm());
    for round in 0..100 {
        std::thread::sleep(Duration::from_millis(1));
        let thread = Thread::seize(storms[round % storms.len()].0).unwrap();
        let stopped = thread.stop(Instant::now() + Duration::from_secs(20));
        assert!(matches!(stopped, Ok(Stop::Trap)), "round {round}: {stopped:?}");
        thread.detach().unwrap();
    }
}

#[test]
fn several_threads_of_a_process_have_stubs_at_once() {
    const THREADS: usize = 4;
    const STACK: usize = 64 << 10;
    let mut stacks = vec![0u8; THREADS * STACK];
    let child = Child::fork(|| {
        for stack in stacks.chunks_exact_mut(STACK).skip(1) {
            let flags = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND;
            // SAFETY: a stack of its own, which grows downwards, and a function that never returns.
            let tid = unsafe {
                let top = stack.as_mut_ptr().add(STACK).cast();
                libc::clone(pauses, top, flags | libc::CLONE_THREAD, null_mut())
            };
            assert!(tid > 0);
        }
        pauses(null_mut());
    });
    let end = soon();
    let tids = loop {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.0)).unwrap();
        let tids: Vec<i32> =
            tasks.map(|task| task.unwrap().file_name().into_string().unwrap().parse().unwrap()).collect();
        if tids.len() == THREADS {
            break tids;
        }
        assert!(Instant::now() < end);
        std::thread::yield_now();
    };
    let stopped = |tid: &i32| {
        let thread = Thread::seize(*tid).unwrap();
        thread.stop(soon()).unwrap();
        thread
    };
    let threads: Vec<Thread> = tids.iter().map(stopped).collect();
    let (start, end) = memory::vdso_of_maps(child.0).unwrap().unwrap();
    let vdso = || {
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        memory::Memory::new(child.0).read(start, &mut bytes).unwrap();
        bytes
    };
    let before = vdso();
    let mut injections: Vec<Injection> =
        threads.iter().map(|thread| Injection::start(thread).unwrap()).collect();
    for (injection, tid) in injections.iter_mut().zip(&tids) {
        assert_eq!(injection.syscall(libc::SYS_gettid, &[]).unwrap(), i64::from(*tid));
    }
    assert_ne!(vdso(), before);
    injections.into_iter().for_each(|injection| injection.finish().unwrap());
    assert!(vdso() == before, "the vdso is not what it was");
}

/// Memory that test and child share: words that both see.
struct Shared(*mut u64);

impl Shared {
    fn new() -> Self {
        // SAFETY: a new anonymous mapping.
        let addr = unsafe {
            libc::mmap(
                null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(addr, libc::MAP_FAILED);
        Self(addr.cast())
    }
    /// The first page of a file.
    fn of(file: &std::fs::File) -> Self {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of a file that is a page long.
        let addr = unsafe { libc::mmap(null_mut(), 4096, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        assert_ne!(addr, libc::MAP_FAILED);
        Self(addr.cast())
    }
    fn get(&self, i: usize) -> u64 {
        // SAFETY: inside the page, which lives as long as self.
        unsafe { std::ptr::read_volatile(self.0.add(i)) }
    }
    fn set(&self, i: usize, value: u64) {
        // SAFETY: as above.
        unsafe { std::ptr::write_volatile(self.0.add(i), value) }
    }
    /// Waits until a word grows beyond what it is now: its writer runs.
    fn grows(&self, i: usize) {
        let (before, end) = (self.get(i), soon());
        while self.get(i) <= before + 1 {
            assert!(Instant::now() < end, "word {i} stays at {before}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

/// Far from everything that a test process maps.
const WINDOW: u64 = 0x1000_0000_0000;

#[test]
fn a_settled_task_leaves_its_window_and_goes_on() {
    let shared = Shared::new();
    let child = Child::fork(|| {
        loop {
            shared.set(0, shared.get(0) + 1);
        }
    });
    shared.grows(0);
    let seized = child.seize();
    let (regs, sigmask) = (seized.image_regs().unwrap(), seized.sigmask().unwrap());
    let xstate = seized.xstate().unwrap();
    let mut injection = Injection::start(&seized).unwrap();
    injection.settle(WINDOW).unwrap();
    assert_eq!(injection.syscall(libc::SYS_getpid, &[]).unwrap(), i64::from(child.0));
    let maps = |what: &str| {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.0)).unwrap();
        maps.lines().filter(|line| line.starts_with(what)).count()
    };
    assert_eq!(maps("1000000"), 2);
    let thread = injection.leave(&Final { regs, sigmask, unmap_window: true }).unwrap();
    thread.set_xstate(&xstate).unwrap();
    assert_eq!(maps("1000000"), 0);
    thread.detach().unwrap();
    assert!(seized.is_gone());
    shared.grows(0);
}

#[test]
fn an_emptied_task_makes_children_threads_and_zombies() {
    let child = Child::fork(pause);
    let mut injection = Injection::start(&child.seize()).unwrap();
    injection.settle(WINDOW).unwrap();
    let mut batch = Batch::new();
    if let Some(rseq) = injection.thread().rseq().unwrap() {
        let unregister = 1;
        batch.call(libc::SYS_rseq, &[rseq.addr.into(), rseq.len.into(), unregister.into(), rseq.sig.into()]);
    }
    batch.call(libc::SYS_munmap, &[0.into(), WINDOW.into()]);
    let above = WINDOW + Injection::FOOTPRINT;
    batch.call(libc::SYS_munmap, &[above.into(), (0x7fff_ffff_f000 - above).into()]);
    injection.run(&batch).unwrap();

    let sons = CloneArgs { exit_signal: libc::SIGCHLD, ..CloneArgs::default() };
    let (son, mut in_son) = injection.clone_child(&sons).unwrap();
    assert_eq!(in_son.syscall(libc::SYS_getpid, &[]).unwrap(), i64::from(son.tid()));
    assert_eq!(in_son.syscall(libc::SYS_getppid, &[]).unwrap(), i64::from(child.0));

    let flags =
        libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
    let threads = CloneArgs { flags: flags as u64, ..CloneArgs::default() };
    let (thread, mut in_thread) = in_son.clone_child(&threads).unwrap();
    assert_eq!(in_thread.syscall(libc::SYS_getpid, &[]).unwrap(), i64::from(son.tid()));
    assert_eq!(in_thread.syscall(libc::SYS_gettid, &[]).unwrap(), i64::from(thread.tid()));
    // Both take turns in the same scratch.
    assert_eq!(in_son.syscall(libc::SYS_gettid, &[]).unwrap(), i64::from(son.tid()));

    let mut made = Vec::new();
    let mut several = in_thread.clone_children(&[threads.clone(), threads.clone()], &mut made).unwrap();
    for (injection, thread) in several.iter_mut().zip(&made) {
        assert_eq!(injection.syscall(libc::SYS_gettid, &[]).unwrap(), i64::from(thread.tid()));
    }
    let taken = CloneArgs { set_tid: vec![thread.tid()], ..threads.clone() };
    let error = in_thread.clone_children(&[threads.clone(), taken, threads.clone()], &mut made).unwrap_err();
    assert!(error.to_string().contains(&format!("set_tid=[{}]", thread.tid())), "{error}");
    assert_eq!(made.len(), 3, "the one before is there");
    // Other tests run beside this one, and may take a number that is free now.
    let (free, (grandson, in_grandson)) = (thread.tid() + 77..thread.tid() + 177)
        .find_map(|free| {
            let args = CloneArgs { set_tid: vec![free], ..sons.clone() };
            Some((free, in_thread.clone_child(&args).ok()?))
        })
        .unwrap();
    assert_eq!(grandson.tid(), free);
    in_grandson.exit_child(Exit::Code(3)).unwrap();
    let (killed, in_killed) = in_son.clone_child(&sons).unwrap();
    in_killed.exit_child(Exit::Signal(libc::SIGSEGV)).unwrap();
    for (pid, expected) in [(free, 3 << 8), (killed.tid(), libc::SIGSEGV)] {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        assert!(stat.contains(") Z "), "{stat}");
        let mut batch = Batch::new();
        let status = batch.out(4);
        batch.call(libc::SYS_wait4, &[pid.into(), status.arg(), 0.into(), 0.into()]);
        assert_eq!(in_son.run(&batch).unwrap().i32(status, 0), expected);
    }
}

#[test]
fn errors_read_like_strace() {
    let child = Child::fork(pause);
    let mut injection = Injection::start(&child.seize()).unwrap();
    let mut batch = Batch::new();
    batch.about("cannot open the file");
    let path = batch.string(b"/does/not/exist");
    batch.call(libc::SYS_openat, &[libc::AT_FDCWD.into(), path, libc::O_RDONLY.into()]);
    let error = injection.run(&batch).unwrap_err().to_string();
    let errno = nix::errno::Errno::ENOENT.desc();
    assert_eq!(error, format!("cannot open the file: openat(-100, \"/does/not/exist\", 0): {errno}"));
    let mut batch = Batch::new();
    let call = batch.call(libc::SYS_getppid, &[]);
    batch.expect(call, 1u64);
    assert!(injection.run(&batch).unwrap_err().to_string().contains("getppid() gave "));
    let mut batch = Batch::new();
    let call = batch.call(libc::SYS_close, &[(-1).into()]);
    batch.tolerate(call);
    assert_eq!(injection.run(&batch).unwrap().result(call), Err(nix::errno::Errno::EBADF));
}

#[test]
fn large_batches_are_split_and_the_scratch_grows() {
    let child = Child::fork(pause);
    let mut injection = Injection::start(&child.seize()).unwrap();
    let mut batch = Batch::new();
    let first = batch.call(libc::SYS_getpid, &[]);
    let mut previous = first;
    let mut fields = Vec::new();
    for _ in 0..20_000 {
        // getpgid of an earlier result: across the borders of windows too.
        previous = batch.call(libc::SYS_getpgid, &[first.into()]);
        fields.push(previous);
    }
    let data = batch.data(&[0; 16]);
    batch.link_u32(data, 4, previous);
    let out = batch.out(3 << 20);
    let fd = {
        let name = batch.string(b"x");
        batch.call(libc::SYS_memfd_create, &[name, 0.into()])
    };
    batch.call(libc::SYS_write, &[fd.into(), data, 16.into()]);
    batch.call(libc::SYS_pread64, &[fd.into(), out.arg().plus(1 << 20), 16.into(), 0.into()]);
    let results = injection.run(&batch).unwrap();
    let group = results.ret(previous);
    assert!(fields.iter().all(|&call| results.ret(call) == group) && group > 0);
    assert_eq!(i64::from(results.u32(out, (1 << 20) + 4)), group);
    injection.finish().unwrap();
}

#[test]
fn a_conduit_passes_descriptors() {
    use std::os::fd::{AsFd, AsRawFd};
    let child = Child::fork(pause);
    let mut injection = Injection::start(&child.seize()).unwrap();
    let conduit = Conduit::open(&mut injection, 1000).unwrap();
    let file = std::fs::File::open("/proc/self/status").unwrap();
    let fds = conduit.send(&mut injection, &vec![file.as_fd(); 300]).unwrap();
    assert_eq!(fds.len(), 300);
    let link = |pid: i32, fd: i32| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
    let me = i32::try_from(std::process::id()).unwrap();
    for fd in fds {
        assert_eq!(link(child.0, fd), link(me, file.as_raw_fd()));
    }
    assert!(link(child.0, 1000).to_string_lossy().starts_with("socket:"));
    conduit.close(&mut injection).unwrap();
    assert!(!std::path::Path::new(&format!("/proc/{}/fd/1000", child.0)).exists());
}

#[test]
fn a_copy_that_was_left_behind_is_buried() {
    use crate::checkpoint::memory::snapshot::bury;
    use crate::checkpoint::task::freeze::children;
    let child = Child::fork(|| {
        // SAFETY: as fork(2), but that the child's end is not announced.
        unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
        loop {
            pause();
        }
    });
    let end = soon();
    let copy = loop {
        if let Some(copy) = children(child.0).first() {
            break *copy;
        }
        assert!(Instant::now() < end, "the child has no copy");
        std::thread::yield_now();
    };
    // SAFETY: a descendant of ours.
    unsafe { libc::kill(copy, libc::SIGKILL) };
    bury(&[child.0], i64::MAX).unwrap();
    assert_eq!(children(child.0), [copy], "it is older than who is said to have left it");
    bury(&[child.0], 0).unwrap();
    assert_eq!(children(child.0), [0; 0]);
}

#[test]
fn a_copy_is_buried_by_who_has_got_it() {
    use crate::checkpoint::memory::snapshot::reap_in_passing;
    use crate::checkpoint::task::freeze::children;
    let child = Child::fork(|| {
        // SAFETY: numbers only.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
        // SAFETY: as fork(2).
        if unsafe { libc::fork() } == 0 {
            // SAFETY: as fork(2), but that the child's end is not announced.
            unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
        }
        loop {
            pause();
        }
    });
    let end = soon();
    let only = |of: i32| loop {
        if let Some(one) = children(of).first() {
            break *one;
        }
        assert!(Instant::now() < end, "{of} has no child");
        std::thread::yield_now();
    };
    let parent = only(child.0);
    let copy = only(parent);
    // SAFETY: descendants of ours.
    unsafe { libc::kill(copy, libc::SIGKILL) };
    while crate::checkpoint::task::status::Status::of(copy).unwrap().state != 'Z' {
        assert!(Instant::now() < end, "the copy does not end");
        std::thread::yield_now();
    }
    // SAFETY: as before. Its children go to its own parent at any moment from here on.
    unsafe { libc::kill(parent, libc::SIGKILL) };
    reap_in_passing(copy).unwrap();
    assert!(!children(child.0).contains(&copy));
}

/// Not a test: prints what things cost. `cargo test --release -- --ignored --nocapture costs`
#[test]
#[ignore = "prints measurements"]
fn costs() {
    let child = Child::fork(|| {
        loop {
            pause();
        }
    });
    let time = |what: &str, n: u32, mut run: Box<dyn FnMut() + '_>| {
        let start = Instant::now();
        (0..n).for_each(|_| run());
        println!("{what}: {:.2?}", start.elapsed() / n);
    };
    let thread = child.seize();
    time("start and finish", 500, Box::new(|| Injection::start(&thread).unwrap().finish().unwrap()));
    let mut injection = Injection::start(&thread).unwrap();
    let mut batch = Batch::new();
    batch.call(libc::SYS_getppid, &[]);
    time("batch of 1", 1000, Box::new(|| drop(injection.run(&batch).unwrap())));
    (0..66).for_each(|_| _ = batch.call(libc::SYS_getppid, &[]));
    time("batch of 67", 1000, Box::new(|| drop(injection.run(&batch).unwrap())));
    injection.settle(WINDOW).unwrap();
    let args = CloneArgs { exit_signal: libc::SIGCHLD, ..CloneArgs::default() };
    time(
        "child, made and ended",
        200,
        Box::new(|| {
            let (child, injected) = injection.clone_child(&args).unwrap();
            injected.exit_child(Exit::Code(0)).unwrap();
            injection.syscall(libc::SYS_wait4, &[child.tid().into(), 0.into(), 0.into(), 0.into()]).unwrap();
        }),
    );
}
