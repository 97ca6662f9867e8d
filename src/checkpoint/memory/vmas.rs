//! What a mapping is, in the words of the image format: from a line of `maps` to a [`VmaEntry`].
//!
//! ```text
//!   maps + VmFlags + map_files ──> Vma { entry, backing }
//!                                        │      └─ whose contents these are, for the dump alone
//!                                        └─ status: what kind (one REGULAR thing, or a special area of the kernel)
//!                                           flags:  MAP_* as mmap(2) takes them
//!                                           madv:   one bit for each madvise(2) that was given
//! ```
//!
//! Memory that no restore could bring back is refused here, by address and name.

use std::fmt;

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{VmaEntry, vma as status};
use crate::checkpoint::memory::aio;
use crate::checkpoint::memory::maps::{Mapping, VmFlags};
use crate::checkpoint::memory::marks::Mark;

/// `MAP_DROPPABLE`: pages that the kernel may drop at any time. A type beside `MAP_PRIVATE`; Linux 6.11.
pub const MAP_DROPPABLE: u32 = 0x08;
/// `MAP_HUGETLB`, and the size of the pages.
pub const HUGE: u32 = (libc::MAP_HUGETLB | libc::MAP_HUGE_MASK << libc::MAP_HUGE_SHIFT).cast_unsigned();
/// `madvise(2)` advice that a `VmFlags` word shows, and how it is spelt there.
pub const ADVICE: [(&[u8; 2], u32); 8] = [
    (b"rr", libc::MADV_RANDOM.cast_unsigned()),
    (b"sr", libc::MADV_SEQUENTIAL.cast_unsigned()),
    (b"dc", libc::MADV_DONTFORK.cast_unsigned()),
    (b"mg", libc::MADV_MERGEABLE.cast_unsigned()),
    (b"hg", libc::MADV_HUGEPAGE.cast_unsigned()),
    (b"nh", libc::MADV_NOHUGEPAGE.cast_unsigned()),
    (b"dd", libc::MADV_DONTDUMP.cast_unsigned()),
    (b"wf", libc::MADV_WIPEONFORK.cast_unsigned()),
];

/// Where the contents of a mapping are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// In the process, or nowhere: its private pages are all there is.
    Process,
    /// In a file, with private pages over it where the mapping is private.
    File,
    /// In anonymous memory shared between processes, which the inode number tells apart.
    Shared,
    /// In the System V segment of this id.
    SystemV(u32),
    /// In a ring of io_uring, whose file has the inode of the mapping.
    Ring,
    /// In a ring of Linux AIO.
    Aio,
}

/// How `maps` calls a ring of io_uring; from this offset on it has buffers that the kernel provides.
const RING: &[u8] = b"anon_inode:[io_uring]";
const RING_END: u64 = 0x8000_0000;

/// What `/proc/PID/map_files` says about a mapping of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileFacts {
    /// `st_mode`
    pub mode: u32,
    /// `st_dev`
    pub device: u64,
    /// `st_rdev`
    pub special: u64,
    /// `st_blksize`: of hugetlbfs, the size of its pages.
    pub block: u64,
    /// How the file was opened for the mapping: `O_RDONLY`, `O_WRONLY` or `O_RDWR`.
    pub access: u32,
}

/// One mapping of a live task.
#[derive(Debug, Clone, PartialEq)]
pub struct Vma {
    /// As it goes into the image; `shmid` is filled in when its file has an id.
    pub entry: VmaEntry,
    /// Where its contents are.
    pub backing: Backing,
    /// The line of `maps`.
    pub mapping: Mapping,
    /// Its pages are locked as they come: `mlock2(MLOCK_ONFAULT)`. The image has no place for this.
    pub lock_on_fault: bool,
    /// What is on it; the image has no place for this, either.
    pub mark: Mark,
}

