//! Contents to an archive and back, past GNU tar both ways.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use super::*;

/// A bit of everything.
fn fill(at: &Path) {
    fs::create_dir_all(at.join("dir/inner")).unwrap();
    fs::write(at.join("dir/file"), "hello").unwrap();
    fs::set_permissions(at.join("dir/file"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(at.join("dir/file"), at.join("other name")).unwrap();
    symlink("dir/file", at.join("link")).unwrap();
    symlink("x".repeat(300), at.join("long link")).unwrap();
    let long = at.join("d".repeat(200));
    fs::create_dir(&long).unwrap();
    fs::write(long.join("f".repeat(200)), "far").unwrap();
    nix::unistd::mkfifo(&at.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    std::os::unix::net::UnixListener::bind(at.join("socket")).unwrap();
    fs::set_permissions(at.join("socket"), fs::Permissions::from_mode(0o710)).unwrap();
    let sparse = File::create(at.join("sparse")).unwrap();
    sparse.set_len(32 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (32 << 20) - 3).unwrap();
    let file = File::open(at.join("dir/file")).unwrap();
    crate::sys::xattr::set(&magic_path(&file), c"trusted.mark", b"a\0b").unwrap();
    // What a record of its own would not survive: a newline in the value, an equals sign in the name.
    crate::sys::xattr::set(&magic_path(&file), c"trusted.lines", b"7 a=b\nc\n").unwrap();
    crate::sys::xattr::set(&magic_path(&file), c"trusted.a=b", b"c").unwrap();
    let dir = File::open(at.join("dir")).unwrap();
    crate::sys::xattr::set(&magic_path(&dir), c"trusted.lines", b"\n").unwrap();
    fs::write(at.join("two\nlines"), "x").unwrap();
    std::os::unix::net::UnixListener::bind(at.join("socket\nof two lines")).unwrap();
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(at.join("dir"), Some(3_000_000), Some(7)).unwrap();
    }
    fs::set_permissions(at, fs::Permissions::from_mode(0o1777)).unwrap();
}

fn same(a: &Path, b: &Path) {
    let list = |dir: &Path| -> Vec<String> {
        let out = Command::new("find")
            .args([".", "-printf", "%P|%y|%m|%U|%G|%s|%n|%l|%T@\\0"])
            .current_dir(dir)
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let mut lines: Vec<String> =
            text.split_terminator('\0').filter(|l| !l.contains("|s|")).map(str::to_owned).collect();
        // The size of a directory is the file system's affair.
        lines.iter_mut().for_each(|l| {
            let mut parts: Vec<&str> = l.split('|').collect();
            if parts[1] == "d" {
                parts[5] = "";
            }
            *l = parts.join("|");
        });
        lines.sort();
        lines
    };
    assert_eq!(list(a), list(b));
}

#[test]
fn contents_come_back_as_they_were() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fill(from.path());
    // What is there and should not be; what is there and is right; what is there and is of another kind.
    fs::create_dir_all(to.path().join("stray/inner")).unwrap();
    fs::write(to.path().join("stray/inner/file"), "x").unwrap();
    fs::create_dir(to.path().join("link")).unwrap();
    fs::write(to.path().join("dir"), "x").unwrap();
    let archive = tempfile::NamedTempFile::new().unwrap();
    pack(File::open(from.path()).unwrap(), archive.reopen().unwrap()).unwrap();
    unpack(File::open(to.path()).unwrap(), archive.reopen().unwrap(), &Policy::default()).unwrap();
    same(from.path(), to.path());
    let attribute = |path: &str, name: &CStr| {
        let file = File::open(to.path().join(path)).unwrap();
        crate::sys::xattr::get(&magic_path(&file), name).unwrap()
    };
    assert_eq!(attribute("other name", c"trusted.mark"), b"a\0b");
    assert_eq!(attribute("other name", c"trusted.lines"), b"7 a=b\nc\n");
    assert_eq!(attribute("dir/file", c"trusted.a=b"), b"c");
    assert_eq!(attribute("dir", c"trusted.lines"), b"\n");
    assert!(to.path().join("socket\nof two lines").symlink_metadata().is_ok());
    let socket = to.path().join("socket").symlink_metadata().unwrap();
    assert!(std::os::unix::fs::FileTypeExt::is_socket(&socket.file_type()));
    assert_eq!(socket.mode() & 0o7777, 0o710);
    assert!(to.path().join("sparse").metadata().unwrap().blocks() * 512 < 1 << 20);
    assert!(archive.as_file().metadata().unwrap().len() < 200_000);
}

#[test]
fn gnu_tar_reads_ours_and_we_read_its() {
    let (from, to, back) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fill(from.path());
    let archive = tempfile::NamedTempFile::new().unwrap();
    pack(File::open(from.path()).unwrap(), archive.reopen().unwrap()).unwrap();
    let out = Command::new("tar")
        .args(["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"])
        .arg(to.path())
        .stdin(archive.reopen().unwrap())
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    same(from.path(), to.path());

    let theirs = tempfile::NamedTempFile::new().unwrap();
    let out = Command::new("tar")
        .args(["--create", "--gzip", "--no-unquote", "--no-wildcards", "--one-file-system", "--check-links"])
        .args(["--preserve-permissions", "--sparse", "--numeric-owner", "--directory"])
        .arg(to.path())
        .arg(".")
        .stdout(theirs.reopen().unwrap())
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    unpack(File::open(back.path()).unwrap(), theirs.reopen().unwrap(), &Policy::default()).unwrap();
    // GNU's own format has whole seconds only.
    let touch = |dir: &Path| {
        let out =
            Command::new("find").arg(dir).args(["-exec", "touch", "-h", "-d", "@5", "{}", "+"]).status();
        assert!(out.unwrap().success());
    };
    touch(to.path());
    touch(back.path());
    same(to.path(), back.path());
}

fn archive(build: impl FnOnce(&mut tar::Builder<flate2::write::GzEncoder<File>>)) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let gzip = flate2::write::GzEncoder::new(file.reopen().unwrap(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    let mut root = tar::Header::new_gnu();
    root.set_entry_type(tar::EntryType::Directory);
    root.as_gnu_mut().unwrap().name[..2].copy_from_slice(b"./");
    root.set_mode(0o755);
    root.set_uid(0);
    root.set_gid(0);
    root.set_mtime(0);
    root.set_size(0);
    root.set_cksum();
    tar.append(&root, std::io::empty()).unwrap();
    build(&mut tar);
    tar.into_inner().unwrap().finish().unwrap();
    file
}

fn entry(name: &[u8], kind: tar::EntryType, target: &str) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name);
    header.as_gnu_mut().unwrap().linkname[..target.len()].copy_from_slice(target.as_bytes());
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header.set_device_major(1).unwrap();
    header.set_device_minor(3).unwrap();
    header.set_cksum();
    header
}

