//! The mappings of a live task, each with its file.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{VmaEntry, vma as status};
use crate::checkpoint::memory::look::{Flagged, Looks};
use crate::checkpoint::memory::maps::{self, Mapping, VmFlags};
use crate::checkpoint::memory::vmas::{self, FileFacts, Vma};
use crate::sys::resolve::open_in_root;

/// Describes all mappings of a stopped task, apart from those within `hidden`: what an injection has put there. Its flags,
/// where they were looked at, are of the second value.
/// `watched`: if its memory is write-protected, it is so by us. `looks` may have its flags already, which are not to be
/// trusted if some of it is `locked`.
pub fn read(
    pid: i32,
    hidden: &[Range<u64>],
    watched: bool,
    locked: bool,
    looks: &mut Looks,
) -> Result<(Vec<Vma>, VmFlags)> {
    let is_hidden = |m: &Mapping| hidden.iter().any(|h| h.start <= m.start && m.end <= h.end);
    let known = if looks.know(pid) {
        let mut now = maps::read(pid)?;
        now.retain(|mapping| !is_hidden(mapping));
        looks.of_stopped(pid, &now, locked)
    } else {
        None
    };
    let mut found = known.map_or_else(|| maps::read_with_flags(pid), Ok)?;
    let ours = found.iter().find(|(mapping, _)| is_hidden(mapping)).map(|(_, flags)| *flags);
    found.retain(|(mapping, _)| !is_hidden(mapping));
    Ok((describe(pid, unmarked(found, watched))?, ours.unwrap_or_default()))
}

fn unmarked(mut found: Flagged, watched: bool) -> Flagged {
    if watched {
        found.iter_mut().for_each(|(_, flags)| flags.clear(b"uw"));
    }
    found
}

/// The mappings that can have pages of the task's own, as far as `maps` tells, which is quick.
pub fn private(pid: i32) -> Result<Vec<VmaEntry>> {
    let special = [&b"[vdso]"[..], b"[vvar]", b"[vvar_vclock]", b"[vsyscall]"];
    // Writes to huge pages are not noted: they are saved in the end.
    let left_out = |m: &Mapping| special.contains(&m.name()) || m.name().starts_with(b"/anon_hugepage");
    let mappings = maps::read(pid)?.into_iter().filter(|m| !m.shared && !left_out(m));
    let entry = |mapping: Mapping| {
        let anonymous = mapping.inode == 0;
        let kind = if anonymous { status::ANON_PRIVATE } else { status::FILE_PRIVATE };
        let flags = libc::MAP_PRIVATE | if anonymous { libc::MAP_ANONYMOUS } else { 0 };
        VmaEntry {
            start: mapping.start,
            end: mapping.end,
            pgoff: mapping.offset,
            prot: mapping.prot,
            flags: flags.cast_unsigned(),
            status: status::REGULAR | kind,
            fd: -1,
            ..VmaEntry::default()
        }
    };
    Ok(mappings.map(entry).collect())
}

/// Every mapping of a running task that is refused, unless it is gone already; and all that was seen of it.
pub fn refusals(pid: i32, watched: bool) -> Result<(Vec<Error>, Flagged)> {
    let internal = internal_device()?;
    let found = unmarked(maps::read_with_flags(pid)?, watched);
    let mut files = Files::default();
    let mut check = |(mapping, flags): &(Mapping, VmFlags)| {
        files.facts(pid, mapping).and_then(|file| vmas::describe(mapping, *flags, file, internal))
    };
    let mut refused: Vec<(&Mapping, Error)> =
        found.iter().filter_map(|found| check(found).err().map(|error| (&found.0, error))).collect();
    refused.retain(|(_, error)| error.errno() != Some(Errno::ENOENT));
    if !refused.is_empty() {
        let now = maps::read(pid)?;
        refused.retain(|(mapping, _)| now.contains(mapping));
    }
    let refused = refused.into_iter().map(|(_, error)| error).collect();
    Ok((refused, found))
}

fn describe(pid: i32, found: Flagged) -> Result<Vec<Vma>> {
    let internal = internal_device()?;
    let mut described: Vec<Vma> = Vec::with_capacity(found.len());
    let mut files = Files::default();
    for (mapping, flags) in found {
        let file = files.facts(pid, &mapping)?;
        described.push(vmas::describe(&mapping, flags, file, internal)?);
    }
    vmas::join_vvar(&mut described);
    Ok(described)
}

