//! Sysctls of a network namespace: all that can be written below /proc/sys/net. CRIU keeps some of them, by their place
//! in lists that it shares with nobody; these are filled in for it, and read where it has made the images.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::{NetSysctl, SysctlEntry, SysctlType};
use crate::checkpoint::model::NetNamespace;

const ROOT: &str = "/proc/sys/net";

/// Values by their names below /proc/sys/net.
pub type Sysctls = BTreeMap<String, String>;

/// CRIU's list for a device, of IPv4.
const CONF4: [&str; 30] = [
    "accept_local",
    "accept_redirects",
    "accept_source_route",
    "arp_accept",
    "arp_announce",
    "arp_filter",
    "arp_ignore",
    "arp_notify",
    "bootp_relay",
    "disable_policy",
    "disable_xfrm",
    "force_igmp_version",
    "forwarding",
    "igmpv2_unsolicited_report_interval",
    "igmpv3_unsolicited_report_interval",
    "log_martians",
    "medium_id",
    "promote_secondaries",
    "proxy_arp",
    "proxy_arp_pvlan",
    "route_localnet",
    "rp_filter",
    "secure_redirects",
    "send_redirects",
    "shared_media",
    "src_valid_mark",
    "tag",
    "ignore_routes_with_linkdown",
    "drop_gratuitous_arp",
    "drop_unicast_in_l2_multicast",
];

/// The same of IPv6.
const CONF6: [&str; 42] = [
    "accept_dad",
    "accept_ra",
    "accept_ra_defrtr",
    "accept_ra_from_local",
    "accept_ra_min_hop_limit",
    "accept_ra_mtu",
    "accept_ra_pinfo",
    "accept_ra_rt_info_max_plen",
    "accept_ra_rtr_pref",
    "accept_redirects",
    "accept_source_route",
    "autoconf",
    "dad_transmits",
    "disable_ipv6",
    "drop_unicast_in_l2_multicast",
    "drop_unsolicited_na",
    "force_mld_version",
    "force_tllao",
    "forwarding",
    "hop_limit",
    "ignore_routes_with_linkdown",
    "keep_addr_on_down",
    "max_addresses",
    "max_desync_factor",
    "mldv1_unsolicited_report_interval",
    "mldv2_unsolicited_report_interval",
    "mtu",
    "ndisc_notify",
    "optimistic_dad",
    "proxy_ndp",
    "regen_max_retry",
    "router_probe_interval",
    "router_solicitation_delay",
    "router_solicitation_interval",
    "router_solicitations",
    STABLE_SECRET,
    "suppress_frag_ndisc",
    "temp_prefered_lft",
    "temp_valid_lft",
    "use_oif_addrs_only",
    "use_optimistic",
    "use_tempaddr",
];

const STABLE_SECRET: &str = "stable_secret";
const UNIX: [&str; 1] = ["max_dgram_qlen"];
const IPV4: [&str; 1] = ["ping_group_range"];

const WHAT: &str = "cannot read the sysctls of the network";
/// Where each device has a directory.
const OF_DEVICES: [&str; 5] = ["ipv4/conf", "ipv4/neigh", "ipv6/conf", "ipv6/neigh", "mpls/conf"];
/// More than a value has.
const LONG: usize = 4096;

/// All of them, opened: finding some 850 files takes longer than reading them, and need not be done while a container
/// stands still.
#[derive(Debug, Default)]
pub struct Files {
    files: Vec<(String, File)>,
    /// The devices that have some.
    devices: BTreeSet<PathBuf>,
}

impl Files {
    /// Opens all. Runs in the namespace.
    pub fn open() -> Result<Self> {
        let mut all = Self { files: Vec::new(), devices: devices()? };
        all.gather(Path::new(ROOT))?;
        Ok(all)
    }

    fn gather(&mut self, dir: &Path) -> Result<()> {
        for entry in fs::read_dir(dir).during(WHAT, || format!("open({dir:?})"))? {
            let entry = entry.during(WHAT, || format!("getdents({dir:?})"))?;
            let path = entry.path();
            let meta = match entry.metadata() {
                // A device has gone meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                meta => meta.during(WHAT, || format!("stat({path:?})"))?,
            };
            if meta.is_dir() {
                self.gather(&path)?;
            } else if meta.permissions().mode() & 0o200 != 0
                && let Ok(file) = File::open(&path)
                && let Ok(name) = path.strip_prefix(ROOT)
            {
                self.files.push((name.to_string_lossy().into_owned(), file));
            }
        }
        Ok(())
    }

