//! getsockopt(2) and setsockopt(2) with options as the plain bytes that the images hold.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// An option as raw bytes, at most `N` of them; the second value is how many the kernel filled.
pub fn get_bytes<const N: usize>(fd: impl AsFd, level: i32, name: i32) -> nix::Result<([u8; N], usize)> {
    let mut value = [0u8; N];
    let mut len = N as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `value`.
    Errno::result(unsafe {
        libc::getsockopt(fd.as_fd().as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len)
    })?;
    Ok((value, (len as usize).min(N)))
}

/// An option that depends on what `value` holds before; how much of it the kernel has filled.
pub fn query(fd: impl AsFd, level: i32, name: i32, value: &mut [u8]) -> nix::Result<usize> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `len` bytes, the size of `value`.
    Errno::result(unsafe {
        libc::getsockopt(fd.as_fd().as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len)
    })?;
    Ok((len as usize).min(value.len()))
}

/// An option that is an int.
pub fn get_int(fd: impl AsFd, level: i32, name: i32) -> nix::Result<i32> {
    get_bytes::<4>(fd, level, name).map(|(b, _)| i32::from_ne_bytes(b))
}

/// Sets an option from raw bytes.
pub fn set_bytes(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> nix::Result<()> {
    // SAFETY: the kernel reads `value.len()` bytes of `value`.
    Errno::result(unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Sets an option that is an int.
pub fn set_int(fd: impl AsFd, level: i32, name: i32, value: i32) -> nix::Result<()> {
    set_bytes(fd, level, name, &value.to_ne_bytes())
}

/// getsockname(2) as raw bytes, address family first.
pub fn name(fd: impl AsFd) -> nix::Result<Vec<u8>> {
    address(fd, libc::getsockname)
}

/// getpeername(2) as raw bytes, address family first.
pub fn peer(fd: impl AsFd) -> nix::Result<Vec<u8>> {
    address(fd, libc::getpeername)
}

type GetAddress = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

fn address(fd: impl AsFd, call: GetAddress) -> nix::Result<Vec<u8>> {
    let mut buf = [0u8; 128];
    let mut len = buf.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `buf`; bytes have no alignment to keep.
    Errno::result(unsafe { call(fd.as_fd().as_raw_fd(), buf.as_mut_ptr().cast(), &raw mut len) })?;
    Ok(buf[..(len as usize).min(buf.len())].to_vec())
}

/// bind(2) to an address given as raw bytes.
pub fn bind(fd: impl AsFd, address: &[u8]) -> nix::Result<()> {
    // SAFETY: the kernel copies `address.len()` bytes.
    Errno::result(unsafe {
        libc::bind(fd.as_fd().as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t)
    })
    .map(drop)
}

/// connect(2) to an address given as raw bytes.
pub fn connect(fd: impl AsFd, address: &[u8]) -> nix::Result<()> {
    // SAFETY: the kernel copies `address.len()` bytes.
    Errno::result(unsafe {
        libc::connect(fd.as_fd().as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t)
    })
    .map(drop)
}

/// The length that an option has, read with an empty buffer. SO_GET_FILTER counts instructions.
pub fn length(fd: impl AsFd, level: i32, name: i32) -> nix::Result<usize> {
    let mut len: libc::socklen_t = 0;
    // SAFETY: with a length of 0 the kernel writes nothing.
    Errno::result(unsafe {
        libc::getsockopt(fd.as_fd().as_raw_fd(), level, name, std::ptr::null_mut(), &raw mut len)
    })?;
    Ok(len as usize)
}

/// The instructions of a classic filter, as many as `count`, eight bytes each.
pub fn get_filter(fd: impl AsFd, count: usize) -> nix::Result<Vec<u8>> {
    let mut bytes = vec![0u8; count * 8];
    let mut len = count as libc::socklen_t;
    // SAFETY: the kernel counts this option's length in instructions of eight bytes, which `bytes` has room for.
    Errno::result(unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            bytes.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    bytes.truncate(len as usize * 8);
    Ok(bytes)
}

/// Attaches a classic filter, given as the kernel's instructions of eight bytes each.
pub fn attach_filter(fd: impl AsFd, program: &[u64]) -> nix::Result<()> {
    let filter =
        libc::sock_fprog { len: program.len() as libc::c_ushort, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel reads `len` instructions of eight bytes each, the elements of `program`.
    Errno::result(unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_names_pass_both_ways() {
        let s = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        set_int(&s, libc::SOL_SOCKET, libc::SO_BROADCAST, 1).unwrap();
        assert_eq!(get_int(&s, libc::SOL_SOCKET, libc::SO_BROADCAST).unwrap(), 1);
        assert_eq!(name(&s).unwrap()[..2], (libc::AF_INET as u16).to_ne_bytes());
        assert_eq!(peer(&s).unwrap_err(), Errno::ENOTCONN);
        let to = name(&s).unwrap();
        let t = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        connect(&t, &to).unwrap();
        assert_eq!(peer(&t).unwrap()[..8], to[..8]);
    }
}