/// Device of the kernel's own tmpfs, which holds memfds, System V segments and shared anonymous memory.
fn internal_device() -> Result<u64> {
    let memfd = memfd_create(c"stasis", MFdFlags::MFD_CLOEXEC)
        .during("cannot find the device of shared memory", || {
            "memfd_create(\"stasis\", MFD_CLOEXEC)".into()
        })?;
    let stat = fstat(&memfd).during("cannot find the device of shared memory", || "fstat(memfd)".into())?;
    Ok(stat.st_dev)
}

/// The entry in `map_files` of a mapping, whether it exists or not.
fn map_file(pid: i32, mapping: &Mapping) -> String {
    format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end)
}

/// The files of a process's mappings: most are mapped in several parts.
#[derive(Default)]
struct Files(HashMap<((u32, u32), u64, OsString), Metadata>);

impl Files {
    fn facts(&mut self, pid: i32, mapping: &Mapping) -> Result<Option<FileFacts>> {
        if mapping.inode == 0 && !mapping.name().starts_with(b"/") {
            return Ok(None);
        }
        let path = map_file(pid, mapping);
        let link = match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            link => link.during("cannot look at a mapped file", || format!("lstat({path:?})"))?,
        };
        let known = (mapping.device, mapping.inode, mapping.name.clone());
        let file = match self.0.entry(known) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(match fs::metadata(&path) {
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => by_name(pid, mapping, libc::O_PATH)
                    .and_then(|(file, _)| {
                        file.metadata().during("cannot look at a mapped file", || "fstat(_)".into())
                    })?,
                file => file.during("cannot look at a mapped file", || format!("stat({path:?})"))?,
            }),
        };
        // The link's permissions tell how the file was opened.
        let access = match link.st_mode() & 0o600 {
            0o600 => libc::O_RDWR,
            0o200 => libc::O_WRONLY,
            _ => libc::O_RDONLY,
        };
        Ok(Some(FileFacts {
            mode: file.st_mode(),
            device: file.st_dev(),
            special: file.st_rdev(),
            block: file.st_blksize(),
            access: access.cast_unsigned(),
        }))
    }
}

/// The file of a mapping, named but not opened (`O_PATH`), and its path as `map_files` prints it.
pub fn named(pid: i32, vma: &Vma) -> Result<(OwnedFd, PathBuf)> {
    open(pid, &vma.mapping, libc::O_PATH).map(|(file, link)| (file.into(), link))
}

/// The executable of a task, named but not opened, and its path as `/proc/PID/exe` prints it.
pub fn executable(pid: i32) -> Result<(OwnedFd, PathBuf)> {
    let path = format!("/proc/{pid}/exe");
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(&path)
        .during("cannot open the executable", || format!("open({path:?}, O_PATH)"))?;
    let link =
        fs::read_link(&path).during("cannot read the executable's path", || format!("readlink({path:?})"))?;
    Ok((file.into(), link))
}

/// The shared memory behind a mapping, opened for reading.
pub fn shared(pid: i32, vma: &Vma) -> Result<File> {
    open(pid, &vma.mapping, 0).map(|(file, _)| file)
}

fn open(pid: i32, mapping: &Mapping, flags: i32) -> Result<(File, PathBuf)> {
    let path = map_file(pid, mapping);
    let file = match File::options().read(true).custom_flags(flags).open(&path) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return by_name(pid, mapping, flags),
        file => file
            .during("cannot open a mapped file", || format!("open({path:?})"))
            .map_err(|e| e.path(&mapping.name))?,
    };
    let link =
        fs::read_link(&path).during("cannot read a mapped file's path", || format!("readlink({path:?})"))?;
    Ok((file, link))
}