#[test]
fn hostile_archives_stay_inside() {
    let place = tempfile::tempdir().unwrap();
    let inside = place.path().join("inside");
    fs::create_dir(&inside).unwrap();
    fs::write(place.path().join("secret"), "x").unwrap();
    let run = |file: tempfile::NamedTempFile, policy: &Policy| {
        unpack(File::open(&inside).unwrap(), file.reopen().unwrap(), policy).map_err(|e| e.to_string())
    };
    let none = Policy::default();
    let up = archive(|tar| tar.append(&entry(b"../evil", tar::EntryType::Regular, ""), &[][..]).unwrap());
    assert!(run(up, &none).unwrap_err().contains("outside of it"));
    let through = archive(|tar| {
        tar.append(&entry(b"out", tar::EntryType::Symlink, ".."), &[][..]).unwrap();
        tar.append(&entry(b"out/evil", tar::EntryType::Regular, ""), &[][..]).unwrap();
    });
    assert!(run(through, &none).unwrap_err().contains("openat2"));
    let link =
        archive(|tar| tar.append(&entry(b"stolen", tar::EntryType::Link, "../secret"), &[][..]).unwrap());
    assert!(run(link, &none).unwrap_err().contains("outside of it"));
    let device = || archive(|tar| tar.append(&entry(b"null", tar::EntryType::Char, ""), &[][..]).unwrap());
    assert!(run(device(), &none).unwrap_err().contains("device 1:3"));
    run(device(), &Policy { devices: true, ..Policy::default() }).unwrap();
    // Now it is there, so the archive adds nothing.
    run(device(), &none).unwrap();
    assert!(!place.path().join("evil").exists());
}