/// Describes a mapping. `file` is what `map_files` says, if it has an entry; `internal` is the device of the kernel's own
/// tmpfs, home of all shared memory without a path.
pub fn describe(mapping: &Mapping, flags: VmFlags, file: Option<FileFacts>, internal: u64) -> Result<Vma> {
    let special = special(mapping.name());
    refuse(mapping, flags, special)?;
    let mut entry = VmaEntry {
        start: mapping.start,
        end: mapping.end,
        pgoff: mapping.offset,
        prot: mapping.prot,
        flags: if mapping.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE }.cast_unsigned(),
        status: special.unwrap_or(status::REGULAR),
        fd: -1,
        ..VmaEntry::default()
    };
    for (word, flag) in
        [(b"gd", libc::MAP_GROWSDOWN), (b"lo", libc::MAP_LOCKED), (b"nr", libc::MAP_NORESERVE)]
    {
        if flags.has(word) {
            entry.flags |= flag.cast_unsigned();
        }
    }
    if flags.has(b"dp") {
        entry.flags = entry.flags & !libc::MAP_PRIVATE.cast_unsigned() | MAP_DROPPABLE;
    }
    let advice = ADVICE.iter().filter(|(word, _)| flags.has(word)).fold(0, |bits, (_, n)| bits | 1 << n);
    entry.madv = (advice != 0).then_some(advice);
    let backing = match file {
        _ if special == Some(status::AIORING) => {
            entry.fdflags = Some(libc::O_RDWR.cast_unsigned());
            Backing::Aio
        }
        _ if mapping.name() == RING => {
            entry.status |= status::FILE_SHARED;
            entry.fdflags = Some(libc::O_RDWR.cast_unsigned());
            Backing::Ring
        }
        None => {
            entry.flags |= libc::MAP_ANONYMOUS.cast_unsigned();
            entry.status |= status::ANON_PRIVATE;
            Backing::Process
        }
        Some(file) if flags.has(b"ht") => {
            entry.flags |= libc::MAP_HUGETLB.cast_unsigned();
            entry.flags |= file.block.max(1).ilog2() << libc::MAP_HUGE_SHIFT;
            if mapping.shared {
                // What the kernel has on its own hugetlbfs is named as on its own tmpfs.
                let name = mapping.name();
                let begins =
                    [HUGE_ANONYMOUS, b"/SYSV", b"/memfd:"].iter().any(|begin| name.starts_with(begin));
                let own = begins && name.ends_with(b" (deleted)");
                backing(mapping, file, if own { file.device } else { internal }, &mut entry)?
            } else {
                entry.flags |= libc::MAP_ANONYMOUS.cast_unsigned();
                entry.status |= status::ANON_PRIVATE;
                Backing::Process
            }
        }
        Some(file) => backing(mapping, file, internal, &mut entry)?,
    };
    let (lock_on_fault, mark) = (flags.has(b"lf"), Mark::of(mapping, flags));
    Ok(Vma { entry, backing, mapping: mapping.clone(), lock_on_fault, mark })
}

/// How a file begins that the kernel has made for a mapping of huge pages alone: `MAP_ANONYMOUS|MAP_HUGETLB`.
const HUGE_ANONYMOUS: &[u8] = b"/anon_hugepage";

/// The size of the pages of a mapping, if it is one of huge pages.
pub fn huge(entry: &VmaEntry) -> Option<u64> {
    let huge = entry.flags & libc::MAP_HUGETLB.cast_unsigned() != 0;
    let size = entry.flags >> libc::MAP_HUGE_SHIFT & libc::MAP_HUGE_MASK.cast_unsigned();
    // Without a size it is that of this processor: 2 MiB.
    huge.then(|| 1 << if size == 0 { 21 } else { size })
}

/// The status of an area that the kernel named.
fn special(name: &[u8]) -> Option<u32> {
    match name {
        b"[vsyscall]" => Some(status::VSYSCALL),
        b"[vdso]" => Some(status::REGULAR | status::VDSO),
        b"[vvar]" | b"[vvar_vclock]" => Some(status::REGULAR | status::VVAR),
        b"[heap]" => Some(status::REGULAR | status::HEAP),
        name if name.starts_with(aio::NAME) => Some(status::AIORING),
        _ => None,
    }
}

