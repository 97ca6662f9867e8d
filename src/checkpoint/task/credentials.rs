//! Credentials: users, groups, the five capability sets, securebits, no_new_privs.
//!
//! They are a thread's own, whatever libc pretends. They are restored last, because each step takes away what the next
//! may need:
//!
//! ```text
//!   securebits: no fixup   ids change without touching capabilities
//!   groups, gids, uids
//!   bounding set           needs CAP_SETPCAP
//!   inheritable, ambient   need CAP_SETPCAP, and that NO_CAP_AMBIENT_RAISE is not set yet
//!   securebits             the thread's own; needs CAP_SETPCAP
//!   permitted, effective   now nothing is left that was not there
//!   no_new_privs, dumpable, parent-death signal      (a change of ids resets the last two)
//! ```
//!
//! The destination's config.json bounds them: no capability that a process started there could not have had.

use libc::{
    PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, PR_CAP_AMBIENT_RAISE, PR_CAPBSET_DROP, PR_GET_SECUREBITS,
    PR_SET_NO_NEW_PRIVS, PR_SET_SECUREBITS,
};
use oci_spec::runtime::Spec;

use super::status::{IdMap, Status};
use crate::checkpoint::image::CredsEntry;
use crate::checkpoint::remote::{Batch, Call, Results};
use crate::checkpoint::{Error, Result};
use crate::sys;

const INHERITABLE: usize = 0;
const PERMITTED: usize = 1;
const EFFECTIVE: usize = 2;
const BOUNDING: usize = 3;
const AMBIENT: usize = 4;

const KEEP_CAPS: u32 = 1 << 4;
const NO_SETUID_FIXUP: u32 = 1 << 2;
const CAP_VERSION_3: u32 = 0x2008_0522;

/// Asks what `/proc` does not tell.
#[derive(Debug)]
pub struct Ask(Call);

impl Ask {
    /// Adds the question to `batch`.
    pub fn new(batch: &mut Batch) -> Self {
        batch.about("cannot read the securebits");
        Self(batch.call(libc::SYS_prctl, &[PR_GET_SECUREBITS.into()]))
    }
    /// The record of a thread's credentials, with ids as the container sees them.
    pub fn answer(&self, results: &Results, status: &Status, users: &IdMap, groups: &IdMap) -> CredsEntry {
        let [uid, euid, suid, fsuid] = status.uid.map(|id| users.inside(id));
        let [gid, egid, sgid, fsgid] = status.gid.map(|id| groups.inside(id));
        let caps = status.caps.map(halves);
        CredsEntry {
            uid,
            gid,
            euid,
            egid,
            suid,
            sgid,
            fsuid,
            fsgid,
            cap_inh: caps[INHERITABLE].to_vec(),
            cap_prm: caps[PERMITTED].to_vec(),
            cap_eff: caps[EFFECTIVE].to_vec(),
            cap_bnd: caps[BOUNDING].to_vec(),
            secbits: u32::try_from(results.ret(self.0)).unwrap_or_default(),
            groups: status.groups.iter().map(|id| groups.inside(*id)).collect(),
            lsm_profile: None,
            lsm_sockcreate: None,
            apparmor_data: None,
            no_new_privs: Some(u32::from(status.no_new_privs)),
            cap_amb: caps[AMBIENT].to_vec(),
        }
    }
}

/// Capability sets of a record, in the order of the constants above.
fn sets(creds: &CredsEntry) -> Result<[u64; 5]> {
    let mut sets = [0; 5];
    for (set, words) in
        sets.iter_mut().zip([&creds.cap_inh, &creds.cap_prm, &creds.cap_eff, &creds.cap_bnd, &creds.cap_amb])
    {
        *set = match words[..] {
            [] => 0,
            [low] => u64::from(low),
            [low, high] => u64::from(low) | u64::from(high) << 32,
            _ => return Err(Error::new("a capability set of the image has more than 64 bits")),
        };
    }
    Ok(sets)
}

fn halves(set: u64) -> [u32; 2] {
    // The two halves of the set.
    [(set & 0xffff_ffff) as u32, (set >> 32) as u32]
}

/// What the destination allows.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Capabilities that some process started under this config.json could have.
    pub capabilities: u64,
    /// no_new_privs is set for every process.
    pub no_new_privs: bool,
}

