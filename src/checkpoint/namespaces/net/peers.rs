//! What devices have outside: the other end of a veth pair, the device below a macvlan.
//!
//! ```text
//!   --external veth[eth0]=OUT            the other end is called OUT, in the namespace of the runtime, and up
//!   --external veth[eth0]=OUT@BRIDGE     and a port of that bridge
//!   --external macvlan[eth0]=eth1        what it lies on; also ipvlan, vlan
//! ```
//!
//! CRIU separates the two by a colon. A pair without it has its other end under the old name, down: what it is to be
//! connected to is for somebody outside to say.

use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;

use nix::errno::Errno;

use crate::checkpoint::error::{Context, Error, Result};
use crate::sys::netlink::{Netlink, attribute, u32_at};

const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;

/// One `--external`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct External {
    /// The kind of the device inside.
    pub kind: String,
    /// Its name.
    pub inside: String,
    /// The name of the device outside.
    pub outside: String,
    /// The bridge that is given the latter as a port.
    pub bridge: Option<String>,
}

impl FromStr for External {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = || {
            let (kind, rest) = text.split_once('[')?;
            let (inside, rest) = rest.split_once(']')?;
            let outside = rest.strip_prefix(['=', ':'])?;
            let (outside, bridge) = match outside.split_once('@') {
                Some((outside, bridge)) => (outside, Some(bridge)),
                None => (outside, None),
            };
            let names = [Some(inside), Some(outside), bridge];
            let kinds = ["veth", "macvlan", "ipvlan", "vlan"];
            let known = kinds.contains(&kind) && (bridge.is_none() || kind == "veth");
            let sane = names.iter().flatten().all(|name| crate::container::net_devices::is_valid(name));
            (known && sane).then(|| Self {
                kind: kind.to_owned(),
                inside: inside.to_owned(),
                outside: outside.to_owned(),
                bridge: bridge.map(str::to_owned),
            })
        };
        parts().ok_or_else(|| {
            format!(
                "--external {text}: must be veth[IN]=OUT, veth[IN]=OUT@BRIDGE, macvlan[IN]=OUT, ipvlan[IN]=OUT or \
                 vlan[IN]=OUT"
            )
        })
    }
}

/// The number by which another network namespace is known in that of the socket, if it has one.
pub fn number(socket: &Netlink, other: &OwnedFd) -> Result<Option<i32>> {
    let body = [&[0u8; 4][..], &attribute(NETNSA_FD, &other.as_raw_fd().to_ne_bytes())].concat();
    let answer = socket.get(libc::RTM_GETNSID, &body);
    let answer = answer.during("cannot ask for a network namespace", || "RTM_GETNSID".into())?;
    let number = answer.attribute(4, NETNSA_NSID).and_then(|value| u32_at(value, 0)).map(u32::cast_signed);
    Ok(number.filter(|number| *number >= 0))
}

/// The same; it is given one if it has none.
pub fn numbered(socket: &Netlink, other: &OwnedFd) -> Result<i32> {
    if let Some(number) = number(socket, other)? {
        return Ok(number);
    }
    let any = attribute(NETNSA_NSID, &(-1i32).to_ne_bytes());
    let body = [&[0u8; 4][..], &any, &attribute(NETNSA_FD, &other.as_raw_fd().to_ne_bytes())].concat();
    match socket.change(libc::RTM_NEWNSID, 0, &body) {
        Err(Errno::EEXIST) => Ok(()),
        done => done.during("cannot number a network namespace", || "RTM_NEWNSID".into()),
    }?;
    number(socket, other)?.ok_or_else(|| Error::new("a network namespace has no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_devices_are_named_as_criu_names_them() {
        let external = |kind: &str, bridge: Option<&str>| External {
            kind: kind.into(),
            inside: "eth0".into(),
            outside: "out".into(),
            bridge: bridge.map(str::to_owned),
        };
        assert_eq!("veth[eth0]=out".parse(), Ok(external("veth", None)));
        assert_eq!("veth[eth0]:out@br0".parse(), Ok(external("veth", Some("br0"))));
        assert_eq!("macvlan[eth0]:out".parse(), Ok(external("macvlan", None)));
        for bad in
            ["", "veth", "veth[]=a", "veth[a]=", "veth[a]b", "macvlan[a]=b@c", "tun[a]=b", "veth[a/b]=c"]
        {
            assert!(bad.parse::<External>().is_err(), "{bad}");
        }
    }
}
