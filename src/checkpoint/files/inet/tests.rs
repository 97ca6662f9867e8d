use super::make::make;
use super::*;
use crate::checkpoint::context::Options;
use crate::sys::sockopt::set_int;
use nix::sys::socket::{Backlog, listen};
use std::net::{TcpListener, TcpStream, UdpSocket};

fn again(fd: &OwnedFd) -> (InetSkEntry, InetSkEntry) {
    let seen = see(fd).unwrap();
    supported(&seen, &Options::default()).unwrap();
    let was = entry(fd, &seen).unwrap();
    // The address is still taken by the first one.
    let free = InetSkEntry { src_port: 0, ..was.clone() };
    let made = make(&free, None, None).unwrap();
    let is = entry(&made, &see(&made).unwrap()).unwrap();
    (was, is)
}

#[test]
fn a_listener_comes_back() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address) else { continue };
        let fd = OwnedFd::from(listener);
        listen(&fd, Backlog::new(77).unwrap()).unwrap();
        set_int(&fd, libc::SOL_TCP, libc::TCP_NODELAY, 1).unwrap();
        let (was, mut is) = again(&fd);
        assert_eq!((was.state, was.backlog), (LISTEN, 77));
        assert_ne!(is.src_port, 0);
        is.src_port = was.src_port;
        assert_eq!(was, is);
    }
}

#[test]
fn a_port_is_bound_again_when_it_is_free() {
    let fd = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    let was = entry(&fd, &see(&fd).unwrap()).unwrap();
    let e = make(&was, None, None).unwrap_err();
    assert!(e.to_string().contains("another program uses"), "{e}");
    drop(fd);
    let made = make(&was, None, None).unwrap();
    assert_eq!(entry(&made, &see(&made).unwrap()).unwrap(), was);
}

#[test]
fn connected_datagrams() {
    let to = UdpSocket::bind("127.0.0.1:0").unwrap();
    let from = UdpSocket::bind("127.0.0.1:0").unwrap();
    from.connect(to.local_addr().unwrap()).unwrap();
    let (was, is) = again(&from.into());
    assert_eq!((was.state, is.dst_port), (ESTABLISHED, was.dst_port));
    let (was, _) = again(&to.into());
    assert_eq!((was.state, was.dst_port), (CLOSE, 0));
}

#[test]
fn connections_are_refused_by_address() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let live = Live::own(OwnedFd::from(stream), 4).unwrap();
    let refusal = |live: &Live, options: &Options| {
        check(live, options).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let none = Options::default();
    let e = refusal(&live, &none);
    assert!(e.contains("TCP connection from 127.0.0.1:") && e.contains("process 4"), "{e}");
    for options in [
        Options { tcp_established: true, ..Options::default() },
        Options { tcp_close: true, ..Options::default() },
    ] {
        assert_eq!(refusal(&live, &options), "");
    }
    let listening = Live::own(listener.into(), 4).unwrap();
    let e = refusal(&listening, &none);
    assert!(e.contains("has not been accepted"), "{e}");
    assert_eq!(refusal(&listening, &Options { tcp_skip_in_flight: true, ..Options::default() }), "");
}

#[test]
fn a_socket_that_was_never_bound() {
    let fd = crate::sys::socket::socket(libc::AF_INET, libc::SOCK_STREAM, TCP).unwrap();
    let (was, is) = again(&fd);
    assert_eq!(was, is);
    assert_eq!((was.state, was.src_port), (CLOSE, 0));
}
