//! Packet filters: the tables of nftables, those that `iptables` makes among them, as the kernel's own messages.
//!
//! ```text
//!   saved      tables │ chains │ sets │ objects │ flow tables │ elements │ rules       each without what the kernel gives
//!   restored   the same as one transaction, before any device is up
//! ```
//!
//! CRIU has them as text, which only `nft` reads and writes.

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::checkpoint::error::{Context, Error, Result};
use crate::sys::netlink::{
    ACK, APPEND, CREATE, Message, Netlink, attribute, attributes, nested, text_of, u32_at,
};

const SUBSYSTEM: u16 = libc::NFNL_SUBSYS_NFTABLES as u16;
/// nfgenmsg: family, version, subsystem or generation.
const FIXED: usize = 4;
/// In every message the name of the table, and but for tables one of its own or of what it belongs to.
const TABLE: u16 = 1;
const NAME: u16 = 2;
const FLAGS: u16 = 2;
const CHAIN_FLAGS: u16 = 10;
const OWNED: u32 = 2;
const BINDING: u32 = 4;
const SET_FLAGS: u16 = 3;
const SET_ID: u16 = 10;
const INTERVAL: u32 = 4;
const ELEMENTS: u16 = 3;
const ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_FLAGS: u16 = 3;
const INTERVAL_END: u32 = 1;
const EXPRESSIONS: u16 = 4;
const COMPAT: u16 = 5;
const COMPAT_INVERTED: u32 = 2;
/// Bytes of elements in one message; an attribute has at most 64 KiB.
const MUCH: usize = 32 << 10;

/// A kind of thing: the message that asks for it, the one that makes it, what of it the kernel takes.
struct Thing {
    get: i32,
    new: i32,
    kept: &'static [u16],
}

const TABLES: Thing = Thing { get: libc::NFT_MSG_GETTABLE, new: libc::NFT_MSG_NEWTABLE, kept: &[1, 2, 6] };
const CHAINS: Thing =
    Thing { get: libc::NFT_MSG_GETCHAIN, new: libc::NFT_MSG_NEWCHAIN, kept: &[1, 3, 4, 5, 7, 8, 10, 12] };
const SETS: Thing = Thing {
    get: libc::NFT_MSG_GETSET,
    new: libc::NFT_MSG_NEWSET,
    kept: &[1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 17, 18],
};
const OBJECTS: Thing = Thing { get: libc::NFT_MSG_GETOBJ, new: libc::NFT_MSG_NEWOBJ, kept: &[1, 2, 3, 4, 8] };
const FLOWS: Thing = Thing { get: 23, new: 22, kept: &[1, 2, 3, 7] };
const RULES: Thing =
    Thing { get: libc::NFT_MSG_GETRULE, new: libc::NFT_MSG_NEWRULE, kept: &[1, 2, EXPRESSIONS, 7] };

/// Packet filters of the socket's namespace.
pub struct Filters {
    /// Ready to be made again.
    pub messages: Vec<Message>,
    /// What cannot be.
    pub refused: Vec<Error>,
}

fn kind(of: i32) -> u16 {
    SUBSYSTEM << 8 | of as u16
}

fn open() -> Result<Netlink> {
    Netlink::open(libc::NETLINK_NETFILTER)
        .during("cannot ask for packet filters", || "socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER)".into())
}

/// All of this thread's network namespace, but for one table.
pub fn save(but: Option<&str>) -> Result<Filters> {
    let socket = open()?;
    let mut filters = Filters { messages: Vec::new(), refused: Vec::new() };
    if socket.get(kind(libc::NFT_MSG_GETGEN), &[0; FIXED]).is_err() {
        // A kernel without.
        return Ok(filters);
    }
    let list = |thing: &Thing| -> Result<Vec<Message>> {
        let all = match socket.dump(kind(thing.get), &[0; FIXED]) {
            // A kernel without flow tables.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) if thing.get == FLOWS.get => Vec::new(),
            all => all.during("cannot list packet filters", || format!("netfilter({})", thing.get))?,
        };
        Ok(all.into_iter().filter(|m| but.is_none_or(|but| name(m, TABLE) != but)).collect())
    };
    let (tables, chains, sets) = (list(&TABLES)?, list(&CHAINS)?, list(&SETS)?);
    for table in tables.iter().filter(|m| word(m, FLAGS) & OWNED != 0) {
        let what = format!("the table {} of nftables belongs to a program's socket", name(table, TABLE));
        filters.refused.push(
            Error::new(format!("{what}, which --keep-network cannot keep"))
                .remedy("have the program remove it"),
        );
    }
    for chain in chains.iter().filter(|m| word(m, CHAIN_FLAGS) & BINDING != 0) {
        let what = format!("a chain without a name in the table {} of nftables", name(chain, TABLE));
        filters.refused.push(
            Error::new(format!("there is {what}, which --keep-network cannot keep yet")).remedy("name it"),
        );
    }
    let all = &mut filters.messages;
    all.extend(tables.iter().map(|m| again(m, &TABLES)));
    all.extend(chains.iter().map(|m| again(m, &CHAINS)));
    for (number, set) in sets.iter().enumerate() {
        let mut new = again(set, &SETS);
        new.body.extend(attribute(SET_ID, &(number as u32 + 1).to_be_bytes()));
        all.push(new);
    }
    all.extend(list(&OBJECTS)?.iter().map(|m| again(m, &OBJECTS)));
    all.extend(list(&FLOWS)?.iter().map(|m| again(m, &FLOWS)));
    for set in &sets {
        all.extend(elements(&socket, set)?);
    }
    all.extend(list(&RULES)?.iter().map(|m| {
        let mut rule = again(m, &RULES);
        rule.flags |= APPEND;
        rule.body.extend(compat(m));
        rule
    }));
    Ok(filters)
}

