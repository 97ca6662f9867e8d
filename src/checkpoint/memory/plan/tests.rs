//! Plans of small address spaces, and of bad ones.

use super::*;

const WINDOW: Range<u64> = 0x10_0000..0x12_0000;

fn entry(start: u64, end: u64, status: u32, flags: i32) -> VmaEntry {
    let flags = flags.cast_unsigned();
    VmaEntry { start, end, status: status | 1, flags, prot: 3, fd: -1, ..VmaEntry::default() }
}

fn private(start: u64, end: u64) -> VmaEntry {
    entry(start, end, status::ANON_PRIVATE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
}

fn plan_of(entries: &[VmaEntry]) -> Result<Plan> {
    plan(entries, &WINDOW, |id| (id == 9).then_some(0x4800))
}

fn map(range: Range<u64>, flags: i32, source: Source, offset: u64) -> Step {
    let flags = (flags | libc::MAP_FIXED_NOREPLACE).cast_unsigned();
    Step::Map { range, prot: 3, flags, source, offset }
}

#[test]
fn each_kind_becomes_its_call() {
    let mut stack = private(0x7000_0000, 0x7000_2000);
    stack.flags |= libc::MAP_GROWSDOWN.cast_unsigned();
    let mut file = entry(0x40_0000, 0x40_2000, status::FILE_SHARED, libc::MAP_SHARED);
    (file.shmid, file.pgoff, file.fdflags) = (5, 0x3000, Some(2));
    let mut shared = entry(0x50_0000, 0x50_1000, status::ANON_SHARED, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    (shared.shmid, shared.pgoff) = (77, 0x1000);
    let done = plan_of(&[file, shared, stack]).unwrap();
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
    assert_eq!(
        done.map,
        [
            map(0x40_0000..0x40_2000, libc::MAP_SHARED, Source::File(5, 2), 0x3000),
            map(0x50_0000..0x50_1000, libc::MAP_SHARED, Source::Shared(77), 0x1000),
            map(0x7000_0000..0x7000_2000, anonymous, Source::Nothing, 0),
        ]
    );
    assert_eq!(done.finish, []);
}

#[test]
fn advice_and_locks_come_in_their_time() {
    let mut vma = private(0x40_0000, 0x60_0000);
    vma.madv = Some(1 << libc::MADV_HUGEPAGE | 1 << libc::MADV_DONTFORK);
    vma.flags |= libc::MAP_LOCKED.cast_unsigned();
    let guard = VmaEntry { start: 0x40_1000, end: 0x40_2000, status: status::GUARD, ..VmaEntry::default() };
    let prot = vma.prot;
    let done = plan_of(&[vma, guard]).unwrap();
    let range = 0x40_0000..0x60_0000;
    assert_eq!(done.map[1..], [Step::Advise(range.clone(), 14)]);
    let expected =
        [Step::Advise(range.clone(), 10), Step::Lock(range, prot), Step::Advise(0x40_1000..0x40_2000, 102)];
    assert_eq!(done.finish, expected);
}

#[test]
fn the_vdso_comes_last_and_once() {
    let vvar = entry(0x40_0000, 0x40_6000, status::ANON_PRIVATE | status::VVAR, libc::MAP_PRIVATE);
    let vdso = entry(0x40_6000, 0x40_8000, status::ANON_PRIVATE | status::VDSO, libc::MAP_PRIVATE);
    let vsyscall = VmaEntry {
        start: 0xffff_ffff_ff60_0000,
        end: 0xffff_ffff_ff60_1000,
        status: status::VSYSCALL | status::ANON_PRIVATE,
        ..VmaEntry::default()
    };
    let all = [vvar, vdso.clone(), private(0x60_0000, 0x60_1000), vsyscall];
    let done = plan_of(&all).unwrap();
    assert_eq!(done.map.last(), Some(&Step::Vdso(0x40_0000)));
    assert_eq!((done.vvar, done.vdso), (Some(0x40_0000..0x40_6000), Some(0x40_6000..0x40_8000)));
    let second = VmaEntry { start: 0x50_0000, end: 0x50_2000, ..vdso.clone() };
    assert!(plan_of(&[vdso, second]).is_err());
}

#[test]
fn a_bridge_keeps_the_code_and_maps_the_new_one_behind() {
    let vvar = entry(0x40_0000, 0x40_6000, status::ANON_PRIVATE | status::VVAR, libc::MAP_PRIVATE);
    let vdso = entry(0x40_6000, 0x40_8000, status::ANON_PRIVATE | status::VDSO, libc::MAP_PRIVATE);
    let far = private(0x70_0000, 0x70_1000);
    let all = [vvar, vdso, far];
    let mut done = plan_of(&all).unwrap();
    let at = free_behind(0x40_8000, &all, &WINDOW, 0x8000).unwrap();
    assert_eq!(at, 0x40_9000);
    done.bridge(at);
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE).cast_unsigned();
    let code = Step::Map { range: 0x40_6000..0x40_8000, prot: 5, flags, source: Source::Nothing, offset: 0 };
    assert_eq!(done.map[done.map.len() - 2..], [code, Step::Vdso(at)]);
    assert_eq!(done.map.iter().filter(|step| matches!(step, Step::Vdso(_))).count(), 1);
    // No room behind it: anywhere but in the window.
    let elsewhere = free_behind(0x70_1000, &all, &(0x70_2000..0x80_0000), 0x8000).unwrap();
    assert_eq!(elsewhere, 1 << 20);
}

#[test]
fn segments_are_attached_whole_and_cut() {
    let part = |start, end, pgoff, access| {
        let kind = status::ANON_SHARED | status::SYSVIPC;
        let mut part = entry(start, end, kind, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        (part.shmid, part.pgoff, part.fdflags, part.prot) = (9, pgoff, Some(access), 1);
        part
    };
    let done = plan_of(&[
        part(0x40_1000, 0x40_2000, 0x1000, 0),
        part(0x40_3000, 0x40_4000, 0x3000, 0),
        part(0x50_0000, 0x50_5000, 0, 2),
    ]);
    let steps = done.unwrap().map;
    let expected = [
        Step::Attach { segment: 9, at: 0x40_0000, flags: libc::SHM_RDONLY },
        Step::Unmap(0x40_0000..0x40_1000),
        Step::Unmap(0x40_2000..0x40_3000),
        Step::Unmap(0x40_4000..0x40_5000),
        Step::Attach { segment: 9, at: 0x50_0000, flags: 0 },
    ];
    assert_eq!(steps[..5], expected);
    assert_eq!(steps[5], Step::Protect(0x40_1000..0x40_2000, 1));
}

#[test]
fn hostile_entries_are_refused() {
    let good = private(0x40_0000, 0x40_2000);
    let with = |change: fn(&mut VmaEntry)| {
        let mut bad = good.clone();
        change(&mut bad);
        vec![bad]
    };
    let cases = [
        with(|e| e.end = e.start),
        with(|e| e.start += 1),
        with(|e| e.end = 1 << 60),
        with(|e| e.start = WINDOW.start),
        with(|e| e.status = 1),
        with(|e| e.status |= status::FILE_SHARED),
        with(|e| e.status |= status::AIORING),
        with(|e| e.status |= 1 << 27),
        with(|e| e.flags |= libc::MAP_HUGETLB as u32),
        with(|e| e.flags |= HUGE),
        with(|e| e.flags |= 12 << libc::MAP_HUGE_SHIFT),
        with(|e| e.flags |= libc::MAP_SHARED as u32),
        with(|e| e.prot = 8),
        with(|e| e.madv = Some(1 << libc::MADV_REMOVE)),
        with(|e| e.status = status::GUARD),
        vec![good.clone(), good.clone()],
        vec![private(0x50_0000, 0x50_1000), good.clone()],
    ];
    for case in cases {
        assert!(plan_of(&case).is_err(), "{case:?}");
    }
    assert!(plan_of(&[good]).is_ok());
}

#[test]
fn the_window_is_where_nothing_is() {
    let at = |entries: &[VmaEntry], size| free_window(entries.iter(), size).unwrap();
    assert_eq!(at(&[], 0x4000), 1 << 20);
    let low = private(0x18_0000, 0x20_0000);
    assert_eq!(at(std::slice::from_ref(&low), 0x4000), 0x30_0000);
    let pair = [private(0x40_0000, 0x60_0000), low];
    assert_eq!(at(&pair, 0x4000), 0x70_0000);
    assert_eq!(at(&[private(0x40_0000, 0x60_0000)], 0x4000), 1 << 20);
    assert!(free_window([private(1 << 20, TASK_SIZE)].iter(), 0x4000).is_err());
}