/// Where links of `map_files` may not be followed, which takes CAP_CHECKPOINT_RESTORE in the initial user namespace: the
/// file that its name leads to in the process's root, if it is that one.
fn by_name(pid: i32, mapping: &Mapping, flags: i32) -> Result<(File, PathBuf)> {
    let unseen = || {
        Error::new("a mapped file that its path does not lead to (any more) can be opened by root only")
            .path(&mapping.name)
            .remedy(
                "have root take the checkpoint, who has CAP_CHECKPOINT_RESTORE in the initial user namespace",
            )
    };
    let root = format!("/proc/{pid}/root");
    let root = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(&root)
        .during("cannot open the root of the process", || format!("open({root:?}, O_PATH)"))?;
    let path = PathBuf::from(&mapping.name);
    let file = open_in_root(&root, &path, OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC)
        .map_err(|_| unseen())?;
    let is = fstat(&file).during("cannot look at a mapped file", || "fstat(_)".into())?;
    let device = (nix::sys::stat::major(is.st_dev), nix::sys::stat::minor(is.st_dev));
    let wanted = (u64::from(mapping.device.0), u64::from(mapping.device.1));
    match (is.st_ino, device) == (mapping.inode, wanted) {
        true => Ok((file.into(), path)),
        false => Err(unseen()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::testing::in_child;

    // Alone, for other tests map and watch memory, too.
    #[test]
    fn this_process_has_code_heap_stack_and_vdso() {
        in_child(0, || {
            let pid = std::process::id().cast_signed();
            let vmas = read(pid, &[], false, false, &mut Looks::default()).unwrap().0;
            let count = |bit: u32| vmas.iter().filter(|v| v.entry.status & bit != 0).count();
            assert_eq!((count(status::VDSO), count(status::VVAR), count(status::HEAP)), (1, 1, 1));
            assert!(count(status::FILE_PRIVATE) > 3 && count(status::ANON_PRIVATE) > 3);
            let code = vmas.iter().find(|v| v.entry.prot & 4 != 0 && v.entry.fdflags.is_some()).unwrap();
            let (file, link) = named(pid, code).unwrap();
            assert_eq!(fstat(file.as_fd()).unwrap().st_ino, code.mapping.inode);
            assert!(link.is_absolute());
            assert_eq!(refusals(pid, false).unwrap().0.len(), 0);
        });
    }

    #[test]
    fn a_file_is_found_by_its_name_while_it_has_that() {
        in_child(0, || {
            let pid = std::process::id().cast_signed();
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(4096).unwrap();
            let (prot, flags) = (nix::sys::mman::ProtFlags::PROT_READ, nix::sys::mman::MapFlags::MAP_PRIVATE);
            // SAFETY: a new mapping at an address that the kernel chooses.
            let at = unsafe { nix::sys::mman::mmap(None, 4096.try_into().unwrap(), prot, flags, &file, 0) };
            let at = u64::try_from(at.unwrap().as_ptr().addr()).unwrap();
            let mapping = || maps::read(pid).unwrap().into_iter().find(|m| m.start == at).unwrap();
            let (found, path) = by_name(pid, &mapping(), libc::O_PATH).unwrap();
            assert_eq!((fstat(&found).unwrap().st_ino, path.as_path()), (mapping().inode, file.path()));
            // Another one of that name is not it.
            let before = mapping();
            fs::remove_file(file.path()).unwrap();
            assert!(by_name(pid, &mapping(), 0).unwrap_err().to_string().contains("does not lead to"));
            fs::write(file.path(), "another").unwrap();
            let error = by_name(pid, &before, 0).unwrap_err().to_string();
            assert!(error.contains("does not lead to") && error.contains("have root"), "{error}");
        });
    }

    #[test]
    fn mappings_that_go_meanwhile_are_no_findings() {
        in_child(0, || {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(4096).unwrap();
            let done = std::sync::atomic::AtomicBool::new(false);
            let order = std::sync::atomic::Ordering::Relaxed;
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(order) {
                        let len = 4096.try_into().unwrap();
                        let (prot, flags) =
                            (nix::sys::mman::ProtFlags::PROT_READ, nix::sys::mman::MapFlags::MAP_PRIVATE);
                        // SAFETY: a new mapping at an address that the kernel chooses, which nobody else knows of.
                        unsafe {
                            let at = nix::sys::mman::mmap(None, len, prot, flags, file.as_file(), 0).unwrap();
                            nix::sys::mman::munmap(at, 4096).unwrap();
                        }
                    }
                });
                let pid = std::process::id().cast_signed();
                let found: Vec<Error> = (0..500).flat_map(|_| refusals(pid, false).unwrap().0).collect();
                done.store(true, order);
                assert!(found.is_empty(), "{}: {}", found.len(), found[0]);
            });
        });
    }

    #[test]
    fn what_is_hidden_is_left_out() {
        let pid = std::process::id().cast_signed();
        let all = read(pid, &[], false, false, &mut Looks::default()).unwrap().0;
        let stack = all.iter().find(|v| v.mapping.name() == b"[stack]").unwrap();
        let hidden = stack.entry.start..stack.entry.end;
        let rest = read(pid, &[hidden], false, false, &mut Looks::default()).unwrap().0;
        assert!(rest.iter().all(|v| v.mapping.name() != b"[stack]"));
    }
}