fn name(m: &Message, kind: u16) -> String {
    m.attribute(FIXED, kind).map(text_of).unwrap_or_default()
}

/// A number in the order of the network.
fn word(m: &Message, kind: u16) -> u32 {
    m.attribute(FIXED, kind).and_then(|value| u32_at(value, 0)).map_or(0, u32::from_be)
}

/// The message that makes it again.
fn again(m: &Message, thing: &Thing) -> Message {
    let mut body = vec![m.body.first().copied().unwrap_or(0), 0, 0, 0];
    let kept = m.attributes(FIXED).filter(|(kind, _)| thing.kept.contains(kind));
    body.extend(kept.flat_map(|(kind, value)| attribute(kind, value)));
    Message { kind: kind(thing.new), flags: CREATE, body }
}

/// What is in a set. The kernel takes intervals from the first to the last, and tells them in another order.
fn elements(socket: &Netlink, set: &Message) -> Result<Vec<Message>> {
    let family = set.body.first().copied().unwrap_or(0);
    let of_set = |kind| attribute(kind, set.attribute(FIXED, kind).unwrap_or_default());
    let head = [vec![family, 0, 0, 0], of_set(TABLE), of_set(NAME)].concat();
    let all = socket.dump(kind(libc::NFT_MSG_GETSETELEM), &head);
    let all = all.during("cannot list the elements of a set", || "NFT_MSG_GETSETELEM".into())?;
    let lists = all.iter().filter_map(|m| m.attribute(FIXED, ELEMENTS));
    let mut each: Vec<&[u8]> = lists.flat_map(attributes).map(|(_, element)| element).collect();
    if word(set, SET_FLAGS) & INTERVAL != 0 {
        each.sort_by_key(|element| {
            let part = |kind| attributes(element).find(|(k, _)| *k == kind).map(|(_, value)| value);
            let flags = part(ELEMENT_FLAGS).and_then(|value| u32_at(value, 0)).map_or(0, u32::from_be);
            (part(ELEMENT_KEY), flags & INTERVAL_END == 0)
        });
    }
    let (mut messages, mut list) = (Vec::new(), Vec::new());
    let mut flush = |list: &mut Vec<u8>| {
        let body = [&head[..], &nested(ELEMENTS, list)].concat();
        messages.push(Message { kind: kind(libc::NFT_MSG_NEWSETELEM), flags: CREATE, body });
        list.clear();
    };
    for element in each {
        list.extend(nested(ELEMENT, element));
        if list.len() > MUCH {
            flush(&mut list);
        }
    }
    if !list.is_empty() {
        flush(&mut list);
    }
    Ok(messages)
}

/// What the kernel has forgotten of a rule with matches of iptables, and wants to know again: which protocol they are for.
/// The rule compares it itself.
fn compat(rule: &Message) -> Vec<u8> {
    let list = rule.attribute(FIXED, EXPRESSIONS).unwrap_or_default();
    let expressions: Vec<(String, BTreeMap<u16, &[u8]>)> = attributes(list)
        .map(|(_, expression)| {
            let part = |kind| attributes(expression).find(|(k, _)| *k == kind).map(|(_, value)| value);
            (part(1).map(text_of).unwrap_or_default(), attributes(part(2).unwrap_or_default()).collect())
        })
        .collect();
    if !expressions.iter().any(|(name, _)| name == "match" || name == "target") {
        return Vec::new();
    }
    let number = |data: &BTreeMap<u16, &[u8]>, kind| {
        data.get(&kind).and_then(|value| u32_at(value, 0)).map(u32::from_be)
    };
    // The protocol by META_L4PROTO, or the byte in the header of IPv4 or IPv6.
    let loads = |(name, data): &(String, BTreeMap<u16, &[u8]>)| match name.as_str() {
        "meta" => number(data, 2) == Some(16),
        "payload" => {
            number(data, 2) == Some(1) && matches!(number(data, 3), Some(9 | 6)) && number(data, 4) == Some(1)
        }
        _ => false,
    };
    let compared = expressions.windows(2).find(|two| loads(&two[0]) && two[1].0 == "cmp");
    let (protocol, flags) = compared.map_or((0, 0), |two| {
        let data = &two[1].1;
        let value = data.get(&3).and_then(|value| attributes(value).next());
        let protocol = value.and_then(|(_, bytes)| bytes.first().copied()).unwrap_or(0);
        // NFT_CMP_NEQ
        (u32::from(protocol), if number(data, 2) == Some(1) { COMPAT_INVERTED } else { 0 })
    });
    let parts = [attribute(1, &protocol.to_be_bytes()), attribute(2, &flags.to_be_bytes())];
    nested(COMPAT, &parts.concat())
}

