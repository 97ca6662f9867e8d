//! Options that sockets of every family have (SOL_SOCKET), read into the record and set from it.

use std::os::fd::OwnedFd;

use libc::SOL_SOCKET;
use nix::sys::socket::Shutdown;

use crate::checkpoint::error::Context;
use crate::checkpoint::image::{SkOptsEntry, SkShutdown};
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{get_bytes, get_int, set_bytes, set_int};

const SO_BUF_LOCK: i32 = 72;
const SO_PASSSEC: i32 = 34;
const SO_NO_CHECK: i32 = 11;
/// Instructions of the largest classic filter.
const FILTER_MAX: usize = 4096;

/// Reads an int.
fn read(fd: &OwnedFd, name: i32) -> Result<u32> {
    get_int(fd, SOL_SOCKET, name)
        .map(i32::cast_unsigned)
        .during("cannot read a socket's option", || format!("getsockopt(_, SOL_SOCKET, {name}, _, _)"))
}

fn flag(fd: &OwnedFd, name: i32) -> Result<Option<bool>> {
    read(fd, name).map(|v| Some(v != 0))
}

fn time(fd: &OwnedFd, name: i32) -> Result<(u64, u64)> {
    let (bytes, _) = get_bytes::<16>(fd, SOL_SOCKET, name)
        .during("cannot read a socket's option", || format!("getsockopt(_, SOL_SOCKET, {name}, _, _)"))?;
    let half = |at: usize| bytes.iter().skip(at).take(8).rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    Ok((half(0), half(8)))
}

/// The directions in which a record says that the socket is shut down.
pub fn directions(record: Option<i32>) -> Option<Shutdown> {
    match SkShutdown::try_from(record?).ok()? {
        SkShutdown::None => None,
        SkShutdown::Read => Some(Shutdown::Read),
        SkShutdown::Write => Some(Shutdown::Write),
        SkShutdown::Both => Some(Shutdown::Both),
    }
}

/// Reads all options.
pub fn dump(fd: &OwnedFd, family: i32) -> Result<SkOptsEntry> {
    let (so_snd_tmo_sec, so_snd_tmo_usec) = time(fd, libc::SO_SNDTIMEO)?;
    let (so_rcv_tmo_sec, so_rcv_tmo_usec) = time(fd, libc::SO_RCVTIMEO)?;
    let (linger, _) = get_bytes::<8>(fd, SOL_SOCKET, libc::SO_LINGER)
        .during("cannot read a socket's option", || "getsockopt(_, SOL_SOCKET, SO_LINGER, _, _)".into())?;
    let [on, _, _, _, l0, l1, l2, l3] = linger;
    let credentials = family == libc::AF_UNIX || family == libc::AF_NETLINK;
    let mark = read(fd, libc::SO_MARK)?;
    Ok(SkOptsEntry {
        so_sndbuf: read(fd, libc::SO_SNDBUF)?,
        so_rcvbuf: read(fd, libc::SO_RCVBUF)?,
        so_snd_tmo_sec,
        so_snd_tmo_usec,
        so_rcv_tmo_sec,
        so_rcv_tmo_usec,
        reuseaddr: flag(fd, libc::SO_REUSEADDR)?,
        so_priority: Some(read(fd, libc::SO_PRIORITY)?),
        so_rcvlowat: Some(read(fd, libc::SO_RCVLOWAT)?),
        so_mark: (mark != 0).then_some(mark),
        so_passcred: if credentials { flag(fd, libc::SO_PASSCRED)? } else { None },
        so_passsec: if credentials { flag(fd, SO_PASSSEC)? } else { None },
        so_dontroute: flag(fd, libc::SO_DONTROUTE)?,
        so_no_check: flag(fd, SO_NO_CHECK)?,
        so_bound_dev: bound_device(fd, family)?,
        so_filter: filter(fd)?,
        so_reuseport: flag(fd, libc::SO_REUSEPORT)?,
        so_broadcast: flag(fd, libc::SO_BROADCAST)?,
        so_keepalive: flag(fd, libc::SO_KEEPALIVE)?,
        so_oobinline: Some(read(fd, libc::SO_OOBINLINE)?),
        so_linger: (on != 0).then_some(u32::from_ne_bytes([l0, l1, l2, l3])),
        // Since 5.14.
        so_buf_lock: read(fd, SO_BUF_LOCK).ok(),
        ..SkOptsEntry::default()
    })
}