#[test]
fn headers_without_end_are_errors() {
    let to = tempfile::tempdir().unwrap();
    let long = 1 << 26;
    for kind in [tar::EntryType::XHeader, tar::EntryType::GNULongName, tar::EntryType::GNULongLink] {
        // A few kilobytes on the disk.
        let file = archive(|tar| {
            let mut header = entry(b"x", kind, "");
            header.set_size(long);
            header.set_cksum();
            tar.append(&header, std::io::repeat(b'x').take(long)).unwrap();
            tar.append(&entry(b"file", tar::EntryType::Regular, ""), &[][..]).unwrap();
        });
        let result = unpack(File::open(to.path()).unwrap(), file.reopen().unwrap(), &Policy::default());
        assert!(result.unwrap_err().to_string().contains("goes on and on"), "{kind:?}");
    }
    // The contents of a file may be as long, also where nobody asks for them.
    let file = archive(|tar| {
        for kind in [tar::EntryType::Regular, tar::EntryType::Fifo] {
            let mut header = entry(if kind.is_file() { b"file" } else { b"fifo" }, kind, "");
            header.set_size(long);
            header.set_cksum();
            tar.append(&header, std::io::repeat(0).take(long)).unwrap();
        }
    });
    unpack(File::open(to.path()).unwrap(), file.reopen().unwrap(), &Policy::default()).unwrap();
    assert_eq!(to.path().join("file").metadata().unwrap().len(), long);
}

#[test]
fn places_of_mounts_are_left_alone() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("console"), "").unwrap();
    fs::create_dir_all(place.path().join("a/b")).unwrap();
    let inode = place.path().join("console").metadata().unwrap().ino();
    let policy = Policy { keep: ["console".into(), "a/b".into()].into(), ..Policy::default() };
    unpack(File::open(place.path()).unwrap(), archive(|_| {}).reopen().unwrap(), &policy).unwrap();
    assert_eq!(place.path().join("console").metadata().unwrap().ino(), inode);
    assert!(place.path().join("a/b").exists());
    let clash = archive(|tar| tar.append(&entry(b"a", tar::EntryType::Regular, ""), &[][..]).unwrap());
    let error = unpack(File::open(place.path()).unwrap(), clash.reopen().unwrap(), &policy).unwrap_err();
    assert!(error.to_string().contains("config.json mounts something"), "{error}");
}

#[test]
fn damaged_archives_are_errors() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fill(from.path());
    let whole = tempfile::NamedTempFile::new().unwrap();
    pack(File::open(from.path()).unwrap(), whole.reopen().unwrap()).unwrap();
    let bytes = fs::read(whole.path()).unwrap();
    for cut in [0, 5, bytes.len() / 2, bytes.len() - 9] {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &bytes[..cut]).unwrap();
        let result = unpack(File::open(to.path()).unwrap(), file.reopen().unwrap(), &Policy::default());
        assert!(result.is_err(), "{cut}");
        assert!(verify(file.reopen().unwrap()).is_err(), "{cut}");
    }
    verify(whole.reopen().unwrap()).unwrap();
    // CRIU's tar fills the last block in a user namespace; anything else behind the end is none of it.
    for (behind, good) in [(&[0; 10240][..], true), (&[0, 0, 7], false), (&vec![0; 2 << 20], false)] {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [&bytes, behind].concat()).unwrap();
        assert_eq!(verify(file.reopen().unwrap()).is_ok(), good, "{}", behind.len());
        let result = unpack(File::open(to.path()).unwrap(), file.reopen().unwrap(), &Policy::default());
        assert_eq!(result.is_ok(), good, "{}: {result:?}", behind.len());
    }
}
