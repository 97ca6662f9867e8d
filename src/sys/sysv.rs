//! System V IPC: shared memory, semaphores, message queues of the caller's IPC namespace.
//!
//! The tables are walked by index with the `*_STAT` commands, as ipcs(1) does; ids are what the rest goes by.

use std::fs::{File, OpenOptions};
use std::mem::zeroed;

use nix::errno::Errno;

use super::{check, credentials};

const SHM_STAT: i32 = 13;
const SHM_INFO: i32 = 14;
const SEM_INFO: i32 = 19;
const MSG_INFO: i32 = 12;
const MSG_COPY: i32 = 0o40000;

/// What the three kinds have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Perm {
    /// Key; 0 is private.
    pub key: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Creator.
    pub cuid: u32,
    /// Group of the creator.
    pub cgid: u32,
    /// Permissions, and for shared memory SHM_DEST and SHM_LOCKED.
    pub mode: u32,
}

impl From<libc::ipc_perm> for Perm {
    fn from(p: libc::ipc_perm) -> Self {
        let key = p.__key.cast_unsigned();
        Self { key, uid: p.uid, gid: p.gid, cuid: p.cuid, cgid: p.cgid, mode: p.mode.into() }
    }
}

/// A shared memory segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Id.
    pub id: i32,
    /// Key, owners, mode.
    pub perm: Perm,
    /// Bytes, as they were asked for.
    pub size: u64,
}

/// A semaphore set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set {
    /// Id.
    pub id: i32,
    /// Key, owners, mode.
    pub perm: Perm,
    /// Number of semaphores.
    pub count: u32,
    /// Whether there has been a semop(2) on it.
    pub operated: bool,
}

/// A message queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Id.
    pub id: i32,
    /// Key, owners, mode.
    pub perm: Perm,
    /// Bytes it may hold.
    pub capacity: u64,
    /// Messages in it.
    pub messages: u64,
}

/// The kernel's `semid64_ds`.
#[repr(C)]
struct SetStat {
    perm: libc::ipc_perm,
    otime: i64,
    _unused1: u64,
    ctime: i64,
    _unused2: u64,
    nsems: u64,
    _unused3: [u64; 2],
}

