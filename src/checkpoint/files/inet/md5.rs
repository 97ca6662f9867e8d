//! Keys with which TCP segments are signed (TCP-MD5), which no socket tells: sock_diag(7) lists them, of sockets that
//! listen or are connected.
//!
//! ```text
//!   tcp_diag_md5sig   family(1) prefix(1) length(2) address(16) key(80)
//!   tcp_md5sig        sockaddr_storage(128) flags(1) prefix(1) length(2) index(4) key(80)
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::checkpoint::error::Context;
use crate::checkpoint::files::{address, diag};
use crate::checkpoint::{Error, Result};
use crate::sys::sockopt::{query, set_bytes};

const INET_DIAG_MD5SIG: u16 = 18;
/// What they are listed with: INET_DIAG_INFO.
const SHOW_INFO: u8 = 1 << 1;
const MESSAGE: usize = 72;
const INODE: usize = 68;
const LISTED: usize = 100;
const TCP_MD5SIG_EXT: i32 = 32;
const TCP_AO_INFO: i32 = 40;
const KEY_MAX: usize = 80;

/// A key, and for whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    address: IpAddr,
    prefix: u8,
    key: Vec<u8>,
}

/// The keys of all TCP sockets, by inode.
pub type Keys = BTreeMap<u32, Vec<Key>>;

/// Those of a family, in the network namespace of that process. A kernel without CONFIG_INET_DIAG tells of none.
pub fn read(pid: i32, family: i32) -> Result<Keys> {
    let mut request = vec![family as u8, libc::IPPROTO_TCP as u8, SHOW_INFO, 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&[0; 48]);
    let mut all = Keys::new();
    let listed = diag::list(pid, &request, |message| {
        let (fixed, rest) = message.split_at_checked(MESSAGE).ok_or_else(diag::garbled)?;
        diag::attributes(rest, |number, value| {
            if number == INET_DIAG_MD5SIG {
                let keys = value.chunks_exact(LISTED).filter_map(key).collect();
                all.insert(diag::word(fixed, INODE), keys);
            }
        })
    });
    match listed {
        Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(Keys::new()),
        other => other.map(|()| all),
    }
}

fn key(bytes: &[u8]) -> Option<Key> {
    let octets: [u8; 16] = bytes.get(4..20)?.try_into().ok()?;
    let length = usize::from(u16::from_ne_bytes([bytes[2], bytes[3]]));
    let address = match i32::from(bytes[0]) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])),
        _ => IpAddr::V6(Ipv6Addr::from(octets)),
    };
    Some(Key { address, prefix: bytes[1], key: bytes.get(20..20 + length)?.to_vec() })
}

/// Refuses TCP-AO, whose keys have state of their own.
pub fn refuse_ao(fd: &OwnedFd) -> Result<()> {
    // Older kernels do not know it, and of a socket without it newer ones say ENOENT.
    match query(fd, libc::SOL_TCP, TCP_AO_INFO, &mut [0; 56]) {
        Ok(_) => Err(Error::new("a TCP socket signs its segments (TCP-AO), which cannot be checkpointed")
            .remedy("let the program close it, or stop it")),
        Err(_) => Ok(()),
    }
}

/// Gives a socket its keys again.
pub fn restore(fd: &OwnedFd, v6: bool, keys: &[Key]) -> Result<()> {
    for Key { address, prefix, key } in keys {
        // A socket of IPv6 wants even those of IPv4 as its own, with the prefixes of IPv4.
        let address = match address {
            IpAddr::V4(four) if v6 => IpAddr::V6(four.to_ipv6_mapped()),
            other => *other,
        };
        let mut bytes = address::bytes(&SocketAddr::new(address, 0));
        bytes.resize(128, 0);
        let length = u16::try_from(key.len().min(KEY_MAX)).unwrap_or(0);
        // TCP_MD5SIG_FLAG_PREFIX
        bytes.extend([1, *prefix]);
        bytes.extend(length.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(key.iter().take(KEY_MAX));
        bytes.resize(216, 0);
        set_bytes(fd, libc::SOL_TCP, TCP_MD5SIG_EXT, &bytes)
            .during("cannot give a TCP socket its key", || {
                format!("setsockopt(_, SOL_TCP, TCP_MD5SIG_EXT, {address}/{prefix})")
            })
            .map_err(|e| e.remedy("the kernel must be built with CONFIG_TCP_MD5SIG"))?;
    }
    Ok(())
}
