//! Owners of what the images have, where config.json maps other ids than at the checkpoint.
//!
//! ```text
//!   images      100007 ──mappings of the checkpoint──▶ user 7 of the container ──mappings of config.json──▶ 300007
//!   archives of CRIU's tar                             user 7 of the container ──mappings of config.json──▶ 300007
//! ```
//!
//! What the container sees stays as it was. A user of the container whom config.json does not map is refused by name, and
//! so is an id that was nobody inside and would become somebody.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::CStr;

use super::maps;
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{CredsEntry, MntEntry, UidGidExtent, UsernsEntry};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::{mount, nested};
use crate::checkpoint::task::process::DEAD;

/// Every id but the one that stands for none.
const ALL: UidGidExtent = UidGidExtent { first: 0, lower_first: 0, count: u32::MAX };

/// Entries of an access control list for one user, for one group: `acl_ea_entry`, 8 bytes each behind a version of 4.
const ACL_USER: u16 = 0x02;
const ACL_GROUP: u16 = 0x08;
/// `VFS_CAP_REVISION_3`: capabilities of a file, with the id of the root user whom they are for in the last 4 bytes.
const CAPABILITIES_3: u32 = 0x0300_0000;
const CAPABILITIES_3_LENGTH: usize = 24;

/// From the owners in images to those on this host. The default changes nothing.
#[derive(Debug, Default, Clone)]
pub struct Owners(Option<Box<Change>>);

#[derive(Debug, Clone)]
struct Change {
    users: [Vec<UidGidExtent>; 2],
    groups: [Vec<UidGidExtent>; 2],
}

impl Owners {
    /// From the mappings of the images to those of the container's new init.
    pub fn of(model: &Model, init: i32) -> Result<Self> {
        let saved = model.userns.get(&Kind::User.inits(model)).cloned();
        let here = here(init)?;
        if saved.is_some() != here.is_some() {
            // Devices are mounted in the one and made in the other, and mounts are locked.
            let text = |maps: Option<&UsernsEntry>| match maps {
                None => "none".to_owned(),
                Some(maps) => format!("users {} groups {}", list(&maps.uid_map), list(&maps.gid_map)),
            };
            return Err(Error::new(format!(
                "config.json has the id mappings: {}, the checkpoint: {}",
                text(here.as_ref()),
                text(saved.as_ref())
            ))
            .remedy(
                "give config.json a user namespace where the checkpoint has one, and none where it has none",
            ));
        }
        Ok(Self::between(saved, here))
    }

    /// The same for archives of what a tmpfs holds: CRIU's have the owners that the container sees.
    pub fn of_archives(&self, model: &Model, init: i32) -> Result<Self> {
        match model.extension {
            Some(_) => Ok(self.clone()),
            None => Ok(Self::between(None, here(init)?)),
        }
    }

    fn between(saved: Option<UsernsEntry>, here: Option<UsernsEntry>) -> Self {
        let all = || UsernsEntry { uid_map: vec![ALL], gid_map: vec![ALL] };
        let (saved, here) = (saved.unwrap_or_else(all), here.unwrap_or_else(all));
        if saved == here {
            return Self::default();
        }
        let (users, groups) = ([saved.uid_map, here.uid_map], [saved.gid_map, here.gid_map]);
        Self(Some(Box::new(Change { users, groups })))
    }

    /// The user of this host for one of the checkpoint's.
    pub fn user(&self, id: u32) -> Result<u32> {
        self.0.as_ref().map_or(Ok(id), |change| moved(&change.users, id, "user"))
    }

    /// The group of this host for one of the checkpoint's.
    pub fn group(&self, id: u32) -> Result<u32> {
        self.0.as_ref().map_or(Ok(id), |change| moved(&change.groups, id, "group"))
    }

    /// Both at once.
    pub fn both(&self, uid: &mut u32, gid: &mut u32) -> Result<()> {
        (*uid, *gid) = (self.user(*uid)?, self.group(*gid)?);
        Ok(())
    }

