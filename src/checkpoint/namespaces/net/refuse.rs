//! What else may be in a network namespace, and cannot be kept: each is named.

use crate::checkpoint::error::{Error, Result};
use crate::sys::netlink::{Message, Netlink, attribute};

/// XFRM_MSG_GETSA, XFRM_MSG_GETPOLICY.
const STATES: u16 = 18;
const POLICIES: u16 = 21;
/// NFNL_SUBSYS_IPSET, IPSET_CMD_LIST, IPSET_ATTR_PROTOCOL.
const IPSETS: u16 = 6 << 8 | 7;
const IPSET_PROTOCOL: u16 = 1;

/// Everything of this thread's network namespace that would be lost.
pub fn all() -> Result<Vec<Error>> {
    let error = |what: String, remedy: &str| {
        Error::new(format!("{what}, which --keep-network cannot keep yet")).remedy(remedy.to_owned())
    };
    let mut found = Vec::new();
    for (file, command) in [("ip_tables_names", "iptables"), ("ip6_tables_names", "ip6tables")] {
        // Not there, where the kernel has none.
        let names = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        if !names.is_empty() {
            let names = names.split_whitespace().collect::<Vec<_>>().join(", ");
            let what = format!("tables of {command}-legacy are in use ({names})");
            found.push(error(what, "filter by nft, or by iptables-nft"));
        }
    }
    let services = std::fs::read_to_string("/proc/thread-self/net/ip_vs").unwrap_or_default();
    if services.lines().count() > 3 {
        found.push(error("there are virtual servers of IPVS".into(), "remove them: ipvsadm -C"));
    }
    if !listed(libc::NETLINK_XFRM, STATES, &[]).is_empty()
        || !listed(libc::NETLINK_XFRM, POLICIES, &[]).is_empty()
    {
        found.push(error(
            "there are states or policies of IPsec".into(),
            "remove them: ip xfrm policy flush; ip xfrm state flush",
        ));
    }
    let body = [&[0u8; 4][..], &attribute(IPSET_PROTOCOL, &[6])].concat();
    // To ask would load the module.
    let ipset = std::path::Path::new("/sys/module/ip_set").exists();
    if ipset && !listed(libc::NETLINK_NETFILTER, IPSETS, &body).is_empty() {
        found.push(error("there are sets of ipset".into(), "use sets of nft, or remove them: ipset destroy"));
    }
    Ok(found)
}

/// What there is of a kind; nothing where the kernel has none.
fn listed(protocol: i32, kind: u16, body: &[u8]) -> Vec<Message> {
    Netlink::open(protocol).and_then(|socket| socket.dump(kind, body)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::sys::testing::in_child;

    #[test]
    fn what_would_be_lost_is_named() {
        in_child(libc::CLONE_NEWNET, || {
            assert!(all().unwrap().is_empty());
            let policy = "xfrm policy add src 10.0.0.0/8 dst 10.1.0.0/16 dir out action block";
            if !Command::new("ip").args(policy.split(' ')).status().is_ok_and(|status| status.success()) {
                eprintln!("SKIPPED: the kernel has no IPsec");
                return;
            }
            let found = all().unwrap();
            assert!(found.len() == 1 && found[0].to_string().contains("policies of IPsec"), "{found:?}");
        });
    }
}
