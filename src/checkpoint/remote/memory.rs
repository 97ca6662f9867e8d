//! Memory of a stopped task, and the few lines of /proc that the driver needs.

use std::cell::OnceCell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::checkpoint::error::{Context, Error, Result};
use crate::sys::procfs::{read_bytes, read_text};

/// Reads and writes a task's memory, whatever the protection of its mappings.
#[derive(Debug)]
pub(super) struct Memory {
    tid: i32,
    /// /proc/TID/mem, opened when process_vm_readv(2) or its sibling is refused.
    file: OnceCell<File>,
}

impl Memory {
    pub(super) fn new(tid: i32) -> Self {
        Self { tid, file: OnceCell::new() }
    }

    pub(super) fn read(&self, addr: u64, into: &mut [u8]) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        let remote = libc::iovec { iov_base: addr as *mut _, iov_len: into.len() };
        // SAFETY: local is a live, writable buffer; remote addresses are checked by the kernel.
        let got = unsafe { libc::process_vm_readv(self.tid, &raw const local, 1, &raw const remote, 1, 0) };
        if usize::try_from(got) == Ok(into.len()) {
            return Ok(());
        }
        self.read_forced(addr, into)
    }

    /// Reads a mapping that is not readable, as the scratch of a live task: process_vm_readv(2) would be in vain.
    pub(super) fn read_forced(&self, addr: u64, into: &mut [u8]) -> Result<()> {
        self.file()?.read_exact_at(into, addr).during("cannot read the task's memory", || {
            format!("pread(/proc/{}/mem, {} bytes, {addr:#x})", self.tid, into.len())
        })
    }

    pub(super) fn write(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = libc::iovec { iov_base: addr as *mut _, iov_len: bytes.len() };
        // SAFETY: local is a live buffer that is only read; remote addresses are checked by the kernel.
        let put = unsafe { libc::process_vm_writev(self.tid, &raw const local, 1, &raw const remote, 1, 0) };
        if usize::try_from(put) == Ok(bytes.len()) {
            return Ok(());
        }
        self.force(addr, bytes)
    }

    /// Writes to a mapping that is not writable: through /proc/TID/mem, which makes a private copy of the page.
    pub(super) fn force(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        self.file()?.write_all_at(bytes, addr).during("cannot write the task's memory", || {
            format!("pwrite(/proc/{}/mem, {} bytes, {addr:#x})", self.tid, bytes.len())
        })
    }

    pub(super) fn word(&self, addr: u64) -> Result<u64> {
        let mut word = [0; 8];
        self.read(addr, &mut word)?;
        Ok(u64::from_ne_bytes(word))
    }

    fn file(&self) -> Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let path = format!("/proc/{}/mem", self.tid);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .during("cannot open the task's memory", || format!("open({path:?}, O_RDWR)"))?;
        Ok(self.file.get_or_init(|| file))
    }
}

/// What `/proc/TID/status` says of a thread that batches go by.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Thread group and thread, in the innermost pid namespace.
    pub ids: (i32, i32),
    /// Signals queued for the thread or its process.
    pub pending: u64,
    /// Those that it blocks.
    pub blocked: u64,
    /// Those that have a handler.
    pub caught: u64,
    /// Those that it ignores.
    pub ignored: u64,
}