impl Policy {
    /// Of config.json.
    pub fn of(spec: &Spec) -> Self {
        let process = spec.process().as_ref();
        let mut allowed = 0;
        if let Some(caps) = process.and_then(|p| p.capabilities().as_ref()) {
            for set in
                [caps.bounding(), caps.permitted(), caps.effective(), caps.inheritable(), caps.ambient()]
            {
                for cap in set.iter().flatten() {
                    allowed |= number(*cap).map_or(0, |n| 1 << n);
                }
            }
        }
        let no_new_privs = process.and_then(oci_spec::runtime::Process::no_new_privileges).unwrap_or(false);
        Self { capabilities: allowed, no_new_privs }
    }

    /// Whether some process may have that capability.
    pub fn grants(&self, capability: oci_spec::runtime::Capability) -> bool {
        number(capability).is_some_and(|n| self.capabilities & (1 << n) != 0)
    }

    /// Takes away what the destination does not grant.
    pub fn clamp(&self, creds: &mut CredsEntry) {
        let allowed = halves(self.capabilities);
        let sets = [
            &mut creds.cap_inh,
            &mut creds.cap_prm,
            &mut creds.cap_eff,
            &mut creds.cap_bnd,
            &mut creds.cap_amb,
        ];
        for word in sets.into_iter().flat_map(|set| set.iter_mut().zip(allowed)) {
            *word.0 &= word.1;
        }
    }

    /// Refuses credentials that are wider than the destination allows, naming both.
    pub fn check(&self, creds: &CredsEntry) -> Result<()> {
        let all = sets(creds)?;
        for (name, set) in ["inheritable", "permitted", "effective", "bounding", "ambient"].iter().zip(all) {
            let wider = set & !self.capabilities;
            if wider != 0 {
                return Err(Error::new(format!(
                    "the image's {name} capabilities have {}, which process.capabilities of config.json does not grant \
                     (image {set:#x}, config.json {:#x})",
                    names(wider),
                    self.capabilities
                )));
            }
        }
        Ok(())
    }
}

/// The kernel's number of a capability: its place in the header, which is where `caps` keeps it.
fn number(capability: oci_spec::runtime::Capability) -> Option<u8> {
    let name = format!("CAP_{}", capability.to_string().trim_start_matches("CAP_"));
    name.parse::<caps::Capability>().ok().map(|cap| cap.index())
}

fn names(set: u64) -> String {
    let name = |n: u8| {
        let known = caps::all().into_iter().find(|cap| cap.index() == n);
        known.map_or_else(|| format!("capability {n}"), |cap| cap.to_string())
    };
    (0..64).filter(|n| set & (1 << n) != 0).map(name).collect::<Vec<_>>().join(", ")
}

/// Sets the ids of a thread, which so far has the full set of the runtime, and keeps that.
pub fn take_ids(batch: &mut Batch, creds: &CredsEntry) {
    batch.about("cannot set the supplementary groups");
    let groups: Vec<u8> = creds.groups.iter().flat_map(|id| id.to_ne_bytes()).collect();
    let list = batch.data(&groups);
    batch.call(libc::SYS_setgroups, &[creds.groups.len().into(), list]);
    take_own_ids(batch, creds);
}

/// The same but for supplementary groups, which a user namespace may let nobody change.
pub fn take_own_ids(batch: &mut Batch, creds: &CredsEntry) {
    batch.about("cannot set the user and group ids");
    let securebits = u64::from(PR_SET_SECUREBITS.unsigned_abs());
    batch.call(libc::SYS_prctl, &[securebits.into(), (KEEP_CAPS | NO_SETUID_FIXUP).into(), 0.into()]);
    batch.call(libc::SYS_setresgid, &[creds.gid.into(), creds.egid.into(), creds.sgid.into()]);
    batch.call(libc::SYS_setfsgid, &[creds.fsgid.into()]);
    batch.call(libc::SYS_setresuid, &[creds.uid.into(), creds.euid.into(), creds.suid.into()]);
    batch.call(libc::SYS_setfsuid, &[creds.fsuid.into()]);
}