/// Asks for each index up to the highest; those without an object answer EINVAL, those being removed EIDRM.
fn walk<T>(highest: i32, mut stat: impl FnMut(i32) -> Result<T, Errno>) -> Result<Vec<T>, Errno> {
    let mut found = Vec::new();
    for index in 0..=highest {
        match stat(index) {
            Ok(one) => found.push(one),
            Err(Errno::EINVAL | Errno::EIDRM) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(found)
}

/// All shared memory segments.
pub fn segments() -> Result<Vec<Segment>, Errno> {
    // SAFETY: SHM_INFO writes a shm_info, which is smaller than the structure given.
    let highest = unsafe {
        let mut info: libc::shmid_ds = zeroed();
        check(libc::shmctl(0, SHM_INFO, &raw mut info).into())?
    };
    walk(highest as i32, |index| {
        // SAFETY: all zeroes is a valid structure, which the kernel fills in.
        let mut ds: libc::shmid_ds = unsafe { zeroed() };
        // SAFETY: the kernel writes one structure.
        let id = check(unsafe { libc::shmctl(index, SHM_STAT, &raw mut ds) }.into())? as i32;
        Ok(Segment { id, perm: ds.shm_perm.into(), size: ds.shm_segsz as u64 })
    })
}

/// All semaphore sets.
pub fn sets() -> Result<Vec<Set>, Errno> {
    let mut info = [0i32; 10];
    // SAFETY: SEM_INFO writes a seminfo, ten ints.
    let highest = check(unsafe { libc::semctl(0, 0, SEM_INFO, info.as_mut_ptr()) }.into())?;
    walk(highest as i32, |index| {
        // SAFETY: all zeroes is a valid structure, which the kernel fills in.
        let mut ds: SetStat = unsafe { zeroed() };
        // SAFETY: the kernel writes one structure.
        let id = check(unsafe { libc::semctl(index, 0, libc::SEM_STAT, &raw mut ds) }.into())? as i32;
        Ok(Set { id, perm: ds.perm.into(), count: ds.nsems as u32, operated: ds.otime != 0 })
    })
}

/// All message queues.
pub fn queues() -> Result<Vec<Queue>, Errno> {
    // SAFETY: MSG_INFO writes a msginfo, which is smaller than the structure given.
    let highest = unsafe {
        let mut info: libc::msqid_ds = zeroed();
        check(libc::msgctl(0, MSG_INFO, &raw mut info).into())?
    };
    walk(highest as i32, |index| {
        // SAFETY: all zeroes is a valid structure, which the kernel fills in.
        let mut ds: libc::msqid_ds = unsafe { zeroed() };
        // SAFETY: the kernel writes one structure.
        let id = check(unsafe { libc::msgctl(index, libc::MSG_STAT, &raw mut ds) }.into())? as i32;
        let (capacity, messages) = (ds.msg_qbytes, ds.msg_qnum);
        Ok(Queue { id, perm: ds.msg_perm.into(), capacity, messages })
    })
}

fn flags(mode: u32) -> i32 {
    libc::IPC_CREAT | libc::IPC_EXCL | (mode & 0o777).cast_signed()
}

/// Makes a segment that is not there yet. Its id. `huge`: `SHM_HUGETLB` and the size of its pages, or 0.
pub fn make_segment(perm: &Perm, size: u64, huge: i32) -> Result<i32, Errno> {
    let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
    // SAFETY: numbers only.
    let id = unsafe { libc::shmget(perm.key.cast_signed(), size, flags(perm.mode) | huge) };
    check(id.into()).map(|id| id as i32)
}

/// Makes a set that is not there yet. Its id.
pub fn make_set(perm: &Perm, count: u32) -> Result<i32, Errno> {
    // SAFETY: numbers only.
    let id = unsafe { libc::semget(perm.key.cast_signed(), count.cast_signed(), flags(perm.mode)) };
    check(id.into()).map(|id| id as i32)
}

/// Makes a queue that is not there yet. Its id.
pub fn make_queue(perm: &Perm) -> Result<i32, Errno> {
    // SAFETY: numbers only.
    check(unsafe { libc::msgget(perm.key.cast_signed(), flags(perm.mode)) }.into()).map(|id| id as i32)
}

fn own(to: &mut libc::ipc_perm, perm: &Perm) {
    (to.uid, to.gid) = (perm.uid, perm.gid);
    // Nine bits fit.
    to.mode = (perm.mode & 0o777) as _;
}

/// Sets owner, group and permissions of a segment.
pub fn own_segment(id: i32, perm: &Perm) -> Result<(), Errno> {
    // SAFETY: all zeroes is a valid structure.
    let mut ds: libc::shmid_ds = unsafe { zeroed() };
    own(&mut ds.shm_perm, perm);
    // SAFETY: the kernel reads one structure.
    check(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut ds) }.into()).map(drop)
}

/// Sets owner, group and permissions of a set.
pub fn own_set(id: i32, perm: &Perm) -> Result<(), Errno> {
    // SAFETY: all zeroes is a valid structure.
    let mut ds: SetStat = unsafe { zeroed() };
    own(&mut ds.perm, perm);
    // SAFETY: the kernel reads one structure.
    check(unsafe { libc::semctl(id, 0, libc::IPC_SET, &raw mut ds) }.into()).map(drop)
}

/// Sets owner, group, permissions and capacity of a queue.
pub fn own_queue(id: i32, perm: &Perm, capacity: u64) -> Result<(), Errno> {
    // SAFETY: all zeroes is a valid structure.
    let mut ds: libc::msqid_ds = unsafe { zeroed() };
    own(&mut ds.msg_perm, perm);
    ds.msg_qbytes = capacity;
    // SAFETY: the kernel reads one structure.
    check(unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut ds) }.into()).map(drop)
}