    /// Reads all. Runs in the namespace.
    pub fn read(&self) -> Result<Sysctls> {
        if devices()? != self.devices {
            return Self::open()?.read();
        }
        let mut buffer = [0; LONG];
        let mut all = Sysctls::new();
        for (name, file) in &self.files {
            // One that has no value, or is a command, cannot be read; that of a device which was made anew under its name
            // has to be found again.
            let value = match file.read_at(&mut buffer, 0) {
                Ok(length) if length < LONG => std::str::from_utf8(&buffer[..length]).ok().map(str::to_owned),
                _ => fs::read_to_string(Path::new(ROOT).join(name)).ok(),
            };
            all.extend(value.map(|value| (name.clone(), value.trim_end().to_owned())));
        }
        Ok(all)
    }
}

fn devices() -> Result<BTreeSet<PathBuf>> {
    let mut all = BTreeSet::new();
    for dir in OF_DEVICES.map(|dir| Path::new(ROOT).join(dir)) {
        let entries = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.during(WHAT, || format!("open({dir:?})"))?,
        };
        for entry in entries {
            all.insert(entry.during(WHAT, || format!("getdents({dir:?})"))?.path());
        }
    }
    Ok(all)
}

/// Reads all. Runs in the namespace.
#[cfg(test)]
fn read() -> Result<Sysctls> {
    Files::open()?.read()
}

/// As records of ours.
pub fn records(all: &Sysctls) -> Vec<NetSysctl> {
    all.iter().map(|(name, value)| NetSysctl { name: name.clone(), value: value.clone() }).collect()
}

/// As CRIU has them.
pub fn describe(net: &mut NetNamespace, all: &Sysctls) {
    let conf = |version: &str, device: &str| {
        let names: &[&str] = if version == "ipv4" { &CONF4 } else { &CONF6 };
        list(all, &format!("{version}/conf/{device}"), names)
    };
    net.entry.def_conf4 = conf("ipv4", "default");
    net.entry.all_conf4 = conf("ipv4", "all");
    net.entry.def_conf6 = conf("ipv6", "default");
    net.entry.all_conf6 = conf("ipv6", "all");
    net.entry.unix_conf = list(all, "unix", &UNIX);
    net.entry.ipv4_sysctl = list(all, "ipv4", &IPV4);
    for device in &mut net.devices {
        device.conf4 = conf("ipv4", &device.name);
        device.conf6 = conf("ipv6", &device.name);
    }
}