fn backing(mapping: &Mapping, file: FileFacts, internal: u64, entry: &mut VmaEntry) -> Result<Backing> {
    entry.fdflags = Some(file.access);
    let regular = file.mode & libc::S_IFMT == libc::S_IFREG;
    let zero = file.mode & libc::S_IFMT == libc::S_IFCHR && file.special == libc::makedev(1, 5);
    if !regular && !zero {
        return Err(refusal(mapping, "a mapping of a device or socket"));
    }
    let name = mapping.name();
    if regular && file.device == internal && mapping.shared {
        if name.starts_with(b"/SYSV") {
            entry.flags |= libc::MAP_ANONYMOUS.cast_unsigned();
            entry.status |= status::ANON_SHARED | status::SYSVIPC;
            // The inode of a segment has its id for a number.
            entry.shmid = mapping.inode;
            let id = u32::try_from(mapping.inode).map_err(|_| refusal(mapping, "a strange segment"))?;
            return Ok(Backing::SystemV(id));
        }
        let anonymous = [&b"/dev/zero"[..], b"[anon_shmem:", HUGE_ANONYMOUS];
        if anonymous.iter().any(|begin| name.starts_with(begin)) {
            entry.flags |= libc::MAP_ANONYMOUS.cast_unsigned();
            entry.status |= status::ANON_SHARED;
            return Ok(Backing::Shared);
        }
    }
    if regular && file.device == internal {
        entry.status |= status::MEMFD;
    }
    entry.status |= if mapping.shared { status::FILE_SHARED } else { status::FILE_PRIVATE };
    Ok(Backing::File)
}

fn refuse(mapping: &Mapping, flags: VmFlags, special: Option<u32>) -> Result<()> {
    let name = mapping.name();
    let what = if special == Some(status::AIORING) && (!mapping.shared || mapping.offset != 0) {
        "a part of a ring of Linux AIO"
    } else if name == RING && (!mapping.shared || mapping.offset >= RING_END) {
        "a part of an io_uring that is neither its queues nor its requests"
    } else if name == RING {
        return Ok(());
    } else if name == b"[uprobes]" {
        "a page of a tracer's uprobes"
    } else if flags.has(b"um") || flags.has(b"uw") || flags.has(b"ui") {
        "memory that userfaultfd watches"
    } else if flags.has(b"ht") && !mapping.shared && !name.starts_with(HUGE_ANONYMOUS) {
        "huge pages of a file that are private to the process"
    } else if flags.has(b"ss") {
        "a shadow stack"
    } else if flags.has(b"sl") && special.is_some_and(|special| special & status::HEAP == 0) {
        "a part of the kernel that is sealed"
    } else if (flags.has(b"pf") || flags.has(b"io"))
        && special != Some(status::REGULAR | status::VVAR)
        && special != Some(status::REGULAR | status::VDSO)
    {
        "a mapping of device memory"
    } else if name.starts_with(b"anon_inode:") {
        "a mapping of a kernel object"
    } else if mapping.shared && name == b"/secretmem (deleted)" && flags.has(b"dd") {
        "secret memory, which only the program can read (memfd_secret)"
    } else {
        return Ok(());
    };
    Err(refusal(mapping, what))
}

fn refusal(mapping: &Mapping, what: &str) -> Error {
    Error::new(format!("cannot checkpoint {what} at {}", Range(mapping.start, mapping.end)))
        .path(&mapping.name)
        .remedy("let the program release it before the checkpoint")
}

/// An address range as `maps` prints it.
pub struct Range(pub u64, pub u64);

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x}", self.0, self.1)
    }
}

/// Joins the parts of the vdso's data, as CRIU does: `[vvar]` and `[vvar_vclock]` are one entry of the image.
pub fn join_vvar(vmas: &mut Vec<Vma>) {
    vmas.dedup_by(|next, vma| {
        let both = vma.entry.status & next.entry.status & status::VVAR != 0;
        let join = both && vma.entry.end == next.entry.start;
        if join {
            vma.entry.end = next.entry.end;
        }
        join
    });
}

/// Whether a mapping has pages of its own in pages-N.img.
pub fn has_private_pages(entry: &VmaEntry) -> bool {
    if aio::is(entry) {
        return true;
    }
    let private = status::ANON_PRIVATE | status::FILE_PRIVATE;
    entry.status & status::REGULAR != 0
        && entry.status & private != 0
        && entry.status & (status::VVAR | status::GUARD) == 0
        && entry.flags & MAP_DROPPABLE == 0
}