    /// The ids in an extended attribute of a file.
    pub fn attribute(&self, name: &CStr, value: &mut [u8]) -> Result<()> {
        let word = |bytes: &[u8]| bytes.try_into().map(u32::from_le_bytes).unwrap_or_default();
        match name.to_bytes() {
            b"system.posix_acl_access" | b"system.posix_acl_default" => {
                for entry in value.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
                    let id = word(&entry[4..]);
                    let to = match u16::from_le_bytes([entry[0], entry[1]]) {
                        ACL_USER => self.user(id)?,
                        ACL_GROUP => self.group(id)?,
                        _ => continue,
                    };
                    entry[4..].copy_from_slice(&to.to_le_bytes());
                }
            }
            b"security.capability" if value.len() == CAPABILITIES_3_LENGTH => {
                let (head, root) = value.split_at_mut(CAPABILITIES_3_LENGTH - 4);
                if word(&head[..4]) & 0xff00_0000 == CAPABILITIES_3 {
                    root.copy_from_slice(&self.user(word(root))?.to_le_bytes());
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The images with the owners of this host. What is in extensions and archives is changed where it is used.
    pub fn apply<'a>(&self, mut model: Cow<'a, Model>) -> Result<Cow<'a, Model>> {
        let Some(change) = &self.0 else { return Ok(model) };
        change.has_all(&model)?;
        let images = model.to_mut();
        images.each_owner(&mut |what, uid, gid| self.both(uid, gid).map_err(|e| whose(&e, what)))?;
        for controller in images.cgroup.iter_mut().flat_map(|groups| &mut groups.controllers) {
            // The container's own is made by config.json.
            let mut left: Vec<_> = controller.dirs.iter_mut().flat_map(|top| &mut top.children).collect();
            while let Some(dir) = left.pop() {
                let files = dir.properties.iter_mut().filter_map(|file| file.perms.as_mut());
                for perms in files.chain(&mut dir.dir_perms) {
                    self.both(&mut perms.uid, &mut perms.gid).map_err(|e| whose(&e, "control group"))?;
                }
                left.extend(&mut dir.children);
            }
        }
        for tun in images
            .netns
            .values_mut()
            .flat_map(|net| &mut net.devices)
            .filter_map(|device| device.tun.as_mut())
        {
            // -1: nobody's.
            if tun.owner >= 0 {
                tun.owner = self.user(tun.owner.cast_unsigned())?.cast_signed();
            }
            if tun.group >= 0 {
                tun.group = self.group(tun.group.cast_unsigned())?.cast_signed();
            }
        }
        for entry in images.mountpoints.values_mut().flatten().filter(|entry| entry.ext_key.is_none()) {
            self.options(entry).map_err(|e| e.path(&entry.mountpoint))?;
        }
        Ok(model)
    }

    /// `uid=` and `gid=` among the options of a file system.
    fn options(&self, entry: &mut MntEntry) -> Result<()> {
        if !mount::has_owner(entry) {
            return Ok(());
        }
        let changed = |option: &str| -> Result<String> {
            let number = option.split_once('=').and_then(|(key, value)| Some((key, value.parse().ok()?)));
            Ok(match number {
                Some(("uid", id)) => format!("uid={}", self.user(id)?),
                Some(("gid", id)) => format!("gid={}", self.group(id)?),
                _ => option.to_owned(),
            })
        };
        entry.options = entry.options.split(',').map(changed).collect::<Result<Vec<_>>>()?.join(",");
        Ok(())
    }
}

/// The mappings of the container that is being made; none if it has none of its own.
fn here(init: i32) -> Result<Option<UsernsEntry>> {
    Ok(if Kind::User.private(init)? { Some(maps(init)?) } else { None })
}

fn moved([from, to]: &[Vec<UidGidExtent>; 2], id: u32, what: &str) -> Result<u32> {
    let inside = from
        .iter()
        .find_map(|e| e.first.checked_add(id.checked_sub(e.lower_first).filter(|n| *n < e.count)?));
    let Some(inside) = inside else {
        return match to.iter().find(|e| id >= e.lower_first && id - e.lower_first < e.count) {
            None => Ok(id),
            Some(e) => Err(Error::new(format!(
                "the {what} {id} of the host, nobody inside at the checkpoint, would be {} under config.json",
                e.first + (id - e.lower_first)
            ))
            .remedy("map other ids in config.json")),
        };
    };
    let extent = to.iter().find(|e| inside >= e.first && inside - e.first < e.count);
    extent
        .and_then(|e| e.lower_first.checked_add(inside - e.first))
        .ok_or_else(|| lacks(what, inside, to, from))
}

/// Both mappings, and who is missing.
fn lacks(what: &str, inside: u32, to: &[UidGidExtent], from: &[UidGidExtent]) -> Error {
    let field = if what == "user" { "uidMappings" } else { "gidMappings" };
    Error::new(format!(
        "config.json maps no {what} {inside} (it maps {}, the checkpoint {})",
        list(to),
        list(from)
    ))
    .remedy(format!("add it to linux.{field}"))
}

fn list(extents: &[UidGidExtent]) -> String {
    let line = |e: &UidGidExtent| format!("{}:{}:{}", e.first, e.lower_first, e.count);
    extents.iter().map(line).collect::<Vec<_>>().join(",")
}

/// Says what the missing one is needed for.
fn whose(error: &Error, what: &str) -> Error {
    let fields = error.fields();
    let more = Error::new(format!("{}: the checkpoint has a {what} of this owner", fields.what));
    more.remedy(fields.remedy.clone().unwrap_or_default())
}

impl Change {
    /// Refuses ids that processes, or namespaces that the container has made, have and config.json does not.
    fn has_all(&self, model: &Model) -> Result<()> {
        for entry in &model.pstree {
            for vtid in &entry.threads {
                let Some(core) = model.cores.get(vtid) else { continue };
                if core.tc.as_ref().is_some_and(|tc| tc.task_state == DEAD) {
                    continue;
                }
                if let Some(creds) = core.thread_core.as_ref().and_then(|thread| thread.creds.as_ref()) {
                    self.has_creds(creds).map_err(|e| e.pid(entry.pid.cast_signed()))?;
                }
            }
        }
        let owners: BTreeMap<u32, u32> =
            nested::spaces(model)?.iter().map(|space| (space.id, space.owner)).collect();
        // Those further inside have no more than the one around them.
        for (_, maps) in model.userns.iter().filter(|(id, _)| owners.get(id) == Some(&0)) {
            for (extents, [from, to], what) in
                [(&maps.uid_map, &self.users, "user"), (&maps.gid_map, &self.groups, "group")]
            {
                for e in extents {
                    // The kernel asks for one extent that has all of it.
                    let has = |o: &UidGidExtent| {
                        e.lower_first >= o.first
                            && u64::from(e.lower_first) + u64::from(e.count)
                                <= u64::from(o.first) + u64::from(o.count)
                    };
                    if !to.iter().any(has) {
                        let last = e.lower_first.saturating_add(e.count.saturating_sub(1));
                        let needs = format!("user namespace with {}:{}:{}", e.first, e.lower_first, e.count);
                        return Err(whose(&lacks(what, last, to, from), &needs));
                    }
                }
            }
        }
        Ok(())
    }

