//! Every record, from bytes to a struct and back; hostile bytes; staging directories.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::PathBuf;

use crate::checkpoint::image::wire::Schema;
use crate::checkpoint::image::*;

/// A record type, for tests that go through all of them.
#[derive(Clone, Copy)]
pub(crate) struct AnyRecord {
    pub schema: &'static Schema,
    pub recode: fn(&[u8]) -> Vec<u8>,
    pub read: fn(&[u8]) -> crate::checkpoint::Result<usize>,
}

impl AnyRecord {
    pub(crate) const fn of<T: Record>() -> Self {
        Self {
            schema: T::SCHEMA,
            recode: |bytes| T::decode(bytes).expect("decodes").encode_to_vec(),
            read: |image| {
                let input = Cursor::new(image.to_vec());
                Reader::from_input(input, PathBuf::from("test.img"), Kind::Files)?
                    .records::<T>()
                    .map(|r| r.len())
            },
        }
    }
}

/// A record with every field set, once.
pub(crate) fn sample<T: Record>() -> T {
    T::decode(bytes_of(T::SCHEMA, 0).as_slice()).expect("a sample decodes")
}

/// The wire form of a record with every field set, in the order of their numbers.
fn bytes_of(schema: &Schema, depth: usize) -> Vec<u8> {
    let fields: BTreeMap<u32, _> = schema.fields.iter().map(|f| (f.number, f)).collect();
    let mut out = Vec::new();
    for (number, field) in fields {
        let mut key = (number << 3) | u32::from(field.wire);
        let value = match (field.nested, field.wire) {
            // A control group holds control groups: one inside the other is enough.
            (Some(nested), _) if nested().name == schema.name && depth > 2 => continue,
            (Some(nested), _) => {
                let inner = bytes_of(nested(), depth + 1);
                [length(inner.len()), inner].concat()
            }
            (None, 0) if schema.name == "sysctl_entry" && number == 1 => vec![5],
            (None, 0) => vec![1],
            (None, 1) => vec![7; 8],
            (None, _) => vec![2, b'a', b'b'],
        };
        while key >= 0x80 {
            out.push(key as u8 | 0x80);
            key >>= 7;
        }
        out.push(key as u8);
        out.extend(value);
    }
    out
}

fn length(mut n: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
    out
}

fn all() -> Vec<AnyRecord> {
    [
        anon::RECORDS,
        apparmor::RECORDS,
        bpf::RECORDS,
        cgroup::RECORDS,
        core::RECORDS,
        cpuinfo::RECORDS,
        creds::RECORDS,
        extra::RECORDS,
        file::RECORDS,
        fsnotify::RECORDS,
        inventory::RECORDS,
        ipc::RECORDS,
        legacy::RECORDS,
        mm::RECORDS,
        mount::RECORDS,
        namespace::RECORDS,
        net::RECORDS,
        packet::RECORDS,
        pipe::RECORDS,
        pstree::RECORDS,
        regfile::RECORDS,
        seccomp::RECORDS,
        socket::RECORDS,
        stasis::RECORDS,
        stats::RECORDS,
        timer::RECORDS,
        tty::RECORDS,
        unix::RECORDS,
        x86::RECORDS,
    ]
    .concat()
}

fn image(record: &[u8]) -> Vec<u8> {
    [&Kind::Files.header()[..], &u32::try_from(record.len()).unwrap().to_le_bytes(), record].concat()
}

#[test]
fn every_record_comes_back_as_it_was() {
    assert!(all().len() > 110);
    for record in all() {
        let bytes = bytes_of(record.schema, 0);
        assert_eq!((record.recode)(&bytes), bytes, "{}", record.schema.name);
        assert_eq!((record.read)(&image(&bytes)).unwrap(), 1, "{}", record.schema.name);
    }
}

#[test]
fn field_numbers_are_unique_and_fit_the_scan() {
    for record in all() {
        let mut numbers: Vec<u32> = record.schema.fields.iter().map(|f| f.number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), record.schema.fields.len(), "{}", record.schema.name);
        assert!(numbers.len() <= 64, "{}", record.schema.name);
    }
}

#[test]
fn unknown_fields_are_refused_by_name() {
    for record in all() {
        let mut bytes = bytes_of(record.schema, 0);
        bytes.extend([0xf8, 0x7f, 1]);
        let error = (record.read)(&image(&bytes)).unwrap_err().to_string();
        assert!(error.contains(record.schema.name) && error.contains("field 2047"), "{error}");
        assert!(error.contains("record 1") && error.contains("test.img"), "{error}");
    }
}

