//! Connections from one socket into another, in a network of their own, with a peer that must not notice.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::socket::Backlog;

use super::testing::in_new_network;
use super::{capture, lock, make, repair, state};
use crate::checkpoint::files::inet;
use crate::checkpoint::model;
use crate::sys::socket::socket;
use crate::sys::sockopt::{get_int, set_int};

const ID: &str = "stasis-unit-test";
const PATIENCE: Duration = Duration::from_secs(60);

fn me() -> i32 {
    // The thread, for the network namespace is its own.
    nix::unistd::gettid().as_raw()
}

/// A connection: the two ends, the first of which connected.
fn pair(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    // Not the whole of loopback's 64 KiB at once: two of them hardly fit a window, and every one is waited for.
    set_int(&listener, libc::SOL_TCP, libc::TCP_MAXSEG, 1400).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let server = listener.accept().unwrap().0;
    for s in [&client, &server] {
        s.set_read_timeout(Some(PATIENCE)).unwrap();
        s.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (client, server)
}

struct Kept {
    state: u32,
    stream: model::TcpStream,
    ends: (SocketAddr, SocketAddr),
    reuse: bool,
}

/// Takes a connection off its socket, which is gone afterwards, behind a lock.
fn take(s: TcpStream) -> Kept {
    let fd = OwnedFd::from(s);
    let ends = inet::see(&fd).unwrap().connection().unwrap();
    lock::set(ID, me(), &[ends, (ends.1, ends.0)]).unwrap();
    let reuse = repair::reuse(&fd).unwrap();
    let (state, stream) = capture::capture(&fd).unwrap();
    assert!(!repair::is_on(&fd));
    assert_eq!(repair::reuse(&fd).unwrap(), reuse);
    repair::on(&fd).unwrap();
    drop(fd);
    Kept { state, stream, ends, reuse: reuse != 0 }
}

/// Puts it on a new socket.
fn put(kept: &Kept) -> TcpStream {
    let (local, remote) = kept.ends;
    let family = if local.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    let fd = socket(family, libc::SOCK_STREAM, 0).unwrap();
    make::make(&fd, kept.state, &kept.stream, local, remote).unwrap();
    lock::remove(ID, me()).unwrap();
    repair::finish(&fd, kept.reuse).unwrap();
    let s = TcpStream::from(fd);
    s.set_read_timeout(Some(PATIENCE)).unwrap();
    s.set_write_timeout(Some(PATIENCE)).unwrap();
    s
}

fn state_of(s: &TcpStream) -> u32 {
    repair::info(&s.try_clone().unwrap().into()).unwrap().state
}

/// Waits until the socket is in a state.
fn reach(s: &TcpStream, wanted: u32) {
    for _ in 0..60_000 {
        if state_of(s) == wanted {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("state {} instead of {wanted}", state_of(s));
}

fn say(to: &mut TcpStream, from: &mut TcpStream, what: &[u8]) {
    to.write_all(what).unwrap();
    let mut heard = vec![0; what.len()];
    from.read_exact(&mut heard).unwrap();
    assert_eq!(heard, what);
}

#[test]
fn a_connection_goes_on() {
    in_new_network(|| {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (client, mut server) = pair(address);
            let kept = take(client);
            assert_eq!(kept.state, state::ESTABLISHED);
            let mut client = put(&kept);
            say(&mut client, &mut server, b"to the server");
            say(&mut server, &mut client, b"to the client");
            // And the other end, which was accepted.
            let mut server = put(&take(server));
            say(&mut client, &mut server, b"to the server");
            say(&mut server, &mut client, b"to the client");
            drop(server);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        }
    });
}

#[test]
fn an_address_of_the_other_family() {
    in_new_network(|| {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (server, from) = listener.accept().unwrap();
        assert!(from.is_ipv6());
        let mut server = put(&take(server));
        say(&mut client, &mut server, b"mapped");
        server.shutdown(Shutdown::Write).unwrap();
        reach(&client, state::CLOSE_WAIT);
        reach(&server, state::FIN_WAIT2);
        let server = put(&take(server));
        drop(client);
        assert_eq!((&server).read(&mut [0]).unwrap(), 0);
    });
}

#[test]
fn what_is_unread_unacknowledged_and_unsent_arrives() {
    in_new_network(|| {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (mut client, mut server) = pair(address);
            // Far more than fits: some is with the peer, some on its way, some not sent.
            let data: Vec<u8> =
                (0..8u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            client.set_nonblocking(true).unwrap();
            let mut written = 0;
            loop {
                match client.write(&data[written..]) {
                    Ok(n) => written += n,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) => panic!("{e}"),
                }
                assert!(written < data.len());
            }
            server.write_all(b"unread").unwrap();
            let mut buffer = [0; 16];
            client.set_nonblocking(false).unwrap();
            assert_eq!(client.peek(&mut buffer).unwrap(), 6);
            let kept = take(client);
            assert_eq!(kept.stream.received, b"unread");
            let e = &kept.stream.entry;
            assert!(e.outq_len > 0 && e.unsq_len > Some(0), "{e:?}");
            let mut client = put(&kept);
            // The other end, too, with what it has not read.
            let kept = take(server);
            assert!(kept.stream.entry.inq_len > 0);
            let mut server = put(&kept);
            assert_eq!(client.read(&mut buffer).unwrap(), 6);
            let rest = &data[written..];
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    client.write_all(rest).unwrap();
                    client.shutdown(Shutdown::Write).unwrap();
                });
                let mut heard = Vec::new();
                server.read_to_end(&mut heard).unwrap();
                assert!(heard == data, "{} of {} bytes", heard.len(), data.len());
            });
        }
    });
}

