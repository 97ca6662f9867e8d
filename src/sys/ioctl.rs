//! ioctl(2) requests on descriptors that are restored: timerfd ticks, unix socket files, terminals.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
const SIOCOUTQNSD: libc::c_ulong = 0x894B;
const SIOCUNIXFILE: libc::c_ulong = 0x89E0;
const TIOCGPKT: libc::c_ulong = 0x8004_5438;
const TIOCGPTLCK: libc::c_ulong = 0x8004_5439;
const TIOCGDEV: libc::c_ulong = 0x8004_5432;
const TIOCGEXCL: libc::c_ulong = 0x8004_5440;
const TIOCGPTPEER: libc::c_ulong = 0x5441;
const TIOCGPTN: libc::c_ulong = 0x8004_5430;
const TIOCSPTLCK: libc::c_ulong = 0x4004_5431;
const TIOCGLCKTRMIOS: libc::c_ulong = 0x5456;
const TIOCSLCKTRMIOS: libc::c_ulong = 0x5457;
const INOTIFY_IOC_SETNEXTWD: libc::c_ulong = 0x4004_4900;
const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;
const FS_IOC_SETFLAGS: libc::c_ulong = 0x4008_6602;
const SIOCGSKNS: libc::c_ulong = 0x894C;
const NS_GET_USERNS: libc::c_ulong = 0xb701;
const NS_GET_PARENT: libc::c_ulong = 0xb702;
const NS_GET_OWNER_UID: libc::c_ulong = 0xb704;
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// What a terminal is set to, the kernel's own layout (`struct termios`, 19 control characters).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Termios {
    /// Input modes.
    pub iflag: u32,
    /// Output modes.
    pub oflag: u32,
    /// Control modes.
    pub cflag: u32,
    /// Local modes.
    pub lflag: u32,
    /// Line discipline.
    pub line: u8,
    /// Control characters.
    pub cc: [u8; 19],
}

