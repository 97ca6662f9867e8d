//! A task must go on rightly when its driver is killed, at whatever moment.

use std::process::Command;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;

use super::*;

/// Words of the shared page: each worker counts in its own, and names what went wrong in `WRONG`.
const COMPUTE: usize = 0;
const SLEEP: usize = 1;
const PIPE: usize = 2;
const WAIT: usize = 3;
const WORKERS: usize = 5;
const WRONG: usize = 10;
const TIDS: usize = 20;
/// A driver has come this far.
const PROGRESS: usize = 30;

/// Blocks a mask that no other thread has; it must stay.
fn own_mask(worker: usize) -> u64 {
    0x4000_0000 | (1 << (33 + worker))
}

fn raw_mask(how: libc::c_int, set: Option<u64>) -> u64 {
    let mut old = 0u64;
    let set = set.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: both pointers are null or to live words of the size that is given.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, set, &raw mut old, 8) };
    old
}

fn check(shared: &Shared, worker: usize, right: bool, code: u64) {
    if !right {
        shared.set(WRONG, 100 * (worker as u64 + 1) + code);
    }
    let expected = own_mask(worker);
    if raw_mask(libc::SIG_SETMASK, None) != expected {
        shared.set(WRONG, 100 * (worker as u64 + 1) + 99);
    }
    shared.set(worker, shared.get(worker) + 1);
}