/// Sets a thread's credentials. Runs in the thread, which so far has the full set of the runtime. `inside`: it is in a
/// user namespace that the container has made, has its ids already, and its capabilities are nobody else's concern.
pub fn restore(batch: &mut Batch, creds: &CredsEntry, policy: &Policy, inside: bool) -> Result<()> {
    if !inside {
        policy.check(creds)?;
    }
    let all = sets(creds)?;
    let prctl = |batch: &mut Batch, args: [u64; 3]| batch.call(libc::SYS_prctl, &args.map(Into::into));
    let option = |n: i32| u64::from(n.unsigned_abs());
    if !inside {
        take_ids(batch, creds);
    }
    batch.about("cannot set the capabilities");
    for cap in 0..=sys::prctl::last_capability() {
        if all[BOUNDING] & (1 << cap) == 0 {
            prctl(batch, [option(PR_CAPBSET_DROP), cap.into(), 0]);
        }
    }
    // The thread's own sets are read first, since the full ones differ from machine to machine.
    let header = batch.data(&[CAP_VERSION_3.to_ne_bytes(), [0; 4]].concat());
    let mine = batch.out(24);
    batch.call(libc::SYS_capget, &[header, mine.arg()]);
    let [low, high] = halves(all[INHERITABLE]);
    let first = batch.data(&[0; 24]);
    for half in [0, 12] {
        batch.link_u32(first, half, mine.load_u32(half));
        batch.link_u32(first, half + 4, mine.load_u32(half + 4));
    }
    batch.link_u32(first, 8, low);
    batch.link_u32(first, 20, high);
    batch.call(libc::SYS_capset, &[header, first]);
    prctl(batch, [option(PR_CAP_AMBIENT), option(PR_CAP_AMBIENT_CLEAR_ALL), 0]);
    for cap in (0..64_u64).filter(|n| all[AMBIENT] & (1 << n) != 0) {
        prctl(batch, [option(PR_CAP_AMBIENT), option(PR_CAP_AMBIENT_RAISE), cap]);
    }
    prctl(batch, [option(PR_SET_SECUREBITS), creds.secbits.into(), 0]);
    let [inh, prm, eff] = [INHERITABLE, PERMITTED, EFFECTIVE].map(|set| halves(all[set]));
    let words: Vec<u8> =
        [0, 1].iter().flat_map(|&i| [eff[i], prm[i], inh[i]]).flat_map(u32::to_ne_bytes).collect();
    let last = batch.data(&words);
    batch.call(libc::SYS_capset, &[header, last]);
    if creds.no_new_privs.unwrap_or(0) != 0 || policy.no_new_privs {
        batch.about("cannot set no_new_privs");
        prctl(batch, [option(PR_SET_NO_NEW_PRIVS), 1, 0]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        assert_eq!(number(oci_spec::runtime::Capability::Chown), Some(0));
        assert_eq!(number(oci_spec::runtime::Capability::SysAdmin), Some(21));
        assert_eq!(number(oci_spec::runtime::Capability::CheckpointRestore), Some(40));
        assert_eq!(names(1 << 21 | 1), "CAP_CHOWN, CAP_SYS_ADMIN");
    }

    #[test]
    fn the_destination_bounds_the_image() {
        let policy = Policy { capabilities: 0b1011, no_new_privs: false };
        let fits = CredsEntry { cap_bnd: vec![0b1011, 0], cap_prm: vec![0b11], ..CredsEntry::default() };
        policy.check(&fits).unwrap();
        let wide = CredsEntry { cap_bnd: vec![0b1111], ..CredsEntry::default() };
        let error = policy.check(&wide).unwrap_err().to_string();
        assert!(error.contains("bounding") && error.contains("0xf") && error.contains("0xb"), "{error}");
        assert!(restore(&mut Batch::new(), &wide, &policy, false).is_err());
        assert!(sets(&CredsEntry { cap_eff: vec![0; 3], ..CredsEntry::default() }).is_err());
    }

    #[test]
    fn the_default_spec_grants_what_it_lists() {
        let policy = Policy::of(&Spec::default());
        assert_ne!(policy.capabilities, 0);
        assert_eq!(policy.capabilities & (1 << 21), 0, "not CAP_SYS_ADMIN");
    }

    #[test]
    fn the_last_capability_is_the_kernels() {
        let text = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap();
        assert_eq!(text.trim(), sys::prctl::last_capability().to_string());
    }
}