/// Marks a segment: it goes with its last user (IPC_RMID), or stays in memory (SHM_LOCK).
pub fn mark_segment(id: i32, command: i32) -> Result<(), Errno> {
    // SAFETY: neither command reads or writes a structure.
    check(unsafe { libc::shmctl(id, command, std::ptr::null_mut()) }.into()).map(drop)
}

/// The values of a set of `count` semaphores.
pub fn values(id: i32, count: u32) -> Result<Vec<u16>, Errno> {
    let mut values = vec![0u16; count as usize];
    // SAFETY: the kernel writes a value a semaphore; a set never changes its number.
    check(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) }.into())?;
    Ok(values)
}

/// Sets all values of a set, one a semaphore.
pub fn set_values(id: i32, values: &[u16]) -> Result<(), Errno> {
    // SAFETY: the kernel reads a value a semaphore; the caller has just made the set with as many.
    check(unsafe { libc::semctl(id, 0, libc::SETALL, values.as_ptr()) }.into()).map(drop)
}

/// An operation on the first semaphore, of that value, that leaves it as it is: the set counts as used afterwards.
pub fn touch_set(id: i32, value: u16) -> Result<(), Errno> {
    let by = if value == 0 { 1 } else { -1 };
    let op = |sem_op| libc::sembuf { sem_num: 0, sem_op, sem_flg: libc::IPC_NOWAIT as i16 };
    let mut ops = [op(by), op(-by)];
    // SAFETY: two operations are given.
    check(unsafe { libc::semop(id, ops.as_mut_ptr(), 2) }.into()).map(drop)
}

/// A message: eight bytes of type, then the text.
fn buffer(length: usize) -> Vec<u64> {
    vec![0; 1 + length.div_ceil(8)]
}

/// A copy of the message at that place of a queue, the first being 0, of at most `max` bytes; it stays there.
pub fn peek(id: i32, at: u64, max: usize) -> Result<(i64, Vec<u8>), Errno> {
    let mut message = buffer(max);
    let at = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
    let (to, how) = (message.as_mut_ptr().cast(), MSG_COPY | libc::IPC_NOWAIT);
    // SAFETY: the buffer has room for a type and `max` bytes.
    let length = check(unsafe { libc::msgrcv(id, to, max, at, how) } as i64)?;
    let kind = message[0].cast_signed();
    let mut text: Vec<u8> = message[1..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    text.truncate(length as usize);
    Ok((kind, text))
}

/// Appends a message to a queue, if there is room.
pub fn send(id: i32, kind: i64, text: &[u8]) -> Result<(), Errno> {
    let mut message = buffer(text.len());
    message[0] = kind.cast_unsigned();
    for (word, bytes) in message[1..].iter_mut().zip(text.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(whole);
    }
    // SAFETY: the buffer has a type and, rounded up, the bytes of the text.
    check(unsafe { libc::msgsnd(id, message.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) }.into()).map(drop)
}

/// The memory of a segment as a file.
pub fn open_segment(id: i32, size: u64, write: bool) -> Result<File, Errno> {
    let flags = if write { 0 } else { libc::SHM_RDONLY };
    // SAFETY: the kernel chooses a free address, so no memory in use is replaced.
    let at = unsafe { libc::shmat(id, std::ptr::null(), flags) };
    if at as isize == -1 {
        return Err(Errno::last());
    }
    let open = |end: u64| {
        let path = format!("/proc/self/map_files/{:x}-{end:x}", at as u64);
        OpenOptions::new().read(true).write(write).open(path)
    };
    let file = match open(at as u64 + size.next_multiple_of(4096)) {
        // It has huge pages, and ends with one.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => end_of(at as u64).and_then(open),
        file => file,
    };
    // SAFETY: nothing refers to the mapping.
    unsafe { libc::shmdt(at) };
    file.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
}

/// Where the mapping of this process ends that begins at `start`.
fn end_of(start: u64) -> std::io::Result<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let begin = format!("{start:x}-");
    let end = maps.lines().find_map(|line| line.strip_prefix(&begin)?.split(' ').next());
    let end = end.and_then(|end| u64::from_str_radix(end, 16).ok());
    end.ok_or_else(|| std::io::ErrorKind::NotFound.into())
}