#[test]
fn directions_that_have_ended_stay_so() {
    in_new_network(|| {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // We have ended, and the peer knows.
            let (client, mut server) = pair(address);
            client.shutdown(Shutdown::Write).unwrap();
            reach(&client, state::FIN_WAIT2);
            server.write_all(b"unread").unwrap();
            reach(&server, state::CLOSE_WAIT);
            assert_eq!(client.peek(&mut [0; 16]).unwrap(), 6);
            let kept = take(client);
            assert_eq!(kept.state, state::FIN_WAIT2);
            let mut client = put(&kept);
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
            // The other end: the peer has ended.
            let kept = take(server);
            assert_eq!(kept.state, state::CLOSE_WAIT);
            let mut server = put(&kept);
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
            let mut heard = [0; 6];
            client.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"unread");
            say(&mut server, &mut client, b"half");
            drop(server);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        }
    });
}

#[test]
fn ends_that_the_peer_has_not_heard() {
    in_new_network(|| {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // Ours, with the lock in the way.
            let (mut client, mut server) = pair(address);
            let ends = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            lock::set(ID, me(), &[ends, (ends.1, ends.0)]).unwrap();
            client.write_all(b"last").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let kept = take(client);
            assert_eq!(kept.state, state::FIN_WAIT1);
            assert_eq!(kept.stream.sent, b"last");
            let mut client = put(&kept);
            let mut heard = Vec::new();
            server.read_to_end(&mut heard).unwrap();
            assert_eq!(heard, b"last");
            drop(server);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            // Both, ours second.
            let (client, server) = pair(address);
            let ends = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            server.shutdown(Shutdown::Write).unwrap();
            reach(&client, state::CLOSE_WAIT);
            lock::set(ID, me(), &[ends, (ends.1, ends.0)]).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let kept = take(client);
            assert_eq!(kept.state, state::LAST_ACK);
            let client = put(&kept);
            assert_eq!((&server).read(&mut [0]).unwrap(), 0);
            reach(&client, state::CLOSE);
        }
    });
}

#[test]
fn both_have_ended_at_once() {
    in_new_network(|| {
        let (client, server) = pair("127.0.0.1:0");
        let ends = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        // Only what the client hears is let through, so that its own end is not acknowledged.
        lock::set(ID, me(), &[ends]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        reach(&client, state::CLOSING);
        let kept = take(client);
        assert_eq!(kept.state, state::CLOSING);
        let client = put(&kept);
        assert_eq!((&client).read(&mut [0]).unwrap(), 0);
        assert_eq!((&server).read(&mut [0]).unwrap(), 0);
        reach(&client, state::CLOSE);
    });
}

#[test]
fn a_connection_that_is_being_made() {
    in_new_network(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let from: SocketAddr = "127.0.0.1:4321".parse().unwrap();
        lock::set(ID, me(), &[(from, to), (to, from)]).unwrap();
        let fd = socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).unwrap();
        use crate::checkpoint::files::address::bytes;
        crate::sys::sockopt::bind(&fd, &bytes(&from)).unwrap();
        assert!(crate::sys::sockopt::connect(&fd, &bytes(&to)).is_err());
        let kept = take(fd.into());
        assert_eq!(kept.state, state::SYN_SENT);
        let mut client = put(&kept);
        // The kernel asks again in a second.
        let mut server = listener.accept().unwrap().0;
        reach(&client, state::ESTABLISHED);
        say(&mut client, &mut server, b"made");
    });
}

#[test]
fn what_was_agreed_upon_is_kept() {
    in_new_network(|| {
        let (client, mut server) = pair("127.0.0.1:0");
        let before = repair::info(&client.try_clone().unwrap().into()).unwrap();
        let mut client = put(&take(client));
        let after = repair::info(&client.try_clone().unwrap().into()).unwrap();
        assert_eq!(before, after);
        assert_ne!(before.options & (repair::TIMESTAMPS | repair::SACK | repair::WSCALE), 0);
        say(&mut client, &mut server, b"x");
    });
}

#[test]
fn images_that_contradict_themselves_are_refused() {
    in_new_network(|| {
        let (client, _server) = pair("127.0.0.1:0");
        let mut kept = take(client);
        kept.stream.entry.outq_len = 7;
        let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
        let e = make::make(&fd, kept.state, &kept.stream, kept.ends.0, kept.ends.1).unwrap_err();
        assert!(e.to_string().contains("queues"), "{e}");
    });
}

#[test]
fn a_port_shared_with_its_listener() {
    in_new_network(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        let server = listener.accept().unwrap().0;
        let kept = take(server);
        drop(listener);
        let listener = TcpListener::bind(address).unwrap();
        nix::sys::socket::listen(&listener, Backlog::new(5).unwrap()).unwrap();
        let mut server = put(&kept);
        say(&mut client, &mut server, b"the old one");
        let mut other = TcpStream::connect(address).unwrap();
        let mut accepted = listener.accept().unwrap().0;
        say(&mut other, &mut accepted, b"a new one");
        let fd = OwnedFd::from(server);
        assert_eq!(get_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap(), 1);
        set_int(&fd, libc::SOL_TCP, libc::TCP_NODELAY, 1).unwrap();
    });
}