/// Whether what `nft list ruleset` or `iptables-save` has written for CRIU is nothing but the lock under which it was: chains
/// called CRIU and the ways there, or a table called so.
pub fn is_lock(text: &str) -> bool {
    let mut own_table = false;
    text.lines().map(str::trim).all(|line| {
        if let Some(table) = line.strip_prefix("table ") {
            own_table = table.split(' ').nth(1).is_some_and(|name| name.starts_with("CRIU-"));
            return true;
        }
        let passing = |line: &str| {
            let marked = line.starts_with("meta mark 0x0000c114 ") && line.ends_with(" accept");
            let dropped = line.starts_with("counter packets ") && line.ends_with(" drop");
            let led = line.starts_with("counter packets ") && line.ends_with(" jump CRIU");
            let hooked = line.starts_with("type filter hook ") && line.ends_with(" policy accept;");
            let opened =
                ["chain CRIU {", "chain INPUT {", "chain OUTPUT {", "}", "", "COMMIT"].contains(&line);
            let saved = line.starts_with(['#', '*']) || line.starts_with(':') && !line.contains(" DROP ");
            let rule = ["-A INPUT -j CRIU", "-A OUTPUT -j CRIU", "-A CRIU -j DROP"].contains(&line)
                || line.starts_with("-A CRIU -m mark --mark 0xc114 ");
            marked || dropped || led || hooked || opened || saved || rule
        };
        own_table || passing(line)
    })
}

/// The packet filters of an image.
pub fn read(bytes: &[u8]) -> Result<Vec<Message>> {
    let bad = || Error::new("the packet filters in the extension network of stasis.img make no sense");
    let all = Message::all(bytes).map_err(|_| bad())?;
    let known = [&TABLES, &CHAINS, &SETS, &OBJECTS, &FLOWS, &RULES].map(|thing| kind(thing.new));
    let sane = |m: &Message| {
        (known.contains(&m.kind) || m.kind == kind(libc::NFT_MSG_NEWSETELEM))
            && m.flags & !(CREATE | APPEND) == 0
            && m.body.len() >= FIXED
    };
    if all.iter().all(sane) { Ok(all) } else { Err(bad()) }
}