/// As [`created_by`], and the creator has all capabilities.
pub fn created_with_leave<T: Send>(
    uid: u32,
    gid: u32,
    work: impl FnOnce() -> Result<T, Errno> + Send,
) -> Result<T, Errno> {
    if (uid, gid) == (0, 0) {
        return work();
    }
    let made = || {
        credentials::keep_capabilities()?;
        credentials::set_thread_ids(uid, gid)?;
        work()
    };
    // A thread of its own, which takes its ids with it.
    std::thread::scope(|scope| scope.spawn(made).join().unwrap_or(Err(Errno::ECANCELED)))
}

/// Runs `work` with other effective ids, of this thread only. As the effective ids name the creator of what it makes.
pub fn created_by<T>(uid: u32, gid: u32, work: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    if (uid, gid) == (0, 0) {
        return work();
    }
    // SAFETY: numbers only. The raw calls change this thread's ids; the C library's would change every thread's.
    let set = |call, id: u32| check(unsafe { libc::syscall(call, u32::MAX, id, u32::MAX) });
    set(libc::SYS_setresgid, gid)?;
    let done = set(libc::SYS_setresuid, uid).and_then(|_| work());
    set(libc::SYS_setresuid, 0)?;
    set(libc::SYS_setresgid, 0)?;
    done
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::sys::testing::in_child;

    #[test]
    fn objects_are_found_with_what_they_were_made_with() {
        in_child(libc::CLONE_NEWIPC, || {
            assert!(
                segments().unwrap().is_empty() && sets().unwrap().is_empty() && queues().unwrap().is_empty()
            );
            let perm = Perm { key: 5, uid: 7, gid: 8, cuid: 9, cgid: 10, mode: 0o640 };
            let id = created_by(9, 10, || make_segment(&perm, 5000, 0)).unwrap();
            own_segment(id, &perm).unwrap();
            assert_eq!(segments().unwrap(), [Segment { id, perm, size: 5000 }]);
            let file = open_segment(id, 5000, true).unwrap();
            file.write_all_at(b"here", 4990).unwrap();
            let mut back = [0; 4];
            open_segment(id, 5000, false).unwrap().read_exact_at(&mut back, 4990).unwrap();
            assert_eq!(&back, b"here");
            mark_segment(id, libc::IPC_RMID).unwrap();
            assert!(segments().unwrap().is_empty());

            let id = created_by(9, 10, || make_set(&perm, 3)).unwrap();
            own_set(id, &perm).unwrap();
            set_values(id, &[1, 0, 3]).unwrap();
            assert!(!sets().unwrap()[0].operated);
            touch_set(id, 1).unwrap();
            assert_eq!(sets().unwrap(), [Set { id, perm, count: 3, operated: true }]);
            assert_eq!(values(id, 3).unwrap(), [1, 0, 3]);

            let id = created_by(9, 10, || make_queue(&perm)).unwrap();
            own_queue(id, &perm, 100).unwrap();
            send(id, 3, b"first message").unwrap();
            send(id, 1, b"").unwrap();
            assert_eq!(queues().unwrap(), [Queue { id, perm, capacity: 100, messages: 2 }]);
            assert_eq!(peek(id, 0, 100).unwrap(), (3, b"first message".to_vec()));
            assert_eq!(peek(id, 1, 100).unwrap(), (1, Vec::new()));
            assert_eq!(peek(id, 2, 100), Err(Errno::ENOMSG));
        });
    }
}