/// Whether it may have pages of its own, or guards.
pub fn may_have_guards(entry: &VmaEntry) -> bool {
    entry.status & status::REGULAR != 0 && entry.status & (status::VVAR | status::GUARD) == 0
}

/// Whether writes to its pages can be noted.
pub fn may_be_watched(entry: &VmaEntry) -> bool {
    has_private_pages(entry) && entry.status & (status::VDSO | status::AIORING) == 0 && huge(entry).is_none()
}

/// Whether its pages may be filled after the process runs.
pub fn may_be_lazy(entry: &VmaEntry) -> bool {
    let anonymous = libc::MAP_ANONYMOUS.cast_unsigned() | libc::MAP_PRIVATE.cast_unsigned();
    entry.flags & anonymous == anonymous
        && entry.flags & libc::MAP_LOCKED.cast_unsigned() == 0
        && huge(entry).is_none()
        && entry.status & (status::VDSO | status::VVAR | status::VSYSCALL) == 0
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    const INTERNAL: u64 = 1;

    fn mapping(shared: bool, inode: u64, name: &str) -> Mapping {
        Mapping {
            start: 0x1000,
            end: 0x3000,
            prot: 3,
            shared,
            offset: 0,
            device: (0, 1),
            inode,
            name: OsString::from(name),
        }
    }

    fn regular(device: u64) -> Option<FileFacts> {
        Some(FileFacts { mode: libc::S_IFREG | 0o600, device, special: 0, block: 4096, access: 2 })
    }

    fn describe_as(shared: bool, name: &str, words: &str, file: Option<FileFacts>) -> Result<Vma> {
        describe(&mapping(shared, 7, name), VmFlags::parse(words.as_bytes()), file, INTERNAL)
    }

    /// Status and flags as `crit show mm-1.img` of CRIU's own dumps has them.
    #[test]
    fn entries_are_those_of_criu() {
        let aio = regular(9).map(|file| FileFacts { mode: 0o600, ..file });
        let cases = [
            (false, "", "rd wr", None, 0x201, 0x22),
            (false, "[heap]", "rd wr", None, 0x221, 0x22),
            (false, "[stack]", "rd wr gd", None, 0x201, 0x122),
            (false, "[vdso]", "rd ex de", None, 0x209, 0x22),
            (false, "[vvar]", "rd pf io de dd", None, 0x1201, 0x22),
            (false, "[vsyscall]", "ex", None, 0x204, 0x22),
            (false, "/lib/a.so", "rd", regular(9), 0x41, 0x2),
            (true, "/data", "rd wr sh", regular(9), 0x81, 0x1),
            (true, "/memfd:x (deleted)", "rd", regular(INTERNAL), 0x4081, 0x1),
            (false, "/memfd:x (deleted)", "rd", regular(INTERNAL), 0x4041, 0x2),
            (true, "/SYSV00000000 (deleted)", "rd", regular(INTERNAL), 0x501, 0x21),
            (true, "/dev/zero (deleted)", "rd", regular(INTERNAL), 0x101, 0x21),
            (true, "/[aio] (deleted)", "rd wr sh de", aio, 0x2000, 0x1),
            (false, "", "rd wr lo nr", None, 0x201, 0x6022),
            (false, "", "rd wr nr wf dd dp", None, 0x201, 0x4028),
        ];
        for (shared, name, words, file, status, flags) in cases {
            let vma = describe_as(shared, name, words, file).unwrap();
            assert_eq!((vma.entry.status, vma.entry.flags), (status, flags), "{name} {words}");
            assert_eq!(vma.entry.fdflags, file.map(|f| f.access), "{name}");
        }
    }

    #[test]
    fn private_huge_pages_say_their_size() {
        let file = regular(9).map(|file| FileFacts { block: 1 << 30, ..file });
        let vma = describe_as(false, "/anon_hugepage (deleted)", "rd wr ht", file).unwrap();
        assert_eq!((vma.entry.status, vma.entry.flags), (0x201, 0x22 | 0x40000 | 30 << 26));
        assert_eq!((huge(&vma.entry), vma.entry.fdflags), (Some(1 << 30), None));
        assert!(has_private_pages(&vma.entry) && !may_be_watched(&vma.entry) && !may_be_lazy(&vma.entry));
        assert!(describe_as(false, "/mnt/huge/x", "rd wr ht", file).is_err());
    }

    #[test]
    fn shared_huge_pages_are_told_by_their_files() {
        let file = regular(9).map(|file| FileFacts { block: 2 << 20, ..file });
        let size = 0x40000 | 21 << 26;
        for (name, status, flags, backing) in [
            ("/anon_hugepage (deleted)", 0x101, 0x21 | size, Backing::Shared),
            ("/SYSV00000000 (deleted)", 0x501, 0x21 | size, Backing::SystemV(7)),
            ("/memfd:x (deleted)", 0x4081, 0x1 | size, Backing::File),
            ("/mnt/huge/x", 0x81, 0x1 | size, Backing::File),
        ] {
            let vma = describe_as(true, name, "rd wr sh ht", file).unwrap();
            assert_eq!((vma.entry.status, vma.entry.flags, vma.backing), (status, flags, backing), "{name}");
            assert!(!has_private_pages(&vma.entry) && !may_be_lazy(&vma.entry), "{name}");
        }
    }

    #[test]
    fn advice_is_a_bit_set() {
        let vma = describe_as(false, "", "rd wr dc hg", None).unwrap();
        assert_eq!(vma.entry.madv, Some(1 << 10 | 1 << 14));
        assert_eq!(describe_as(false, "", "rd wr", None).unwrap().entry.madv, None);
    }

    #[test]
    fn what_cannot_be_restored_is_refused_by_name() {
        let device =
            Some(FileFacts { mode: libc::S_IFCHR, device: 5, special: 0x1234, block: 4096, access: 2 });
        let cases = [
            ("anon_inode:[perf_event]", "rd wr", None, "kernel object"),
            ("/secretmem (deleted)", "rd wr sh lo dd", None, "secret memory"),
            ("", "rd wr um", None, "userfaultfd"),
            ("", "rd wr ss", None, "shadow stack"),
            ("[vdso]", "rd ex sl", None, "sealed"),
            ("/dev/mem", "rd wr pf io", None, "device memory"),
            ("/dev/fb0", "rd wr", device, "device or socket"),
        ];
        for (name, words, file, expected) in cases {
            let error = describe_as(true, name, words, file).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("1000-3000"), "{error}");
        }
        let error = describe_as(false, "/[aio] (deleted)", "rd wr", None).unwrap_err().to_string();
        assert!(error.contains("a part of a ring of Linux AIO"), "{error}");
    }

    #[test]
    fn the_parts_of_vvar_are_joined_and_nothing_else() {
        let part = |start, end, name: &str| {
            let mut m = mapping(false, 0, name);
            (m.start, m.end) = (start, end);
            describe(&m, VmFlags::default(), None, INTERNAL).unwrap()
        };
        let mut vmas = vec![
            part(0x1000, 0x2000, ""),
            part(0x2000, 0x6000, "[vvar]"),
            part(0x6000, 0x8000, "[vvar_vclock]"),
            part(0x8000, 0xa000, "[vdso]"),
        ];
        join_vvar(&mut vmas);
        let ends: Vec<u64> = vmas.iter().map(|v| v.entry.end).collect();
        assert_eq!(ends, [0x2000, 0x8000, 0xa000]);
    }

    #[test]
    fn private_pages_are_those_of_private_mappings() {
        let private = |shared, name, words, file| {
            has_private_pages(&describe_as(shared, name, words, file).unwrap().entry)
        };
        assert!(private(false, "", "rd", None));
        assert!(private(false, "/lib/a.so", "rd", regular(9)));
        assert!(private(false, "[vdso]", "rd", None));
        assert!(!private(false, "[vvar]", "rd", None));
        assert!(!private(false, "[vsyscall]", "ex", None));
        assert!(!private(true, "/data", "rd", regular(9)));
        assert!(!private(false, "", "rd wr dp", None));
    }
}