fn bound_device(fd: &OwnedFd, family: i32) -> Result<Option<String>> {
    if family == libc::AF_UNIX || family == libc::AF_NETLINK {
        return Ok(None);
    }
    let (bytes, len) = get_bytes::<16>(fd, SOL_SOCKET, libc::SO_BINDTODEVICE)
        .during("cannot read a socket's device", || {
            "getsockopt(_, SOL_SOCKET, SO_BINDTODEVICE, _, _)".into()
        })?;
    let name: Vec<u8> = bytes.iter().take(len).copied().take_while(|b| *b != 0).collect();
    if name.is_empty() {
        return Ok(None);
    }
    String::from_utf8(name).map(Some).map_err(|_| Error::new("a network device's name is not valid UTF-8"))
}

/// A classic filter, eight bytes an instruction. Others are refused.
pub fn filter(fd: &OwnedFd) -> Result<Vec<u64>> {
    let what = "cannot read a socket's filter";
    let call = || "getsockopt(_, SOL_SOCKET, SO_GET_FILTER, _, _)".to_owned();
    // The length of the answer counts instructions.
    let count = match crate::sys::sockopt::length(fd, SOL_SOCKET, libc::SO_GET_FILTER) {
        // An eBPF program has no classic form.
        Err(nix::errno::Errno::EACCES | nix::errno::Errno::EINVAL) => {
            return Err(Error::new("a socket has an eBPF filter, which cannot be checkpointed")
                .remedy("let the program detach it, or stop it"));
        }
        other => other.during(what, call)?,
    };
    if count == 0 {
        return Ok(Vec::new());
    }
    let bytes = crate::sys::sockopt::get_filter(fd, count.min(FILTER_MAX)).during(what, call)?;
    Ok(bytes.chunks_exact(8).map(|c| c.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b))).collect())
}

/// May its filter not be changed any more?
pub fn is_locked(fd: &OwnedFd) -> bool {
    get_int(fd, SOL_SOCKET, libc::SO_LOCK_FILTER).is_ok_and(|v| v != 0)
}

/// Has its filter stay as it is.
pub fn lock(fd: &OwnedFd) -> Result<()> {
    set(fd, libc::SO_LOCK_FILTER, 1)
}

/// Room for queues to be filled: as much as there is.
pub fn open_buffers(fd: &OwnedFd) -> Result<()> {
    for (force, plain) in [(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF), (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF)] {
        set_buffer(fd, force, plain, i32::MAX / 2)?;
    }
    Ok(())
}

/// The kernel doubles what it is given. Without CAP_NET_ADMIN the limit of the host holds.
fn set_buffer(fd: &OwnedFd, force: i32, plain: i32, size: i32) -> Result<()> {
    set_int(fd, SOL_SOCKET, force, size)
        .or_else(|_| set_int(fd, SOL_SOCKET, plain, size))
        .during("cannot size a socket's buffer", || format!("setsockopt(_, SOL_SOCKET, {force}, {size})"))
}

/// Sets the options that decide about bind(2).
pub fn restore_early(fd: &OwnedFd, opts: &SkOptsEntry) -> Result<()> {
    if let Some(device) = &opts.so_bound_dev {
        set_bytes(fd, SOL_SOCKET, libc::SO_BINDTODEVICE, device.as_bytes())
            .during("cannot bind a socket to its device", || {
                format!("setsockopt(_, SO_BINDTODEVICE, {device:?})")
            })?;
    }
    if opts.so_reuseport == Some(true) {
        set(fd, libc::SO_REUSEPORT, 1)?;
    }
    // Whatever it was: what the checkpointed one left behind must not be in the way.
    set(fd, libc::SO_REUSEADDR, 1)
}

fn set(fd: &OwnedFd, name: i32, value: u32) -> Result<()> {
    set_int(fd, SOL_SOCKET, name, value.cast_signed())
        .during("cannot set a socket's option", || format!("setsockopt(_, SOL_SOCKET, {name}, {value})"))
}