    fn has_creds(&self, creds: &CredsEntry) -> Result<()> {
        let users = [creds.uid, creds.euid, creds.suid, creds.fsuid].map(|id| (id, &self.users, "user"));
        let groups = [creds.gid, creds.egid, creds.sgid, creds.fsgid];
        let groups = groups.iter().chain(&creds.groups).map(|id| (*id, &self.groups, "group"));
        for (id, [from, to], what) in users.into_iter().chain(groups) {
            if !to.iter().any(|e| id >= e.first && id - e.first < e.count) {
                return Err(lacks(what, id, to, from));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::*;

    fn extent(first: u32, lower_first: u32, count: u32) -> UidGidExtent {
        UidGidExtent { first, lower_first, count }
    }

    fn entry(users: &[UidGidExtent]) -> Option<UsernsEntry> {
        Some(UsernsEntry { uid_map: users.to_vec(), gid_map: vec![extent(0, 900_000, 10)] })
    }

    #[test]
    fn owners_stay_who_they_were_inside() {
        let (old, new) =
            (entry(&[extent(0, 100_000, 1000)]), entry(&[extent(0, 500_000, 8), extent(8, 7000, 50)]));
        let owners = Owners::between(old.clone(), new.clone());
        assert_eq!((owners.user(100_007).unwrap(), owners.user(100_009).unwrap()), (500_007, 7001));
        assert_eq!(owners.group(900_003).unwrap(), 900_003);
        let error = owners.user(100_100).unwrap_err().to_string();
        assert!(error.contains("no user 100 ") && error.contains("0:500000:8,8:7000:50"), "{error}");
        assert!(error.contains("0:100000:1000"), "{error}");
        // Nobody inside stays nobody, and becomes nobody else.
        assert_eq!(owners.user(0).unwrap(), 0);
        assert!(owners.user(7040).unwrap_err().to_string().contains("would be 48"));
        // To no mappings at all, from none, and the same.
        assert_eq!(Owners::between(old.clone(), None).user(100_007).unwrap(), 7);
        assert_eq!(Owners::between(None, new).user(9).unwrap(), 7001);
        assert_eq!(Owners::between(old.clone(), old).user(5).unwrap(), 5);
    }

    #[test]
    fn attributes_have_ids_too() {
        let owners = Owners::between(None, entry(&[extent(0, 100_000, 1000)]));
        let mut list = [
            2_u32.to_le_bytes(),
            [2, 0, 7, 0],
            5_u32.to_le_bytes(),
            [8, 0, 7, 0],
            6_u32.to_le_bytes(),
            [4, 0, 7, 0],
            [0xff; 4],
        ]
        .concat();
        owners.attribute(c"system.posix_acl_access", &mut list).unwrap();
        assert_eq!(list[8..12], 100_005_u32.to_le_bytes());
        assert_eq!(list[16..20], 900_006_u32.to_le_bytes());
        assert_eq!(list[24..], [0xff; 4]);
        let mut file = [0; 24];
        file[3] = 3;
        owners.attribute(c"security.capability", &mut file).unwrap();
        assert_eq!(file[20..], 100_000_u32.to_le_bytes());
        owners.attribute(c"user.some", &mut [1, 2, 3]).unwrap();
        owners.attribute(c"system.posix_acl_access", &mut [1, 2]).unwrap();
    }

    fn model(uid: u32, extents: &[UidGidExtent]) -> Model {
        let creds = CredsEntry { uid, ..CredsEntry::default() };
        let thread = ThreadCoreEntry { creds: Some(creds), ..ThreadCoreEntry::default() };
        let ids = |user| TaskKobjIdsEntry { user_ns_id: Some(user), ..TaskKobjIdsEntry::default() };
        let process = |pid| PstreeEntry { pid, threads: vec![pid], ..PstreeEntry::default() };
        Model {
            pstree: vec![process(1), process(5)],
            ids: [(1, ids(6)), (5, ids(21))].into(),
            cores: [(5, CoreEntry { thread_core: Some(thread), ..CoreEntry::default() })].into(),
            userns: [(21, UsernsEntry { uid_map: extents.to_vec(), gid_map: Vec::new() })].into(),
            ..Model::default()
        }
    }

    #[test]
    fn processes_and_namespaces_need_their_ids() {
        let owners = Owners::between(None, entry(&[extent(0, 100_000, 10), extent(10, 500_000, 10)]));
        owners.apply(Cow::Owned(model(3, &[extent(0, 3, 1)]))).unwrap();
        let fails = |uid, extents: &[UidGidExtent]| {
            owners.apply(Cow::Owned(model(uid, extents))).unwrap_err().to_string()
        };
        let error = fails(44, &[]);
        assert!(error.contains("no user 44") && error.contains('5'), "{error}");
        assert!(fails(0, &[extent(0, 0, 30)]).contains("no user 29"));
        // Two lines of the mappings have them, and the kernel wants one.
        assert!(fails(0, &[extent(0, 5, 10)]).contains("0:5:10"));
    }

    #[test]
    fn file_systems_have_owners() {
        let owners = Owners::between(None, entry(&[extent(0, 100_000, 10)]));
        let mut mount = MntEntry {
            fstype: Fstype::Devpts as u32,
            options: "mode=620,gid=5,ptmxmode=666".into(),
            ..MntEntry::default()
        };
        owners.options(&mut mount).unwrap();
        assert_eq!(mount.options, "mode=620,gid=900005,ptmxmode=666");
    }
}