fn get<T>(fd: impl AsFd, request: libc::c_ulong, mut value: T) -> nix::Result<T> {
    // SAFETY: private; every caller below passes the type that its request fills.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

fn set<T>(fd: impl AsFd, request: libc::c_ulong, value: &T) -> nix::Result<()> {
    // SAFETY: private; every caller below passes the type that its request reads.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw const *value) }).map(drop)
}

fn plain(fd: impl AsFd, request: libc::c_ulong, argument: libc::c_int) -> nix::Result<i32> {
    // SAFETY: private; every caller below passes a request whose argument is a number.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, argument) })
}

/// A descriptor that an ioctl made.
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: private; the kernel has just made this descriptor, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Sets the expirations that a timerfd has not reported yet.
pub fn set_timerfd_ticks(fd: impl AsFd, ticks: u64) -> nix::Result<()> {
    set(fd, TFD_IOC_SET_TICKS, &ticks)
}

/// Lets the kernel count the expirations of a periodic timerfd since the first: asking for its time does.
pub fn count_timerfd_ticks(fd: impl AsFd) -> nix::Result<()> {
    // SAFETY: plain numbers, for which zero is valid.
    let mut time: libc::itimerspec = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes an itimerspec.
    Errno::result(unsafe { libc::timerfd_gettime(fd.as_fd().as_raw_fd(), &raw mut time) }).map(drop)
}

/// An O_PATH descriptor of the file that a unix socket is bound to.
pub fn unix_socket_file(fd: impl AsFd) -> nix::Result<OwnedFd> {
    plain(fd, SIOCUNIXFILE, 0).map(owned)
}

/// The next watch descriptor that inotify will give out.
pub fn set_inotify_next_wd(fd: impl AsFd, wd: i32) -> nix::Result<()> {
    plain(fd, INOTIFY_IOC_SETNEXTWD, wd).map(drop)
}

/// Bytes that can be read: FIONREAD.
pub fn readable(fd: impl AsFd) -> nix::Result<i32> {
    get(fd, libc::FIONREAD, 0)
}

/// Bytes that a TCP socket has sent and not been acknowledged, or has not sent yet: SIOCOUTQ.
pub fn unacknowledged(fd: impl AsFd) -> nix::Result<i32> {
    get(fd, libc::TIOCOUTQ, 0)
}

/// Bytes that a TCP socket has not sent yet: SIOCOUTQNSD.
pub fn unsent(fd: impl AsFd) -> nix::Result<i32> {
    get(fd, SIOCOUTQNSD, 0)
}

/// Types a byte into a terminal, or on a master says it. Needs CAP_SYS_ADMIN.
pub fn push_input(fd: impl AsFd, byte: u8) -> nix::Result<()> {
    set(fd, libc::TIOCSTI, &byte)
}

/// Terminal settings.
pub fn termios(fd: impl AsFd) -> nix::Result<Termios> {
    get(fd, libc::TCGETS, Termios::default())
}

/// Sets terminal settings at once.
pub fn set_termios(fd: impl AsFd, value: &Termios) -> nix::Result<()> {
    set(fd, libc::TCSETS, value)
}

/// Which terminal settings are locked.
pub fn locked_termios(fd: impl AsFd) -> nix::Result<Termios> {
    get(fd, TIOCGLCKTRMIOS, Termios::default())
}

/// Locks terminal settings. Needs CAP_SYS_ADMIN.
pub fn set_locked_termios(fd: impl AsFd, value: &Termios) -> nix::Result<()> {
    set(fd, TIOCSLCKTRMIOS, value)
}

/// Rows, columns, and pixels in both directions.
pub fn window_size(fd: impl AsFd) -> nix::Result<[u16; 4]> {
    get(fd, libc::TIOCGWINSZ, [0; 4])
}

/// Sets rows, columns, and pixels. The foreground process group gets SIGWINCH if they change.
pub fn set_window_size(fd: impl AsFd, value: &[u16; 4]) -> nix::Result<()> {
    set(fd, libc::TIOCSWINSZ, value)
}

/// Index of a pseudoterminal, from its master.
pub fn pty_index(fd: impl AsFd) -> nix::Result<u32> {
    get(fd, TIOCGPTN, 0)
}

/// Device number of the terminal behind a descriptor; for /dev/tty, of the one it stands for. Since Linux 2.6.31.
pub fn tty_device(fd: impl AsFd) -> nix::Result<u64> {
    let number: u32 = get(fd, TIOCGDEV, 0)?;
    // new_encode_dev(): 12 bits of major between 8 and 12 of minor.
    let (major, minor) = ((number >> 8) & 0xfff, (number & 0xff) | ((number >> 12) & 0xfff00));
    Ok(nix::sys::stat::makedev(major.into(), minor.into()))
}

/// Is the slave locked? From the master.
pub fn pty_locked(fd: impl AsFd) -> nix::Result<bool> {
    get(fd, TIOCGPTLCK, 0).map(|v: i32| v != 0)
}

/// Locks or unlocks the slave, from the master.
pub fn set_pty_locked(fd: impl AsFd, locked: bool) -> nix::Result<()> {
    set(fd, TIOCSPTLCK, &i32::from(locked))
}

/// Is the master in packet mode?
pub fn pty_packet_mode(fd: impl AsFd) -> nix::Result<bool> {
    get(fd, TIOCGPKT, 0).map(|v: i32| v != 0)
}

/// Sets the master's packet mode.
pub fn set_pty_packet_mode(fd: impl AsFd, on: bool) -> nix::Result<()> {
    set(fd, libc::TIOCPKT, &i32::from(on))
}

/// Opens the slave of a master, whatever is mounted on /dev/pts.
pub fn pty_peer(fd: impl AsFd, flags: i32) -> nix::Result<OwnedFd> {
    plain(fd, TIOCGPTPEER, flags).map(owned)
}

/// Is the terminal closed to further opens?
pub fn tty_exclusive(fd: impl AsFd) -> nix::Result<bool> {
    get(fd, TIOCGEXCL, 0).map(|v: i32| v != 0)
}

/// Closes the terminal to further opens.
pub fn set_tty_exclusive(fd: impl AsFd) -> nix::Result<()> {
    plain(fd, libc::TIOCEXCL, 0).map(drop)
}

/// Foreground process group of a terminal: of this session's one, or, asked on a master, of its slave.
pub fn tty_pgrp(fd: impl AsFd) -> nix::Result<i32> {
    get(fd, libc::TIOCGPGRP, 0)
}

/// Session of a terminal, under the same conditions.
pub fn tty_session(fd: impl AsFd) -> nix::Result<i32> {
    get(fd, libc::TIOCGSID, 0)
}

/// The flags of a file that chattr(1) shows. The kernel takes and gives an int, whatever the request's number says.
pub fn file_flags(fd: impl AsFd) -> nix::Result<u32> {
    get(fd, FS_IOC_GETFLAGS, 0u64).map(|flags| flags as u32)
}

/// Sets the flags of a file.
pub fn set_file_flags(fd: impl AsFd, flags: u32) -> nix::Result<()> {
    set(fd, FS_IOC_SETFLAGS, &u64::from(flags))
}

/// The network namespace that a socket is in. Needs CAP_NET_ADMIN there.
pub fn socket_namespace(fd: impl AsFd) -> nix::Result<OwnedFd> {
    plain(fd, SIOCGSKNS, 0).map(owned)
}

/// The user namespace that owns a namespace. EPERM where it is not ours or one below.
pub fn namespace_owner(fd: impl AsFd) -> nix::Result<OwnedFd> {
    plain(fd, NS_GET_USERNS, 0).map(owned)
}

/// The namespace around a pid or user namespace.
pub fn namespace_parent(fd: impl AsFd) -> nix::Result<OwnedFd> {
    plain(fd, NS_GET_PARENT, 0).map(owned)
}

/// Who has made a user namespace, as ours knows him.
pub fn namespace_maker(fd: impl AsFd) -> nix::Result<u32> {
    get(fd, NS_GET_OWNER_UID, 0u32)
}

/// The CLONE_NEW* flag of a namespace's kind.
pub fn namespace_kind(fd: impl AsFd) -> nix::Result<i32> {
    plain(fd, NS_GET_NSTYPE, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_tells_its_kind_and_owner() {
        let net = std::fs::File::open("/proc/self/ns/net").unwrap();
        assert_eq!(namespace_kind(&net).unwrap(), libc::CLONE_NEWNET);
        if let Ok(owner) = namespace_owner(&net) {
            assert_eq!(namespace_kind(&owner).unwrap(), libc::CLONE_NEWUSER);
            let around = namespace_parent(&owner);
            assert!(around.is_ok() || around.err() == Some(Errno::EPERM));
        }
    }

    #[test]
    fn a_pty_is_made_and_read() {
        let master = std::fs::OpenOptions::new().read(true).write(true).open("/dev/ptmx").unwrap();
        assert!(pty_locked(&master).unwrap());
        set_pty_locked(&master, false).unwrap();
        let slave = pty_peer(&master, libc::O_RDWR | libc::O_NOCTTY).unwrap();
        set_window_size(&master, &[24, 80, 1, 2]).unwrap();
        assert_eq!(window_size(&slave).unwrap(), [24, 80, 1, 2]);
        let mut t = termios(&slave).unwrap();
        t.cc[libc::VINTR] = 7;
        set_termios(&slave, &t).unwrap();
        assert_eq!(termios(&slave).unwrap(), t);
        assert!(!pty_packet_mode(&master).unwrap());
        set_pty_packet_mode(&master, true).unwrap();
        assert!(pty_packet_mode(&master).unwrap());
        let name = std::fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd())).unwrap();
        assert_eq!(name.file_name().unwrap().to_str().unwrap(), pty_index(&master).unwrap().to_string());
    }
}
