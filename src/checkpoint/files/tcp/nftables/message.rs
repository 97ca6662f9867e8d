//! Messages to the kernel's netfilter, in its netlink language.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::{CREATE, REGISTER};
use crate::sys::sockopt::set_int;

const FAMILY_INET: u8 = 1;
const SUBSYSTEM: u16 = libc::NFNL_SUBSYS_NFTABLES as u16;
const ERROR: u16 = 2;
const NESTED: u16 = 0x8000;

/// Attributes in the making.
#[derive(Default)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.0.extend(((value.len() + 4) as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
    pub fn word(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }
    pub fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes);
    }
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(kind | NESTED, &inner.0);
    }
    pub fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Self)) {
        self.nest(1, |a| {
            a.text(1, name);
            a.nest(2, fill);
        });
    }
    pub fn load_meta(&mut self, key: u32) {
        self.expression("meta", |a| {
            a.word(1, REGISTER);
            a.word(2, key);
        });
    }
    pub fn load_packet(&mut self, register: u32, base: u32, at: u32, length: u32) {
        self.expression("payload", |a| {
            a.word(1, register);
            a.word(2, base);
            a.word(3, at);
            a.word(4, length);
        });
    }
    pub fn equal(&mut self, value: &[u8]) {
        self.expression("cmp", |a| {
            a.word(1, REGISTER);
            a.word(2, 0);
            a.nest(3, |a| a.bytes(1, value));
        });
    }
    pub fn verdict(&mut self, code: u32) {
        self.expression("immediate", |a| {
            a.word(1, 0);
            a.nest(2, |a| a.nest(2, |a| a.word(1, code)));
        });
    }
}

/// Messages for the kernel.
#[derive(Default)]
pub struct Batch {
    bytes: Vec<u8>,
    /// Where the last message begins.
    last: usize,
    count: u32,
}

impl Batch {
    fn put(&mut self, kind: u16, flags: u16, family: u8, subsystem: u16, attributes: &[u8]) {
        self.last = self.bytes.len();
        self.count += 1;
        self.bytes.extend(((20 + attributes.len()) as u32).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((libc::NLM_F_REQUEST as u16 | flags).to_ne_bytes());
        self.bytes.extend(self.count.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend([family, 0]);
        self.bytes.extend(subsystem.to_be_bytes());
        self.bytes.extend(attributes);
    }

    pub fn border(&mut self, kind: i32) {
        self.put(kind as u16, 0, 0, SUBSYSTEM, &[]);
    }

    pub fn message(&mut self, kind: i32, flags: u16, fill: impl FnOnce(&mut Attributes)) {
        let mut attributes = Attributes::default();
        fill(&mut attributes);
        self.put(SUBSYSTEM << 8 | kind as u16, flags, FAMILY_INET, 0, &attributes.0);
    }

    pub fn rule(&mut self, table: &str, chain: &str, fill: impl FnOnce(&mut Attributes)) {
        self.message(libc::NFT_MSG_NEWRULE, CREATE | libc::NLM_F_APPEND as u16, |a| {
            a.text(1, table);
            a.text(2, chain);
            a.nest(4, fill);
        });
    }

    /// Has the kernel say so when it has got as far as the last message. What fails before it says so in any case.
    pub fn acknowledge(&mut self) {
        if let Some(flags) = self.bytes.get_mut(self.last + 6) {
            *flags |= libc::NLM_F_ACK as u8;
        }
    }

    /// Sends it all, and hears what the kernel answers: the first error, or that all went well.
    pub fn talk(&self) -> nix::Result<()> {
        let fd = crate::sys::socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER)?;
        let room = i32::try_from(self.bytes.len().saturating_mul(2)).unwrap_or(i32::MAX / 2);
        if self.bytes.len() > 64 << 10 {
            set_int(&fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room)?;
        }
        send(fd.as_raw_fd(), &self.bytes, MsgFlags::empty())?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            // The kernel has answered before send(2) returned.
            let length = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((header, _)) = rest.split_at_checked(20) {
                let word = |at: usize| header[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
                if u16::from_ne_bytes([header[4], header[5]]) == ERROR {
                    return match word(16).cast_signed() {
                        0 => Ok(()),
                        errno => Err(Errno::from_raw(errno.wrapping_neg())),
                    };
                }
                rest = rest.get((word(0) as usize).next_multiple_of(4).max(20)..).unwrap_or_default();
            }
        }
    }
}