#[test]
fn an_unknown_field_of_a_nested_record_is_named_too() {
    let mut inner = bytes_of(FownEntry::SCHEMA, 0);
    inner.extend([0x78, 1]);
    let error = wire::check(
        EventfdFileEntry::SCHEMA,
        &[&[8, 1, 16, 1, 26, inner.len() as u8][..], &inner, &[32, 1]].concat(),
        &mut { IMAGE_MAX },
    );
    assert_eq!(error, Err(wire::Defect::Unknown("fown_entry", 15)));
}

#[test]
fn a_missing_required_field_is_named() {
    let error = AnyRecord::of::<PipeDataEntry>();
    let error = (error.read)(&image(&[8, 1])).unwrap_err().to_string();
    assert!(error.contains("pipe_data_entry lacks its field bytes"), "{error}");
}

#[test]
fn truncation_is_told_with_the_number_of_the_record() {
    let record = bytes_of(PstreeEntry::SCHEMA, 0);
    let two = [image(&record), image(&record)[8..].to_vec()].concat();
    let read = AnyRecord::of::<PstreeEntry>().read;
    assert_eq!(read(&two).unwrap(), 2);
    for cut in 0..two.len() {
        match read(&two[..cut]) {
            Ok(n) => assert!(cut == 8 && n == 0 || cut == 8 + 4 + record.len() && n == 1, "{cut}: {n}"),
            Err(e) => {
                let number = if cut < 8 {
                    "magic"
                } else if cut < 12 + record.len() {
                    "1 is"
                } else {
                    "2 is"
                };
                assert!(e.to_string().contains("truncated") && e.to_string().contains(number), "{cut}: {e}");
            }
        }
    }
}

/// A small generator, so that a failure can be repeated.
fn noise(seed: u64) -> impl FnMut() -> u8 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    }
}

#[test]
fn random_bytes_never_panic() {
    let all = all();
    for seed in 0..3000 {
        let mut next = noise(seed);
        let record = all[next() as usize % all.len()];
        let raw: Vec<u8> = (0..next()).map(|_| next()).collect();
        let _ = (record.read)(&raw);
        let _ = (record.read)(&[Kind::Files.header(), raw.clone()].concat());
        let _ = (record.read)(&image(&raw));
        // A real record with some bytes changed gets further than noise.
        let mut changed = bytes_of(record.schema, 0);
        for _ in 0..1 + next() % 4 {
            if let Some(at) = (usize::from(next()) * 7).checked_rem(changed.len()) {
                changed[at] = next();
            }
        }
        let _ = (record.read)(&image(&changed));
    }
}

#[test]
fn a_short_record_cannot_claim_much_memory() {
    // 64 MiB of empty nested records would decode into gigabytes.
    let bytes: Vec<u8> = [0x72, 0].repeat(RECORD_MAX / 2);
    let mut budget = IMAGE_MAX;
    assert_eq!(
        wire::check(MmEntry::SCHEMA, &bytes, &mut budget),
        Err(wire::Defect::Missing("vma_entry", "start"))
    );
    let bytes: Vec<u8> = [0x22, 0].repeat(RECORD_MAX / 2);
    assert_eq!(
        wire::check(SkPacketEntry::SCHEMA, &bytes, &mut { budget }).unwrap_err(),
        wire::Defect::Missing("scm_entry", "r#type")
    );
    let bytes: Vec<u8> = [0x0a, 0].repeat(RECORD_MAX / 2);
    assert_eq!(
        wire::check(CgroupEntry::SCHEMA, &bytes, &mut { 1000 }).unwrap_err(),
        wire::Defect::Missing("cg_set_entry", "id")
    );
    let bytes: Vec<u8> = [0x12, 0].repeat(RECORD_MAX / 2);
    assert_eq!(
        wire::check(CgroupEntry::SCHEMA, &bytes, &mut budget).unwrap_err(),
        wire::Defect::Large("cgroup_entry")
    );
}

#[test]
fn a_length_beyond_the_limit_is_refused_before_it_is_read() {
    let bytes = [Kind::Files.header(), u32::MAX.to_le_bytes().to_vec()].concat();
    let error = (AnyRecord::of::<FileEntry>().read)(&bytes).unwrap_err().to_string();
    assert!(error.contains("claims a length of 4294967295"), "{error}");
}

#[test]
fn nesting_ends() {
    let mut bytes = vec![0x0a, 1, b'x'];
    for _ in 0..200 {
        bytes = [vec![0x0a, 1, b'x', 0x12], length(bytes.len()), bytes].concat();
    }
    assert_eq!(
        wire::check(CgroupDirEntry::SCHEMA, &bytes, &mut { IMAGE_MAX }),
        Err(wire::Defect::Deep("cgroup_dir_entry"))
    );
}

