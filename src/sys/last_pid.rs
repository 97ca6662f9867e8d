//! The pid that a pid namespace has given last: `/proc/sys/kernel/ns_last_pid`.
//!
//! The file shows, and takes, that of the namespace of whoever reads it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::newborn;

const FILE: &str = "/proc/sys/kernel/ns_last_pid";

/// The last pid of the namespace that children of this thread are born in, before the child that looked.
pub fn get() -> io::Result<u32> {
    let file = File::open(FILE)?;
    let mut text = [0; 16];
    let args = [file.as_raw_fd().into(), text.as_mut_ptr() as libc::c_long, 16, 0];
    // SAFETY: the kernel writes at most 16 bytes into the buffer, which lives here.
    let len = unsafe { newborn::call(libc::SYS_pread64, args) }?;
    let text = usize::try_from(len).ok().and_then(|len| std::str::from_utf8(text.get(..len)?).ok());
    let last: u32 =
        text.and_then(|text| text.trim().parse().ok()).ok_or(io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(last.saturating_sub(1))
}

/// Makes the next pid the one after `last`.
pub fn set(last: u32) -> io::Result<()> {
    let file = File::options().write(true).open(FILE)?;
    let number = last.to_string();
    let args = [file.as_raw_fd().into(), number.as_ptr() as libc::c_long, number.len() as libc::c_long, 0];
    // SAFETY: the kernel reads that many bytes of the text, which lives here.
    unsafe { newborn::call(libc::SYS_pwrite64, args) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing;

    #[test]
    fn the_next_pid_follows() {
        testing::in_child(libc::CLONE_NEWPID, || {
            // The first process of the namespace must live, or no other can be made.
            let first = std::process::Command::new("sleep").arg("1000").spawn();
            assert_eq!(get().unwrap(), 1);
            set(4000).unwrap();
            assert_eq!(get().unwrap(), 4000);
            assert!(set(u32::MAX).is_err());
            first.unwrap().kill().unwrap();
        });
    }
}