/// Computes with registers, flags and vector registers for a while.
fn compute() -> (u64, f64) {
    let (mut sum, mut wave) = (0u64, 0f64);
    for i in 0..20_000u64 {
        sum = sum.rotate_left(7).wrapping_add(i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        sum = sum.wrapping_sub(u64::from(sum & 0xffff > i));
        wave += (i as f64).sqrt();
    }
    (sum, wave)
}

fn work(shared: &Shared, worker: usize, pipes: &[[i32; 2]; 2], catch: bool) {
    // SAFETY: system calls on descriptors and memory of our own.
    unsafe {
        shared.set(TIDS + worker, u64::try_from(libc::gettid()).unwrap_or(0));
        raw_mask(libc::SIG_SETMASK, Some(own_mask(worker)));
        let mut byte = 0u8;
        let expected = compute();
        loop {
            match worker {
                COMPUTE => check(shared, worker, std::hint::black_box(compute()) == expected, 1),
                SLEEP => {
                    let start = Instant::now();
                    let time = libc::timespec { tv_sec: 0, tv_nsec: 2_000_000 };
                    let slept = libc::nanosleep(&raw const time, null_mut());
                    // The handler of a caught signal interrupts it.
                    let interrupted = catch && Errno::last() == Errno::EINTR;
                    check(shared, worker, slept == 0 || interrupted, 1);
                    check(shared, worker, slept != 0 || start.elapsed() >= Duration::from_millis(2), 2);
                }
                PIPE => {
                    let put = libc::write(pipes[0][1], (&raw const byte).cast(), 1);
                    let mut got = !byte;
                    let read = libc::read(pipes[1][0], (&raw mut got).cast(), 1);
                    check(shared, worker, (put, read, got) == (1, 1, byte), 1);
                    byte = byte.wrapping_add(1);
                }
                WAIT => {
                    let read = libc::read(pipes[0][0], (&raw mut byte).cast(), 1);
                    let put = libc::write(pipes[1][1], (&raw const byte).cast(), 1);
                    check(shared, worker, (read, put) == (1, 1), 1);
                }
                _ => {
                    // Interrupted system calls of the kind that is not started again after a handler.
                    let mut none = libc::pollfd { fd: -1, events: 0, revents: 0 };
                    let time = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                    let all = [u64::MAX; 16];
                    let polled = libc::ppoll(&raw mut none, 1, &raw const time, all.as_ptr().cast());
                    check(shared, worker, polled == 0, 1);
                }
            }
        }
    }
}

extern "C" fn count(_: i32) {}

/// The victim: one worker a thread.
fn victim(shared: &Shared, catch: bool) {
    // SAFETY: zero is a valid sigaction; pipes are ours.
    let pipes = unsafe {
        if catch {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count as extern "C" fn(i32) as usize;
            action.sa_flags = libc::SA_RESTART;
            for signal in [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD, libc::SIGCONT] {
                libc::sigaction(signal, &raw const action, null_mut());
            }
        }
        let mut pipes = [[0; 2]; 2];
        pipes.iter_mut().for_each(|pair| assert_eq!(libc::pipe(pair.as_mut_ptr()), 0));
        pipes
    };
    std::thread::scope(|scope| {
        for worker in 1..WORKERS {
            scope.spawn(move || work(shared, worker, &pipes, catch));
        }
        work(shared, COMPUTE, &pipes, catch);
    });
}

// The page of words is made to be shared.
// SAFETY: all access is volatile, word by word.
unsafe impl Sync for Shared {}

/// Drives one thread of the victim without end, and then `beside` it another, and is killed in the middle.
fn drive(shared: &Shared, tid: i32, beside: Option<i32>) {
    let mut batch = Batch::new();
    for _ in 0..40 {
        batch.call(libc::SYS_getppid, &[]);
    }
    let out = batch.out(8);
    batch.call(libc::SYS_pipe2, &[out.arg(), libc::O_CLOEXEC.into()]);
    batch.call(libc::SYS_close, &[out.load_u32(0)]);
    batch.call(libc::SYS_close, &[out.load_u32(4)]);
    let run = |injection: &mut Injection| {
        if let Err(error) = injection.run(&batch) {
            eprintln!("{error}");
            shared.set(WRONG, 2);
        }
    };
    let stopped = |tid: i32| {
        let thread = Thread::seize(tid).ok()?;
        thread.stop(Instant::now() + Duration::from_secs(60)).ok()?;
        Some(thread)
    };
    while shared.get(PROGRESS) < u64::MAX {
        let Some(thread) = stopped(tid) else { continue };
        let Ok(mut injection) = Injection::start(&thread) else {
            shared.set(WRONG, 1);
            return;
        };
        (0..3).for_each(|_| run(&mut injection));
        if let Some(other) = beside.and_then(stopped) {
            let Ok(mut lent) = injection.lend() else {
                shared.set(WRONG, 4);
                return;
            };
            for _ in 0..3 {
                let facts = Facts::read(other.tid()).unwrap();
                let Ok(mut injection) = lent.start(&other, &facts, -1) else {
                    shared.set(WRONG, 5);
                    return;
                };
                run(&mut injection);
                if injection.finish().is_err() {
                    shared.set(WRONG, 6);
                }
            }
            drop(lent);
            if other.detach().is_err() {
                shared.set(WRONG, 7);
            }
        }
        if injection.finish().is_err() || thread.detach().is_err() {
            shared.set(WRONG, 3);
        }
        shared.set(PROGRESS, shared.get(PROGRESS) + 1);
    }
}

fn mappings(pid: i32) -> usize {
    std::fs::read_to_string(format!("/proc/{pid}/maps"))
        .unwrap()
        .lines()
        .filter(|l| l.contains("-w-p"))
        .count()
}

/// Waits for what has to come, however busy the machine is.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

/// Kills drivers for a while; a busy machine sees fewer of them.
fn survive(catch: bool, lend: bool) {
    // One at a time: they are made to be timing-dependent.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let shared = Shared::new();
    let child = Child::fork(|| victim(&shared, catch));
    let ready = |worker: usize| shared.get(TIDS + worker) != 0 && shared.get(worker) != 0;
    until("the victim does not start", || (0..WORKERS).all(ready));
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let limit = Instant::now() + Duration::from_millis(1500);
    let mut killed = 0;
    while Instant::now() < limit {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let worker = usize::try_from(random % WORKERS as u64).unwrap();
        let tid = i32::try_from(shared.get(TIDS + worker)).unwrap();
        let next = shared.get(TIDS + (worker + 1) % WORKERS);
        let beside = lend.then(|| i32::try_from(next).unwrap());
        let driver = Child::fork(|| drive(&shared, tid, beside));
        // A random moment is what this is about.
        std::thread::sleep(Duration::from_micros(random >> 16 & 0xfff));
        drop(driver);
        killed += 1;
        for worker in 0..WORKERS {
            let before = shared.get(worker);
            until(&format!("worker {worker} hangs after round {killed}"), || shared.get(worker) > before);
        }
        assert_eq!(shared.get(WRONG), 0, "after round {killed}");
    }
    // One that is not killed still finds the victim as it should be.
    let (before, tid) = (shared.get(PROGRESS), i32::try_from(shared.get(TIDS)).unwrap());
    let driver = Child::fork(|| drive(&shared, tid, None));
    until("no driver comes to an end any more", || shared.get(PROGRESS) > before);
    drop(driver);
    // What is lent is nobody's for a moment, between two threads.
    until("scratch memory is left behind", || lend || mappings(child.0) == 0);
    assert_eq!(shared.get(WRONG), 0, "after the last");
    println!("{killed} drivers killed, {} injections whole", shared.get(PROGRESS));
}

#[test]
fn the_drivers_death_does_no_harm() {
    survive(false, false);
}

#[test]
fn nor_where_all_harmless_signals_are_caught() {
    survive(true, false);
}

#[test]
fn nor_that_of_one_that_lends_memory() {
    survive(false, true);
}

/// A 32-bit program, which counts in word 0 of a page that it shares with us, and says in word 1 what went wrong.
fn victim_32(dir: &std::path::Path) -> (Child, Shared) {
    let (code, program, page) = (dir.join("victim.c"), dir.join("victim"), dir.join("page"));
    std::fs::write(&code, include_str!("victim_32.c")).unwrap();
    let flags = ["-m32", "-O1", "-nostdlib", "-static", "-ffreestanding", "-fno-pie", "-no-pie"];
    let mut gcc = Command::new("gcc");
    gcc.args(flags).args(["-fno-stack-protector", "-fomit-frame-pointer", "-o"]);
    assert!(gcc.arg(&program).arg(&code).status().unwrap().success());
    std::fs::write(&page, [0; 4096]).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&page).unwrap();
    let child = Child::spawn(Command::new(&program).arg(&page));
    (child, Shared::of(&file))
}

#[test]
fn nor_in_a_32_bit_program() {
    if !std::path::Path::new("/proc/sys/abi/vsyscall32").exists() {
        println!("not tried: this kernel runs no 32-bit programs");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (child, counts) = victim_32(dir.path());
    let shared = Shared::new();
    until("the victim does not start", || counts.get(0) > 2);
    let maps = || std::fs::read_to_string(format!("/proc/{}/maps", child.0)).unwrap().lines().count();
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let (before, limit) = (maps(), Instant::now() + Duration::from_millis(1000));
    let mut killed = 0;
    while Instant::now() < limit {
        random = random.rotate_left(11).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let driver = Child::fork(|| drive(&shared, child.0, None));
        // A random moment is what this is about.
        std::thread::sleep(Duration::from_micros(random >> 16 & 0xfff));
        drop(driver);
        killed += 1;
        let count = counts.get(0);
        until(&format!("the victim hangs after round {killed}"), || counts.get(0) > count);
        assert_eq!((shared.get(WRONG), counts.get(1)), (0, 0), "after round {killed}");
    }
    until("scratch memory is left behind", || maps() == before);
    println!("{killed} drivers killed, {} injections whole", shared.get(PROGRESS));
}