impl Facts {
    pub(super) fn read(tid: i32) -> Result<Self> {
        let path = format!("/proc/{tid}/status");
        let text = read_text(&path)
            .during("cannot read the thread's status", || format!("open({path:?}, O_RDONLY)"))?;
        Self::parse(&text).ok_or_else(|| Error::new("cannot understand the thread's status").path(&path))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut facts = Self::default();
        for line in text.lines() {
            let Some((name, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            let last = || value.rsplit(char::is_whitespace).next()?.parse().ok();
            let mask = || u64::from_str_radix(value, 16).ok();
            match name {
                "NStgid" => facts.ids.0 = last()?,
                "NSpid" => facts.ids.1 = last()?,
                "SigPnd" | "ShdPnd" => facts.pending |= mask()?,
                "SigBlk" => facts.blocked = mask()?,
                "SigIgn" => facts.ignored = mask()?,
                "SigCgt" => facts.caught = mask()?,
                _ => {}
            }
        }
        (facts.ids.0 > 0 && facts.ids.1 > 0).then_some(facts)
    }
}

/// The process of a thread, in our pid namespace.
pub(super) fn process_of(tid: i32) -> Result<i32> {
    let path = format!("/proc/{tid}/status");
    let text =
        read_text(&path).during("cannot read the thread's status", || format!("open({path:?}, O_RDONLY)"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Tgid:"));
    line.and_then(|pid| pid.trim().parse().ok())
        .ok_or_else(|| Error::new("cannot understand the thread's status").path(&path))
}

/// Where the kernel put the vdso when the program was started (AT_SYSINFO_EHDR). None if it has none.
pub(super) fn vdso_of_auxv(tid: i32) -> Result<Option<u64>> {
    const AT_SYSINFO_EHDR: u64 = 33;
    let path = format!("/proc/{tid}/auxv");
    let auxv = read_bytes(&path)
        .during("cannot read the auxiliary vector", || format!("open({path:?}, O_RDONLY)"))?;
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or(0);
    let pair = auxv.chunks_exact(16).find(|pair| word(&pair[..8]) == AT_SYSINFO_EHDR);
    Ok(pair.map(|pair| word(&pair[8..])).filter(|&addr| addr != 0))
}

/// Where the vdso is mapped now, start and end, as /proc/TID/maps says.
pub(super) fn vdso_of_maps(tid: i32) -> Result<Option<(u64, u64)>> {
    let path = format!("/proc/{tid}/maps");
    let maps =
        read_bytes(&path).during("cannot read the mappings", || format!("open({path:?}, O_RDONLY)"))?;
    let line = maps.split(|&b| b == b'\n').find(|line| line.ends_with(b"[vdso]"));
    Ok(line.and_then(|line| {
        let range = std::str::from_utf8(line.split(|&b| b == b' ').next()?).ok()?;
        let (start, end) = range.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    }))
}

/// Executable mappings, start and end.
pub(super) fn executable(tid: i32) -> Result<Vec<(u64, u64)>> {
    let path = format!("/proc/{tid}/maps");
    let maps =
        read_bytes(&path).during("cannot read the mappings", || format!("open({path:?}, O_RDONLY)"))?;
    let parse = |line: &[u8]| {
        let mut words = line.split(|&b| b == b' ');
        let range = std::str::from_utf8(words.next()?).ok()?;
        let (start, end) = range.split_once('-')?;
        (words.next()?.get(2) == Some(&b'x'))
            .then_some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    };
    Ok(maps.split(|&b| b == b'\n').filter_map(parse).collect())
}

/// A thread's state and where it sleeps, in words, for errors about a thread that does not stop.
pub(super) fn standing(tid: i32) -> String {
    let stat = read_text(format!("/proc/{tid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    let wchan = read_text(format!("/proc/{tid}/wchan")).unwrap_or_default();
    match state {
        None => format!("thread {tid} is gone"),
        Some(state) if wchan.is_empty() || wchan == "0" => format!("thread {tid} is in state {state}"),
        Some(state) => format!("thread {tid} is in state {state}, in {wchan}"),
    }
}

/// True if the process of `tid` runs on the same memory as the process of `other`.
pub(super) fn shares_memory(tid: i32, other: i32) -> nix::Result<bool> {
    const KCMP_VM: i32 = 1;
    // SAFETY: kcmp takes numbers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, tid, other, KCMP_VM, 0, 0) };
    Errno::result(order).map(|order| order == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_of_a_thread_in_a_nested_namespace() {
        let text = "Name:\tx\nTgid:\t71\nNStgid:\t71\t1\nNSpid:\t72\t2\nSigPnd:\t0000000000000001\n\
                    ShdPnd:\t0000000000000100\nSigBlk:\t00000000fffffff0\nSigCgt:\t0000000000400000\n";
        let facts = Facts::parse(text).unwrap();
        assert_eq!(facts.ids, (1, 2));
        assert_eq!((facts.pending, facts.blocked, facts.caught), (0x101, 0xffff_fff0, 0x40_0000));
    }

    #[test]
    fn own_memory_is_shared_with_itself() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(shares_memory(me, me).unwrap());
    }

    #[test]
    fn auxv_and_maps_agree_on_the_vdso() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert_eq!(vdso_of_auxv(me).unwrap(), vdso_of_maps(me).unwrap().map(|(start, _)| start));
    }

    #[test]
    fn reading_and_writing_own_memory() {
        let memory = Memory::new(i32::try_from(std::process::id()).unwrap());
        let mut value = 7u64;
        assert_eq!(memory.word(&raw const value as u64).unwrap(), 7);
        memory.write(&raw mut value as u64, &8u64.to_ne_bytes()).unwrap();
        // SAFETY: a live local that was changed behind the compiler's back.
        assert_eq!(unsafe { std::ptr::read_volatile(&raw const value) }, 8);
        assert!(memory.read(8, &mut [0; 8]).is_err());
    }
}