fn list(all: &Sysctls, dir: &str, names: &[&str]) -> Vec<SysctlEntry> {
    let entry = |name: &&str| {
        let value = all.get(&format!("{dir}/{name}"));
        if is_text(name) {
            let r#type = SysctlType::CtlStr as i32;
            SysctlEntry { r#type, iarg: None, sarg: value.cloned() }
        } else {
            let iarg = value.and_then(|value| value.parse().ok());
            SysctlEntry { r#type: SysctlType::Ctl32 as i32, iarg, sarg: None }
        }
    };
    names.iter().map(entry).collect()
}

fn is_text(name: &str) -> bool {
    name == STABLE_SECRET || IPV4.contains(&name)
}

/// Those of images that CRIU has made.
pub fn of_criu(net: &NetNamespace) -> Sysctls {
    let mut all = Sysctls::new();
    let mut take = |dir: &str, names: &[&str], entries: &[SysctlEntry]| {
        for (name, entry) in names.iter().zip(entries) {
            let value = entry.iarg.map(|n| n.to_string()).or_else(|| entry.sarg.clone());
            all.extend(value.map(|value| (format!("{dir}/{name}"), value)));
        }
    };
    let entry = &net.entry;
    take("ipv4/conf/all", &CONF4, &entry.all_conf4);
    take("ipv4/conf/default", &CONF4, &entry.def_conf4);
    take("ipv6/conf/all", &CONF6, &entry.all_conf6);
    take("ipv6/conf/default", &CONF6, &entry.def_conf6);
    take("unix", &UNIX, &entry.unix_conf);
    take("ipv4", &IPV4, &entry.ipv4_sysctl);
    for device in &net.devices {
        take(&format!("ipv4/conf/{}", device.name), &CONF4, &device.conf4);
        take(&format!("ipv6/conf/{}", device.name), &CONF6, &device.conf6);
    }
    all
}

/// Writes those that differ and that config.json does not set. Some change others, so all are looked at once more. Returns
/// the names of those that could not be set. Runs in the namespace.
pub fn restore(wanted: &Sysctls, spec: Option<&Spec>) -> Vec<String> {
    let ours = spec.and_then(|spec| spec.linux().as_ref()?.sysctl().clone()).unwrap_or_default();
    let ours: Vec<String> = ours.keys().map(|name| crate::init::sysctl::path(name)).collect();
    let mut names: Vec<&String> =
        wanted.keys().filter(|name| !ours.contains(&format!("net/{name}"))).collect();
    names.sort_by_key(|name| rank(name));
    let differs = |name: &str| {
        let value = fs::read_to_string(format!("{ROOT}/{name}"));
        !value.is_ok_and(|value| value.split_whitespace().eq(wanted[name].split_whitespace()))
    };
    for _ in 0..3 {
        names.retain(|name| {
            let other = differs(name);
            if other {
                // What fails is seen below.
                let _ = fs::write(format!("{ROOT}/{name}"), format!("{}\n", wanted[name.as_str()]));
            }
            other || name.contains("/conf/")
        });
    }
    names.retain(|name| differs(name));
    names.into_iter().cloned().collect()
}

/// What changes others comes first, what is changed by others last.
fn rank(name: &str) -> u32 {
    let all = if name.contains("/conf/all/") { 1 } else { 3 };
    let all = if name.contains("/conf/default/") { 2 } else { all };
    match name.rsplit('/').next() {
        Some("ip_forward") => 0,
        // An address may be made of the secret as soon as the way to make it is known.
        Some("forwarding" | "disable_ipv6" | STABLE_SECRET) => all * 10,
        Some("accept_redirects") => all * 10 + 2,
        _ => all * 10 + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netlink::{Netlink, nested, text};
    use crate::sys::route;
    use crate::sys::testing::in_child;

    #[test]
    fn what_was_changed_comes_back() {
        in_child(libc::CLONE_NEWNET, || {
            let fresh = read().unwrap();
            assert!(fresh.contains_key("ipv4/conf/lo/rp_filter"), "{fresh:?}");
            let set = |name: &str, value: &str| fs::write(format!("{ROOT}/{name}"), value).unwrap();
            set("ipv4/ip_forward", "1");
            set("ipv4/conf/lo/accept_redirects", "1");
            set("ipv4/tcp_rmem", "5000 60000 700000");
            set("ipv6/conf/all/disable_ipv6", "1");
            set("ipv6/conf/lo/disable_ipv6", "0");
            set("ipv6/conf/default/stable_secret", "2001:db8::1");
            let changed = read().unwrap();
            assert_eq!(restore(&fresh, None), Vec::<String>::new());
            assert_eq!(restore(&changed, None), Vec::<String>::new());
            assert_eq!(read().unwrap(), changed);
            let spec = r#"{"ociVersion": "1.0.2", "linux": {"sysctl": {"net.ipv4.ip_forward": "1"}}}"#;
            let spec = serde_json::from_str(spec).unwrap();
            let wanted = Sysctls::from([("ipv4/ip_forward".into(), "0".into()), ("none".into(), "1".into())]);
            assert_eq!(restore(&wanted, Some(&spec)), ["none"]);
            assert_eq!(read().unwrap()["ipv4/ip_forward"], "1");
        });
    }

    #[test]
    fn files_that_are_open_tell_what_is_true_now() {
        in_child(libc::CLONE_NEWNET, || {
            let files = Files::open().unwrap();
            assert_eq!(files.read().unwrap(), read().unwrap());
            let set = |name: &str, value: &str| fs::write(format!("{ROOT}/{name}"), value).unwrap();
            set("ipv4/ip_forward", "1");
            set("ipv6/conf/default/stable_secret", "2001:db8::1");
            let now = files.read().unwrap();
            assert_eq!(now["ipv4/ip_forward"], "1");
            assert!(now["ipv6/conf/default/stable_secret"].ends_with(":0001"));
            // Devices come, and go and come again.
            const NLM_F_CREATE: u16 = 0x400;
            let bridge = || {
                let data = nested(libc::IFLA_LINKINFO, &text(libc::IFLA_INFO_KIND, "bridge"));
                [route::link(0, 0, 0), text(libc::IFLA_IFNAME, "br"), data].concat()
            };
            let new = || {
                let socket = Netlink::open(libc::NETLINK_ROUTE).unwrap();
                socket.change(libc::RTM_NEWLINK, NLM_F_CREATE, &bridge()).unwrap();
                socket
            };
            let socket = new();
            assert!(files.read().unwrap().contains_key("ipv4/conf/br/rp_filter"));
            let files = Files::open().unwrap();
            socket.change(libc::RTM_DELLINK, 0, &bridge()).unwrap();
            assert!(!files.read().unwrap().contains_key("ipv4/conf/br/rp_filter"));
            new();
            set("ipv4/conf/br/rp_filter", "2");
            assert_eq!(files.read().unwrap()["ipv4/conf/br/rp_filter"], "2");
            assert_eq!(files.read().unwrap(), read().unwrap());
        });
    }

    #[test]
    fn criu_finds_its_own() {
        let all = Sysctls::from([
            ("ipv4/conf/all/rp_filter".into(), "2".into()),
            ("ipv6/conf/default/stable_secret".into(), "2001:db8::1".into()),
            ("ipv4/ping_group_range".into(), "0\t7".into()),
            ("unix/max_dgram_qlen".into(), "9".into()),
        ]);
        let mut net = NetNamespace::default();
        describe(&mut net, &all);
        assert_eq!(net.entry.all_conf4[21].iarg, Some(2));
        assert_eq!(of_criu(&net), all);
    }
}
