//! setdomainname(2).

use nix::errno::Errno;

use super::check;

/// Sets the NIS domain name of the UTS namespace.
pub fn set_domainname(name: &str) -> Result<(), Errno> {
    // SAFETY: the kernel reads `len` bytes from the slice.
    check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }.into()).map(drop)
}