#[test]
fn magic_words_are_unique() {
    let mut words: Vec<u32> = Kind::ALL.iter().map(|k| k.magic()).collect();
    words.sort_unstable();
    words.dedup();
    assert_eq!(words.len(), Kind::ALL.len());
}

#[test]
fn publishing_replaces_an_older_set_and_spares_other_files() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path().join("a/b");
    let one = ImageDir::create(&at).unwrap();
    one.write(Kind::Inventory, INVENTORY, &[sample::<InventoryEntry>()]).unwrap();
    one.write(Kind::Seccomp, "seccomp.img", &[sample::<SeccompEntry>()]).unwrap();
    assert!(!at.join(INVENTORY).exists());
    one.publish(true).unwrap();
    std::fs::write(at.join("descriptors.json"), "[]").unwrap();
    std::fs::write(at.join(TOUCHED), "{}").unwrap();
    assert!(at.join("seccomp.img").exists() && one.exists(INVENTORY));

    let two = ImageDir::create(&at).unwrap();
    two.write(Kind::Inventory, INVENTORY, &[sample::<InventoryEntry>()]).unwrap();
    two.publish(false).unwrap();
    let mut left: Vec<_> = std::fs::read_dir(&at).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["descriptors.json", INVENTORY]);
}

#[test]
fn an_aborted_or_dead_dump_leaves_the_older_set() {
    let place = tempfile::tempdir().unwrap();
    let one = ImageDir::create(place.path()).unwrap();
    one.write(Kind::Inventory, INVENTORY, &[sample::<InventoryEntry>()]).unwrap();
    one.publish(false).unwrap();
    let two = ImageDir::create(place.path()).unwrap();
    two.write(Kind::Pstree, "pstree.img", &[sample::<PstreeEntry>()]).unwrap();
    // A third beside a living second does not touch it; what a dead one left goes.
    std::fs::create_dir(place.path().join(".stasis-dead")).unwrap();
    std::fs::write(place.path().join(".stasis-dead/core-1.img"), "x").unwrap();
    let three = ImageDir::create(place.path()).unwrap();
    assert!(two.exists("pstree.img") && !place.path().join(".stasis-dead").exists());
    two.abort();
    drop(three);
    let left: Vec<_> = std::fs::read_dir(place.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [INVENTORY]);
    let back: InventoryEntry =
        ImageDir::open(place.path()).unwrap().read_one(Kind::Inventory, INVENTORY).unwrap();
    assert_eq!(back, sample());
}

#[test]
fn only_regular_files_are_images() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("real.img"), "").unwrap();
    std::os::unix::fs::symlink("real.img", place.path().join("link.img")).unwrap();
    nix::unistd::mkfifo(&place.path().join("fifo.img"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    std::fs::create_dir(place.path().join("dir.img")).unwrap();
    let dir = ImageDir::open(place.path()).unwrap();
    assert!(dir.raw_open("real.img").is_ok());
    for name in ["link.img", "fifo.img", "dir.img"] {
        assert!(dir.raw_open(name).is_err(), "{name}");
    }
}

#[test]
fn a_ghost_keeps_its_holes() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let place = tempfile::tempdir().unwrap();
    let images = ImageDir::create(place.path()).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(b"head", 0).unwrap();
    file.write_all_at(b"tail", 3 << 20).unwrap();
    let entry = GhostFileEntry { mode: 0o100_600, ..Default::default() };
    let written = ghost::write(&images, 26, &entry, Some(&file)).unwrap();
    assert_eq!((written.size, written.chunks), (Some((3 << 20) + 4), Some(true)));
    images.publish(false).unwrap();
    assert!(place.path().join("ghost-file-1a.img").metadata().unwrap().len() < 1 << 20);
    let back = tempfile::tempfile().unwrap();
    ghost::restore(&images, 26, &back).unwrap();
    let mut bytes = vec![0; 4];
    back.read_exact_at(&mut bytes, 3 << 20).unwrap();
    assert_eq!(bytes, b"tail");
    assert_eq!(back.metadata().unwrap().size(), (3 << 20) + 4);
    assert!(back.metadata().unwrap().blocks() * 512 < 1 << 20);

    let plain = tempfile::tempfile().unwrap();
    plain.write_all_at(&[b'x'; 5000], 0).unwrap();
    let images = ImageDir::create(place.path()).unwrap();
    assert_eq!(ghost::write(&images, 1, &entry, Some(&plain)).unwrap().chunks, None);
    let back = tempfile::tempfile().unwrap();
    ghost::restore(&images, 1, &back).unwrap();
    assert_eq!(back.metadata().unwrap().size(), 5000);
}