/// Makes them, all or none. Runs in the namespace.
pub fn restore(messages: &[Message]) -> Result<()> {
    let Some(last) = messages.len().checked_sub(1) else { return Ok(()) };
    let border = |kind: i32| {
        let body = [&[0, 0][..], &SUBSYSTEM.to_be_bytes()].concat();
        Message { kind: kind as u16, flags: 0, body }
    };
    let mut all = vec![border(libc::NFNL_MSG_BATCH_BEGIN)];
    all.extend(messages.iter().enumerate().map(|(i, m)| {
        // The end of the last is the end of all.
        let ack = if i == last { ACK } else { 0 };
        Message { flags: m.flags | ack, ..m.clone() }
    }));
    all.push(border(libc::NFNL_MSG_BATCH_END));
    open()?.batch(&all).map_err(|(errno, kind)| {
        let of = messages.iter().find(|m| m.kind == kind).map(|m| name(m, TABLE)).unwrap_or_default();
        Error::new("cannot restore the packet filters")
            .call(format!("netfilter({}, table {of})", kind & 0xff), errno)
            .remedy("does this kernel have all modules of nftables that they use?")
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::sys::testing::in_child;

    const RULES: &str = r#"
        table inet filter {
            comment "mine"
            set intervals { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.0.2.1-192.0.2.9, 192.0.2.10 } }
            set both { type ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 80-90 } }
            set timed { type ipv4_addr; flags timeout; timeout 10d; elements = { 10.1.1.1 } }
            map verdicts { type inet_service : verdict; elements = { 22 : jump side, 80 : accept } }
            counter hits { packets 3 bytes 77 }
            chain side {
                counter packets 5 bytes 100 accept
            }
            chain input {
                type filter hook input priority filter; policy drop;
                iif "lo" accept comment "own"
                ct state { established, related } accept
                ip saddr @intervals tcp dport { 22, 80-90 } counter name "hits" accept
                ip saddr . tcp dport @both accept
                tcp dport vmap @verdicts
                ip saddr != { 10.2.0.0/16 } limit rate 10/second burst 7 packets log prefix "odd " drop
                udp dport 53 add @timed { ip saddr timeout 1d }
            }
        }
        table ip nat {
            chain post {
                type nat hook postrouting priority srcnat;
                oifname "eth0" masquerade
            }
        }
    "#;

    fn run(program: &str, args: &[&str], input: &str) -> Option<String> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        child.stdin.take()?.write_all(input.as_bytes()).ok()?;
        let out = child.wait_with_output().ok()?;
        assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Some(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// As somebody lists them, but for what passes.
    fn listed() -> Option<Vec<String>> {
        let text = run("nft", &["list", "ruleset"], "")?;
        let words: Vec<&str> = text.split_whitespace().collect();
        let lasting = words.iter().enumerate().filter(|(i, _)| *i == 0 || words[i - 1] != "expires");
        Some(lasting.map(|(_, word)| (*word).to_owned()).collect())
    }

    fn there_and_back(fill: impl FnOnce() -> Option<()>) {
        in_child(libc::CLONE_NEWNET, || {
            if fill().is_none() {
                eprintln!("SKIPPED: nft is not installed");
                return;
            }
            let (before, filters) = (listed(), save(None).unwrap());
            assert!(filters.refused.is_empty());
            let bytes: Vec<u8> = filters.messages.iter().flat_map(Message::bytes).collect();
            run("nft", &["flush", "ruleset"], "");
            assert!(save(None).unwrap().messages.is_empty());
            restore(&read(&bytes).unwrap()).unwrap();
            assert_eq!(listed(), before);
        });
    }

    #[test]
    fn rules_of_nftables_come_back() {
        there_and_back(|| run("nft", &["-f", "-"], RULES).map(drop));
    }

    #[test]
    fn rules_of_iptables_come_back() {
        let rule = |program: &str, rule: &str| {
            run(program, &rule.split_whitespace().collect::<Vec<_>>(), "").map(drop)
        };
        there_and_back(|| {
            rule("iptables-nft", "-A INPUT -p tcp --dport 22 -m conntrack --ctstate NEW -j ACCEPT")?;
            rule("iptables-nft", "-A INPUT ! -p udp -m mark --mark 7 -j DROP")?;
            rule("iptables-nft", "-A INPUT -p tcp -m multiport --dports 80,443 -j LOG --log-prefix x")?;
            rule("iptables-nft", "-t nat -A PREROUTING -p tcp --dport 80 -j DNAT --to 10.0.0.1:8080")?;
            rule("ip6tables-nft", "-A FORWARD -p udp -m udp --sport 53 -j REJECT")
        });
    }

    #[test]
    fn the_lock_of_criu_is_no_filter() {
        let table = "table ip filter {\n\tchain CRIU {\n\t\tmeta mark 0x0000c114 counter packets 0 bytes 0 accept\n\t\t\
                     counter packets 0 bytes 0 drop\n\t}\n\n\tchain INPUT {\n\t\ttype filter hook input priority filter; \
                     policy accept;\n\t\tcounter packets 0 bytes 0 jump CRIU\n\t}\n}\n";
        assert!(is_lock(table) && is_lock(""));
        assert!(is_lock(
            "table inet CRIU-7 {\n\tchain input {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n}"
        ));
        assert!(is_lock(
            "*filter\n:INPUT ACCEPT [0:0]\n:CRIU - [0:0]\n-A INPUT -j CRIU\n-A CRIU -j DROP\nCOMMIT\n"
        ));
        assert!(!is_lock(&table.replace("policy accept", "policy drop")));
        assert!(!is_lock(&table.replace("jump CRIU", "jump mine")));
        assert!(!is_lock("*filter\n:INPUT DROP [0:0]\nCOMMIT\n"));
    }

    #[test]
    fn what_makes_other_things_is_refused() {
        let message = |kind| Message { kind, flags: CREATE, body: vec![0; 4] };
        assert!(read(&message(kind(libc::NFT_MSG_NEWTABLE)).bytes()).is_ok());
        assert!(read(&message(kind(libc::NFT_MSG_DELTABLE)).bytes()).is_err());
        assert!(read(&message(libc::RTM_NEWLINK).bytes()).is_err());
        assert!(read(&[1, 2, 3]).is_err());
    }
}