/// Sets all other options.
pub fn restore(fd: &OwnedFd, opts: &SkOptsEntry, family: i32) -> Result<()> {
    let halved = |n: u32| i32::try_from(n / 2).unwrap_or(i32::MAX / 2);
    set_buffer(fd, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, halved(opts.so_sndbuf))?;
    set_buffer(fd, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, halved(opts.so_rcvbuf))?;
    if let Some(lock) = opts.so_buf_lock {
        // Since 5.14; without it the buffers keep their sizes, which is what the lock would see to.
        let _ = set(fd, SO_BUF_LOCK, lock);
    }
    let numbers = [
        (libc::SO_PRIORITY, opts.so_priority),
        (libc::SO_RCVLOWAT, opts.so_rcvlowat),
        (libc::SO_MARK, opts.so_mark.filter(|m| *m != 0)),
        (libc::SO_OOBINLINE, opts.so_oobinline.filter(|v| *v != 0)),
    ];
    for (name, value) in numbers {
        if let Some(value) = value {
            set(fd, name, value)?;
        }
    }
    let flags = [
        (libc::SO_PASSCRED, opts.so_passcred),
        (SO_PASSSEC, opts.so_passsec),
        (libc::SO_DONTROUTE, opts.so_dontroute),
        (SO_NO_CHECK, opts.so_no_check),
        (libc::SO_BROADCAST, opts.so_broadcast),
        (libc::SO_KEEPALIVE, opts.so_keepalive),
    ];
    for (name, _) in flags.iter().filter(|f| f.1 == Some(true)) {
        set(fd, *name, 1)?;
    }
    if family != libc::AF_UNIX && family != libc::AF_NETLINK {
        set(fd, libc::SO_REUSEADDR, u32::from(opts.reuseaddr == Some(true)))?;
    } else if opts.reuseaddr == Some(true) {
        set(fd, libc::SO_REUSEADDR, 1)?;
    }
    if let Some(seconds) = opts.so_linger {
        let value: Vec<u8> = [1u32, seconds].iter().flat_map(|n| n.to_ne_bytes()).collect();
        set_bytes(fd, SOL_SOCKET, libc::SO_LINGER, &value)
            .during("cannot set a socket's option", || format!("setsockopt(_, SO_LINGER, {seconds})"))?;
    }
    let times = [
        (libc::SO_SNDTIMEO, opts.so_snd_tmo_sec, opts.so_snd_tmo_usec),
        (libc::SO_RCVTIMEO, opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec),
    ];
    for (name, sec, usec) in times.into_iter().filter(|t| (t.1, t.2) != (0, 0)) {
        let value: Vec<u8> = [sec, usec].iter().flat_map(|n| n.to_ne_bytes()).collect();
        set_bytes(fd, SOL_SOCKET, name, &value).during("cannot set a socket's option", || {
            format!("setsockopt(_, SOL_SOCKET, {name}, {sec}.{usec:06})")
        })?;
    }
    if !opts.so_filter.is_empty() {
        if opts.so_filter.len() > FILTER_MAX {
            return Err(Error::new(format!("a socket's filter has {} instructions", opts.so_filter.len())));
        }
        crate::sys::sockopt::attach_filter(fd, &opts.so_filter)
            .during("cannot attach a socket's filter", || {
                format!("setsockopt(_, SO_ATTACH_FILTER, {} instructions)", opts.so_filter.len())
            })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_back() {
        let s: OwnedFd = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into();
        set(&s, libc::SO_BROADCAST, 1).unwrap();
        set(&s, libc::SO_PRIORITY, 4).unwrap();
        set_int(&s, SOL_SOCKET, libc::SO_RCVBUF, 40_000).unwrap();
        let value: Vec<u8> = [3u64, 250_000].iter().flat_map(|n| n.to_ne_bytes()).collect();
        set_bytes(&s, SOL_SOCKET, libc::SO_RCVTIMEO, &value).unwrap();
        set_bytes(&s, SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 9, 0, 0, 0]).unwrap();
        // return 7 of each packet
        let program = [0x0000_0007_0000_0006u64];
        crate::sys::sockopt::attach_filter(&s, &program).unwrap();
        let was = dump(&s, libc::AF_INET).unwrap();
        assert_eq!((was.so_linger, was.so_rcv_tmo_sec, was.so_rcvbuf), (Some(9), 3, 80_000));
        assert_eq!(was.so_filter, program);
        let t: OwnedFd = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into();
        restore_early(&t, &was).unwrap();
        restore(&t, &was, libc::AF_INET).unwrap();
        assert_eq!(dump(&t, libc::AF_INET).unwrap(), was);
    }
}
