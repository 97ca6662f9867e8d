//! Against a systemd of our own making, that plays back answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use super::wire::{FIXED, Reader, header, sizes};
use super::*;

/// A message from systemd: type, fields (code, type, value), body.
fn message(kind: u8, fields: &[(u8, &str, &str)], reply_to: u32, body: &[u8]) -> Vec<u8> {
    let mut array = Vec::new();
    let pad = |v: &mut Vec<u8>, to: usize| v.resize(v.len().next_multiple_of(to), 0);
    if reply_to != 0 {
        array.extend([5, 1, b'u', 0]);
        array.extend(reply_to.to_le_bytes());
    }
    for (code, kind, text) in fields {
        pad(&mut array, 8);
        array.extend([*code, 1, kind.as_bytes()[0], 0]);
        if *kind == "g" {
            array.push(text.len() as u8);
        } else {
            array.extend((text.len() as u32).to_le_bytes());
        }
        array.extend(text.as_bytes());
        array.push(0);
    }
    let mut all = vec![b'l', kind, 1, 1];
    all.extend((body.len() as u32).to_le_bytes());
    all.extend(77u32.to_le_bytes());
    all.extend((array.len() as u32).to_le_bytes());
    all.extend(array);
    pad(&mut all, 8);
    all.extend(body);
    all
}

fn text(all: &[&str]) -> Vec<u8> {
    let mut w = Writer::default();
    all.iter().for_each(|s| w.string(s));
    w.bytes()
}

/// Answers calls until the connection is closed; returns the calls with their bodies.
fn systemd(listener: UnixListener) -> JoinHandle<Vec<(String, Vec<u8>)>> {
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut stream: UnixStream = stream;
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "\0AUTH EXTERNAL 31303030\r\n");
        stream.write_all(b"OK 1234\r\n").unwrap();
        line.clear();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "BEGIN\r\n");
        let mut calls = Vec::new();
        let mut fixed = [0; FIXED];
        while reader.read_exact(&mut fixed).is_ok() {
            let (fields, length) = sizes(&fixed).unwrap();
            let mut rest = vec![0; fields + length];
            reader.read_exact(&mut rest).unwrap();
            let body = rest.split_off(fields);
            let exact = u32::from_le_bytes(fixed[12..].try_into().unwrap()) as usize;
            let member = header(1, &rest, exact).unwrap().member;
            let serial = u32::from_le_bytes(fixed[8..12].try_into().unwrap());
            let starts = calls.iter().filter(|(m, _)| m == "StartTransientUnit").count();
            let removed = |how: &str| {
                let mut w = Writer::default();
                w.u32(1);
                ["/job/1", "x.scope", how].iter().for_each(|s| w.string(s));
                message(4, &[(3, "s", "JobRemoved"), (8, "g", "uoss")], 0, &w.bytes())
            };
            let error = |name: &str| message(3, &[(4, "s", name), (8, "g", "s")], serial, &text(&["no"]));
            let answer = message(2, &[(8, "g", "o")], serial, &text(&["/job/1"]));
            let sent = match member.as_str() {
                // A unit is left over at first. The signal may come before the answer.
                "StartTransientUnit" if starts == 0 => error("org.freedesktop.systemd1.UnitExists"),
                "StartTransientUnit" => [removed("done"), answer].concat(),
                "StopUnit" => [answer, removed("done")].concat(),
                "ResetFailedUnit" => error("org.freedesktop.systemd1.NoSuchUnit"),
                _ => message(2, &[], serial, &[]),
            };
            stream.write_all(&sent).unwrap();
            calls.push((member, body));
        }
        calls
    })
}

#[test]
fn a_scope_is_started_and_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("bus");
    let server = systemd(UnixListener::bind(&socket).unwrap());
    let unit = Unit::parse(Some(Path::new("machine.slice:docker:abc")), "id").unwrap();
    let mut bus = Bus::connect(&socket, 1000, true).unwrap();
    bus.subscribe().unwrap();
    unit.start_with(&mut bus, &[("PIDs".to_owned(), Value::U32s(vec![42]))]).unwrap();
    unit.attach_with(&mut bus, Path::new("a/b"), 43).unwrap();
    unit.stop_with(&mut bus).unwrap();
    drop(bus);
    let calls = server.join().unwrap();
    let names: Vec<&str> = calls.iter().map(|(name, _)| name.as_str()).collect();
    let expected =
        ["Hello", "AddMatch", "Subscribe", "StartTransientUnit", "ResetFailedUnit", "StartTransientUnit"];
    assert_eq!(names[..6], expected);
    assert_eq!(names[6..], ["AttachProcessesToUnit", "StopUnit", "ResetFailedUnit"]);
    let mut r = Reader::new(&calls[6].1);
    assert_eq!((r.string().unwrap().as_str(), r.string().unwrap().as_str()), ("docker-abc.scope", "/a/b"));
    assert_eq!((r.u32().unwrap(), r.u32().unwrap()), (4, 43));
    let mut r = Reader::new(&calls[5].1);
    assert_eq!((r.string().unwrap().as_str(), r.string().unwrap().as_str()), ("docker-abc.scope", "replace"));
}

#[test]
fn names_become_units_and_directories() {
    let unit = |path: &str| Unit::parse(Some(Path::new(path)), "id");
    let path = |text: &str| {
        let unit = unit(text).unwrap();
        expand(&unit.slice).unwrap().join(&unit.name)
    };
    assert_eq!(path("a-b.slice:docker:x"), Path::new("a.slice/a-b.slice/docker-x.scope"));
    assert_eq!(path("-.slice::x"), Path::new("x.scope"));
    assert_eq!(path("a.slice:docker:a-pod.slice"), Path::new("a.slice/a-pod.slice"));
    assert_eq!(Unit::parse(None, "id").unwrap().name, "runc-id.scope");
    assert!(unit("/docker/x").is_err() && unit("a:b").is_err() && unit("a.slice:p:x/y").is_err());
    assert!(expand("a").is_err() && expand("a--b.slice").is_err() && expand(".slice").is_err());
    assert!(expand("../x.slice").is_err());
    let unit = Unit::of(Path::new("/sys/fs/cgroup/a.slice/docker-x.scope")).unwrap();
    assert_eq!((unit.name.as_str(), unit.slice.as_str()), ("docker-x.scope", "a.slice"));
    let devices = "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  7 loop\n";
    assert_eq!(group(devices, false, 136), Some("pts"));
    assert_eq!(group(devices, true, 7), Some("loop"));
    assert_eq!(group(devices, true, 136), None);
}
